"""Loading takes the memory of the weights and little more, also where they are joined or cast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blt_plugins.huggingface.reading import tables_of
from blt_plugins.huggingface.tensors import layout_of
from tests.forks import forks
from tests.huggingface import published

SHAPE = published.Shape(
    dim=256, latent_dim=512, heads=8, layers=(2, 1, 40, 8), rows=60_001, ngrams=(3, 4, 5, 6)
)

LOAD = """
import json, sys
import torch
torch.set_num_threads(1)
from blt_core.pipeline import Pipeline

def kilobytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

small, folder, dtype = sys.argv[1:]
# What any first run loads (kernels, thread pools) is not of the weights.
def run(checkpoint):
    pipeline = Pipeline.from_config(
        {"schema": 1, "run": {"checkpoint": checkpoint, "dtype": dtype, "max_new_bytes": 4}}
    )
    pipeline.generate("warm")
    return pipeline
run(small)
open("/proc/self/clear_refs", "w").write("5")
before = kilobytes("VmRSS")
pipeline = run(folder)
weights = sum(p.nbytes for p in pipeline.model.module_dict().parameters())
table = pipeline.model.encoder.ngrams.table.weight
table.sum()  # a table is touched where it is looked up; count all of it
print(json.dumps({"weights": weights, "peak": (kilobytes("VmHWM") - before) * 1024}))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A folder of about 300 MB in bfloat16, written tensor by tensor."""
    folder = tmp_path_factory.mktemp("big")
    config = SHAPE.config.to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    sources = [s for sources in layout_of(tables_of(config, "x")).values() for s in sources]
    tensors = {s.name: torch.rand(s.shape).sub(0.5).mul(0.05).bfloat16() for s in sources}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_peak_is_at_most_1_15_of_the_weights(dtype, big, folder_of):
    done = forks().run(LOAD, [folder_of("plain"), big, dtype])
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    assert found["weights"] > 200e6
    assert found["peak"] <= 1.15 * found["weights"], found
