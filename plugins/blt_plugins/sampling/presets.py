"""Presets: the names of the papers for verified samplers with a given drafter."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from blt_core.component import Preset, at_least, nested
from blt_core.protocols import Unmasking, Verification


@attrs.frozen(kw_only=True)
class BltSParams:
    """draft_bytes: bytes that the decoder drafts a round (k). verification: which of them stand."""

    draft_bytes: int = attrs.field(default=8, validator=at_least(1))
    verification: Verification = nested("verification", default="replay")


def expand_blt_s(params: BltSParams) -> dict[str, Any]:
    """BLT-S is verified sampling with the decoder itself as the drafter."""
    return {
        "use": "speculative",
        "drafter": {"use": "self", "draft_bytes": params.draft_bytes},
        "verification": params.verification,
    }


BLT_S = Preset(
    kind="sampler",
    name="blt-s",
    params=BltSParams,
    expand=expand_blt_s,
    summary="BLT-S: the local decoder drafts past the patch boundary, the model verifies",
)


@attrs.frozen(kw_only=True)
class BltDVParams:
    """block_bytes: bytes of a block (B). unmasking: which of them a pass fills.

    start: "aligned" begins the block at the open patch, "frontier" at the next byte. closure of a
    frontier block: "forced" closes the open patch, "none" reads the newest latent. verification:
    which drafted bytes stand.
    """

    block_bytes: int = attrs.field(default=8, validator=at_least(1))
    unmasking: Unmasking = nested("unmasking", default="all")
    start: Literal["aligned", "frontier"] = "aligned"
    closure: Literal["forced", "none"] = "forced"
    verification: Verification = nested("verification", default="replay")


def expand_blt_dv(params: BltDVParams) -> dict[str, Any]:
    """BLT-DV is verified sampling with block diffusion as the drafter."""
    return {
        "use": "speculative",
        "drafter": {
            "use": "diffusion",
            "block_bytes": params.block_bytes,
            "unmasking": params.unmasking,
            "start": params.start,
            "closure": params.closure,
        },
        "verification": params.verification,
    }


BLT_DV = Preset(
    kind="sampler",
    name="blt-dv",
    params=BltDVParams,
    expand=expand_blt_dv,
    summary="BLT-DV: a diffused block as the draft, the model verifies",
)
