"""The cascade drafter: what BLT-S drafts, in fewer decoder passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blt_core.component import BuildContext, Component, at_least, nested
from blt_core.decoding.drafting import propose
from blt_core.protocols import DecodeOps, Drafter
from blt_core.types import Draft, Draws, Sampling, StopRule, matches


@attrs.frozen(kw_only=True)
class CascadeParams:
    """draft_bytes: bytes drafted a round (k). drafter: proposes them to the decoder.

    A frontier drafter had better leave the patch open (``closure = "none"``).
    """

    draft_bytes: int = attrs.field(default=16, validator=at_least(1))
    drafter: Drafter = nested("drafter", default="diffusion")


class CascadeDrafter:
    """An inner drafter proposes; the decoder alone, latents frozen, verifies many bytes in a pass.

    The rejected part is drafted again until k bytes are there, so the draft is byte for byte that
    of the drafter ``self``, whatever the inner one proposes. A row stops drafting at EOS.
    """

    def __init__(self, params: CascadeParams, context: BuildContext) -> None:
        self.draft_bytes = params.draft_bytes
        self.drafter = params.drafter

    def draft(
        self,
        ops: DecodeOps,
        limit: Sequence[int],
        sampling: Sampling,
        draws: Draws,
        rule: StopRule | None = None,
    ) -> Draft:
        """At most ``draft_bytes`` ids of each row, and what they were drawn from."""
        ids: list[list[int]] = [[] for _ in limit]
        q: list[list[Tensor]] = [[] for _ in limit]
        left = [min(self.draft_bytes, most) for most in limit]
        while any(left):
            begin = ops.lengths
            # The decoder adds a byte of its own to each proposal.
            room = [max(n - 1, 0) for n in left]
            proposed = Draft([[] for _ in limit])
            if any(room):
                proposed = propose(self.drafter, ops, room, sampling, draws)
                ops.rewind(begin)
            ops.append(proposed.ids)
            rows = [len(p) + 1 if n else 0 for p, n in zip(proposed.ids, left, strict=True)]
            logits = ops.draft_logits(rows)
            chosen = sampling.picks(logits, begin, rows, draws)
            stood = [matches(p, own) for p, own in zip(proposed.ids, chosen, strict=True)]
            kept = [
                _to_eos(own[: most + 1], ops.scheme.eos)
                for own, most in zip(chosen, stood, strict=True)
            ]
            beliefs = sampling.belief(logits) if rule is not None else logits
            for row, new in enumerate(kept):
                most, goes_on = len(new), True
                if rule is not None and new:
                    most, goes_on = rule(row, beliefs[row, :most])
                ended = not goes_on or most < len(new) or new[-1:] == [ops.scheme.eos]
                kept[row] = new[:most]
                ids[row] += kept[row]
                left[row] = 0 if ended else left[row] - most
            # What stood is decoded: the next pass begins with the decoder's own byte.
            right = [min(most, len(new)) for most, new in zip(stood, kept, strict=True)]
            ops.rewind([n + most for n, most in zip(begin, right, strict=True)])
            ops.append([new[most:] for new, most in zip(kept, right, strict=True)])
            if draws.begins is not None:
                probs = sampling.probabilities(logits)
                for row, new in enumerate(kept):
                    q[row].append(probs[row, : len(new)])
        return Draft(ids, _stacked(q))


def _stacked(parts: Sequence[Sequence[Tensor]]) -> Tensor | None:
    """(b, k, V) of what each row was drawn from, padded with zeros; None if that was not kept."""
    found = [torch.cat(list(row)) if row else None for row in parts]
    if (size := next((probs.shape[1] for probs in found if probs is not None), None)) is None:
        return None
    nothing = torch.zeros(0, size, dtype=torch.float64)
    return pad_sequence([nothing if p is None else p for p in found], batch_first=True)


def _to_eos(ids: list[int], eos: int) -> list[int]:
    """The ids up to the first EOS, which is kept."""
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def cascade_notes(params: CascadeParams) -> Iterator[str]:
    """Keys of the inner drafter that a cascade pays for in vain."""
    inner: Any = params.drafter  # the node that it is built from
    proposes = getattr(inner.params, "draft_bytes", getattr(inner.params, "block_bytes", 0))
    if proposes > params.draft_bytes:
        room = params.draft_bytes - 1
        yield (
            f"{inner.label} proposes {proposes} bytes, of which a draft of "
            f"{params.draft_bytes} has room for {room}; the rest is cut"
        )
    keys = (getattr(inner.params, "start", ""), getattr(inner.params, "closure", ""))
    if keys == ("frontier", "forced"):
        yield (
            'closure = "forced" costs an encoder + global pass in each refill; '
            'with closure = "none" a cascade runs the decoder alone'
        )


CASCADE = Component(
    kind="drafter",
    name="cascade",
    factory=CascadeDrafter,
    params=CascadeParams,
    summary="an inner drafter, verified by the decoder alone and refilled",
    notes=cascade_notes,
    # Its draft is that of ``self``, whatever the inner drafter proposes.
    provides=lambda _: frozenset({"stops_early", "gives_q"}),
)
