"""Config tables to the ``config.json`` that transformers reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from blt_core.errors import CheckpointError
from blt_plugins.huggingface.reading import EPS, IDS


def config_of(tables: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The ``config.json`` of a model; CheckpointError that names what the format has no word for.

    tables: with every key (``Plan.describe_model``).
    """
    if problems := list(_inexpressible(tables)):
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{place}: transformers has no such model:\n{lines}")
    encoder, decoder = tables["encoder"], tables["decoder"]
    scorer, big = tables["patcher"]["byte_scorer"], tables["global_model"]
    size = tables["model"]["ids"]["size"]
    cross = {
        "vocab_size": size,
        "cross_attn_k": encoder["slots"],
        "hidden_size_global": big["latent_dim"],
    }
    return {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "vocab_size": size,
        "max_position_embeddings": tables["model"]["context_bytes"],
        "bos_token_id": IDS["bos"],
        "eos_token_id": IDS["eos"],
        "tie_word_embeddings": False,
        "patch_in_forward": True,
        "patching_mode": "entropy",
        "patching_threshold": tables["patcher"]["threshold"],
        "max_patch_length": None,
        "local_attention_window_len": encoder.get("window"),
        "cross_attn_k": encoder["slots"],
        "encoder_hash_byte_group_size": encoder["ngram_sizes"],
        "encoder_hash_byte_group_vocab": encoder["ngram_rows"],
        "encoder_hash_byte_group_nb_functions": encoder["ngram_functions"],
        "patcher_config": {
            **_stack_of(scorer),
            "vocab_size": size,
            "sliding_window": scorer.get("window"),
        },
        "encoder_config": {**_stack_of(encoder), **cross, "cross_attn_all_layers": False},
        "global_config": _stack_of({**big, "dim": big["latent_dim"]}),
        "decoder_config": {**_stack_of(decoder), **cross, "cross_attn_all_layers": True},
    }


def _stack_of(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": table["dim"],
        "num_hidden_layers": table["layers"],
        "num_attention_heads": table["heads"],
        "num_key_value_heads": table.get("kv_heads") or table["heads"],
        "intermediate_size": table["hidden"],
        "hidden_act": "silu",
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": table["rope_theta"]},
    }


def _inexpressible(tables: Mapping[str, Any]) -> Iterator[str]:
    """What in ``tables`` the format has no word for, each with what it would have to be."""
    encoder = tables["encoder"]
    demanded = {
        "patcher.use": "entropy",
        "patcher.max_patch_bytes": None,
        "patcher.byte_scorer.use": "transformer",
        "encoder.use": "local",
        "encoder.double_residual": True,
        "encoder.ngram_hash": "published",
        "global_model.use": "transformer",
        "global_model.window": None,
        "decoder.use": "local",
        "decoder.double_residual": True,
        "decoder.reads_byte_states": True,
        "decoder.slots": encoder.get("slots"),
        "decoder.window": encoder.get("window"),
        **{f"model.ids.{key}": value for key, value in {**IDS, "mask": None}.items()},
    }
    for path, wanted in demanded.items():
        found: Any = tables
        for key in path.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        if found != wanted:
            yield f"{path} = {found!r}, which would have to be {wanted!r}"
    if not encoder.get("ngram_sizes"):
        yield "encoder.ngram_sizes: empty, which would have to name a size"
