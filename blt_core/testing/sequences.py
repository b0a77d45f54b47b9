"""Driving a model's part over texts: whole or in pieces, alone or in a batch, rewound or not.

Each kind of part gets its inputs in a form of its own; here a text is a list of ids, and whatever a
part is given for it follows from the ids alone. So the contracts of all parts are written once.

Axes: b batch rows, r rows of a pass, m patches, D widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from blt_core.model import Model
from blt_core.testing.contracts import Broken
from blt_core.types import Blocks, Latents, Patches, Rows

TOLERANCE = 1e-8
#: What padding is filled with: a part that reads it is found out.
JUNK_ID = 77
JUNK = 1e3


class Driven(Protocol):
    """One kind of part, driven over texts."""

    def new_cache(self, batch: int) -> Any:
        """A cache of the part."""
        ...

    def caches(self, cache: Any) -> list[tuple[Any, Callable[[Sequence[int]], int]]]:
        """Each cache that it has, with how many rows it holds after some ids of a text."""
        ...

    def read(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int], cache: Any
    ) -> list[Tensor]:
        """What the part gives for ids ``begins[b]`` to the end of each text: (n, …) each."""
        ...


def _padded(rows: Sequence[Sequence[int]], junk: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[junk] * (width - len(row))] for row in rows])


def _stacked(rows: Sequence[Tensor], width: int) -> Tensor:
    """(b, n, D) of rows (n, D), padded with JUNK."""
    longest = max(len(row) for row in rows)
    out = torch.full((len(rows), longest, width), JUNK, dtype=torch.float64)
    for place, row in enumerate(rows):
        out[place, : len(row)] = row
    return out


def vectors(ids: Sequence[int], width: int, salt: int = 0) -> Tensor:
    """(n, D): a vector for each id, the same each time."""
    rows = [torch.empty(0, width, dtype=torch.float64)]
    for token in ids:
        generator = torch.Generator().manual_seed(token + 1000 * salt)
        rows.append(torch.randn(1, width, generator=generator, dtype=torch.float64))
    return torch.cat(rows)


def opened(text: Sequence[int]) -> list[bool]:
    """Flags 1 to n of a text, as some patcher might set them: a function of the ids before."""
    return [i == 0 or (token * 7 + i) % 3 == 0 for i, token in enumerate(text)]


def checked(
    given: object, shape: tuple[int, ...], counts: Sequence[int], dtypes: Callable[[Any], bool]
) -> list[Tensor]:
    """The rows (n, …) of what a part gave; Broken unless it is a tensor of this shape."""
    if not isinstance(given, Tensor):
        raise Broken(f"gave {type(given).__name__}; expected a tensor of shape {shape}")
    if tuple(given.shape[: len(shape)]) != shape:
        raise Broken(f"gave shape {tuple(given.shape)}; expected {shape}")
    if not dtypes(given.dtype):
        raise Broken(f"gave {given.dtype}")
    return [row[:count] for row, count in zip(given, counts, strict=True)]


def _is_bool(dtype: torch.dtype) -> bool:
    return dtype == torch.bool


def _is_double(dtype: torch.dtype) -> bool:
    return dtype == torch.float64


@attrs.frozen
class _ByteRows:
    """Parts that read ids."""

    model: Model
    kind: str

    def _part(self) -> Any:
        raise NotImplementedError

    def new_cache(self, batch: int) -> Any:
        """The part's own."""
        return self._part().new_cache(batch)

    def caches(self, cache: Any) -> list[tuple[Any, Callable[[Sequence[int]], int]]]:
        """One, with a row for each id."""
        return [(cache, len)]

    def read(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int], cache: Any
    ) -> list[Tensor]:
        """Ids in, whatever the part gives out."""
        new = [text[begin:] for text, begin in zip(texts, begins, strict=True)]
        rows = Rows(_padded(new, JUNK_ID), tuple(map(len, new)))
        before = rows.ids_br.clone()
        found = self._run(rows, cache)
        if not torch.equal(rows.ids_br, before):
            raise Broken("wrote to the ids that it was given", f"{self.kind}.arguments")
        return found

    def _run(self, rows: Rows, cache: Any) -> list[Tensor]:
        raise NotImplementedError


@attrs.frozen
class PatcherRows(_ByteRows):
    """A patcher: flags."""

    def _part(self) -> Any:
        return self.model.patcher

    def _run(self, rows: Rows, cache: Any) -> list[Tensor]:
        flags = self.model.patcher.flags(rows, cache)
        return checked(flags, tuple(rows.ids_br.shape), rows.lengths, _is_bool)


@attrs.frozen
class ScorerRows(_ByteRows):
    """A byte scorer: logits."""

    def _part(self) -> Any:
        return self.model.patcher.byte_scorer  # type: ignore[attr-defined]

    def _run(self, rows: Rows, cache: Any) -> list[Tensor]:
        logits = self._part().logits(rows, cache)
        shape = (*rows.ids_br.shape, self.model.scheme.size)
        return checked(logits, shape, rows.lengths, _is_double)


@attrs.frozen
class EncoderRows(_ByteRows):
    """An encoder: byte states."""

    def _part(self) -> Any:
        return self.model.encoder

    def _run(self, rows: Rows, cache: Any) -> list[Tensor]:
        states = self.model.encoder.byte_states(rows, cache)
        return checked(states, tuple(rows.ids_br.shape), rows.lengths, _is_double)


@attrs.frozen
class GlobalRows:
    """A global model: latents of patches, each of which is made of one id here."""

    model: Model
    width: int

    def new_cache(self, batch: int) -> Any:
        """The part's own."""
        return self.model.global_model.new_cache(batch)

    def caches(self, cache: Any) -> list[tuple[Any, Callable[[Sequence[int]], int]]]:
        """One, with a row for each patch."""
        return [(cache, len)]

    def read(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int], cache: Any
    ) -> list[Tensor]:
        """Embeddings in, latents out."""
        new = [text[begin:] for text, begin in zip(texts, begins, strict=True)]
        values = _stacked([vectors(ids, self.width) for ids in new], self.width)
        before, counts = values.clone(), tuple(map(len, new))
        found = self.model.global_model.forward(Latents(values, counts), cache)
        if not torch.equal(values, before):
            raise Broken("wrote to the embeddings that it was given", "global_model.arguments")
        return checked(found, tuple(values.shape[:2]), counts, _is_double)


@attrs.frozen
class DecoderRows:
    """A decoder: logits of clean rows that read latents, and of blocks."""

    model: Model
    width: int
    state_width: int

    def new_cache(self, batch: int) -> Any:
        """The part's own."""
        return self.model.decoder.new_cache(batch)

    def caches(self, cache: Any) -> list[tuple[Any, Callable[[Sequence[int]], int]]]:
        """Its rows, and the latents of the patches that are closed."""
        return [(cache.rows, len), (cache.latents, lambda text: sum(opened(text)))]

    def latents(self, texts: Sequence[Sequence[int]], begins: Sequence[int]) -> Latents | None:
        """The latents of the patches that the new ids close; each follows from its last id."""
        closing = [
            [text[i] for i in range(begin, len(text)) if opened(text)[i]]
            for text, begin in zip(texts, begins, strict=True)
        ]
        counts = tuple(map(len, closing))
        if not any(counts):
            return None
        values = [vectors(ids, self.width, salt=1) for ids in closing]
        return Latents(_stacked(values, self.width), counts)

    def rows(self, texts: Sequence[Sequence[int]], begins: Sequence[int]) -> Rows:
        """The clean rows of the new ids."""
        new = [text[begin:] for text, begin in zip(texts, begins, strict=True)]
        reads = [
            [sum(opened(text)[: i + 1]) - 1 for i in range(begin, len(text))]
            for text, begin in zip(texts, begins, strict=True)
        ]
        states = None
        if self.model.decoder.reads_byte_states:
            width = self.state_width
            states = _stacked([vectors(ids, width, salt=2) for ids in new], width)
        return Rows(_padded(new, JUNK_ID), tuple(map(len, new)), _padded(reads, 0), states)

    def read(
        self, texts: Sequence[Sequence[int]], begins: Sequence[int], cache: Any
    ) -> list[Tensor]:
        """Ids and latents in, logits out."""
        rows = self.rows(texts, begins)
        given = rows.ids_br.clone()
        output = self.model.decoder.forward(rows, None, self.latents(texts, begins), cache)
        if not torch.equal(rows.ids_br, given):
            raise Broken("wrote to the ids that it was given", "decoder.arguments")
        clean = getattr(output, "clean", None)
        if clean is None or getattr(output, "blocks", None) is not None:
            raise Broken("gave no output for its clean rows, or one for blocks that are not there")
        shape = (*rows.ids_br.shape, self.model.scheme.size)
        return checked(clean.logits, shape, rows.lengths, _is_double)

    def blocks(
        self, text: Sequence[int], block: Sequence[int], *, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """A block after a whole text, without a cache: logits of its rows and the clean ones."""
        last = sum(opened(text)) - 1
        given = Blocks(
            torch.tensor([[list(block)]]),
            torch.tensor([[len(text)]]),
            torch.tensor([[last]]),
            torch.tensor([[True]]) if causal else None,
        )
        latents = self.latents([text], [0])
        output = self.model.decoder.forward(self.rows([text], [0]), given, latents, None)
        if output.clean is None or output.blocks is None:
            raise Broken("gave no output for its clean rows, or none for its blocks")
        shape = (1, 1, len(block), self.model.scheme.size)
        [rows] = checked(output.blocks.logits, shape, [1], _is_double)
        return rows[0], output.clean.logits[0, : len(text)]

    def block_from_cache(self, cache: Any, text: Sequence[int], block: Sequence[int]) -> Tensor:
        """A block after a text that the cache holds: logits of its rows."""
        given = Blocks(
            torch.tensor([[list(block)]]),
            torch.tensor([[len(text)]]),
            torch.tensor([[sum(opened(text)) - 1]]),
        )
        output = self.model.decoder.forward(None, given, None, cache)
        if output.blocks is None:
            raise Broken("gave no output for its blocks")
        logits: Tensor = output.blocks.logits[0, 0]
        return logits


def driven(kind: str, model: Model) -> Driven:
    """The part of this kind of a model, ready to be driven."""
    if kind == "patcher":
        return PatcherRows(model, kind)
    if kind == "byte_scorer":
        return ScorerRows(model, kind)
    if kind == "encoder":
        return EncoderRows(model, kind)
    states = model.encoder.byte_states(Rows(torch.tensor([[model.scheme.bos]]), (1,)), None)
    one = torch.tensor([[0]])
    embedded = model.encoder.patch_embeddings(states, Patches(one, one + 1, (1,)))
    if kind == "global_model":
        return GlobalRows(model, embedded.shape[-1])
    latents = model.global_model.forward(Latents(embedded, (1,)), None)
    return DecoderRows(model, latents.shape[-1], states.shape[-1])


def whole(part: Driven, text: Sequence[int]) -> Tensor:
    """What a part gives for a whole text, without a cache."""
    return part.read([text], [0], None)[0]


def far(one: Tensor, other: Tensor) -> float:
    """How far two results are apart; infinite for what is no number, or differs in shape."""
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    apart = (one.double() - other.double()).abs().max().item()
    return apart if apart == apart else float("inf")  # noqa: PLR0124 -- NaN is unequal to itself


def first_difference(one: Tensor, other: Tensor) -> int | None:
    """The first row in which two results differ; None if they are equal."""
    for place, (a, b) in enumerate(zip(one, other, strict=True)):
        if far(a, b) > TOLERANCE:
            return place
    return None


def garbled(rng: Random, text: Sequence[int], place: int) -> list[int]:
    """``text`` with another byte at ``place``."""
    changed = list(text)
    changed[place] = (changed[place] + 1 + rng.randrange(200)) % 256
    return changed
