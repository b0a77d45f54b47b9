"""What objectives promise, held by small batches written out here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from blt_core.model import Model
from blt_core.protocols import RESERVED_FIGURES, RESERVED_PREFIXES, UNSCORED
from blt_core.testing.contracts import Broken, Contracts, require, reseed
from blt_core.testing.subject import Subject
from blt_core.types import Rows

OBJECTIVE = Contracts("objective")

ALPHABET = b"ab 1(\n"
_text = st.lists(st.sampled_from(ALPHABET), min_size=4, max_size=24)
batches = st.tuples(st.lists(_text, min_size=1, max_size=3), st.integers(0, 1000))


def _trained(subject: Subject) -> Model:
    """The host model, with weights that can be trained."""
    model = subject.new_model()
    model.module_dict().requires_grad_(requires_grad=True)
    return model


def _batch(
    model: Model, texts: Sequence[Sequence[int]], junk: int = 0
) -> tuple[Rows, Tensor, Tensor]:
    """(rows, flags, targets) of texts, EOS after each; ``junk`` fills what is padding."""
    scheme, width = model.scheme, max(map(len, texts)) + 1
    ids = [[scheme.bos, *text, *[junk] * (width - 1 - len(text))] for text in texts]
    targets = [[*text, scheme.eos, *[UNSCORED] * (width - 1 - len(text))] for text in texts]
    rows = Rows(torch.tensor(ids), tuple(len(text) + 1 for text in texts))
    with torch.no_grad():
        flags = model.patcher.flags(rows, None)
    return rows, flags, torch.tensor(targets)


def _loss(
    subject: Subject, model: Model, texts: Sequence[Sequence[int]], seed: int, junk: int = 0
) -> tuple[Tensor, Mapping[str, float]]:
    found = subject.build().loss(
        model, *_batch(model, texts, junk), torch.Generator().manual_seed(seed)
    )
    if not isinstance(found, tuple) or len(found) != 2:  # noqa: PLR2004 -- a pair
        raise Broken(
            f"loss gave {type(found).__name__}; expected (loss, figures)", "objective.loss"
        )
    return found


@OBJECTIVE.add(
    "loss",
    "It gives (loss, figures): a finite tensor of one number that depends on the weights, and "
    "a dict.",
    lambda _: batches,
    share=0.4,
)
def _gives_loss(subject: Subject, example: Any) -> None:
    texts, seed = example
    loss, figures = _loss(subject, _trained(subject), texts, seed)
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        shown = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise Broken(f"its loss is {shown}; expected a tensor of one number")
    require(loss.requires_grad, "its loss depends on no weight")
    require(bool(loss.isfinite()), f"its loss is {loss.item()}")
    require(isinstance(figures, Mapping), f"its figures are {type(figures).__name__}, no dict")


@OBJECTIVE.add(
    "figures",
    "Figures are finite numbers, the same names for every batch, none of a run's own.",
    lambda _: st.tuples(batches, batches),
    share=0.4,
)
def _figures(subject: Subject, example: Any) -> None:
    model, names = _trained(subject), []
    for texts, seed in example:
        figures = _loss(subject, model, texts, seed)[1]
        names.append(sorted(figures))
        for name, value in figures.items():
            if (
                not isinstance(name, str)
                or name in RESERVED_FIGURES
                or name.startswith(RESERVED_PREFIXES)
            ):
                raise Broken(f"the figure {name!r} has a name of the run's own")
            if not _is_number(value):
                raise Broken(f"the figure {name} is {type(value).__name__}, no number")
            require(math.isfinite(value), f"the figure {name} is {value}")
    require(names[0] == names[1], f"figures differ between batches: {names[0]} and {names[1]}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@OBJECTIVE.add(
    "rng",
    "Random choices come from `rng` alone: the same generator gives the same loss.",
    lambda _: batches,
    share=0.4,
)
def _rng(subject: Subject, example: Any) -> None:
    model, found = _trained(subject), []
    for number in range(2):
        reseed(number)
        found.append(float(_loss(subject, model, *example)[0].detach()))
    require(found[0] == found[1], "another loss in another global random state")


@OBJECTIVE.add(
    "arguments",
    "It does not write to rows, flags or targets.",
    lambda _: batches,
    share=0.4,
)
def _objective_arguments(subject: Subject, example: Any) -> None:
    model = _trained(subject)
    rows, flags, targets = _batch(model, example[0])
    before = [each.clone() for each in (rows.ids_br, flags, targets)]
    subject.build().loss(model, rows, flags, targets, torch.Generator().manual_seed(example[1]))
    for name, one, two in zip(
        ("rows", "flags", "targets"), before, (rows.ids_br, flags, targets), strict=True
    ):
        require(torch.equal(one, two), f"wrote to the {name} that it was given")


@OBJECTIVE.add(
    "padding",
    "Rows whose target is UNSCORED are not scored, and what stands there changes nothing.",
    lambda _: batches,
    share=0.4,
)
def _padding(subject: Subject, example: Any) -> None:
    model = _trained(subject)
    texts = [*example[0], list(b"a" * 30)]  # so that all others are padded
    one, two = (
        float(_loss(subject, model, texts, example[1], junk)[0].detach()) for junk in (0, 77)
    )
    require(math.isclose(one, two, rel_tol=1e-9), "the loss depends on what stands in the padding")


@OBJECTIVE.add(
    "mean",
    "The loss is a mean over the scored rows, in nats a byte: more text does not make it larger, "
    "and each row counts alike, in long texts and short ones.",
)
def _mean(subject: Subject, _: None) -> None:
    model, texts = _trained(subject), [list(b"ab 1(ab 1(")]

    def average(count: int) -> float:
        losses = [
            float(_loss(subject, model, texts * count, seed)[0].detach()) for seed in range(8)
        ]
        return sum(losses) / len(losses)

    one, many = average(1), average(8)
    require(
        many < 3 * one + 1,
        f"the loss of a text is {one:.3g}, that of eight copies of it {many:.3g}",
    )
    _ragged(subject, model)


def _ragged(subject: Subject, model: Model) -> None:
    """Broken unless a batch of a long likely text and short unlikely ones is a mean over rows.

    Each row counts alike: not each text, and no padding. Chance is averaged out over seeds.
    """
    long, short = _text_of(model, 24, likely=True), _text_of(model, 2, likely=False)

    def losses(texts: Sequence[Sequence[int]]) -> list[float]:
        found: list[float] = []
        for seed in range(8):
            found.append(float(_loss(subject, model, texts, seed)[0].detach()))
            if seed == 1 and found[0] == found[1]:  # nothing is left to chance
                break
        return found

    def average(found: list[float]) -> float:
        return sum(found) / len(found)

    alone, together = [losses([each]) for each in (long, short)], losses([long, *[short] * 3])
    one, other, found = average(alone[0]), average(alone[1]), average(together)
    rows = (len(long) + 1, 3 * (len(short) + 1))  # EOS is scored too
    want = (rows[0] * one + rows[1] * other) / sum(rows)
    of_texts = (one + 3 * other) / 4
    certain = all(len({*each}) == 1 for each in (*alone, together))
    slack = 1e-3 * abs(want) if certain else abs(of_texts - want) / 2
    require(
        abs(found - want) <= slack + 1e-9,
        f"a text of {rows[0]} rows has the loss {one:.3g}, one of {rows[1] // 3} rows {other:.3g}; "
        f"the first with three of the others has {found:.3g}, where the mean over rows is "
        f"{want:.3g} (over texts: {of_texts:.3g})",
    )


@torch.no_grad()
def _text_of(model: Model, size: int, *, likely: bool) -> list[int]:
    """A text of the bytes that are likeliest, or unlikeliest, one after another."""
    text: list[int] = []
    for _ in range(size):
        rows, flags, _targets = _batch(model, [[*text, 0]])
        output = model.forward(rows, flags).clean
        if output is None:
            raise Broken("the host's decoder gave no clean rows")
        found = output.logits[0, len(text), :256]
        text.append(int(found.argmax() if likely else found.argmin()))
    return text


@OBJECTIVE.add(
    "stateless",
    "Nothing is kept between calls: a batch gives the same loss after another one.",
    lambda _: st.tuples(batches, batches),
    share=0.4,
)
def _objective_stateless(subject: Subject, example: Any) -> None:
    model, objective = _trained(subject), subject.build()

    def loss(each: Any) -> float:
        texts, seed = each
        generator = torch.Generator().manual_seed(seed)
        return float(objective.loss(model, *_batch(model, texts), generator)[0].detach())

    first, second = loss(example[0]), loss(example[1])
    require(
        (loss(example[1]), loss(example[0])) == (second, first),
        "a batch's loss depends on the batches before it",
    )


@OBJECTIVE.add(
    "learns",
    "A few steps down its gradient make the next bytes of the text likelier.",
)
def _learns(subject: Subject, _: None) -> None:
    model, objective = _trained(subject), subject.build()
    texts = [list(b"ab 1(ab 1(ab 1(ab"), list(b"(1 ba(1 ba(1")]
    batch = _batch(model, texts)
    weights = [each for each in model.module_dict().parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=5e-3)
    before = _next_byte(model, batch)
    for step in range(30):
        loss, _ = objective.loss(model, *batch, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        for weight in weights:
            if weight.grad is not None and not bool(weight.grad.isfinite().all()):
                raise Broken("a gradient is no number")
        optimizer.step()
    after = _next_byte(model, batch)
    require(
        after < 0.9 * before,
        f"after 30 steps the next bytes cost {after:.3g} nats each; before, {before:.3g}",
    )


def _next_byte(model: Model, batch: tuple[Rows, Tensor, Tensor]) -> float:
    """Nats a byte of the scored rows, by the plain definition."""
    rows, flags, targets = batch
    with torch.no_grad():
        output = model.forward(rows, flags).clean
    if output is None:
        raise Broken("the host's decoder gave no clean rows")
    return float(
        functional.cross_entropy(
            output.logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED
        )
    )
