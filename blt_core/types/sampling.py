"""Values that the parts of a byte-latent model and the decode engine hand to each other.

Shape legend (a suffix names the axes): b batch rows, r new byte rows, m patches, n blocks,
B bytes of a block, k draft bytes, V ids, D a width. Rows of a batch are *ragged*: row b uses the
first ``lengths[b]`` of the r places; the rest is padding that nobody reads.

Host values (lengths, positions, counts) are Python integers, so that bookkeeping never waits for
a device; only what a kernel reads is a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs

from blt_core.errors import RequestError

if TYPE_CHECKING:
    # Configs and the command line use these values too, before anything needs torch.
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor


@attrs.frozen
class IdScheme:
    """How bytes and special symbols map to ids: byte v is id ``byte_offset + v``.

    ``size`` is V, the number of ids. ``mask`` is None where a model has no [MASK] entry.
    ``outputs_specials``: whether ids that stand for no byte may be output; they count as bytes
    towards a request's length, are read on, and show as nothing.
    """

    byte_offset: int = 0
    bos: int = 256
    eos: int = 257
    mask: int | None = 258
    size: int = 259
    outputs_specials: bool = False

    def encode(self, data: bytes) -> list[int]:
        """Ids of ``data``, without BOS."""
        return [value + self.byte_offset for value in data]

    def decode(self, ids: Sequence[int]) -> bytes:
        """The bytes among ``ids``; special ids stand for no byte and are left out."""
        first, last = self.byte_offset, self.byte_offset + 256
        return bytes(i - first for i in ids if first <= i < last)

    def is_byte(self, token: int) -> bool:
        """Whether ``token`` stands for a byte."""
        return self.byte_offset <= token < self.byte_offset + 256

    @property
    def never_output(self) -> tuple[int, ...]:
        """Ids that a model may read but must not produce: [MASK], and maybe other specials."""
        if self.outputs_specials:
            return () if self.mask is None else (self.mask,)
        return tuple(i for i in range(self.size) if not self.is_byte(i) and i != self.eos)


@attrs.frozen
class Sampling:
    """How an id is drawn from logits; temperature 0 is greedy (the lowest id wins a tie)."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise RequestError(f"top_k: expected 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise RequestError(f"top_p: expected a number in (0, 1], got {self.top_p}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable id is always taken."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution (..., V) that this setting draws from, in float64 on the CPU.

        The one place where temperature, top-k and top-p are applied, to a model's p and a
        drafter's q alike. Of equal logits the lower id comes first: exactly ``top_k`` ids stay, and
        of these the smallest head whose mass reaches ``top_p``. Greedy gives a point mass on the
        first maximum, and so does top_k = 1 at any temperature.
        """
        if self.greedy:
            from torch.nn.functional import one_hot

            return one_hot(logits.argmax(-1).cpu(), logits.shape[-1]).double()
        logits = logits.cpu().double()
        # Ordered before they are scaled: a huge temperature makes equal what was not.
        order = None
        if self.top_k is not None or self.top_p is not None:
            order = logits.sort(dim=-1, descending=True, stable=True).indices
        # Less the maximum first: a tiny temperature must not overflow.
        scaled = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if order is not None and self.top_k is not None:
            scaled = scaled.scatter(-1, order[..., self.top_k :], float("-inf"))
        probs = scaled.softmax(-1)
        if order is not None and self.top_p is not None and self.top_p < 1:
            reached = probs.gather(-1, order).cumsum(-1)[..., :-1] >= self.top_p
            beyond = order.lt(0).scatter(-1, order[..., 1:], reached)  # none of them, to begin with
            probs = probs.masked_fill(beyond, 0.0)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs

    def belief(self, logits: Tensor) -> Tensor:
        """How likely each id is (..., V): what is drawn from, or, if greedy, the plain softmax.

        In float64 on the CPU.
        """
        return logits.cpu().double().softmax(-1) if self.greedy else self.probabilities(logits)

    def pick(
        self,
        logits_bV: Tensor,
        positions: Sequence[int],
        active: Sequence[object],
        draws: Draws,
        stream: int = 0,
    ) -> list[int]:
        """An id for each batch row, for the byte at ``positions[b]``; -1 where not ``active``."""
        rows = [int(bool(on)) for on in active]
        picked = self.picks(logits_bV[:, None], positions, rows, draws, stream)
        return [ids[0] if ids else -1 for ids in picked]

    def picks(
        self,
        logits_brV: Tensor,
        positions: Sequence[int],
        rows: Sequence[int],
        draws: Draws,
        stream: int = 0,
    ) -> list[list[int]]:
        """The ids for the bytes at ``positions[b]`` and after it, of the first ``rows[b]`` rows.

        A function of each row's logits, its seed and the byte's position alone: whoever draws for
        a byte from the same logits draws the same id, and from similar ones mostly the same. The
        draw is the maximum of log-probability plus Gumbel noise; ``stream`` separates draws for one
        position that must be independent.
        """
        if self.greedy:
            best = logits_brV.argmax(-1).tolist()
            return [ids[:count] for ids, count in zip(best, rows, strict=True)]
        scores = self.probabilities(logits_brV).log()
        size = scores.shape[-1]
        return [
            (scores[row, :count] + draws.noise(row, begin, count, size, stream)).argmax(-1).tolist()
            for row, (begin, count) in enumerate(zip(positions, rows, strict=True))
        ]

    def margin(self, logits_V: Tensor, draws: Draws, position: int) -> float:
        """How close the pick for batch row 0 came to being another id.

        Greedy: the gap of the two highest logits. Else the smallest of the gap of the two highest
        noisy log-probabilities, in nats, and of how close top-k or top-p came to another cut (of
        two logits, and of a probability).
        """
        logits_V = logits_V.cpu().double()
        if self.greedy:
            first, second = logits_V.topk(2).values.tolist()
            return float(first - second)
        scores = self.probabilities(logits_V).log() + draws.noise(0, position, 1, len(logits_V))[0]
        first, second = scores.topk(2).values.tolist()
        return min(float(first - second), self._cut_margin(logits_V))

    def _cut_margin(self, logits_V: Tensor) -> float:
        """How close top-k or top-p came to keeping other ids; infinite where neither cuts."""
        margin = float("inf")
        scaled = (logits_V - logits_V.max()) / self.temperature
        if self.top_k is not None and self.top_k < len(scaled):
            kept, dropped = scaled.topk(self.top_k + 1).values[-2:].tolist()
            margin = kept - dropped
        if self.top_p is not None and self.top_p < 1:
            before = attrs.evolve(self, top_p=None).probabilities(logits_V)
            mass = before.sort(descending=True).values.cumsum(-1)
            margin = min(margin, float((mass - self.top_p).abs().min()))
        return margin


@attrs.frozen
class Draws:
    """Random numbers that depend on a request's seed and the byte position alone.

    ``seeds[b]`` is the seed of batch row b. The place in a batch, the sampler's rounds and what
    was drawn before have no influence, so a batch repeats what each request gives alone, and a
    drafter can draw what its verification will.
    """

    seeds: tuple[int, ...]

    def uniform(self, row: int, position: int, stream: int = 0) -> float:
        """A number in [0, 1) for the byte at ``position``; ``stream`` separates uses."""
        return (self._key(row, position, stream) >> 11) / float(1 << 53)

    def noise(self, row: int, position: int, count: int, size: int, stream: int = 0) -> Tensor:
        """Standard Gumbel noise (count, size) in float64, a number for each id of each byte.

        Of the bytes at ``position`` and after it. Added to log-probabilities, its maximum is a draw
        from them; two distributions that share it draw the same id as far as they agree.
        """
        import numpy as np
        from torch import from_numpy

        keys = [self._key(row, place, stream) for place in range(position, position + count)]
        states = np.array(keys, np.uint64).reshape(count, 1) ^ np.arange(size, dtype=np.uint64)
        uniform = ((_mix_all(states) >> np.uint64(12)) + 0.5) * 2.0**-52  # in (0, 1)
        return from_numpy(-np.log(-np.log(uniform)))

    def _key(self, row: int, position: int, stream: int) -> int:
        """A hash of a row's seed, a position and a stream."""
        state = _mix(self.seeds[row] & _MASK64)
        state = _mix(state ^ (position & _MASK64))
        return _mix(state ^ (stream & _MASK64))


_MASK64 = (1 << 64) - 1


def _mix(value: int) -> int:
    """The splitmix64 finaliser: a bijection on 64-bit integers that looks random."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix_all(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """:func:`_mix` of each value; uint64 wraps by itself."""
    import numpy as np

    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


@attrs.frozen(eq=False)
class Rows:
    """New *clean* byte rows: row i stands for byte i and predicts byte i + 1.

    ids_br: int64. lengths: new rows of each batch row. latent_br: int64, the index of the latent
    that each row reads (decoder only). states_brD: the encoder's byte states, for decoders that
    read them instead of embedding bytes themselves (``reads_byte_states``).

    With a cache the first new row continues where the cache ends; without one it is byte 0.
    """

    ids_br: Tensor
    lengths: tuple[int, ...]
    latent_br: Tensor | None = None
    states_brD: Tensor | None = None


@attrs.frozen(eq=False)
class Blocks:
    """Blocks: B rows each that see the clean rows before their start, and their own block.

    ids_bnB: int64, with [MASK] at the bytes to fill. start_bn: int64, position of the first byte.
    latent_bn: int64, the latent that all rows of the block read. causal_bn: bool, blocks whose rows
    see their own block up to themselves only (None: no block is). Row j of a causal block predicts
    the byte after its own, of any other block the byte at its own position.
    """

    ids_bnB: Tensor
    start_bn: Tensor
    latent_bn: Tensor
    causal_bn: Tensor | None = None


@attrs.frozen(eq=False)
class Patches:
    """Patches to embed: patch j of row b is bytes [start, start + size) of that row.

    start_bm, size_bm: int64; size 0 is padding. counts: patches of each batch row.
    """

    start_bm: Tensor
    size_bm: Tensor
    counts: tuple[int, ...]


@attrs.frozen(eq=False)
class Latents:
    """Global-model inputs or outputs of new patches: values_bmD and the patches of each row."""

    values_bmD: Tensor
    counts: tuple[int, ...]


@attrs.frozen(eq=False)
class Output:
    """What a decoder gives for rows of one kind: logits (…, V) and last hidden states (…, D)."""

    logits: Tensor
    hidden: Tensor


@attrs.frozen(eq=False)
class DecoderOutput:
    """Outputs of the clean rows (b, r, …) and of the block rows (b, n, B, …), where given."""

    clean: Output | None
    blocks: Output | None


@attrs.frozen(eq=False)
class OpenBlock:
    """A block being denoised, one per batch row; made by ``DecodeOps.open_block``.

    ids: for each batch row its B ids, committed bytes first, then [MASK] (a drafter fills them
    in; an inactive row has none). start: position of its first byte. given: how many of its bytes
    are committed already. provisional: whether the open patch is closed by force. scored: whether
    the flags of the text are brought up to date first. edits: of the state when it was opened; a
    block is good for that text only.
    """

    ids: list[list[int]]
    start: tuple[int, ...]
    given: tuple[int, ...]
    provisional: bool
    scored: bool = False
    edits: int = 0


def matches(drafted: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafted ids, from the first on, are those that were chosen."""
    pairs = enumerate(zip(drafted, chosen, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(drafted), len(chosen)))


@attrs.frozen(eq=False)
class Draft:
    """Proposed bytes: ``ids[b]`` of any length, and the q they were drawn from (b, k, V).

    ``probs_bkV`` is None for a draft that is made of the same draws as the model's own bytes, or of
    none: q is a point mass on each id.
    """

    ids: list[list[int]]
    probs_bkV: Tensor | None = None

    def cut(self, limit: Sequence[int]) -> Draft:
        """This draft with at most ``limit[b]`` ids in each row."""
        ids = [row[:most] for row, most in zip(self.ids, limit, strict=True)]
        return Draft(ids, self.probs_bkV)


@attrs.frozen
class Round:
    """What one sampler round committed, per batch row: ids, drafted and accepted counts.

    ``drafted`` counts all ids that were drafted, ``accepted`` those with which ``ids`` begins; the
    ids after them are the model's own (bonus or correction). ``prefill``: the round read the prompt
    and no more; it is not counted among the rounds.
    """

    ids: list[list[int]]
    drafted: list[int]
    accepted: list[int]
    prefill: bool = False


@attrs.frozen
class Passes:
    """Forward passes (NFE) that one request caused, counted as if it ran alone.

    decoder: N_dec. encoder: N_enc, passes of encoder + global model. encoder_bytes: passes of the
    encoder's byte part (equal to ``encoder`` unless the decoder reads byte states). scorer: passes
    of the patcher over new bytes.
    """

    decoder: int = 0
    encoder: int = 0
    encoder_bytes: int = 0
    scorer: int = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.decoder + other.decoder,
            self.encoder + other.encoder,
            self.encoder_bytes + other.encoder_bytes,
            self.scorer + other.scorer,
        )


@attrs.frozen
class Parameters:
    """Parameter counts of each part. ``tables`` are look-ups: their bytes are not streamed."""

    decoder: int
    encoder: int
    global_model: int
    tables: int = 0
    scorer: int = 0


@attrs.frozen
class Cost:
    """Weight traffic in GB (1e9 bytes): the total, its lines, and lines shown apart from it."""

    gigabytes: float
    lines: Mapping[str, float]
    apart: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen
class StateBytes:
    """Bytes that training holds in one place, from step to step.

    optimizer: with the float32 weights that some backends keep beside narrower ones. buffers: of
    the backend's own, such as those in which gradients travel. step: peak extra bytes during the
    optimizer step, in place of the gradients: copies of them, and workspace (0: none). scoring:
    bytes held during evaluation in place of gradients and buffers: the whole weights, where they
    are sharded at other times (0: none).
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    buffers: int = 0
    step: int = 0
    scoring: int = 0

    @property
    def total(self) -> int:
        """What is there between two passes of a step."""
        return self.parameters + self.gradients + self.optimizer + self.buffers

    @property
    def stepping(self) -> int:
        """The most while the optimizer steps."""
        return self.total - self.gradients + max(self.gradients, self.step)

    @property
    def scored(self) -> int:
        """Bytes held during evaluation; an upper bound if the backend gathers nothing."""
        return self.parameters + self.optimizer + self.scoring


@attrs.frozen
class StateMemory:
    """What a training backend keeps of the module it trains, for each process.

    device: where passes run. host: what was moved to the memory of the CPU. passes_in: the dtype
    that the module is cast to (None: it stays as it is). passes_at_once: how many passes of a step
    run side by side, each with gradients of its own.
    """

    device: StateBytes
    host: StateBytes = StateBytes()
    passes_in: torch.dtype | None = None
    passes_at_once: int = 1
