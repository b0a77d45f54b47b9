"""The block-diffusion objective: next bytes, masked blocks, and rows that read an old latent.

Axes: b batch rows, r byte rows, n blocks, B bytes of a block, V ids.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from blt_core.component import BuildContext, Component, at_least, between
from blt_core.errors import RunError
from blt_core.model import Model, patch_layout
from blt_core.protocols import UNSCORED
from blt_core.types import Blocks, Rows
from blt_plugins.training.objectives.next_byte import next_byte_loss, widened
from blt_plugins.training.setup.blocks import block_sizes

#: The least masking rate, for a block's loss has weight 1 / t.
_LEAST_RATE = 1e-3


def _sizes(_: object, __: attrs.Attribute[object], value: int | tuple[int, ...]) -> None:
    sizes = block_sizes(value)
    if not sizes or sizes[0] < 1 or len({*sizes}) < len(sizes):
        raise ValueError(f"expected one size, or different ones, of at least 1; got {value!r}")


@attrs.frozen(kw_only=True)
class BlockDiffusionObjectiveParams:
    """Which blocks are trained beside the clean rows, as shares of the number of patches.

    block_bytes: bytes of a block (B); of several sizes each batch draws one, all equally likely.
    share: blocks at patch starts, with a masking rate t ~ U(0, 1) each. all_masked_share: further
    ones with t = 1. inside_share: further ones that start at any byte, read with the newest closed
    latent. stale_share: causal blocks at patch starts whose rows all read the latent before the
    patch, as drafting by the decoder alone does.
    mask_weight, stale_weight: of their losses beside L_clean.
    """

    block_bytes: int | tuple[int, ...] = attrs.field(default=16, validator=_sizes)
    share: float = attrs.field(default=0.25, validator=between(0, 1))
    all_masked_share: float = attrs.field(default=0.0, validator=between(0, 1))
    inside_share: float = attrs.field(default=0.0, validator=between(0, 1))
    stale_share: float = attrs.field(default=0.0, validator=between(0, 1))
    mask_weight: float = attrs.field(default=1.0, validator=at_least(0))
    stale_weight: float = attrs.field(default=1.0, validator=at_least(0))


@attrs.frozen(eq=False)
class TrainedBlocks:
    """Blocks and their loss: the sum of ``weights_bnB`` times the cross-entropy of the targets.

    start_bn: first positions. ids_bnB: inputs. targets_bnB: UNSCORED where the weight is 0. The
    weights are float64 on the CPU, since not every device has float64.
    """

    start_bn: Tensor
    ids_bnB: Tensor
    targets_bnB: Tensor
    weights_bnB: Tensor

    @property
    def count(self) -> int:
        """Blocks of each batch row, padding included."""
        return self.start_bn.shape[1]

    def loss(self, logits_bnBV: Tensor) -> Tensor:
        """The loss in nats, given the logits of these blocks' rows."""
        losses = functional.cross_entropy(
            widened(logits_bnBV).flatten(0, -2),
            self.targets_bnB.flatten(),
            ignore_index=UNSCORED,
            reduction="none",
        )
        return (losses.cpu().double() * self.weights_bnB.flatten()).sum()


class BlockDiffusionObjective:
    """L_clean + mask_weight · L_mask + stale_weight · L_stale (Fast BLT, arXiv 2605.08044).

    L_clean: mean next-byte loss of the clean rows. L_mask: the losses of masked bytes, each over
    its block's masking rate, as a mean over all block bytes inside the text. L_stale: mean
    next-byte loss of the stale-latent rows. All in nats.
    """

    def __init__(self, params: BlockDiffusionObjectiveParams, context: BuildContext) -> None:
        if context.scheme.mask is None:
            raise ValueError("block diffusion needs an id scheme with a [MASK] id")
        self.params, self.mask = params, context.scheme.mask
        self.block_bytes = block_sizes(params.block_bytes)

    def loss(
        self,
        model: Model,
        rows: Rows,
        flags_br: Tensor,
        targets_br: Tensor,
        rng: torch.Generator,
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss in nats, its parts to log); the loss is on the CPU."""
        masked, stale = self.blocks(flags_br, targets_br, rng)
        start_bn = torch.cat((masked.start_bn, stale.start_bn), 1)
        # A block reads what the clean row before it reads, wherever it starts.
        latent_bn = patch_layout(flags_br, rows.lengths)[1].gather(1, start_bn - 1)
        causal_bn = torch.arange(start_bn.shape[1], device=start_bn.device) >= masked.count
        ids_bnB = torch.cat((masked.ids_bnB, stale.ids_bnB), 1)
        blocks = Blocks(ids_bnB, start_bn, latent_bn, causal_bn.expand_as(start_bn))
        output = model.forward(rows, flags_br, blocks)
        if output.clean is None or output.blocks is None:
            raise RunError("the decoder gave no output for clean rows or for blocks")
        masked_logits, stale_logits = output.blocks.logits.split((masked.count, stale.count), 1)
        parts = {
            "clean_loss": next_byte_loss(output.clean.logits, targets_br).cpu(),
            "mask_loss": masked.loss(masked_logits),
            "stale_loss": stale.loss(stale_logits),
        }
        total = parts["clean_loss"] + self.params.mask_weight * parts["mask_loss"]
        total = total + self.params.stale_weight * parts["stale_loss"]
        return total, {name: float(part.detach()) for name, part in parts.items()}

    def blocks(
        self, flags_br: Tensor, targets_br: Tensor, rng: torch.Generator
    ) -> tuple[TrainedBlocks, TrainedBlocks]:
        """The masked blocks and the stale-latent blocks of a batch."""
        p = self.params
        size = self._draw_size(rng)
        # Place i stands for a start at byte i + 1: the target of clean row i, so inside the text.
        text_br = targets_br != UNSCORED
        opens_br = flags_br & text_br
        patches_b = opens_br.sum(1)
        drawn = sample_starts(opens_br, patches_b * p.share, rng)
        inside = sample_starts(text_br, patches_b * p.inside_share, rng)
        full = sample_starts(opens_br, patches_b * p.all_masked_share, rng)
        start_bn = torch.cat((drawn, inside, full), 1)
        rate_bn = torch.rand(start_bn.shape, generator=rng).clamp(min=_LEAST_RATE)
        rate_bn[:, start_bn.shape[1] - full.shape[1] :] = 1.0
        masked = self._masked(start_bn, rate_bn, ids_from(start_bn, targets_br, size), rng)
        stale_bn = sample_starts(opens_br, patches_b * p.stale_share, rng)
        return masked, self._stale(stale_bn, targets_br, size)

    def _draw_size(self, rng: torch.Generator) -> int:
        """The bytes of this batch's blocks; nothing is drawn where there is one size."""
        if len(self.block_bytes) == 1:
            return self.block_bytes[0]
        return self.block_bytes[int(torch.randint(len(self.block_bytes), (), generator=rng))]

    def _masked(
        self, start_bn: Tensor, rate_bn: Tensor, truth_bnB: Tensor, rng: torch.Generator
    ) -> TrainedBlocks:
        """Blocks whose rows predict their own byte; each byte is hidden with the block's rate.

        ``rate_bn`` is on the CPU, as ``rng`` is.
        """
        noise = torch.rand(truth_bnB.shape, generator=rng)
        scored = truth_bnB != UNSCORED
        hidden = (noise < rate_bn[..., None]).to(scored.device) & scored
        weights = hidden.cpu().double() / rate_bn[..., None] / scored.sum().clamp(min=1).cpu()
        # Past the end of the text there is nothing to give: it is masked, as in generation.
        ids = truth_bnB.masked_fill(hidden | ~scored, self.mask)
        return TrainedBlocks(
            start_bn.clamp(min=1), ids, truth_bnB.masked_fill(~hidden, UNSCORED), weights
        )

    def _stale(self, start_bn: Tensor, targets_br: Tensor, size: int) -> TrainedBlocks:
        """Causal blocks of clean bytes whose rows predict the byte after their own."""
        given = ids_from(start_bn, targets_br, size)
        after = ids_from(torch.where(start_bn > 0, start_bn + 1, 0), targets_br, size)
        scored = (given != UNSCORED) & (after != UNSCORED)
        weights = scored.cpu().double() / scored.sum().clamp(min=1).cpu()
        return TrainedBlocks(
            start_bn.clamp(min=1),
            given.masked_fill(given == UNSCORED, self.mask),
            after.masked_fill(~scored, UNSCORED),
            weights,
        )


def ids_from(start_bn: Tensor, targets_br: Tensor, block_bytes: int) -> Tensor:
    """(b, n, B): the ids at start + j; UNSCORED after the text, and in padding blocks (start 0)."""
    # The id at position p is the target of clean row p - 1.
    row = start_bn[..., None] + torch.arange(block_bytes, device=start_bn.device) - 1
    ids = targets_br.gather(1, row.clamp(0, targets_br.shape[1] - 1).flatten(1)).view_as(row)
    beyond = (row >= targets_br.shape[1]) | (start_bn == 0)[..., None]
    return ids.masked_fill(beyond, UNSCORED)


def sample_starts(places_br: Tensor, count_b: Tensor, rng: torch.Generator) -> Tensor:
    """(b, n): ``count_b`` (rounded up) different block starts of each batch row, 0 is padding.

    Place i of ``places_br`` (b, r) allows a start at byte i + 1.
    """
    count_b = torch.minimum(count_b.ceil().long(), places_br.sum(1))
    most = int(count_b.max())
    order = torch.rand(places_br.shape, generator=rng).to(places_br.device)
    chosen = order.masked_fill(~places_br, -1.0).topk(most, dim=1).indices + 1
    real = torch.arange(most, device=chosen.device) < count_b[:, None]
    return chosen.masked_fill(~real, 0)


BLOCK_DIFFUSION_OBJECTIVE = Component(
    kind="objective",
    name="block-diffusion",
    factory=BlockDiffusionObjective,
    params=BlockDiffusionObjectiveParams,
    summary="next bytes, masked blocks, and stale-latent rows",
    requires=frozenset({"decoder.denoises"}),
)
