"""Tiny random models in float64 for the properties of the decode engine.

Default weights give constant flags and one repeated byte, and then every property holds. These
weights are scaled so that bytes, flags and acceptance vary; coverage.py checks that they do.
A model is built once and found by its index.
"""

from __future__ import annotations

from functools import cache
from random import Random

import attrs
import torch

from blt_core.component import BuildContext
from blt_core.model import Model
from blt_core.protocols import Patcher
from blt_core.types import Rows
from blt_plugins.latent.transformer import GlobalTransformer, GlobalTransformerParams
from blt_plugins.local.decoder import LocalDecoder, LocalDecoderParams
from blt_plugins.local.encoder import LocalEncoder, LocalEncoderParams
from blt_plugins.patching.entropy import EntropyParams, EntropyPatcher
from blt_plugins.patching.scorer import TransformerScorer, TransformerScorerParams
from blt_plugins.patching.space import SpaceParams, SpacePatcher
from blt_plugins.patching.static import StaticParams, StaticPatcher

CONTEXT = BuildContext()
CONTEXT_BYTES = 600
COUNT = 24
DIM = 16
WINDOWS = (None, 4, 8)


@attrs.frozen
class Shape:
    """How one model of the pool is built.

    patch: most bytes of a patch. latent_scale: weight of the latent path in the decoder; where it
    is small, drafts that read an old latent are often right. eos_scale: weight of the EOS logit.
    """

    patcher: str
    patch: int | None
    decoder_window: int | None
    encoder_window: int | None
    scorer_window: int | None
    decoder_layers: int
    encoder_layers: int
    decoder_slots: int
    encoder_slots: int
    kv_heads: int | None
    ngrams: bool
    projection: bool
    reads_byte_states: bool
    latent_scale: float
    eos_scale: float
    published_hash: bool
    double_residual: bool
    outputs_specials: bool


@cache
def shape(index: int) -> Shape:
    """The shape of model ``index``: traits cycle with different periods, the rest is random."""
    rng = Random(index)
    patcher = ("entropy", "entropy", "static", "entropy", "space")[index % 5]
    return Shape(
        patcher=patcher,
        patch=(3, 4, 5, 6, 8, None)[index % 6] or (5 if patcher == "static" else None),
        decoder_window=WINDOWS[index % 3],
        encoder_window=rng.choice(WINDOWS),
        scorer_window=rng.choice(WINDOWS),
        decoder_layers=1 + rng.randrange(2),
        encoder_layers=1 + rng.randrange(2),
        decoder_slots=1 + index % 3,
        encoder_slots=1 + rng.randrange(3),
        kv_heads=rng.choice((None, 1)),
        ngrams=index % 2 == 0,
        projection=rng.random() < 0.5,
        reads_byte_states=index % 4 == 3,
        latent_scale=(1.0, 0.1, 0.02)[index // 2 % 3],
        eos_scale=2.0 if index % 7 in (1, 4) else 1.0,
        published_hash=index % 4 == 2,
        double_residual=index % 3 == 1,
        outputs_specials=index % 8 == 7,
    )


DENOISING = tuple(i for i in range(COUNT) if not shape(i).reads_byte_states)


@cache
def model(index: int) -> Model:
    """Model ``index`` of the pool, in float64, in evaluation."""
    s = shape(index)
    torch.manual_seed(index)
    latent_dim = 24 if s.projection else s.encoder_slots * DIM
    encoder = LocalEncoder(
        LocalEncoderParams(
            dim=DIM,
            layers=s.encoder_layers,
            heads=2,
            hidden=24,
            latent_dim=latent_dim,
            slots=s.encoder_slots,
            window=s.encoder_window,
            # Longer than some windows.
            ngram_sizes=([3, 6] if s.published_hash else [2, 4]) if s.ngrams else [],
            ngram_rows=64,
            ngram_hash="published" if s.published_hash else "mixed",
            ngram_functions=2 if s.published_hash else 1,
            double_residual=s.double_residual,
        ),
        CONTEXT,
    )
    global_model = GlobalTransformer(
        GlobalTransformerParams(
            latent_dim=latent_dim, layers=2, heads=2, kv_heads=s.kv_heads, hidden=32
        ),
        CONTEXT,
    )
    decoder = LocalDecoder(
        LocalDecoderParams(
            dim=DIM,
            layers=s.decoder_layers,
            heads=2,
            hidden=24,
            latent_dim=latent_dim,
            slots=s.decoder_slots,
            window=s.decoder_window,
            denoises=not s.reads_byte_states,
            reads_byte_states=s.reads_byte_states,
            double_residual=s.double_residual,
        ),
        CONTEXT,
    )
    scheme = attrs.evolve(CONTEXT.scheme, outputs_specials=s.outputs_specials)
    built = Model(_patcher(s), encoder, global_model, decoder, scheme, CONTEXT_BYTES)
    built.to("cpu", torch.float64).module_dict().requires_grad_(requires_grad=False).eval()
    _scale(built, s)
    if isinstance(built.patcher, EntropyPatcher):
        _calibrate(built.patcher, index)
    return built


def _patcher(s: Shape) -> Patcher:
    if s.patcher == "static":
        return StaticPatcher(StaticParams(patch_bytes=s.patch), CONTEXT)
    if s.patcher == "space":
        return SpacePatcher(SpaceParams(max_patch_bytes=s.patch), CONTEXT)
    scorer = TransformerScorer(
        TransformerScorerParams(dim=DIM, layers=1, heads=2, hidden=24, window=s.scorer_window),
        CONTEXT,
    )
    return EntropyPatcher(
        EntropyParams(threshold=1.0, max_patch_bytes=s.patch, byte_scorer=scorer), CONTEXT
    )


def _scale(built: Model, s: Shape) -> None:
    """Weights that keep signals of size 1 and spread logits by several nats."""
    for name, weight in built.module_dict().named_parameters():
        if weight.dim() > 1:
            lookup = name.endswith(("embed.weight", "table.weight"))
            weight.normal_(0.0, 1.0 if lookup else 1.5 * weight.shape[1] ** -0.5)
    decoder = built.decoder
    for layer in decoder.layers:
        layer.latent_attention.out.weight.mul_(s.latent_scale)
    decoder.head.weight[built.scheme.eos].mul_(s.eos_scale)
    if s.outputs_specials:
        decoder.head.weight[built.scheme.bos].mul_(1.5)


def _calibrate(patcher: EntropyPatcher, index: int) -> None:
    """Put the threshold where a quarter to a half of the bytes of random text open a patch."""
    rng = Random(index)
    ids = torch.tensor([[rng.randrange(256) for _ in range(500)]])
    ordered = patcher.entropies(Rows(ids, (500,)))[0].sort().values
    at = rng.randrange(250, 375)
    patcher.threshold = float(ordered[at] + ordered[at + 1]) / 2
