"""Draw the training curves of the translation demo, from the tables of its model card.

    python scripts/draw_curves.py        writes docs/images/translation-curves.svg

Left: held-out bits per byte of the first two parts of training, and of the third, whose text is
the English side alone. Right: what blocks and drafts are right about in the third part.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
CARD = ROOT / "plugins/blt_plugins/demo/translate/README.md"
PICTURE = ROOT / "docs/images/translation-curves.svg"


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, less the line below its head."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for table in found
    ]


def number(cell: str) -> float:
    """The first number of a cell."""
    return float(re.sub(r"[^0-9.].*", "", re.sub(r"^[^0-9]*", "", cell).replace(",", "")))


def main() -> None:
    """Read and draw."""
    found = tables(CARD.read_text("utf-8"))
    # The first has its steps in a row, the second in a column.
    first, third = (each for each in found if each[0][0] == "step")
    steps, scores = first[0][1:], [number(cell) for cell in first[2][1:]]
    second = next(n for n, cell in enumerate(steps) if "part" in cell)
    at = [number(cell) for cell in steps[:second]]
    at += [at[-1] + number(cell.partition(":")[2] or cell) for cell in steps[second:]]
    rows = [[number(cell) for cell in row] for row in third[2:]]
    columns = list(zip(*rows, strict=True))

    mpl.rcParams["svg.hashsalt"] = "blt"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasSVG(figure)
    left, right = figure.subplots(1, 2)
    begin = max(at)
    left.plot(at[:second], scores[:second], "o-", ms=3, label="first part")
    left.plot(at[second:], scores[second:], "o-", ms=3, label="second: the rate goes down")
    later = [begin + step for step in columns[0]]
    left.plot(later, columns[1], "o-", ms=3, label="third, with blocks: English alone")
    left.set(xlabel="step", ylabel="held-out bits per byte", ylim=(0, None))
    for name, values in zip(third[0][2:], columns[2:], strict=True):
        label = name.strip("`")
        what = (
            "masked bytes filled in rightly"
            if label.startswith("t =")
            else "drafted bytes accepted"
        )
        right.plot(columns[0], values, "o-", ms=3, label=f"{what}, {label}")
    right.set(xlabel="step of the third part", ylabel="% right, or accepted", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    spare = PICTURE.with_name(f".{PICTURE.name}.new")
    figure.savefig(spare, format="svg", metadata={"Date": None})
    spare.replace(PICTURE)


if __name__ == "__main__":
    main()
