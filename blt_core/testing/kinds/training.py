"""What objectives and training backends promise, held by small runs written out here."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
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


TRAINING_BACKEND = Contracts("training_backend")


class _Net(nn.Module):
    """A small network in float32, the same each time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.hidden = nn.Linear(6, 10)
        self.head = nn.Linear(10, 8)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for each in self.parameters():
                each.copy_(0.5 * torch.randn(each.shape, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        """(n, 8) logits of (n,) ids."""
        found: Tensor = self.head(torch.tanh(self.hidden(self.embed(ids))))
        return found

    def groups(self, decays: Sequence[float] = (0.0, 0.0)) -> list[dict[str, Any]]:
        """Its weights as a run hands them to a backend: linear layers, and the rest."""
        matrices = [self.hidden.weight, self.head.weight]
        rest = [self.embed.weight, self.hidden.bias, self.head.bias]
        return [
            {"params": matrices, "weight_decay": decays[0], "matrices": True},
            {"params": rest, "weight_decay": decays[1], "matrices": False},
        ]


_IDS = torch.arange(8)
_TARGETS = torch.tensor([3, 1, 4, 1, 5, 0, 2, 6])
_CLIP = 0.5


class _Started:
    """A backend that trains a network; closed in the end."""

    def __init__(
        self,
        subject: Subject,
        *,
        accumulate: int = 1,
        clip: float = _CLIP,
        decays: Sequence[float] = (0.0, 0.0),
    ) -> None:
        self.net, self.backend = _Net(), subject.build()
        self.called = self.backend.start(
            self.net, self.net.groups(decays), clip=clip, accumulate=accumulate
        )

    def __enter__(self) -> _Started:  # noqa: PYI034 -- typing.Self is newer than Python 3.10
        return self

    def __exit__(self, *_: object) -> None:
        self.backend.close()

    def loss(self, part: slice = slice(None)) -> Tensor:
        """The loss of some of the examples."""
        return functional.cross_entropy(self.called(_IDS[part]), _TARGETS[part])

    def steps(self, count: int, rate: float = 0.05) -> list[float]:
        """The norms of so many steps."""
        norms = []
        for _ in range(count):
            self.backend.backward([self.loss])
            norms.append(self.backend.step(rate))
        return norms

    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights, as the backend gives them."""
        return {name: each.clone() for name, each in self.backend.weights().items()}


def _norm(parts: Sequence[slice]) -> float:
    """The norm of the mean gradient over passes, by plain autograd."""
    net = _Net()
    losses = [functional.cross_entropy(net(_IDS[part]), _TARGETS[part]) for part in parts]
    torch.stack(losses).mean().backward()
    total = sum(float(each.grad.pow(2).sum()) for each in net.parameters() if each.grad is not None)
    return math.sqrt(total)


@TRAINING_BACKEND.add(
    "starts",
    "`rank` and `world_size` are known from the start; what `start` gives is called as the module.",
)
def _starts(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        for name in ("rank", "world_size"):
            value = getattr(run.backend, name)
            require(type(value) is int and value >= 0, f"{name} is {value!r}")
        with torch.no_grad(), run.backend.whole():
            found = run.called(_IDS)
        want = _Net()(_IDS)
        require(torch.allclose(found, want, atol=1e-5), "what start gave computes something else")


@TRAINING_BACKEND.add("learns", "Steps make the loss fall.")
def _backend_learns(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        before = float(run.loss().detach())
        run.steps(30)
        after = float(run.loss().detach())
    require(after < 0.7 * before, f"30 steps took the loss from {before:.3g} to {after:.3g}")


@TRAINING_BACKEND.add("norm", "`step` gives the gradients' norm before clipping.")
def _gives_norm(subject: Subject, _: None) -> None:
    with _Started(subject, clip=0.01) as run:
        [norm] = run.steps(1)
    want = _norm([slice(None)])
    require(math.isclose(norm, want, rel_tol=1e-4), f"step gave {norm}; the norm is {want}")


@TRAINING_BACKEND.add(
    "accumulate",
    "The gradient of a step is the mean over its passes.",
)
def _accumulates(subject: Subject, _: None) -> None:
    parts = [slice(0, 3), slice(3, 8)]
    with _Started(subject, accumulate=2) as run:
        run.backend.backward([lambda part=part: run.loss(part) for part in parts])
        norm = run.backend.step(0.05)
    want = _norm(parts)
    require(math.isclose(norm, want, rel_tol=1e-4), f"its norm is {norm}; the mean's is {want}")


@TRAINING_BACKEND.add("rate", "A step of rate 0 changes no weight: gradients are used once.")
def _rate(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        before = run.weights()
        norms = run.steps(1, rate=0.0)
        after = run.weights()
        same = all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)
        require(same, "a step of learning rate 0 changed weights")
        norms += run.steps(1, rate=0.0)
    require(
        math.isclose(norms[0], norms[1], rel_tol=1e-5),
        "gradients of one step are in the next one too",
    )


@TRAINING_BACKEND.add(
    "groups",
    "A group of weights is drawn to 0 by its own `weight_decay`, and by no other's.",
)
def _decays(subject: Subject, _: None) -> None:
    def stepped(decays: Sequence[float]) -> dict[str, Tensor]:
        """The weights after a first step: its gradient is the same whatever the decay."""
        with _Started(subject, decays=decays) as run:
            run.steps(1)
            return run.weights()

    plain, both = stepped((0.0, 0.0)), {"hidden.weight", "head.weight"}
    for decays, drawn in (((0.5, 0.0), both), ((0.0, 0.5), plain.keys() - both)):
        found = stepped(decays)
        for name, without in plain.items():
            decay = 0.5 if name in drawn else 0.0
            if not decay and not torch.allclose(found[name], without, atol=1e-6):
                raise Broken(f"{name} decays; its group has weight_decay 0, the other one 0.5")
            if decay and not float(found[name].norm()) < float(without.norm()) * (1 - 1e-4):
                raise Broken(f"{name} does not decay; its group has weight_decay 0.5, the other 0")


@TRAINING_BACKEND.add("weights", "`weights` gives the module's `state_dict`, in full, on the CPU.")
def _gives_weights(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        found, want = run.weights(), _Net().state_dict()
    require(found.keys() == want.keys(), f"it names {sorted(found)}; expected {sorted(want)}")
    for name, tensor in want.items():
        require(
            found[name].device.type == "cpu" and torch.allclose(found[name], tensor, atol=1e-6),
            f"{name} is not what the module holds",
        )


@TRAINING_BACKEND.add("averages", "`mean` of one process gives the values themselves.")
def _averages(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        if run.backend.world_size == 1:
            found = run.backend.mean([1.5, -2.0, 0.0])
            require(found == [1.5, -2.0, 0.0], f"mean([1.5, -2.0, 0.0]) gave {found!r}")


@TRAINING_BACKEND.add(
    "resumes",
    "What `save` has written `load` goes on from, as if the run had never stopped.",
)
def _resumes(subject: Subject, _: None) -> None:
    with tempfile.TemporaryDirectory(prefix="blt-") as name:
        folder = Path(name) / "state"
        folder.mkdir()
        with _Started(subject) as run:
            run.steps(3)
            run.backend.save(folder)
            run.steps(3)
            want = run.weights()
        with _Started(subject) as run:
            run.backend.load(folder)
            run.steps(3)
            found = run.weights()
    for key, tensor in want.items():
        require(
            torch.allclose(found[key], tensor, atol=1e-6),
            f"{key} is another one than without the interruption",
        )


@TRAINING_BACKEND.add("again", "A later `start` lets the former module go and trains the new one.")
def _again(subject: Subject, _: None) -> None:
    with _Started(subject) as run:
        run.steps(2)
        net = _Net()
        run.called = run.backend.start(net, net.groups(), clip=_CLIP, accumulate=1)
        run.steps(2)
        found, start = run.weights(), _Net().state_dict()
        own = {name: each.detach().clone() for name, each in net.state_dict().items()}
    moved = any(not torch.equal(own[name], start[name]) for name in start)
    require(moved, "after a second start the new module is not trained")
    same = all(torch.allclose(found[name], own[name], atol=1e-6) for name in start)
    require(same, "after a second start `weights` gives another module's")
