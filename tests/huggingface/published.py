"""Tiny random models of transformers itself, saved as folders: what the format is tested against.

Weights are scaled so that patches and bytes vary, and the threshold lies in a gap between the
entropies of many texts, so that rounding moves no boundary.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from random import Random

import attrs
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import BltConfig, BltForCausalLM
    from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

BOS, EOS, OFFSET = 1, 2, 4
IDS = 260


@attrs.frozen
class Shape:
    """How one model of the pool is built; see ``config``."""

    slots: int = 2
    dim: int = 32
    latent_dim: int = 64
    window: int | None = 512
    scorer_window: int | None = 512
    layers: tuple[int, int, int, int] = (1, 1, 2, 2)  # scorer, encoder, global model, decoder
    heads: int = 2
    kv_heads: int = 4
    ngrams: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    rows: int = 97
    functions: int = 1

    @property
    def config(self) -> BltConfig:
        """The config of transformers."""
        scorer, encoder, big, decoder = self.layers
        local = {
            "hidden_size": self.dim,
            "num_attention_heads": self.heads,
            "cross_attn_k": self.slots,
            "hidden_size_global": self.latent_dim,
        }
        return BltConfig(
            max_position_embeddings=600,
            bos_token_id=BOS,
            eos_token_id=EOS,
            cross_attn_k=self.slots,
            local_attention_window_len=self.window,
            encoder_hash_byte_group_size=list(self.ngrams),
            encoder_hash_byte_group_vocab=self.rows,
            encoder_hash_byte_group_nb_functions=self.functions,
            patcher_config={
                "hidden_size": 24,
                "num_hidden_layers": scorer,
                "num_attention_heads": 2,
                "intermediate_size": 40,
                "sliding_window": self.scorer_window,
            },
            encoder_config={**local, "num_hidden_layers": encoder, "intermediate_size": 48},
            decoder_config={**local, "num_hidden_layers": decoder, "intermediate_size": 56},
            global_config={
                "hidden_size": self.latent_dim,
                "num_hidden_layers": big,
                "num_attention_heads": 4,
                "num_key_value_heads": self.kv_heads,
                "intermediate_size": 96,
            },
        )


SHAPES = {
    "plain": Shape(),
    "three slots": Shape(slots=3, latent_dim=96, layers=(2, 2, 1, 1), kv_heads=2, rows=50),
    "four slots, projection": Shape(slots=4, dim=24, latent_dim=48, layers=(1, 3, 2, 1), rows=1009),
    "projection, small windows": Shape(
        latent_dim=80, window=6, scorer_window=5, layers=(3, 1, 1, 3), kv_heads=1
    ),
    "no windows": Shape(window=None, scorer_window=None, heads=4, ngrams=(2, 5), rows=500),
    "three hashes": Shape(window=16, scorer_window=None, functions=3, rows=31, layers=(1, 2, 3, 2)),
}


@cache
def reference(name: str) -> BltForCausalLM:
    """The model of this name, in float32."""
    torch.manual_seed(len(name))
    model = BltForCausalLM(SHAPES[name].config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            lookup = "embed" in parameter_name and "projection" not in parameter_name
            parameter.data.normal_(0.0, 0.6 if lookup else 1.5 * parameter.shape[1] ** -0.5)
    model.config.patching_threshold = _gap(model)
    return model


def _gap(model: BltForCausalLM) -> float:
    """The middle of the widest gap among those entropies that part a third of the bytes."""
    rng = Random(0)
    ids = torch.tensor([[BOS, *(rng.randrange(256) + OFFSET for _ in range(400))]])
    with torch.inference_mode():
        ordered = model.model.patcher(ids)[0][0].sort().values
    middle = ordered[240:300]
    at = int(middle.diff().argmax())
    return float(middle[at] + middle[at + 1]) / 2


def saved(name: str, folder: Path) -> Path:
    """The folder that transformers saves of a model."""
    if not folder.exists():
        reference(name).save_pretrained(folder)
    return folder


def encode(text: bytes) -> list[int]:
    """Ids of a prompt."""
    return [BOS, *(value + OFFSET for value in text)]


@torch.inference_mode()
def logits(model: BltForCausalLM, text: bytes) -> torch.Tensor:
    """(r, V): of every position of a text, BOS first."""
    found: torch.Tensor = model(torch.tensor([encode(text)]), use_cache=False).logits[0]
    return found


@torch.inference_mode()
def generated(model: BltForCausalLM, prompt: bytes, count: int) -> list[int]:
    """The ids that transformers generates greedily, without its cache; EOS ends them."""
    ids = torch.tensor([encode(prompt)])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        use_cache=False,
        pad_token_id=0,
    )
    return found[0, ids.shape[1] :].tolist()


@torch.inference_mode()
def chosen(model: BltForCausalLM, prompt: bytes, ids: list[int]) -> list[int]:
    """The likeliest id at each position of an output: ``ids`` themselves, if they are greedy."""
    whole = torch.tensor([[*encode(prompt), *ids[:-1]]])
    found: torch.Tensor = model(whole, use_cache=False).logits[0, -len(ids) :]
    return found.argmax(-1).tolist()


def prompts() -> list[bytes]:
    """Twenty: words, UTF-8 of several scripts, bytes that are no text, short and long ones."""
    rng = Random(1)
    texts = [
        *("The quick brown fox", "def main():\n    return 0\n", "a", "  ", "x" * 70),
        *("naïve café", "日本語のテキスト", "Привет, мир", "مرحبا", "🙂🙃 emoji 👩‍👩‍👧"),
        "It was the best of times, it was the worst of times, it was the age of wisdom.",
    ]
    binary = [bytes(rng.randrange(256) for _ in range(size)) for size in (1, 2, 7, 30, 90)]
    return [
        *(text.encode() for text in texts),
        *binary,
        b"\x00",
        b"\xff\xfe\x00\x00",
        bytes(9),
        b"\n",
    ]
