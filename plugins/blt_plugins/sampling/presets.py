"""Presets: the names of the papers for verified samplers with a given drafter."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from blt_core.component import Preset, at_least, nested
from blt_core.protocols import CostModel, Unmasking, Verification

#: Shorter matches are so often wrong that block diffusion is asked instead.
LIKELY = 2


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


@attrs.frozen(kw_only=True)
class BltLookupParams:
    """draft_bytes: bytes that a round drafts (k). files: texts to look in besides the own one.

    verification: which drafted bytes stand.
    """

    draft_bytes: int = attrs.field(default=24, validator=at_least(1))
    files: tuple[str, ...] = ()
    verification: Verification = nested("verification", default="replay")


def expand_blt_lookup(params: BltLookupParams) -> dict[str, Any]:
    """What the decoder alone would write, proposed by a look-up: for text that repeats itself."""
    return {
        "use": "speculative",
        "drafter": {
            "use": "cascade",
            "draft_bytes": params.draft_bytes,
            "drafter": _lookup(params.draft_bytes, params.files),
        },
        "verification": params.verification,
    }


BLT_LOOKUP = Preset(
    kind="sampler",
    name="blt-lookup",
    params=BltLookupParams,
    expand=expand_blt_lookup,
    summary="drafts as blt-s, in fewer passes where text repeats: a cascade over a look-up",
)


@attrs.frozen(kw_only=True)
class BltCascadeParams:
    """draft_bytes: bytes that a round drafts (k). block_bytes: of the blocks in between, if any.

    files: texts to look in besides the own one. verification: which drafted bytes stand.
    """

    draft_bytes: int = attrs.field(default=24, validator=at_least(1))
    block_bytes: int = attrs.field(default=8, validator=at_least(1))
    files: tuple[str, ...] = ()
    verification: Verification = nested("verification", default="replay")


def expand_blt_cascade(params: BltCascadeParams, abilities: frozenset[str]) -> dict[str, Any]:
    """A cascade over a look-up, and over block diffusion where that finds nothing, if it can."""
    return {
        "use": "speculative",
        "drafter": _cascade(params, abilities),
        "verification": params.verification,
    }


BLT_CASCADE = Preset(
    kind="sampler",
    name="blt-cascade",
    params=BltCascadeParams,
    expand=expand_blt_cascade,
    adapts=True,
    summary="drafts as blt-s, in fewer passes: a cascade over a look-up, then over diffusion",
)


@attrs.frozen(kw_only=True)
class BltAutoParams(BltCascadeParams):
    """draft_bytes: at most so many a round. block_bytes: of the blocks in between, if any.

    files: texts to look in besides the own one. cost: what is to be saved. patch_bytes: mean length
    of patches. verification: which drafted bytes stand.
    """

    draft_bytes: int = attrs.field(default=32, validator=at_least(1))
    cost: CostModel = nested("cost_model", default="bandwidth")
    patch_bytes: float = attrs.field(default=4.0, validator=at_least(1))


def expand_blt_auto(params: BltAutoParams, abilities: frozenset[str]) -> dict[str, Any]:
    """The cascade, for as many bytes as pay."""
    return {
        "use": "speculative",
        "drafter": {
            "use": "adaptive",
            "max_bytes": params.draft_bytes,
            "drafter": _cascade(params, abilities),
            "cost": params.cost,
            "patch_bytes": params.patch_bytes,
        },
        "verification": params.verification,
    }


BLT_AUTO = Preset(
    kind="sampler",
    name="blt-auto",
    params=BltAutoParams,
    expand=expand_blt_auto,
    adapts=True,
    summary="blt-cascade that drafts as far as it pays, which may be not at all",
)


def _cascade(params: BltCascadeParams, abilities: frozenset[str]) -> dict[str, Any]:
    inner = _lookup(params.draft_bytes, params.files)
    if "decoder.denoises" in abilities:
        inner["min_bytes"] = LIKELY
        blocks = {"use": "diffusion", "block_bytes": params.block_bytes}
        inner = {"use": "first", "drafters": {"lookup": inner, "diffusion": blocks}}
    return {"use": "cascade", "draft_bytes": params.draft_bytes, "drafter": inner}


def _lookup(draft_bytes: int, files: tuple[str, ...]) -> dict[str, Any]:
    # The decoder adds a byte of its own to each proposal. A wrong one costs no pass, so any match
    # will do where nothing else would propose.
    size = max(draft_bytes - 1, 1)
    found: dict[str, Any] = {"use": "lookup", "draft_bytes": size, "min_bytes": 1}
    return {**found, "files": list(files)} if files else found
