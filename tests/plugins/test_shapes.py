"""Parameter counts of the shipped shapes, on the meta device: nothing is allocated."""

from __future__ import annotations

import pytest
import torch

from blt_core.loading import plan_run
from blt_core.model import Model
from blt_core.plugins.loading import load_plugins
from blt_core.protocols import MODEL_KINDS
from blt_core.resources import resource
from blt_core.wiring.config import load_config


def rounded(count: int, digits: int) -> float:
    return float(f"{count:.{digits - 1}e}")


@pytest.mark.parametrize(
    ("name", "global_model", "encoder", "decoder"),
    [("blt-1b", 1.28e9, 19e6, 160e6), ("blt-3b", 2.82e9, 26e6, 160e6)],
)
def test_parameter_counts_are_the_printed_ones(name, global_model, encoder, decoder):
    plan, _ = plan_run(load_config(resource("configs") / f"{name}.toml"), load_plugins())
    with torch.device("meta"):
        model = Model(**{kind: plan.build(kind) for kind in MODEL_KINDS})
    counts = model.parameter_counts()
    assert rounded(counts.global_model, 3) == global_model
    assert rounded(counts.encoder, 2) == encoder
    assert rounded(counts.decoder, 2) == decoder
    assert counts.tables == 6 * 500_002 * 1024
    assert rounded(counts.scorer, 3) == 99.5e6
