"""The contracts between the core and its plugins: one small protocol a kind.

Shapes use the legend of :mod:`blt_core.types`: b batch rows, r new byte rows, m patches, n blocks,
B block bytes, k draft bytes, V ids, D widths. Batch rows are ragged; row b uses ``lengths[b]``
places and the rest is padding whose content is unspecified and never read.

Model parts take a cache or None. With a cache the given rows continue it; with None they are the
whole sequence from BOS on. Both must give the same numbers: that is what
:mod:`blt_core.testing` checks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from blt_core.types import (
    Blocks,
    Cost,
    DecoderOutput,
    Draft,
    Draws,
    IdScheme,
    Latents,
    OpenBlock,
    Parameters,
    Passes,
    Patches,
    Round,
    Rows,
    Sampling,
    StateMemory,
)

CacheT = TypeVar("CacheT", bound="Cache")


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


class DecoderCache(Protocol):
    """A decoder remembers two things that grow apart: byte rows, and keys/values of latents."""

    @property
    def rows(self) -> Cache: ...
    @property
    def latents(self) -> Cache: ...


# -- model parts ---------------------------------------------------------------------------------


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
    its own); the patcher returns flag 1 as True for byte 0.
    """

    def new_cache(self, batch: int) -> Cache: ...
    def flags(self, rows: Rows, cache: Cache | None) -> Tensor: ...


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


# -- decoding ------------------------------------------------------------------------------------


class DecodeOps(Protocol):
    """What samplers and drafters may do to a decode state. Lengths and positions count BOS.

    In the arguments below a batch row with ``rows[b] == 0`` (or ``active[b]`` False) takes no part:
    nothing is computed, written or counted for it. Logits of ids that are never output are -inf.
    """

    @property
    def scheme(self) -> IdScheme: ...
    @property
    def lengths(self) -> tuple[int, ...]:
        """Committed and drafted ids of each batch row, BOS included."""
        ...

    @property
    def remaining(self) -> tuple[int, ...]:
        """Bytes that may still be output; 0 for a finished row."""
        ...

    @property
    def fresh(self) -> bool:
        """True until the first true pass: nothing may be drafted yet."""
        ...

    def text(self, row: int, start: int = 0) -> list[int]:
        """The ids of batch row ``row`` from position ``start`` on; position 0 is BOS."""
        ...

    def append(self, ids: Sequence[Sequence[int]]) -> None:
        """Add ids to each row (EngineError for what is no id). Computes nothing."""
        ...

    def rewind(self, lengths: Sequence[int]) -> None:
        """Cut each row back. Computes nothing; never below what is settled (EngineError)."""
        ...

    def next_logits(self, rows: Sequence[int]) -> Tensor:
        """True passes: (b, max(rows), V), the last ``rows[b]`` rows of each batch row.

        One scorer pass over pending bytes, one encoder + global pass if a patch closed, one decoder
        pass. Row j of batch row b predicts the byte at position length - rows[b] + j + 1.
        """
        ...

    def draft_logits(self, rows: Sequence[int]) -> Tensor:
        """Decoder only: as ``next_logits``; bytes with an unknown flag read the newest latent."""
        ...

    def open_block(
        self,
        size: int,
        *,
        start: Literal["aligned", "frontier"],
        closure: Literal["forced", "none"] = "none",
        scored: bool = False,
        active: Sequence[bool] | None = None,
    ) -> OpenBlock:
        """A block of ``size`` bytes whose committed bytes are given and the rest [MASK].

        aligned: from the first byte of the open patch on; frontier (closure none) where fewer than
        two new bytes would fit. frontier: from the next byte on; ``closure`` is of such a start,
        and forced counts the open patch as closed. Bytes with an unknown flag count as part of the
        open patch, unless ``scored`` has a forced block's first pass run the scorer over them: for
        samplers that verify nothing. ``active`` defaults to the unfinished rows. Computes nothing.
        """
        ...

    def denoise(self, block: OpenBlock, active: Sequence[bool] | None = None) -> Tensor:
        """One decoder pass: (b, size, V), each row's prediction of the byte at its own place.

        ``active`` defaults to the batch rows that take part in the block.
        """
        ...

    def attach(self, owner: object, make: Callable[[int], CacheT]) -> CacheT:
        """The cache of ``owner`` for this state, made on first use; rewound and settled with it."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """A way to generate: each round commits at least one id to every unfinished row.

    ``check`` refuses a request that the sampler cannot serve exactly (RequestError), before any
    work. ``round`` appends what it commits and reports it; the engine applies the end rules.
    """

    def check(self, sampling: Sampling) -> None: ...
    def round(self, ops: DecodeOps, sampling: Sampling, draws: Draws) -> Round: ...


@runtime_checkable
class Drafter(Protocol):
    """Proposes up to ``limit[b]`` ids for each batch row (none where it is 0).

    It may append to the state; the caller rewinds it afterwards.
    """

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft: ...


@runtime_checkable
class Verification(Protocol):
    """Decides how many drafted ids stand, and the id that follows them.

    ``logits_brV``: the model's own logits, row j for the id at ``positions[b] + j``; batch row b
    has ``len(draft.ids[b]) + 1`` of them, or none if ``active[b]`` is False.
    """

    def check(self, sampling: Sampling) -> None: ...
    def accept(
        self,
        draft: Draft,
        logits_brV: Tensor,
        positions: Sequence[int],
        active: Sequence[bool],
        sampling: Sampling,
        draws: Draws,
    ) -> tuple[list[int], list[int]]:
        """(accepted ids of each row, the id after them); 0 and -1 for inactive rows."""
        ...


@runtime_checkable
class Unmasking(Protocol):
    """Which masked rows of a block to fill now: (b, B) bool, at least one where any is masked.

    ``probs_bBV``: each row's distribution; ``masked_bB``: the rows still to fill.
    """

    def select(self, probs_bBV: Tensor, masked_bB: Tensor) -> Tensor: ...


@runtime_checkable
class CostModel(Protocol):
    """Prices counted passes; ``GB`` is 1e9 bytes."""

    def cost(self, passes: Passes, parameters: Parameters) -> Cost: ...


# -- files and training --------------------------------------------------------------------------


@runtime_checkable
class CheckpointFormat(Protocol):
    """Reads and writes trained models.

    ``recognises`` says whether such a checkpoint is at a location, by what is there: all formats
    are asked, and one alone may say yes. ``NAME:…`` is for the format of that name.

    ``read`` gives the config table that rebuilds the model and a mapping from parameter name
    (``decoder.layers.0.…``: dotted config path + name within the module) to tensor, best one that
    reads a tensor when it is asked for (:class:`blt_core.storage.safetensors.LazyTensors`).
    ``write`` is given the table with every key, and must leave either the old state or the new one,
    never half of each.
    """

    def recognises(self, location: str) -> bool: ...
    def read(self, location: str) -> tuple[dict[str, Any], Mapping[str, Tensor]]: ...
    def write(
        self, location: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None: ...


class Documents(Protocol):
    """Texts in a fixed order, each read when it is asked for.

    sizes: int64 (documents,), the bytes of each, none of them 0. digest: names the contents and
    their order. ``source``: where a document is from, for messages and for what is made of it.
    Reading raises DataError, which names the file, where it cannot be read or has changed.
    """

    sizes: npt.NDArray[np.int64]
    digest: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> bytes: ...
    def source(self, index: int) -> str: ...


@runtime_checkable
class WeightedDocuments(Documents, Protocol):
    """Documents that a pass reads more than once, or of which it reads a part.

    weights: (documents, passes over them in one pass of the whole) of consecutive runs.
    """

    weights: Sequence[tuple[int, float]]


@runtime_checkable
class PatchedDocuments(Documents, Protocol):
    """Documents whose patches are known.

    patching: what the patches depend on, None if they are not known after all. ``opens``: bool
    (bytes + 1,), for each byte and EOS, whether it opens a patch.
    """

    patching: Mapping[str, Any] | None

    def opens(self, index: int) -> npt.NDArray[np.bool_]: ...


@runtime_checkable
class Corpus(Protocol):
    """Documents to train on; ``split`` is "train" or "valid"."""

    def documents(self, split: Literal["train", "valid"]) -> Documents: ...


#: A target that is not scored: padding.
UNSCORED = -100


@runtime_checkable
class Objective(Protocol):
    """A loss over a batch of clean rows, with the figures it wants logged.

    ``loss`` (nats a byte) is a mean over the rows whose target (b, r) is not UNSCORED. ``model`` is
    a :class:`blt_core.model.Model`; place i of ``flags_br`` is flag i + 1. Random choices are drawn
    from ``rng`` alone, a generator of the CPU on every device, which is seeded anew for each step.

    Figures are numbers by name, the same names for every batch; those of the run's own
    (``blt_plugins.training.objectives.figures.RESERVED``) are refused. An attribute ``block_bytes``
    (optional) is the size of the blocks that it trains a decoder on, which the checkpoint then
    tells.
    """

    def loss(
        self,
        model: Any,
        rows: Rows,
        flags_br: Tensor,
        targets_br: Tensor,
        rng: torch.Generator,
    ) -> tuple[Tensor, dict[str, float]]: ...


@runtime_checkable
class TrainingBackend(Protocol):
    """Runs optimizer steps on a module: in one process, data-parallel or sharded.

    A run of several processes makes every call in each of them, in the same order. ``rank`` and
    ``world_size`` are known from the start; a process group is there from ``start`` to ``close``.
    """

    rank: int
    world_size: int

    def start(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        *,
        clip: float,
        accumulate: int,
    ) -> nn.Module:
        """Begin to train ``module``; returns what to call in its place.

        AdamW on ``groups`` (dicts of "params" and "weight_decay"), gradients clipped to the norm
        ``clip``. A step is a ``backward`` of ``accumulate`` passes in each process, then ``step``.
        A later start lets the former module go.
        """
        ...

    def backward(self, losses: Iterable[Callable[[], Tensor]]) -> None:
        """Run a step's passes and add their gradients; the mean over passes and processes counts.

        Each function calls what ``start`` gave and returns the loss of one pass. The iterable is
        read in this thread, as passes begin; a backend may call several functions at once, in
        threads, where each draws from a generator of its own.
        """
        ...

    def step(self, learning_rate: float) -> float:
        """Apply the accumulated gradients; returns their norm before clipping."""
        ...

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over the processes, the same in all of them; also a barrier."""
        ...

    def whole(self) -> AbstractContextManager[None]:
        """Within it the parts of the module can be called themselves, for scores; no training."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The module's ``state_dict`` in full in process 0, on the CPU; empty in the others."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and optimizer into an existing folder, for ``load``."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote, perhaps in another number of processes.

        Raises CheckpointError, which says what to do instead, where that is not possible.
        """
        ...

    def close(self) -> None:
        """Let the module and the process group go."""
        ...


@runtime_checkable
class MemoryPlanner(Protocol):
    """An optional ability of a training backend: to say what it keeps, for ``blt train --plan``.

    ``memory`` is asked before any ``start``, about a module whose parameters hold no data, and for
    any number of processes, whatever ``world_size`` the backend itself has. accumulate: as in
    ``start``, the passes of a step in each process.
    """

    def memory(self, module: nn.Module, *, processes: int, accumulate: int) -> StateMemory: ...


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
