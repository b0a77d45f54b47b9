"""Parts of models that are broken on purpose, each in one way, and the same parts unbroken.

All of them are a running mean over what they have read, which needs a cache; ``fault`` says what is
wrong with it.
"""

from __future__ import annotations

import attrs
import torch
from torch import nn

from blt_core import Component, hookimpl
from blt_core.types import DecoderOutput, Output


class MeanCache:
    """Prefix sums of each row of a batch."""

    def __init__(self, batch, fault=""):
        self.sums = [[] for _ in range(batch)]
        self.counts = [0] * batch
        self.fault = fault

    @property
    def lengths(self):
        if self.fault == "zero-lengths":
            return [0] * len(self.sums)
        return list(self.counts)

    def rewind(self, lengths):
        if self.fault == "rewind-noop":
            return
        for row, length in enumerate(lengths):
            if self.fault != "half-rewind":
                del self.sums[row][length:]
            self.counts[row] = min(self.counts[row], length)

    def settle(self, lengths):
        if self.fault == "settle-forgets":
            for row, length in enumerate(lengths):
                self.sums[row] = [
                    each * 0 if at < length else each for at, each in enumerate(self.sums[row])
                ]


class Mean(nn.Module):
    """(b, n, D) to running means (b, n, D), with one linear layer after it."""

    def __init__(self, width, fault):
        super().__init__()
        layer = nn.Linear(width, width, dtype=torch.float64)
        self.layers = [layer] if fault == "plain-list" else nn.ModuleList([layer])
        self.fault, self.kept = fault, None
        if fault == "random-buffer":
            self.register_buffer("shift", torch.randn(width, dtype=torch.float64), persistent=False)

    def forward(self, x, lengths, cache):
        fault, out = self.fault, torch.zeros_like(x)
        for row, count in enumerate(lengths):
            before = cache.sums[row] if cache is not None and fault != "ignores-cache" else []
            start = before[-1] if before else torch.zeros_like(x[0, 0])
            first = len(before)
            if fault == "state-on-self" and cache is not None and self.kept is not None and first:
                start, first = self.kept
            new = x[row, :count]
            sums = start + new.cumsum(0)
            at = torch.arange(first + 1, first + 1 + count, dtype=x.dtype)[:, None]
            mean = sums / at
            if fault == "looks-ahead" and count:
                mean = mean + 0.1 * new.roll(-1, 0)
            if fault == "reads-padding" and x.shape[1] > count:
                mean = mean + 0.1 * x[row, -1]
            out[row, :count] = mean
            if count:
                self.kept = (sums[-1], first + count)
            if cache is not None:
                cache.sums[row] += list(sums)
                if fault == "trims-unsettled":
                    old = max(len(cache.sums[row]) - 64, 0)
                    cache.sums[row][:old] = [each * 0 for each in cache.sums[row][:old]]
                cache.counts[row] += count
        out = self.layers[0](out)
        if fault == "random":
            out = out + torch.randn(1, dtype=out.dtype)
        if fault == "random-buffer":
            out = out + self.shift
        if fault == "last-only":
            out = out[:, -1:]
        if fault == "writes" and isinstance(self, GlobalMean):
            x.zero_()
        return out


class GlobalMean(Mean):
    """The same, of embeddings."""


@attrs.frozen(kw_only=True)
class Params:
    """fault: what is wrong."""

    fault: str = ""


@attrs.frozen(kw_only=True)
class LatentParams:
    """fault: what is wrong. latent_dim: width of the latents."""

    fault: str = ""
    latent_dim: int


class Scorer(nn.Module):
    def __init__(self, params, context):
        super().__init__()
        self.fault = params.fault
        self.embed = nn.Embedding(context.scheme.size, 8)
        self.mean = Mean(8, params.fault)
        self.head = nn.Linear(8, context.scheme.size)

    def new_cache(self, batch):
        return MeanCache(batch, self.fault)

    def logits(self, rows, cache):
        x = self.embed(rows.ids_br)
        if self.fault == "writes":
            rows.ids_br[:, 0] = 5
            return self.head(x)
        return self.head(self.mean(x, rows.lengths, cache))


class Encoder(nn.Module):
    def __init__(self, params, context):
        super().__init__()
        self.fault = params.fault
        self.embed = nn.Embedding(context.scheme.size, params.latent_dim)
        self.mean = Mean(params.latent_dim, params.fault)

    def new_cache(self, batch):
        return MeanCache(batch, self.fault)

    def byte_states(self, rows, cache):
        x = self.embed(rows.ids_br)
        if self.fault == "writes":
            rows.ids_br[:, 0] = 5
        return self.mean(x, rows.lengths, cache)

    def patch_embeddings(self, states_brD, patches):
        states = states_brD
        b, m = patches.start_bm.shape
        out = states.new_zeros(b, m, states.shape[-1])
        for row in range(b):
            for j in range(patches.counts[row]):
                first, size = int(patches.start_bm[row, j]), int(patches.size_bm[row, j])
                if self.fault == "other-bytes":
                    first, size = 0, first + size
                if self.fault == "whole-batch":
                    out[row, j] = states[:, first : first + size].mean((0, 1))
                else:
                    out[row, j] = states[row, first : first + size].mean(0)
        return out


class Global(nn.Module):
    def __init__(self, params, context):
        super().__init__()
        self.fault = params.fault
        self.mean = GlobalMean(params.latent_dim, params.fault)

    def new_cache(self, batch):
        return MeanCache(batch, self.fault)

    def forward(self, embeddings, cache):
        return self.mean(embeddings.values_bmD, embeddings.counts, cache)


@attrs.frozen
class Two:
    rows: MeanCache
    latents: MeanCache


class Decoder(nn.Module):
    reads_byte_states = False

    def __init__(self, params, context):
        super().__init__()
        self.fault, self.denoises = params.fault, True
        self.embed = nn.Embedding(context.scheme.size, params.latent_dim)
        self.mean = Mean(params.latent_dim, params.fault)
        self.head = nn.Linear(params.latent_dim, context.scheme.size)

    def new_cache(self, batch):
        return Two(MeanCache(batch, self.fault), MeanCache(batch))

    def forward(self, clean, blocks, latents, cache):
        given = [[] for _ in range(len((clean or blocks).latent_br if clean else blocks.latent_bn))]
        if cache is not None:
            given = [list(row) for row in cache.latents.sums]
        if latents is not None:
            for row, count in enumerate(latents.counts):
                new = list(latents.values_bmD[row, :count])
                given[row] += new
                if cache is not None:
                    cache.latents.sums[row] += new
                    cache.latents.counts[row] += count
        zero = torch.zeros(self.embed.embedding_dim, dtype=self.embed.weight.dtype)
        own = cache.rows if cache is not None else MeanCache(len(given))
        made = None
        if clean is not None:
            x = self.embed(clean.ids_br).clone()
            for row, count in enumerate(clean.lengths):
                for i in range(count):
                    at = int(clean.latent_br[row, i])
                    if self.fault == "next-latent":
                        at = min(at + 1, len(given[row]) - 1)
                    x[row, i] += given[row][at] if given[row] else zero
            hidden = self.mean(x, clean.lengths, own)
            if self.fault == "writes":
                clean.ids_br[:, 0] = 5
            if self.fault == "clean-sees-block" and blocks is not None:
                hidden = hidden + self.embed(blocks.ids_bnB[:, 0]).mean(1, keepdim=True)
            made = Output(self.head(hidden), hidden)
        filled = None
        if blocks is not None:
            filled = self._blocks(blocks, given, own)
        return DecoderOutput(made, filled)

    def _blocks(self, blocks, given, own):
        x = self.embed(blocks.ids_bnB).clone()
        out = torch.zeros_like(x)
        b, n, size = blocks.ids_bnB.shape
        for row in range(b):
            for k in range(n):
                at, start = int(blocks.latent_bn[row, k]), int(blocks.start_bn[row, k])
                x[row, k] += given[row][at] if given[row] else 0.0
                sums = own.sums[row]
                before = sums[min(start, len(sums)) - 1] if start and sums else x[row, k, 0] * 0
                causal = blocks.causal_bn is not None and bool(blocks.causal_bn[row, k])
                if causal and self.fault != "causal-sees-all":
                    places = torch.arange(1, size + 1, dtype=x.dtype)[:, None]
                    out[row, k] = (before + x[row, k].cumsum(0)) / (start + places)
                else:
                    marks = torch.linspace(0, 1, size, dtype=x.dtype)[:, None]
                    out[row, k] = (before + x[row, k].sum(0)) / (start + size) + marks * x[row, k]
                if self.fault == "remembers-block" and own.counts[row]:
                    own.sums[row][-1] = own.sums[row][-1] + x[row, k].sum(0)
        hidden = self.mean.layers[0](out)
        return Output(self.head(hidden), hidden)


class TextCache:
    """The ids of each row."""

    def __init__(self, batch, fault=""):
        self.ids = [[] for _ in range(batch)]
        self.counts = [0] * batch
        self.fault = fault

    @property
    def lengths(self):
        return [0] * len(self.ids) if self.fault == "zero-lengths" else list(self.counts)

    def rewind(self, lengths):
        if self.fault == "rewind-noop":
            return
        for row, length in enumerate(lengths):
            if self.fault != "half-rewind":
                del self.ids[row][length:]
            self.counts[row] = min(self.counts[row], length)

    def settle(self, lengths):
        if self.fault == "settle-forgets":
            for row, length in enumerate(lengths):
                self.ids[row][:length] = [97] * min(length, len(self.ids[row]))


def letter(token):
    return 97 <= token <= 122


class Patcher:
    """A patch begins after a byte whose class differs from that of the byte before it."""

    def __init__(self, params, context):
        self.fault, self.last = params.fault, None

    def new_cache(self, batch):
        return None if self.fault == "no-cache" else TextCache(batch, self.fault)

    def flags(self, rows, cache):
        fault = self.fault
        out = torch.zeros(rows.ids_br.shape, dtype=torch.bool)
        for b, count in enumerate(rows.lengths):
            new = rows.ids_br[b, :count].tolist()
            before = list(cache.ids[b]) if cache is not None and fault != "ignores-cache" else []
            if fault == "state-on-self" and cache is not None and before:
                before[-1] = self.last
            text = [*before, *new]
            for i in range(len(before), len(text)):
                out[b, i - len(before)] = i == 0 or letter(text[i]) != letter(text[i - 1])
                if fault == "looks-ahead":
                    out[b, i - len(before)] = i == 0 or (
                        i + 1 < len(text) and letter(text[i]) != letter(text[i + 1])
                    )
            if fault == "reads-padding":
                out[b, count - 1 :] = letter(int(rows.ids_br[b, -1]))
                out[b, 0] |= not before
            if new:
                self.last = new[-1]
            if cache is not None:
                cache.ids[b] += new
                if fault == "trims-unsettled":
                    old = max(len(cache.ids[b]) - 64, 0)
                    cache.ids[b][:old] = [97] * old
                cache.counts[b] += count
        if fault == "never-first" and (cache is None or max(cache.counts) == max(rows.lengths)):
            out[:, 0] = False
        if fault == "random":
            return torch.rand(out.shape) < 0.5
        if fault == "one-more":
            return torch.cat((out, out[:, :1]), 1)
        if fault == "floats":
            return out.float()
        if fault == "a-list":
            return out.tolist()
        if fault == "writes":
            rows.ids_br[:, 0] = 5
        return out


#: The faults of parts that are a running mean, and the contract that each breaks.
MEAN = {
    "looks-ahead": "causal",
    "ignores-cache": "incremental",
    "state-on-self": "stateless",
    "rewind-noop": "lengths",
    "half-rewind": "rewind",
    "zero-lengths": "lengths",
    "settle-forgets": "settle",
    "trims-unsettled": "windows",
    "reads-padding": "batch",
    "random": "deterministic",
    "last-only": "shape",
    "plain-list": "saved",
}
FAULTS = {
    "patcher": {
        "looks-ahead": "causal",
        "ignores-cache": "incremental",
        "state-on-self": "stateless",
        "rewind-noop": "lengths",
        "half-rewind": "rewind",
        "zero-lengths": "lengths",
        "settle-forgets": "settle",
        "trims-unsettled": "windows",
        "reads-padding": "batch",
        "random": "deterministic",
        "one-more": "shape",
        "floats": "shape",
        "a-list": "shape",
        "no-cache": "lengths",
        "never-first": "first-flag",
        "writes": "arguments",
    },
    "byte_scorer": {**MEAN, "writes": "arguments"},
    "encoder": {
        **MEAN,
        "writes": "arguments",
        "other-bytes": "own-bytes",
        "whole-batch": "patch-batch",
    },
    "global_model": {**MEAN, "writes": "arguments", "random-buffer": "saved"},
    "decoder": {
        **MEAN,
        "writes": "arguments",
        "next-latent": "causal",
        "clean-sees-block": "blocks",
        "causal-sees-all": "blocks",
        "remembers-block": "blocks-forgotten",
    },
}


@hookimpl
def blt_components():
    dims = {"latent_dim": "latent_dim"}
    return [
        Component("patcher", "broken/it", Patcher, Params, "a patcher with a fault"),
        Component("byte_scorer", "broken/it", Scorer, Params, "a scorer with a fault"),
        Component("encoder", "broken/it", Encoder, LatentParams, "an encoder with a fault", dims),
        Component("global_model", "broken/it", Global, LatentParams, "one with a fault", dims),
        Component(
            "decoder",
            "broken/it",
            Decoder,
            LatentParams,
            "a decoder with a fault",
            dims,
            lambda _: frozenset({"denoises"}),
        ),
    ]
