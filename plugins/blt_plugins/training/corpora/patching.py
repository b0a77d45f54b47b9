"""What the patches of a text depend on, so that patches made before are never mistaken."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from blt_core.errors import DataError
from blt_core.model import Model
from blt_core.protocols import Documents

#: Keys of a patcher that are told apart from its fingerprint, to be named in messages.
APART = ("threshold", "max_patch_bytes")


def patching_of(model: Model, context_bytes: int) -> dict[str, Any]:
    """What decides the patches of windows of ``context_bytes``; plain values, for JSON.

    scorer: the SHA-256 of the patcher's configuration and weights, without the keys below.
    threshold: nats. ids: how bytes and special ids are numbered.
    """
    return {
        "scorer": fingerprint(model),
        **{key: getattr(model.patcher, key, None) for key in APART},
        "context_bytes": context_bytes,
        "ids": attrs.asdict(model.scheme),
    }


def fingerprint(model: Model) -> str:
    """A name for a patcher: its configuration and its weights, as they are in memory."""
    table = {k: v for k, v in model.settings.get("patcher", {}).items() if k not in APART}
    total = hashlib.sha256(json.dumps(table, sort_keys=True).encode())
    modules = model.module_dict()
    tensors = modules["patcher"].state_dict() if "patcher" in modules else {}
    for name, tensor in sorted(tensors.items()):
        total.update(f"|{name} {tensor.dtype} {tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def check_patching(
    documents: Documents,
    model: Model,
    context_bytes: int,
    *,
    trains_scorer: bool = False,
    save_dtype: str = "float32",
) -> None:
    """Raise DataError if documents come with patches that this model would not make.

    trains_scorer: whether the run is yet to train the scorer of ``model``. save_dtype: what the
    scorer was rounded to, for messages.
    """
    there: Mapping[str, Any] | None = getattr(documents, "patching", None)
    if there is None:
        return
    if trains_scorer:
        raise DataError(
            f"the corpus was prepared with the scorer {show(there.get('scorer'))}, but this run "
            "trains a scorer of its own\n"
            "  fix: take the scorer that it was prepared with ([run] checkpoint or [train.scorer] "
            "checkpoint), or train on the corpus that it was made of"
        )
    now = patching_of(model, context_bytes)
    wrong = [key for key in now if there.get(key) != now[key]]
    if wrong:
        lines = "".join(f"\n  {k}: {show(there.get(k))} there, {show(now[k])} now" for k in wrong)
        if "scorer" in wrong and save_dtype != "float32":
            lines += f"\n  (the scorer now is rounded to train.save_dtype = {save_dtype!r})"
        raise DataError(
            f"the corpus was prepared for other patches than this run makes:{lines}\n"
            "  fix: run blt prepare with this configuration, or set these as they were"
        )


def show(value: object) -> str:
    """A value of a message; of a fingerprint the beginning."""
    long = isinstance(value, str) and len(value) > 12  # noqa: PLR2004
    return f"{str(value)[:12]}…" if long else repr(value)
