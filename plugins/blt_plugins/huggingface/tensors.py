"""Names and shapes of the published tensors, and what they are here.

Where this library keeps one matrix (q, k and v; gate and up), the published format keeps several,
one above the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from blt_core.errors import CheckpointError
from blt_core.storage.safetensors import LazyTensors


@attrs.frozen
class Source:
    """A published tensor and its shape."""

    name: str
    shape: tuple[int, ...]


#: Parameter name here to the published tensors that are stacked to make it.
Layout = Mapping[str, tuple[Source, ...]]

#: What old files hold beside parameters: tables of positions, which are computed.
_COMPUTED = "rotary_emb.inv_freq"


class JoinedTensors(LazyTensors):
    """Published tensors by the names they have here, read when they are asked for.

    Raises CheckpointError, when it is made, that lists all missing, surplus and misshapen tensors;
    ``place`` says where they come from.
    """

    def __init__(self, published: LazyTensors, layout: Layout, place: str) -> None:
        self._published, self._layout = published, layout
        _check(published, layout, place)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        shapes = [source.shape for source in self._layout[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._published[source.name] for source in self._layout[name]]
        if len(parts) == 1:
            return parts[0]
        joined = torch.cat(parts)
        self.release(name)
        return joined

    def release(self, name: str) -> None:
        """Let memory go of the published tensors that a parameter was made of."""
        for source in self._layout[name]:
            self._published.release(source.name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __len__(self) -> int:
        return len(self._layout)


def split_tensors(tensors: Mapping[str, Tensor], layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Each published tensor with its name, cut from the parameters of a model."""
    for name, sources in layout.items():
        parts = tensors[name].split([source.shape[0] for source in sources])
        for source, part in zip(sources, parts, strict=True):
            yield source.name, part


def layout_of(tables: Mapping[str, Any]) -> Layout:
    """Every parameter of a model with these tables, and where it comes from."""
    scorer, encoder = tables["patcher"]["byte_scorer"], tables["encoder"]
    big, decoder = tables["global_model"], tables["decoder"]
    ids = tables["model"]["ids"]["size"]
    return {
        **_scorer(scorer, ids),
        **_encoder(encoder, big["latent_dim"], ids),
        **_stack(
            "global_model.stack", "model.global_transformer", {**big, "dim": big["latent_dim"]}
        ),
        **_decoder(decoder, big["latent_dim"], ids),
    }


def _scorer(table: Mapping[str, Any], ids: int) -> Layout:
    own, source, dim = "patcher.byte_scorer", "model.patcher", table["dim"]
    return {
        **_one(f"{own}.embed", f"{source}.embed_tokens", ids, dim),
        **_stack(f"{own}.stack", source, table),
        **_one(f"{own}.norm", f"{source}.norm", dim),
        **_one(f"{own}.head", f"{source}.lm_head", ids, dim),
    }


def _encoder(table: Mapping[str, Any], latent_dim: int, ids: int) -> Layout:
    source, dim, wide = "model.local_encoder", table["dim"], table["slots"] * table["dim"]
    rows = table["ngram_functions"] * len(table["ngram_sizes"]) * table["ngram_rows"]
    projection = "model.global_transformer.token_embedding_projection"
    pooling = "encoder.pooling"
    return {
        **_one("encoder.embed", f"{source}.embed_tokens", ids, dim),
        **_one("encoder.ngrams.table", "model.encoder_hash_tok_embedding", rows, dim),
        **_stack("encoder.stack", source, table),
        **_one(f"{pooling}.queries", f"{source}.patch_embedding_projection", wide, dim),
        **_cross(pooling, f"{source}.cross_attn_layers.0", dim, "query_norm", "state_norm"),
        **(_one("encoder.to_latent", projection, latent_dim, wide) if wide != latent_dim else {}),
    }


def _decoder(table: Mapping[str, Any], latent_dim: int, ids: int) -> Layout:
    source, dim, wide = "model.local_decoder", table["dim"], table["slots"] * table["dim"]
    layout = {
        **_one("decoder.from_latent", f"{source}.patch_embedding_projection", wide, latent_dim),
        **_stack("decoder", source, table),
        **_one("decoder.norm", f"{source}.norm", dim),
        **_one("decoder.head", "lm_head", ids, dim),
    }
    for layer in range(table["layers"]):
        own, theirs = (
            f"decoder.layers.{layer}.latent_attention",
            f"{source}.cross_attn_layers.{layer}",
        )
        layout |= _cross(own, theirs, dim, "row_norm", "slot_norm")
    return layout


def _stack(own: str, source: str, table: Mapping[str, Any]) -> dict[str, tuple[Source, ...]]:
    layout: dict[str, tuple[Source, ...]] = {}
    for layer in range(table["layers"]):
        layout |= _layer(f"{own}.layers.{layer}", f"{source}.layers.{layer}", table)
    return layout


def _layer(own: str, source: str, table: Mapping[str, Any]) -> dict[str, tuple[Source, ...]]:
    dim, hidden = table["dim"], table["hidden"]
    narrow = dim // table["heads"] * (table.get("kv_heads") or table["heads"])
    attention, mlp = f"{source}.self_attn", f"{source}.mlp"
    return {
        **_one(f"{own}.attention_norm", f"{source}.input_layernorm", dim),
        f"{own}.attention.qkv.weight": (
            Source(f"{attention}.q_proj.weight", (dim, dim)),
            Source(f"{attention}.k_proj.weight", (narrow, dim)),
            Source(f"{attention}.v_proj.weight", (narrow, dim)),
        ),
        **_one(f"{own}.attention.out", f"{attention}.o_proj", dim, dim),
        **_one(f"{own}.mlp_norm", f"{source}.post_attention_layernorm", dim),
        f"{own}.mlp.gate_up.weight": (
            Source(f"{mlp}.gate_proj.weight", (hidden, dim)),
            Source(f"{mlp}.up_proj.weight", (hidden, dim)),
        ),
        **_one(f"{own}.mlp.down", f"{mlp}.down_proj", dim, hidden),
    }


def _cross(
    own: str, source: str, dim: int, query_norm: str, key_norm: str
) -> dict[str, tuple[Source, ...]]:
    return {
        **_one(f"{own}.{query_norm}", f"{source}.q_norm", dim),
        **_one(f"{own}.{key_norm}", f"{source}.k_norm", dim),
        **_one(f"{own}.q", f"{source}.q_proj", dim, dim),
        f"{own}.kv.weight": (
            Source(f"{source}.k_proj.weight", (dim, dim)),
            Source(f"{source}.v_proj.weight", (dim, dim)),
        ),
        **_one(f"{own}.out", f"{source}.o_proj", dim, dim),
    }


def _one(own: str, source: str, *shape: int) -> dict[str, tuple[Source, ...]]:
    return {f"{own}.weight": (Source(f"{source}.weight", shape),)}


def _check(published: LazyTensors, layout: Layout, place: str) -> None:
    wanted = {source.name: source.shape for sources in layout.values() for source in sources}
    problems = [f"{name}: missing" for name in wanted if name not in published]
    problems += [
        f"{name}: no tensor of this model"
        for name in published
        if name not in wanted and not name.endswith(_COMPUTED)
    ]
    problems += [
        f"{name}: expected {shape}, found {found}"
        for name, shape in wanted.items()
        if name in published and (found := published.shape(name)) != shape
    ]
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"{place}: the tensors do not fit the config.json:\n{lines}")
