"""What the parts of a model read and give: ragged rows, blocks, patches, latents, logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from torch import Tensor


@attrs.frozen(eq=False)
class Rows:
    """New *clean* byte rows: row i stands for byte i and predicts byte i + 1.

    ids_br: int64. lengths: new rows of each batch row. latent_br: int64, the index of the latent
    that each row reads (decoder only). states_brD: the encoder's byte states, for decoders that
    read them instead of embedding bytes themselves (``reads_byte_states``).

    extents_2b: int64, on the device: where the new rows of each batch row begin, and how many they
    are. The cache and ``lengths`` say so too; from here it needs no copy to the device. None: a
    draft of one text, or nobody sent them. settled: of the first rows of all texts: no rewind will
    go below these positions, so a cache with a window need not hold all of a prompt (None: not
    known). May be ignored.

    With a cache the first new row continues where the cache ends; without one it is byte 0.
    """

    ids_br: Tensor
    lengths: tuple[int, ...]
    latent_br: Tensor | None = None
    states_brD: Tensor | None = None
    extents_2b: Tensor | None = None
    settled: tuple[int, ...] | None = None


@attrs.frozen(eq=False)
class Blocks:
    """Blocks: B rows each that see the clean rows before their start, and their own block.

    ids_bnB: int64, with [MASK] at the bytes to fill. start_bn: int64, position of the first byte.
    latent_bn: int64, the latent that all rows of the block read. causal_bn: bool, blocks whose rows
    see their own block up to themselves only (None: no block is). Row j of a causal block predicts
    the byte after its own, of any other block the byte at its own position. active: which batch
    rows take part (None: all); what comes of the others means nothing, and need not be computed.

    On the device, or None where nobody sent them: active_a, the batch rows that take part;
    cached_b, how many clean rows the cache holds of each, with those that come with the blocks.
    """

    ids_bnB: Tensor
    start_bn: Tensor
    latent_bn: Tensor
    causal_bn: Tensor | None = None
    active: tuple[bool, ...] | None = None
    active_a: Tensor | None = None
    cached_b: Tensor | None = None


@attrs.frozen(eq=False)
class Patches:
    """Patches to embed: patch j of row b is bytes [start, start + size) of that row.

    start_bm, size_bm: int64; size 0 is padding. counts: patches of each batch row. longest: bytes
    of the longest (None: nobody counted).
    """

    start_bm: Tensor
    size_bm: Tensor
    counts: tuple[int, ...]
    longest: int | None = None


@attrs.frozen(eq=False)
class Latents:
    """Global-model inputs or outputs of new patches: values_bmD and the patches of each row.

    extents_2b, settled: as those of :class:`Rows`, of patches.
    """

    values_bmD: Tensor
    counts: tuple[int, ...]
    extents_2b: Tensor | None = None
    settled: tuple[int, ...] | None = None


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
