"""``config.json`` of transformers' BLT models to config tables, and back.

Defaults are those of transformers' ``BltConfig`` (read in version 5.23); files of older versions
name some keys otherwise. What cannot run here is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from blt_core.config import without_none
from blt_core.errors import CheckpointError

EPS = 1e-5
#: Byte v is id v + 4; 0 is BOE, 3 the delimiter of another tokenizer. All may be output.
IDS = {"byte_offset": 4, "bos": 1, "eos": 2, "outputs_specials": True}


@attrs.frozen
class _Table:
    """One table of ``config.json``; what it cannot give is added to ``problems`` by its path."""

    name: str
    values: Mapping[str, Any]
    problems: list[str]

    def part(self, name: str) -> _Table:
        """The table below this one."""
        values = self.values.get(name) or {}
        if not isinstance(values, Mapping):
            self.problems.append(f"{name}: expected a table, got {values!r}")
            values = {}
        return _Table(f"{name}.", values, self.problems)

    def get(self, *names: str, default: Any) -> Any:
        """The value of a key by its new or its old name; a null counts as absent."""
        found = (self.values[name] for name in names if self.values.get(name) is not None)
        return next(found, default)

    def integer(self, name: str, default: int) -> int:
        """A size or a count."""
        return self._whole(name, self.get(name, default=default), default)

    def window(self, name: str, default: int) -> int | None:
        """How many bytes a row sees: null stands for all, an absent key for the default."""
        value = self.values.get(name, default)
        return None if value is None else self._whole(name, value, default)

    def number(self, *names: str, default: float) -> float:
        """A finite number."""
        value = self.get(*names, default=default)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        self.problems.append(f"{self.name}{names[0]}: expected a number, got {value!r}")
        return default

    def integers(self, name: str, default: list[int]) -> list[int]:
        """A list of sizes."""
        value = self.get(name, default=default) or default
        if isinstance(value, list):
            return [self._whole(name, each, 1) for each in value]
        self.problems.append(f"{self.name}{name}: expected a list, got {value!r}")
        return default

    def demand(self, name: str, *supported: Any, default: Any) -> None:
        """Note a value that is not among those supported."""
        if (value := self.values.get(name, default)) not in supported:
            self.problems.append(f"{self.name}{name} = {value!r} is not supported")

    def _whole(self, name: str, value: Any, default: int) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return value
        self.problems.append(f"{self.name}{name}: expected a whole number from 1 on, got {value!r}")
        return default


def tables_of(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The config tables of a ``config.json``; CheckpointError that names all it cannot express."""
    if config.get("model_type") != "blt":
        kind = config.get("model_type")
        raise CheckpointError(f"{place}: model_type = {kind!r}; only 'blt' models can be read")
    problems: list[str] = []
    top = _Table("", config, problems)
    ids = {**IDS, "size": top.integer("vocab_size", 260)}
    scorer, encoder, big, decoder = _stacks(top, ids["size"])
    for name, supported, default in (
        ("patch_in_forward", [True], True),
        ("patching_mode", ["entropy"], "entropy"),
        ("max_patch_length", [None], None),
        ("tie_word_embeddings", [False], False),
        ("bos_token_id", [IDS["bos"], None], None),
        ("eos_token_id", [IDS["eos"], None], None),
    ):
        top.demand(name, *supported, default=default)
    if encoder["dim"] != decoder["dim"]:
        problems.append(
            f"decoder_config.hidden_size: {decoder['dim']} is not supported beside "
            f"encoder_config.hidden_size {encoder['dim']}"
        )
    latent_dim = big.pop("dim")
    cross = {
        "latent_dim": latent_dim,
        "slots": top.integer("cross_attn_k", 2),
        "window": top.window("local_attention_window_len", 512),
        "double_residual": True,
    }
    ngrams = {
        "ngram_sizes": top.integers("encoder_hash_byte_group_size", [3, 4, 5, 6, 7, 8]),
        "ngram_rows": top.integer("encoder_hash_byte_group_vocab", 500_002),
        "ngram_hash": "published",
        "ngram_functions": top.integer("encoder_hash_byte_group_nb_functions", 1),
    }
    threshold = top.number("patching_threshold", default=1.335442066192627)
    context = top.integer("max_position_embeddings", 4096)
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{place}: this model cannot be run here:\n{lines}")
    tables = {
        "schema": 1,
        "model": {"context_bytes": context, "ids": ids},
        "patcher": {
            "use": "entropy",
            "threshold": threshold,
            "byte_scorer": {"use": "transformer", **scorer},
        },
        "encoder": {"use": "local", **encoder, **cross, **ngrams},
        "global_model": {"use": "transformer", "latent_dim": latent_dim, **big},
        "decoder": {"use": "local", **decoder, **cross, "reads_byte_states": True},
    }
    return without_none(tables)


def _stacks(top: _Table, ids: int) -> tuple[dict[str, Any], ...]:
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
    latent["kv_heads"] = big.integer("num_key_value_heads", latent["heads"])
    return scorer, local, latent, out


def _stack(
    table: _Table, *, dim: int, layers: int, heads: int, hidden: int | None, theta: float
) -> dict[str, Any]:
    """What the four parts have in common; the arguments are the defaults."""
    dim, heads = (
        table.integer("hidden_size", dim),
        table.integer("num_attention_heads", heads),
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


def _theta(table: _Table, default: float) -> float:
    """The base of rotary positions, by its new or one of its old names."""
    rope = table.get("rope_parameters", "rope_scaling", default={})
    if not isinstance(rope, Mapping):
        table.problems.append(f"{table.name}rope_parameters: expected a table, got {rope!r}")
        return default
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        table.problems.append(f"{table.name}rope_parameters.rope_type = {kind!r} is not supported")
    theta = rope.get("rope_theta", table.get("rope_theta", default=default))
    return _Table(table.name, {"rope_theta": theta}, table.problems).number(
        "rope_theta", default=default
    )


def config_of(tables: Mapping[str, Any], place: str, dtype: str) -> dict[str, Any]:
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
        "dtype": dtype,
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
