"""How ids are drawn: temperature, top-k, top-p, and noise that every run of a seed shares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import attrs

from blt_core.errors import NO_NUMBERS, RequestError, RunError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor


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

            return one_hot(_numbers(logits).argmax(-1), logits.shape[-1]).double()
        return self._distribution(_numbers(logits))

    def _distribution(self, logits: Tensor) -> Tensor:
        """``probabilities`` of logits in float64, where they are; not greedy."""
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
        return _numbers(logits).softmax(-1) if self.greedy else self.probabilities(logits)

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

    def choose(self, logits: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor]:
        """(highest logit, id) of each row (..., V), where the logits are: nothing is read.

        noise: for draws, as :meth:`Draws.noise` gives it; None for greedy choices. Where a row is
        no numbers its highest logit is none.
        """
        if noise is None:
            highest, best = logits.max(-1)
            return highest, best
        scores = self._distribution(logits.double()).log() + noise
        return logits.amax(-1), scores.argmax(-1)

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
            # What is no number counts as the highest, so the highest tells of it.
            highest, best = self.choose(logits_brV, None)
            read = best.masked_fill(highest.isnan(), -1).tolist()
            if any(-1 in ids for ids in read):
                raise RunError(NO_NUMBERS)
            return [ids[:count] for ids, count in zip(read, rows, strict=True)]
        at = [(row, place) for row, count in enumerate(rows) for place in range(count)]
        scores = self.probabilities(logits_brV).log()
        if len(at) < scores.shape[0] * scores.shape[1]:
            scores = scores[[row for row, _ in at], [place for _, place in at]]
        bytes_at = [(row, positions[row] + place) for row, place in at]
        noise = draws.noise_at(bytes_at, scores.shape[-1], stream)
        drawn = iter((scores.view(noise.shape) + noise).argmax(-1).tolist())
        return [list(islice(drawn, count)) for count in rows]

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


def _numbers(logits: Tensor) -> Tensor:
    """Logits in float64 on the CPU; RunError for what is no number."""
    wide = logits.cpu().double()
    if bool(wide.isnan().any()):
        raise RunError(NO_NUMBERS)
    return wide


#: Streams of draws from this one on are free; those below are the package's own: 0 for a model's
#: bytes and drafts of them, 1 for blocks that are output, 2 and 3 for verifications.
FREE_STREAM = 16


@attrs.frozen
class Draws:
    """Random numbers that depend on a request's seed and the byte position alone.

    ``seeds[b]`` is the seed of batch row b. The place in a batch, the sampler's rounds and what
    was drawn before have no influence, so a batch repeats what each request gives alone, and a
    drafter can draw what its verification will.

    begins: None, or where the round of each batch row began. Draws of a round depend on that too:
    they are independent of ``ar``'s, and of those of another round for the same byte.
    """

    seeds: tuple[int, ...]
    begins: tuple[int, ...] | None = None

    def of_round(self, begins: Sequence[int]) -> Draws:
        """The draws of a round that begins at these positions."""
        return Draws(self.seeds, tuple(begins))

    def uniform(self, row: int, position: int, stream: int = 0) -> float:
        """A number in [0, 1) for the byte at ``position``; ``stream`` separates uses."""
        return (self._key(row, position, stream) >> 11) / float(1 << 53)

    def noise(self, row: int, position: int, count: int, size: int, stream: int = 0) -> Tensor:
        """Standard Gumbel noise (count, size) in float64, a number for each id of each byte.

        Of the bytes at ``position`` and after it. Added to log-probabilities, its maximum is a draw
        from them; two distributions that share it draw the same id as far as they agree.
        """
        places = [(row, place) for place in range(position, position + count)]
        return self.noise_at(places, size, stream)

    def noise_at(self, places: Sequence[tuple[int, int]], size: int, stream: int = 0) -> Tensor:
        """:meth:`noise` (n, size) of n bytes anywhere: a batch row and a position of each."""
        import numpy as np
        from torch import from_numpy

        keys = [self._key(row, position, stream) for row, position in places]
        states = np.array(keys, np.uint64).reshape(-1, 1) ^ np.arange(size, dtype=np.uint64)
        uniform = ((_mix_all(states) >> np.uint64(12)) + 0.5) * 2.0**-52  # in (0, 1)
        return from_numpy(-np.log(-np.log(uniform)))

    def _key(self, row: int, position: int, stream: int) -> int:
        """A hash of a row's seed, a position and a stream."""
        state = _mix(self.seeds[row] & _MASK64)
        if self.begins is not None:
            state = _mix(~state & _MASK64 ^ self.begins[row])
        state = _mix(state ^ (position & _MASK64))
        return _mix(state ^ (stream & _MASK64))


def seed_of_prompt(seed: int, index: int) -> int:
    """The seed of prompt ``index`` of a call: ``seed`` itself for the first, below 2^53 for others.

    So every text of a call has draws of its own, and can be made again alone.
    """
    return seed if index == 0 else _mix(_mix(seed & _MASK64) ^ index) >> 11


def seed_of_sample(seed: int, index: int) -> int:
    """The seed of sample ``index`` of a prompt whose seed is ``seed``: itself for the first."""
    return seed if index == 0 else _mix(_mix(~seed & _MASK64) ^ index) >> 11


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
