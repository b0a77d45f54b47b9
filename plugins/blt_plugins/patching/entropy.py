"""The entropy patcher: a byte opens a patch where a small byte model is unsure of it.

Axes: b batch rows, r new byte rows, V ids.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor, nn

from blt_core.component import BuildContext, Component, at_least, nested, overridable
from blt_core.protocols import ByteScorer
from blt_core.types import Rows
from blt_plugins.patching.scan import PatchHistory, limited


@attrs.frozen(kw_only=True)
class EntropyParams:
    """threshold: nats; fits only the scorer and the data that it was calibrated on.

    max_patch_bytes: the longest patch (None: no bound). byte_scorer: the small model whose entropy
    is compared.
    """

    threshold: float = overridable(validator=at_least(0.0))
    max_patch_bytes: int | None = overridable(default=None, validator=at_least(1))
    byte_scorer: ByteScorer = nested("byte_scorer", default="transformer")


class EntropyPatcher(nn.Module):
    """Byte i opens a patch iff H(byte i | bytes before i) > threshold (BLT, section 2.3).

    H is the entropy in nats of the scorer's prediction. A full patch ends as well.
    """

    def __init__(self, params: EntropyParams, context: BuildContext) -> None:
        super().__init__()
        self.threshold = params.threshold
        self.max_patch_bytes = params.max_patch_bytes
        self.byte_scorer = params.byte_scorer

    def new_cache(self, batch: int) -> PatchHistory[int]:
        """Remembers how long ago a byte was a surprise, and the scorer's own cache."""
        return PatchHistory(batch, self.byte_scorer.new_cache(batch))

    def flags(self, rows: Rows, cache: PatchHistory[int] | None) -> Tensor:
        """(b, r) bool: flag i + 1 for each new byte i."""
        inner = cache.inner if cache is not None else None
        unsure = self.entropies(rows, inner) > self.threshold
        return limited(rows, cache, unsure, self.max_patch_bytes)

    def margins(self, rows: Rows) -> Tensor:
        """(b, r), nats: how far each entropy is from the threshold, where a flag is a near-tie."""
        return (self.entropies(rows) - self.threshold).abs()

    @torch.no_grad()
    def entropies(self, rows: Rows, cache: object = None) -> Tensor:
        """(b, r), nats: place i holds the entropy of the prediction of byte i + 1."""
        logits = self.byte_scorer.logits(rows, cache)  # type: ignore[arg-type]
        # In half precision an entropy would have three digits.
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)


ENTROPY = Component(
    kind="patcher",
    name="entropy",
    factory=EntropyPatcher,
    params=EntropyParams,
    summary="opens a patch where a byte model's entropy exceeds a threshold",
)
