"""What is expected of a text's drafts: how far they stand, what they take, what a byte costs.

A text is some ten to a hundred rounds long, so much depends on what is believed before anything was
seen. Those beliefs were chosen by replaying drafts of both demo models, on texts that no benchmark
quotes; they count for less the more is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from blt_core.pricing import price
from blt_core.protocols import CostModel
from blt_core.types import Parameters, Passes, Shape, Shapes, matches

#: What a round counts for one round later, in what is known of places and passes; and of trust.
MEMORY, TRUST_MEMORY = 0.95, 0.97
#: How often a byte of a draft stands, before any was seen; counts for so many bytes of drafts.
USUAL, USUAL_BYTES = 0.92, 150.0
#: A place of a draft is believed to be like all of them, until so many rounds reached it.
PLACE_ROUNDS = 15.0
#: Decoder passes of a drafted byte before any was seen, believed like one draft of so many bytes.
SLOPE, SLOPE_BYTES = 0.4, 4.0
#: A byte with top probability p is doubted by ``1 - p``, and at least so much: in a sharpened
#: distribution all are near 1. It falls so often for each unit of doubt, before any was seen; that
#: counts for so much doubt.
LEAST_DOUBT, FALLS, DOUBT = 0.01, 0.7, 10.0
#: However doubtful a byte is, it is not taken to stand more seldom than this.
LEAST = 0.02
#: What a byte costs is believed to be what it costs without drafts, like so many bytes.
PRICE_BYTES = 120.0
#: Without a draft, rounds until one is tried again; they double up to the last.
FIRST_PAUSE, LAST_PAUSE = 4, 128
#: The length of such a trial.
TRIAL = 2


@attrs.frozen
class Prices:
    """What passes cost.

    draft: a decoder pass that drafts, over one row. verify, latent: by the bytes that were drafted
    (0, 1, …), the pass of the decoder over them and the next byte with the scorer's, and that of
    encoder and global model if they close patches; the last counts for all that are longer.
    """

    draft: float
    verify: tuple[float, ...]
    latent: tuple[float, ...]
    patch_bytes: float

    @classmethod
    def of(cls, of_passes: Price, patch_bytes: float, longest: int) -> Prices:
        """Those of drafts up to the longest; ValueError where a decoder pass costs nothing."""
        draft, widths = of_passes.of_rows(1), range(1, longest + 2)
        if not draft:
            raise ValueError("cost: a decoder pass costs nothing, so lengths cannot be chosen")
        verify = tuple(of_passes.verifying(rows) for rows in widths)
        latent = tuple(of_passes.latents(rows, patch_bytes) for rows in widths)
        return cls(draft, verify, latent, patch_bytes)

    def of_round(self, draft_passes: float, drafted: int, committed: float) -> float:
        """A round with draft passes that cost as many of one row, if it commits so many bytes."""
        return self.draft * draft_passes + self.of_verifying(drafted, committed)

    def of_verifying(self, drafted: float, committed: float) -> float:
        """True passes over a draft; one of the latent if the bytes that stand close a patch."""
        at = min(round(drafted), len(self.verify) - 1)
        return self.verify[at] + self.latent[at] * (1 - self.open_after(committed))

    def open_after(self, committed: float) -> float:
        """How likely so many bytes close no patch."""
        return math.pow(1 - 1 / self.patch_bytes, committed)

    @property
    def by_rows(self) -> bool:
        """Whether long drafts cost clearly more to verify than short ones."""
        return max(self.verify) - self.verify[0] > self.draft

    @property
    def of_byte(self) -> float:
        """A byte without drafts."""
        return self.verify[0] + self.latent[0] / self.patch_bytes


class Price:
    """What a cost model asks for passes of a model.

    reads_bytes: whether the encoder's byte part runs with each pass of the decoder.
    """

    def __init__(
        self, model: CostModel, parameters: Parameters, *, reads_bytes: bool = False
    ) -> None:
        self._model, self._parameters, self._reads_bytes = model, parameters, reads_bytes
        self._of_rows: dict[tuple[int, bool], float] = {}

    def __call__(self, passes: Passes) -> float:
        """Of any passes. Raises ComponentError for what is no cost."""
        return price(self._model, passes, self._parameters).total

    def of_rows(self, rows: int, *, block: bool = False) -> float:
        """Of one decoder pass that drafts; asked once for each number of rows."""
        found = self._of_rows.get((rows, block))
        if found is None:
            found = self._of_rows[rows, block] = self(self._passes(rows, block=block))
        return found

    def verifying(self, rows: int) -> float:
        """Of a true pass of decoder and scorer."""
        return self(self._passes(rows, scorer=1))

    def latents(self, rows: int, patch_bytes: float) -> float:
        """What such a pass costs more where its bytes close patches."""
        bytes_read = rows if self._reads_bytes else max(rows, round(patch_bytes))
        patches = max(round(rows / patch_bytes), 1)
        both = self._passes(rows, scorer=1, encoder=(bytes_read, patches))
        return self(both) - self.verifying(rows)

    def _passes(
        self,
        rows: int,
        *,
        block: bool = False,
        scorer: int = 0,
        encoder: tuple[int, int] | None = None,
    ) -> Passes:
        """One of the decoder, and what goes with it; encoder: its rows, and the patches."""
        read = rows if self._reads_bytes and not block else 0
        read, patches = encoder or (read, 0)
        shapes = Shapes(
            decoder=_shape(0 if block else rows),
            blocks=_shape(rows if block else 0),
            encoder=_shape(read),
            global_model=_shape(patches),
            scorer=_shape(scorer * rows),
        )
        return Passes(
            decoder=1,
            encoder=int(patches > 0),
            encoder_bytes=int(read > 0),
            scorer=scorer,
            shapes=shapes,
        )


def _shape(rows: int) -> Shape:
    """Of one pass; of none for no rows."""
    return Shape(((rows, 1),)) if rows else Shape()


@attrs.define
class Record:
    """What is known of one text's drafts.

    begin, asked, draft, doubts, passes: of the last draft, until it is known what became of it;
    passes are counted by their cost, in those of one row.
    watched: whether its length is decided by :meth:`goes_on`; then ``doubts`` has its bytes.
    """

    prices: Prices
    begin: int = 0
    asked: int = 0
    watched: bool = False
    draft: list[int] = attrs.field(factory=list)
    doubts: list[float] = attrs.field(factory=list)
    passes: float = 0.0
    # How often place j of a draft could have stood (all before it did), and did; and all together.
    tried: list[float] = attrs.field(factory=list)
    stood: list[float] = attrs.field(factory=list)
    all_tried: float = USUAL_BYTES
    all_stood: float = USUAL_BYTES * USUAL
    # Of drafts: how many, their lengths, their passes, and the products.
    sums: list[float] = attrs.field(factory=lambda: _sums(SLOPE_BYTES, SLOPE * SLOPE_BYTES))
    # How doubtful the bytes were that could have stood, and how many fell.
    doubt: float = DOUBT
    fell: float = DOUBT * FALLS
    # What rounds cost, and what they committed.
    cost: float = attrs.field(
        default=attrs.Factory(lambda self: PRICE_BYTES * self.prices.of_byte, takes_self=True)
    )
    committed: float = PRICE_BYTES
    # The draft that is being made: how likely it stands whole.
    likely: float = 1.0
    pause: int = FIRST_PAUSE
    waited: int = 0

    def choose(self, lengths: Sequence[int], *, watched: bool) -> int:
        """The length that pays best, from these; now and then a short one where none does.

        watched: the draft is going to ask :meth:`goes_on`, so if any pays it may be the longest,
        but where each byte to verify has a price: a pass may propose more of them than pay.
        """
        self.doubts, self.likely, self.watched = [], 1.0, watched
        expected = self._expected(lengths[-1])
        price = self.prices.of_round
        best = min(lengths, key=lambda n: price(self._passes(n), n, expected[n]) / expected[n])
        if best:
            self.pause, self.waited = FIRST_PAUSE, 0
            return lengths[-1] if watched and not self.prices.by_rows else best
        self.waited += 1
        if self.waited < self.pause:
            self._spend(0, 0, 1)
            return 0
        self.pause, self.waited = min(2 * self.pause, LAST_PAUSE), 0
        return min(TRIAL, lengths[-1])

    def goes_on(self, tops: Sequence[float], room: int) -> bool:
        """Whether one more decoder pass is worth it, after bytes with these top probabilities.

        It is if the next bytes, of at most ``room`` in the draft, are expected to save more.
        """
        for top in tops:
            self.doubts.append(max(1 - top, LEAST_DOUBT))
            self.likely *= max(1 - self.fell / self.doubt * self.doubts[-1], LEAST)
        _, lengths, passes, _, _ = self.sums
        each = self.all_stood / self.all_tried
        left = max(room - len(self.doubts), 0)
        more = _geometric(each, min(lengths / passes, left) if passes else left)
        there, price = len(self.doubts), self.prices.of_verifying
        longer = price(there + more, there + 1 + more) - price(there, there + 1)
        worth = min(self.cost / self.committed, self.prices.of_byte)
        return self.likely * (worth * more - longer) > self.prices.draft

    def drafted(self, begin: int, asked: int, ids: Sequence[int], passes: float) -> None:
        """Note a draft and what it took."""
        self.begin, self.draft, self.passes = begin, list(ids), passes
        # A draft that was watched is as long as it was meant to be. Of those that it was asked
        # about, the drafter may have dropped the last.
        self.asked = len(ids) if self.watched else asked
        self.doubts = self.doubts[: len(ids)]
        new = _sums(self.asked, passes)
        self.sums = [MEMORY * old + each for old, each in zip(self.sums, new, strict=True)]
        if not ids:
            self._count(0, self.asked)
            self._spend(passes, 0, 1)

    def learn(self, text: Sequence[int]) -> None:
        """Note how much of the last draft is in the text that followed."""
        if text:
            stood = matches(self.draft, text)
            self._count(stood, self.asked)
            self._spend(self.passes, len(self.draft), stood + 1)
            if self.watched:
                judged = self.doubts[: stood + 1]
                self.doubt = TRUST_MEMORY * self.doubt + sum(judged)
                self.fell = TRUST_MEMORY * self.fell + (stood < len(judged))
        self.draft = []

    def _spend(self, passes: float, drafted: int, committed: int) -> None:
        self.cost += self.prices.of_round(passes, drafted, committed)
        self.committed += committed

    def _count(self, stood: int, asked: int) -> None:
        self.tried = [MEMORY * n for n in self.tried]
        self.stood = [MEMORY * n for n in self.stood]
        grow = stood + 1 - len(self.tried)
        self.tried += [0.0] * grow
        self.stood += [0.0] * grow
        for place in range(min(stood + 1, asked)):
            self.tried[place] += 1
            self.stood[place] += place < stood
        self.all_tried = MEMORY * self.all_tried + min(stood + 1, asked)
        self.all_stood = MEMORY * self.all_stood + min(stood, asked)

    def _expected(self, most: int) -> list[float]:
        """Bytes that a round commits with drafts of 0 to ``most`` bytes."""
        usual = self.all_stood / self.all_tried
        found, reached = [1.0], 1.0
        for place in range(most):
            seen = place < len(self.tried)
            n, good = (self.tried[place], self.stood[place]) if seen else (0.0, 0.0)
            reached *= (good + PLACE_ROUNDS * usual) / (n + PLACE_ROUNDS)
            found.append(found[-1] + reached)
        return found

    def _passes(self, length: int) -> float:
        """Decoder passes of a draft of ``length`` bytes: a line through those that were made."""
        if not length:
            return 0.0
        count, lengths, passes, squares, products = self.sums
        count += 1  # a draft of no bytes, which takes no passes
        slope = (count * products - lengths * passes) / (count * squares - lengths * lengths)
        return max((passes + slope * (count * length - lengths)) / count, 0.0)


def _sums(asked: float, passes: float) -> list[float]:
    """What a draft adds to the sums of a line of passes over lengths."""
    return [1.0, asked, passes, asked * asked, asked * passes]


def _geometric(each: float, count: float) -> float:
    """``each + each ** 2 + …``, ``count`` terms."""
    return count if each >= 1 else each * (1 - each**count) / (1 - each)
