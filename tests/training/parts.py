"""Parts of a plugin of our own: tied weights, and weights that no ``state_dict`` lists."""

from __future__ import annotations

from types import SimpleNamespace

import attrs
import torch
from torch import nn

from blt_core import Component, hookimpl
from blt_core.plugins.loading import Plugins, load_plugins
from blt_plugins.latent.transformer import GlobalTransformer, GlobalTransformerParams
from blt_plugins.local.decoder import LocalDecoder, LocalDecoderParams, abilities
from blt_plugins.patching.scorer import TransformerScorer, TransformerScorerParams

#: Ways to hold what the forward pass of the global model adds to its output.
WAYS = (
    *("list", "parameter", "namespace", "method", "noise", "plain-noise", "grown"),
    *("module-list", "computed", "drop-out"),
)


@attrs.frozen(kw_only=True)
class HoldingParams(GlobalTransformerParams):
    way: str = "module-list"


class Holding(GlobalTransformer):
    """The global model, and something that is held in the way that its params name."""

    def __init__(self, params: HoldingParams, context) -> None:
        super().__init__(params, context)
        self.way, width = params.way, params.latent_dim
        if self.way == "list":
            self.cells = [nn.Linear(width, width)]
        elif self.way == "module-list":
            self.cells = nn.ModuleList([nn.Linear(width, width)])
        elif self.way == "parameter":
            self.shifts = {"a": nn.Parameter(torch.ones(width))}
        elif self.way == "namespace":
            self.inner = SimpleNamespace(cell=nn.Linear(width, width))
        elif self.way == "noise":
            self.register_buffer("table", torch.rand(width), persistent=False)
        elif self.way == "plain-noise":
            self.table = torch.rand(width)
        elif self.way == "computed":
            self.register_buffer("table", torch.arange(width) / width, persistent=False)
        elif self.way == "grown":
            self.table = torch.zeros(width)
        elif self.way == "drop-out":
            self.drop = nn.Dropout(0.5)

    def forward(self, embeddings, cache):
        out = super().forward(embeddings, cache)
        if hasattr(self, "cells"):
            return out + self.cells[0](out)
        if hasattr(self, "shifts"):
            return out + self.shifts["a"]
        if hasattr(self, "inner"):
            return out + self.inner.cell(out)
        if self.way == "grown" and self.training and torch.is_grad_enabled():
            self.table += 0.5  # a running figure that is no buffer
        if hasattr(self, "table"):
            return out + self.table
        return self.drop(out) if hasattr(self, "drop") else out


class TiedDecoder(LocalDecoder):
    """The decoder with one matrix for embedding and head."""

    def __init__(self, params: LocalDecoderParams, context) -> None:
        super().__init__(params, context)
        self.head.weight = self.embed.weight


class TiedScorer(TransformerScorer):
    """The byte scorer with one matrix for embedding and head."""

    def __init__(self, params: TransformerScorerParams, context) -> None:
        super().__init__(params, context)
        self.head.weight = self.embed.weight


class TiedLayers(GlobalTransformer):
    """A global model of two layers that share a matrix."""

    def __init__(self, params: GlobalTransformerParams, context) -> None:
        super().__init__(params, context)
        first, second = self.stack.layers
        second.mlp.down.weight = first.mlp.down.weight


class Parts:
    @hookimpl
    def blt_components(self):
        width = {"latent_dim": "latent_dim"}
        return [
            Component("global_model", "acme/holding", Holding, HoldingParams, "x", dims=width),
            Component(
                "global_model", "acme/layers", TiedLayers, GlobalTransformerParams, "x", dims=width
            ),
            Component(
                *("decoder", "acme/tied", TiedDecoder, LocalDecoderParams, "x"),
                dims=width,
                provides=abilities,
            ),
            Component("byte_scorer", "acme/tied", TiedScorer, TransformerScorerParams, "x"),
        ]


def plugins() -> Plugins:
    """The installed plugins and these."""
    return load_plugins(extra=[("acme-parts", "acme", Parts())])
