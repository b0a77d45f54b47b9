"""Generation: what may be done to a batch of texts, and the parts that decide what is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from blt_core.protocols.parts import CacheT
    from blt_core.types import (
        Cost,
        Draft,
        Draws,
        IdScheme,
        OpenBlock,
        Parameters,
        Passes,
        Round,
        Sampling,
        StopRule,
    )


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
        """Cut each row back. Computes nothing.

        Never below what is settled, nor into a prompt that was read (EngineError).
        """
        ...

    def next_logits(self, rows: Sequence[int]) -> Tensor:
        """True passes: (b, max(rows), V), the last ``rows[b]`` rows of each batch row.

        One scorer pass over pending bytes, one encoder + global pass if a patch closed, one decoder
        pass. Row j of batch row b predicts the byte at position length - rows[b] + j + 1. Raises
        EngineError for rows before the settled patch; that which a prompt ends in settles with the
        pass that reads it.
        """
        ...

    def draft_logits(self, rows: Sequence[int]) -> Tensor:
        """Decoder only: as ``next_logits``; bytes with an unknown flag read the newest latent."""
        ...

    def draft(self, limits: Sequence[int], sampling: Sampling, draws: Draws) -> list[list[int]]:
        """At most ``limits[b]`` ids that the decoder alone appends to each row, which it returns.

        A pass of ``draft_logits`` for each, drawn as ``sampling`` and ``draws`` say; a row ends at
        EOS. This default is the meaning: operations may choose the same ids in other ways, and
        those around others that have their own ``draft_logits`` take it over
        (``draft = DecodeOps.draft``).
        """
        ids: list[list[int]] = [[] for _ in limits]
        left = list(limits)
        while any(left):
            rows = [int(most > 0) for most in left]
            new = sampling.picks(self.draft_logits(rows), self.lengths, rows, draws)
            self.append(new)
            for row, token in enumerate(new):
                ids[row].extend(token)
                left[row] = 0 if token in ([], [self.scheme.eos]) else left[row] - 1
        return ids

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

    def charge(self, passes: Sequence[Passes], call: Passes) -> None:
        """Count passes of another model: ``passes[b]`` for batch row b, ``call`` for the batch."""
        ...

    def attach(self, owner: object, make: Callable[[int], CacheT]) -> CacheT:
        """The cache of ``owner`` for this state, made on first use; rewound and settled with it."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """A way to generate: each round commits at least one id to every unfinished row.

    ``check`` refuses a request that the sampler cannot serve exactly (RequestError), before any
    work. ``round`` appends what it commits and reports it; the engine applies the end rules. An
    attribute ``true_logits`` (optional) says that the last ``next_logits`` of each round predicted
    all that it commits: then log-probabilities can be told. One ``in_law`` says that above
    temperature 0 it draws from ``ar``'s distribution with other draws than ``ar``.
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
class StoppingDrafter(Drafter, Protocol):
    """A drafter that ends a row's draft where a rule says so (the ability ``stops_early``).

    It asks the rule about every id with the distribution that the id is drawn from, in the order of
    the text, and runs no pass for a row that has ended.
    """

    def draft(
        self,
        ops: DecodeOps,
        limit: Sequence[int],
        sampling: Sampling,
        draws: Draws,
        rule: StopRule | None = None,
    ) -> Draft: ...


@runtime_checkable
class Verification(Protocol):
    """Decides how many drafted ids stand, and the id that follows them.

    ``logits_brV``: the model's own logits, row j for the id at ``positions[b] + j``; batch row b
    has ``len(draft.ids[b]) + 1`` of them, or none if ``active[b]`` is False. An attribute
    ``draws_of_round`` (optional) that is true asks for draws of the round, for the drafter too. One
    that is equal to ``ar`` in law may also have ``law(ids, q_kV, p_jV) -> AcceptanceLaw``, what
    ``accept`` draws from as a function of a draft's ids, what they were drawn from, and the model's
    k + 1 distributions: then the law is not counted but summed up exactly.
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

    ``probs_bBV``: each row's distribution; ``masked_bB``: the rows still to fill. ``starts[b]``:
    position of a block's first byte. What a rule leaves to chance it takes from ``draws``, at the
    positions of the bytes and on a stream from FREE_STREAM on, so that a text does not depend on
    its batch. The ability "in_order" says that no byte is filled later than one on its right: a
    draft so filled has a q.
    """

    def select(
        self, probs_bBV: Tensor, masked_bB: Tensor, starts: Sequence[int], draws: Draws
    ) -> Tensor: ...


@runtime_checkable
class CostModel(Protocol):
    """Prices counted passes, in GB of weight traffic (1e9 bytes) or in a unit of its own."""

    def cost(self, passes: Passes, parameters: Parameters) -> Cost: ...
