"""``config.json`` of transformers' BLT models to config tables.

Defaults are those of transformers' ``BltConfig`` (read in version 5.23); files of older versions
name some keys otherwise. What cannot run here is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blt_core.errors import CheckpointError
from blt_core.wiring.config import without_none
from blt_plugins.huggingface.config_json import JsonTable

EPS = 1e-5
#: Byte v is id v + 4; 0 is BOE, 3 the delimiter of another tokenizer. All may be output.
IDS = {"byte_offset": 4, "bos": 1, "eos": 2, "outputs_specials": True}


def tables_of(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The config tables of a ``config.json``; CheckpointError that names all it cannot express."""
    kind = config.get("model_type")
    if kind != "blt":
        raise CheckpointError(f"{place}: model_type = {kind!r}; only 'blt' models can be read")
    top = JsonTable("", config, [])
    tables = _tables(top)
    if top.problems:
        lines = "\n".join(f"  {problem}" for problem in top.problems)
        raise CheckpointError(f"{place}: this model cannot be run here:\n{lines}")
    return without_none(tables)


def _tables(top: JsonTable) -> dict[str, Any]:
    _demand_supported(top)
    ids = top.integer("vocab_size", 260)
    scorer, encoder, big, decoder = _stacks(top, ids)
    latent_dim = big.pop("dim")
    local = {
        "use": "local",
        "latent_dim": latent_dim,
        "slots": top.integer("cross_attn_k", 2),
        "window": top.window("local_attention_window_len", 512),
        "double_residual": True,
    }
    return {
        "schema": 1,
        "model": {
            "context_bytes": top.integer("max_position_embeddings", 4096),
            "ids": {**IDS, "size": ids},
        },
        "patcher": {
            "use": "entropy",
            "threshold": top.number("patching_threshold", default=1.335442066192627),
            "byte_scorer": {"use": "transformer", **scorer},
        },
        "encoder": {**local, **encoder, **_ngrams(top)},
        "global_model": {"use": "transformer", "latent_dim": latent_dim, **big},
        "decoder": {**local, **decoder, "reads_byte_states": True},
    }


def _demand_supported(top: JsonTable) -> None:
    top.demand("patch_in_forward", True, default=True)
    top.demand("patching_mode", "entropy", default="entropy")
    top.demand("max_patch_length", None, default=None)
    top.demand("tie_word_embeddings", False, default=False)
    for name, value in (("bos_token_id", IDS["bos"]), ("eos_token_id", IDS["eos"])):
        top.demand(name, value, [value], None, default=None)
    for name in ("patch_size", "patching_threshold"):
        if top.values.get(name, 0) is None:
            top.problems.append(f"{name} = None is not supported; expected a number")


def _ngrams(top: JsonTable) -> dict[str, Any]:
    return {
        "ngram_sizes": top.integers("encoder_hash_byte_group_size", [3, 4, 5, 6, 7, 8]),
        "ngram_rows": top.integer("encoder_hash_byte_group_vocab", 500_002),
        "ngram_hash": "published",
        "ngram_functions": top.integer("encoder_hash_byte_group_nb_functions", 1),
    }


def _stacks(top: JsonTable, ids: int) -> tuple[dict[str, Any], ...]:
    """The sizes of patcher, encoder, global model and decoder."""
    patcher, encoder = top.part("patcher_config"), top.part("encoder_config")
    big, decoder = top.part("global_config"), top.part("decoder_config")
    scorer = {
        **_stack(patcher, dim=768, layers=14, heads=12, hidden=2048, theta=10_000.0),
        "window": patcher.window("sliding_window", 512),
    }
    local = _stack(encoder, dim=1024, layers=1, heads=16, hidden=None, theta=500_000.0)
    out = _stack(decoder, dim=1024, layers=9, heads=16, hidden=2816, theta=500_000.0)
    for table, sizes in ((patcher, scorer), (encoder, local), (decoder, out)):
        table.demand("num_key_value_heads", sizes["heads"], None, default=None)
        table.demand("vocab_size", ids, default=ids)
    if local["layers"] > 1:
        encoder.demand("cross_attn_all_layers", False, None, default=False)
    if out["layers"] > 1:
        decoder.demand("cross_attn_all_layers", True, default=True)
    slots = top.get("cross_attn_k", default=2)
    encoder.demand("cross_attn_k", slots, default=2)
    decoder.demand("cross_attn_k", slots, default=2)
    latent = _stack(big, dim=2048, layers=25, heads=16, hidden=5632, theta=500_000.0)
    decoder.demand("hidden_size_global", latent["dim"], default=2048)
    decoder.demand("hidden_size", local["dim"], default=1024)
    latent["kv_heads"] = big.integer("num_key_value_heads", latent["heads"])
    if latent["heads"] % latent["kv_heads"]:
        big.problems.append(
            f"{big.name}num_key_value_heads: {latent['kv_heads']} does not divide "
            f"the {latent['heads']} heads"
        )
    return scorer, local, latent, out


def _stack(
    table: JsonTable, *, dim: int, layers: int, heads: int, hidden: int | None, theta: float
) -> dict[str, Any]:
    """What the four parts have in common; the arguments are the defaults."""
    dim = table.integer("hidden_size", dim)
    heads = table.integer("num_attention_heads", heads)
    if dim % heads or dim // heads % 2:
        table.problems.append(
            f"{table.name}num_attention_heads: {heads} heads do not divide {dim} into even widths"
        )
    usual = hidden if "intermediate_size" not in table.values else None
    if table.number("rms_norm_eps", "norm_eps", default=EPS) != EPS:
        table.problems.append(f"{table.name}rms_norm_eps: only {EPS} is supported")
    table.demand("hidden_act", "silu", default="silu")
    table.demand("head_dim", dim // heads, None, default=None)
    return {
        "dim": dim,
        "layers": table.integer("num_hidden_layers", layers),
        "heads": heads,
        "hidden": table.integer("intermediate_size", usual or 8 * dim // 3),
        "rope_theta": _theta(table, theta),
    }


def _theta(table: JsonTable, default: float) -> float:
    """The base of rotary positions, by its new or one of its old names."""
    rope = table.get("rope_parameters", "rope_scaling", default={})
    if not isinstance(rope, Mapping):
        table.problems.append(f"{table.name}rope_parameters: expected a table, got {rope!r}")
        return default
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        table.problems.append(f"{table.name}rope_parameters.rope_type = {kind!r} is not supported")
    theta = rope.get("rope_theta", table.get("rope_theta", default=default))
    return table.finite("rope_theta", theta, default)
