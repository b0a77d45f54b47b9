"""The tutorials work as they are printed: their files, their commands, and what these show.

A page is read from top to bottom, in a folder of its own. A ``python`` or ``toml`` block is the
file that its first line, or ``title="…"`` in its fence, names. ``pyproject.toml`` installs the
plugin. A ``diff`` block changes the module for the ``console`` blocks up to the next ``diff``. Of
the output of a command ``…`` stands for any lines; times are not compared, and decimals to 5 %.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import attrs
import pytest
import structlog
import tomli
from hypothesis import strategies as st

from blt_core.cli.app import run
from blt_core.plugins.loading import _load_default, load_plugins
from blt_core.testing import contracts, kit
from blt_core.testing.kinds import texts
from tests.nightly import NIGHTLY

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
PAGES = sorted(TUTORIALS.glob("*.md"))
KINDS = list(load_plugins().manifest.kinds)
LINES = 155
#: The decoder has two caches, so its component is longer than others.
LONGER = {"decoder": 175}
#: Languages of files; others than these, ``diff`` and ``console`` are not run.
FILES = ("python", "toml", "json")
ELIDED = "…"
#: How hard whole components are tried; a nightly run does as ``--profile dev`` does.
QUICK = contracts.Profile(2)
QUICK_DRAWS = 500


@attrs.frozen
class Block:
    """A fenced block: its language, the title in its fence, its text."""

    language: str
    title: str
    text: str

    @property
    def file(self) -> str:
        """The file that it is."""
        found = re.match(r"# ([\w.]+\.\w+)", self.text)
        name = self.title or (found[1] if found else "")
        assert name, f"a {self.language} block names no file:\n{self.text}"
        return name


def blocks_of(text: str) -> list[Block]:
    found = re.findall(
        r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text, re.DOTALL | re.MULTILINE
    )
    return [Block(*each) for each in found]


def changed(source: str, diff: str) -> str:
    """A file with the lines of a diff replaced; they stand in it once."""
    lines = diff.splitlines()
    before = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
    after = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
    assert source.count(before) == 1, f"stands in the file {source.count(before)} times:\n{before}"
    return source.replace(before, after)


def on_page(contract: contracts.Contract, expected: str) -> contracts.Contract:
    """A contract that is tried on the example that a page shows, where that can be read.

    That no smaller one breaks it is searched for in a nightly run: most of the time goes into that.
    """
    of_it = expected.partition(f"BROKEN {contract.name} ")[2].partition("BROKEN ")[0]
    example = re.search(r"^ +smallest example: (.+)$", of_it, re.MULTILINE)
    try:
        ast.literal_eval(example[1] if example else "-")
    except (ValueError, SyntaxError):
        return contract
    made = st.builds(lambda: ast.literal_eval(example[1]))
    return attrs.evolve(contract, examples=lambda _: made)


class Reader:
    """Follows a page in the folder that it is in."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, *, quick: bool = False) -> None:
        self.folder, self.patch, self.quick = folder, patch, quick
        self.module, self.source = "", ""

    def write(self, block: Block) -> None:
        (self.folder / block.file).write_text(block.text, encoding="utf-8")
        if block.file == "pyproject.toml":
            self._install(tomli.loads(block.text)["project"])
        elif block.language == "python" and not self.module:
            self.module, self.source = block.file.removesuffix(".py"), block.text
            self.renew()

    def _install(self, project: dict) -> None:
        name, version = project["name"], project["version"]
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        points = project["entry-points"]["blt_core"].items()
        lines = "".join(f"{point} = {module}\n" for point, module in points)
        (info / "entry_points.txt").write_text(f"[blt_core]\n{lines}")
        self.renew()

    def change(self, diff: str) -> None:
        (self.folder / f"{self.module}.py").write_text(changed(self.source, diff), encoding="utf-8")
        self.renew()

    def renew(self) -> None:
        """Forget what was imported, as a new process has."""
        sys.modules.pop(self.module, None)
        importlib.invalidate_caches()
        _load_default.cache_clear()

    def call(self, command: str, expected: str) -> str:
        """What a command prints, stdout and stderr in their order."""
        program, *arguments = shlex.split(command)
        shown = re.findall(r"^BROKEN (\S+)", expected, re.MULTILINE)
        printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
        with self.patch.context() as patch:
            patch.setattr(sys, "stdout", printed)
            patch.setattr(sys, "stderr", printed)
            if shown:  # of a broken component only the contracts that the page shows
                every, at_once = kit.contracts_of, expected if self.quick else ""
                patch.setattr(
                    kit,
                    "contracts_of",
                    lambda *a: [on_page(c, at_once) for c in every(*a) if c.name in shown],
                )
            elif self.quick:
                patch.setitem(contracts.PROFILES, "dev", QUICK)
                patch.setattr(texts, "LAW_DRAWS", QUICK_DRAWS)
            if program == "blt":
                run(arguments)
            elif program == "python":
                runpy.run_path(arguments[0])
            else:
                assert program == "cat", command
                printed.write(Path(arguments[0]).read_text(encoding="utf-8"))
        structlog.reset_defaults()  # it logs to a stderr that is gone now
        output = printed.buffer.getvalue().decode(errors="replace")
        # A terminal shows what is said of an output on a line of its own.
        return re.sub(r"(?<!\n)(\[\d+ bytes, )", r"\n\1", output)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = Reader(tmp_path, monkeypatch, quick=not NIGHTLY)
    yield found
    found.renew()


#: What differs from run to run, or from machine to machine.
TIMES = (
    *(r"\d\d:\d\d:\d\d", r"\d+\.\d+ s\b", r"[\d,.]+ ?k?(?:B|bytes)/s"),
    *(r"left \d+:\d\d:\d\d", r"\d+(?= +(?:yes|no) +[\d.]+%)"),  # the last: of blt evaluate's table
)
DECIMAL = r"\d+\.\d+(?:e[+-]\d+)?"


def without_times(text: str) -> list[str]:
    text = re.sub("|".join(TIMES), "(time)", text)
    return [re.sub(r" +", " ", line.rstrip()) for line in text.strip("\n").splitlines()]


def same(shown: str, line: str) -> bool:
    """Whether two lines are alike but for the last digits of decimals."""
    if re.sub(DECIMAL, "#", shown) != re.sub(DECIMAL, "#", line):
        return False
    pairs = zip(re.findall(DECIMAL, shown), re.findall(DECIMAL, line), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=0.05) for a, b in pairs)


def fits(shown: list[str], printed: list[str]) -> bool:
    """Whether lines are what a page shows, where ``…`` is any number of lines."""
    if not shown:
        return not printed
    if shown[0].strip() == ELIDED:
        return any(fits(shown[1:], printed[at:]) for at in range(len(printed) + 1))
    return bool(printed) and same(shown[0], printed[0]) and fits(shown[1:], printed[1:])


def commands_of(text: str) -> list[tuple[str, str]]:
    """(command, output) of a console block; a line that ends in a backslash goes on."""
    parts = re.split(r"^\$ ", text.replace("\\\n", ""), flags=re.MULTILINE)
    assert not parts[0], f"output before the first command: {parts[0]}"
    return [part.partition("\n")[::2] for part in parts[1:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_tutorial_works_as_it_is_printed(page, reader):
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    assert {"python", "toml", "console"} <= {block.language for block in blocks}
    for block in blocks:
        if block.language in FILES:
            reader.write(block)
        elif block.language == "diff":
            reader.change(block.text)
        elif block.language == "console":
            for command, expected in commands_of(block.text):
                printed = reader.call(command, expected)
                assert fits(without_times(expected), without_times(printed)), printed


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_tutorial(kind):
    text = (TUTORIALS / f"{kind}.md").read_text(encoding="utf-8")
    assert f"(../kinds/{kind}.md" in text
    console = "".join(b.text for b in blocks_of(text) if b.language == "console")
    assert re.search(
        rf"^{kind} 'acme/[\w-]+'.*: \d+ contracts hold, 0 are broken", console, re.MULTILINE
    )
    assert len(set(re.findall(rf"^BROKEN {kind}\.\S+", console, re.MULTILINE))) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_tutorial_is_short_and_uses_public_names(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGER.get(page.stem, LINES)
    imported = re.findall(r"^\s*(?:from|import) ([\w.]+)(?: import (.+))?$", text, re.MULTILINE)
    for module, names in imported:
        assert not module.startswith("blt_plugins"), module
        assert not re.search(r"(^|\W)_", names), names


def test_what_a_page_shows_is_compared():
    assert fits(["a 0.1 s", ELIDED, "z"], ["a 0.1 s", "b", "z"])
    assert not fits(["a", ELIDED, "z"], ["a", "b"])
    assert not fits(["a"], ["a", "b"])
    assert without_times("ok  x  0.1 s") == without_times("ok  x  12.5 s")
    assert same("loss 5.01 of 7", "loss 5.02 of 7")
    assert not same("loss 5.01 of 7", "loss 5.02 of 8")
    assert not same("loss 5.0", "loss 6.0")
    assert changed("a\nb\n", "-b\n+c\n") == "a\nc\n"
