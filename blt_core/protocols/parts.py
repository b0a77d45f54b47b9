"""The parts of a model, and what they remember."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from blt_core.types import Blocks, DecoderOutput, Latents, Patches, Rows


CacheT = TypeVar("CacheT", bound="Cache")

#: The kinds that make up a model, in the order of the data flow; checkpoints store their tables.
MODEL_KINDS = ("patcher", "encoder", "global_model", "decoder")


@runtime_checkable
class Cache(Protocol):
    """What a part remembers about the rows it has read, for each row of a batch.

    ``lengths[b]`` rows are remembered. ``rewind`` forgets all after the given lengths (a longer
    length than is stored leaves a row as it is). ``settle`` promises that no later rewind goes
    below the given lengths, so that windows and recurrent states may drop what lies behind.
    """

    @property
    def lengths(self) -> Sequence[int]: ...
    def rewind(self, lengths: Sequence[int]) -> None: ...
    def settle(self, lengths: Sequence[int]) -> None: ...


@runtime_checkable
class ReorderingCache(Cache, Protocol):
    """A cache that can copy what it remembers of one batch row to others.

    ``reorder``: batch row b becomes a copy of what row ``rows[b]`` was; there may be more or fewer
    of them than before. With it, texts that begin alike are read once.
    """

    def reorder(self, rows: Sequence[int]) -> None: ...


def can_reorder(cache: object) -> bool:
    """Whether a cache, with those inside of it, is a :class:`ReorderingCache`.

    One that holds others says so by an attribute ``reorders``.
    """
    return isinstance(cache, ReorderingCache) and bool(getattr(cache, "reorders", True))


class DecoderCache(Protocol):
    """A decoder remembers two things that grow apart: byte rows, and keys/values of latents."""

    @property
    def rows(self) -> Cache: ...
    @property
    def latents(self) -> Cache: ...


@runtime_checkable
class ByteScorer(Protocol):
    """A small byte language model. ``logits`` (b, r, V): row i predicts byte i + 1."""

    def new_cache(self, batch: int) -> Cache: ...
    def logits(self, rows: Rows, cache: Cache | None) -> Tensor: ...


@runtime_checkable
class Patcher(Protocol):
    """Splits bytes into patches, looking only at the past (BLT, section 2.3).

    ``flags`` (b, r) bool: for each new byte i, flag i + 1: does the next, unseen byte open a patch?
    So flag i is a function of bytes before i. Flag 0 and flag 1 are always set (BOS is a patch of
    its own); the patcher returns flag 1 as True for byte 0. The engine reads them on the host: with
    a cache they may be on the CPU, whatever the device of ``rows``.
    """

    def new_cache(self, batch: int) -> Cache: ...
    def flags(self, rows: Rows, cache: Cache | None) -> Tensor: ...


@runtime_checkable
class ThresholdPatcher(Patcher, Protocol):
    """A patcher whose threshold can be calibrated, and whose scorer can be trained.

    ``entropies`` (b, r), nats: place i is that of the prediction of byte i + 1, which opens a patch
    if it exceeds ``threshold``, or if the open patch has ``max_patch_bytes`` bytes.
    """

    threshold: float
    max_patch_bytes: int | None
    byte_scorer: ByteScorer

    def entropies(self, rows: Rows, cache: Any = None) -> Tensor: ...


@runtime_checkable
class Encoder(Protocol):
    """Bytes to patch embeddings (BLT, section 3.2).

    ``byte_states`` (b, r, D): causal states of new bytes. ``patch_embeddings`` (b, m, D): each
    patch from the states of its own bytes only; ``patches`` index into the rows of ``states_brD``.
    An attribute ``table_parameters`` (optional) counts look-up tables, whose weights are not
    streamed.
    """

    def new_cache(self, batch: int) -> Cache: ...
    def byte_states(self, rows: Rows, cache: Cache | None) -> Tensor: ...
    def patch_embeddings(self, states_brD: Tensor, patches: Patches) -> Tensor: ...


@runtime_checkable
class GlobalModel(Protocol):
    """The causal transformer over patches: embeddings of new patches to latents (b, m, D)."""

    def new_cache(self, batch: int) -> Cache: ...
    def forward(self, embeddings: Latents, cache: Cache | None) -> Tensor: ...


@runtime_checkable
class Decoder(Protocol):
    """Byte rows that read latents, to next-byte logits (BLT, section 3.3; Fast BLT).

    ``forward`` takes new latents (appended to the cache first), new clean rows and blocks, each
    optional. Clean rows are causal among themselves and never see blocks; block rows see the clean
    rows before their start and all of their own block. Blocks are never remembered.

    denoises: has a [MASK] entry and was trained on blocks. reads_byte_states: takes the encoder's
    byte states (``Rows.states_brD``) in place of byte embeddings of its own.
    """

    denoises: bool
    reads_byte_states: bool

    def new_cache(self, batch: int) -> DecoderCache: ...
    def forward(
        self,
        clean: Rows | None,
        blocks: Blocks | None,
        latents: Latents | None,
        cache: DecoderCache | None,
    ) -> DecoderOutput: ...
