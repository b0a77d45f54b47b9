"""Text larger than memory is streamed, and no document ever shows in another's rows."""

from __future__ import annotations

import json
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blt_core.component import BuildContext
from blt_core.loading import build_model, plan_run
from blt_core.plugins.loading import load_plugins
from blt_core.protocols import UNSCORED
from blt_core.types import IdScheme
from blt_core.wiring.config import Config
from blt_plugins.training.data.order import Batches
from blt_plugins.training.data.windows import Texts, cut_windows, make_batch
from blt_plugins.training.objectives import block_diffusion
from blt_plugins.training.objectives.block_diffusion import (
    BlockDiffusionObjective,
    BlockDiffusionObjectiveParams,
    ids_from,
)
from tests.nightly import nightly_or
from tests.tiny import config

# -- documents stay apart ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """A tiny model in float64, with n-grams, windows and entropy patches.

    Its weights are scaled so that patches and bytes vary.
    """
    tables = config(run={"dtype": "float64"}, decoder={**config()["decoder"], "denoises": True})
    model = build_model(plan_run(Config.from_mapping(tables), load_plugins())[0], None)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.module_dict().parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 1.5 / parameter.shape[1] ** 0.5, generator=generator)
    return model


TEXTS = st.lists(st.binary(min_size=1, max_size=60), min_size=2, max_size=4)


@settings(max_examples=nightly_or(8, 25))
@given(TEXTS, st.binary(min_size=60, max_size=60), st.integers(5, 70), st.data())
def test_no_document_is_seen_from_the_rows_of_another(model, texts, noise, context, data):
    chosen = data.draw(st.integers(0, len(texts) - 1))
    changed = [noise[: len(t)] if i == chosen else t for i, t in enumerate(texts)]
    found = []
    for documents in (Texts(texts), Texts(changed)):
        windows = list(cut_windows(documents, context))
        batch = make_batch(documents, windows, model.scheme)
        flags = model.patcher.flags(batch.rows, None)
        logits = model.forward(batch.rows, flags).clean.logits
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.targets_br.flatten(), reduction="none"
        ).view_as(batch.targets_br)
        found.append((windows, batch, flags, logits, losses))
    (windows, batch, flags, logits, losses), (_, _, flags2, logits2, losses2) = found
    for row, window in enumerate(windows):
        if window.document != chosen:
            count = batch.rows.lengths[row]
            assert torch.equal(flags[row, :count], flags2[row, :count])
            close = {"atol": 1e-10, "rtol": 1e-10}
            assert torch.allclose(logits[row, :count], logits2[row, :count], **close)
            assert torch.allclose(losses[row, :count], losses2[row, :count], **close)


class Watched:
    """A model whose last output is kept."""

    def __init__(self, model):
        self._model, self.output = model, None

    def forward(self, *arguments):
        self.output = self._model.forward(*arguments)
        return self.output


def every_byte(places_br, count_b, rng):
    """In place of sample_starts: a block at each byte, so that no document decides on another's."""
    return torch.arange(1, places_br.shape[1] + 1).expand(places_br.shape)


def losses_of_rows(model, objective, batch, flags):
    """(rows, 3): the summed clean, masked and stale losses of each row of a batch, in nats."""
    watched, given = Watched(model), (flags, batch.targets_br)
    total = objective.loss(watched, batch.rows, *given, torch.Generator().manual_seed(0))[0]
    masked, stale = objective.blocks(*given, torch.Generator().manual_seed(0))
    clean = torch.nn.functional.cross_entropy(
        watched.output.clean.logits.flatten(0, 1),
        batch.targets_br.flatten(),
        ignore_index=UNSCORED,
        reduction="none",
    ).view_as(batch.targets_br)
    parts = watched.output.blocks.logits.split((masked.count, stale.count), 1)
    found = []
    for row in range(len(clean)):
        one = slice(row, row + 1)
        losses = [clean[row].sum() / batch.scored]
        for blocks, logits in zip((masked, stale), parts, strict=True):
            own = block_diffusion.TrainedBlocks(
                blocks.start_bn[one],
                blocks.ids_bnB[one],
                blocks.targets_bnB[one],
                blocks.weights_bnB[one],
            )
            losses.append(own.loss(logits[one]))
        found.append(torch.stack(losses))
    rows = torch.stack(found)
    assert float(rows.sum()) == pytest.approx(float(total)), "these are the parts of the loss"
    return rows


@settings(max_examples=nightly_or(8, 25))
@given(TEXTS, st.binary(min_size=60, max_size=60), st.integers(5, 70), st.data())
def test_no_document_changes_the_block_losses_of_another(model, texts, noise, context, data):
    chosen = data.draw(st.integers(0, len(texts) - 1))
    changed = [noise[: len(t)] if i == chosen else t for i, t in enumerate(texts)]
    params = BlockDiffusionObjectiveParams(
        block_bytes=4, share=1.0, inside_share=1.0, all_masked_share=1.0, stale_share=1.0
    )
    objective, found = BlockDiffusionObjective(params, BuildContext()), []
    with mock.patch.object(block_diffusion, "sample_starts", every_byte):
        for documents in (Texts(texts), Texts(changed)):
            windows = list(cut_windows(documents, context))
            batch = make_batch(documents, windows, model.scheme)
            flags = model.patcher.flags(batch.rows, None)
            found.append(losses_of_rows(model, objective, batch, flags))
    others = [row for row, window in enumerate(windows) if window.document != chosen]
    assert torch.allclose(found[0][others], found[1][others], atol=1e-10, rtol=1e-10)


def test_the_patches_of_these_models_vary(model):
    texts = Texts([bytes(range(60)), b"abc" * 20])
    batch = make_batch(texts, list(cut_windows(texts, 64)), model.scheme)
    flags = model.patcher.flags(batch.rows, None)
    assert 0.2 < flags.double().mean() < 0.8


def test_blocks_never_reach_over_the_end_of_their_document(model):
    texts = Texts([b"abcdef", b"ABCDEFGHIJ"])
    batch = make_batch(texts, list(cut_windows(texts, 64)), model.scheme)
    start_bn = torch.tensor([[6], [10]])
    truth = ids_from(start_bn, batch.targets_br, 4)
    assert truth.tolist() == [
        [[ord("f"), model.scheme.eos, -100, -100]],
        [[ord("J"), model.scheme.eos, -100, -100]],
    ]


# -- streaming -----------------------------------------------------------------------------------

MEASURED = """
import json, sys
from blt_core.component import BuildContext
from blt_core.plugins.loading import load_plugins
from blt_core.types import IdScheme
from blt_core.wiring.resolve import build_node, resolve_component
from blt_plugins.training.data.order import Batches
from blt_plugins.training.data.windows import cut_windows

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

def corpus(path):
    table = {"use": "jsonl", "path": path, "valid_percent": 1.0}
    plugins = load_plugins()
    return build_node(resolve_component("corpus", table, plugins), BuildContext(), plugins.registry)

def run(path, count):
    documents = corpus(path).documents("train")
    batches = Batches(documents, cut_windows(documents, 4096), scheme=IdScheme(),
                      batch_bytes=65536, seed="s", shuffle_bytes=8_000_000)
    return len(documents), sum(batches[number].scored for number in range(count))

run(sys.argv[1], 3)  # all that is imported lazily is there now
before = peak()
documents, read = run(sys.argv[2], int(sys.argv[3]))
print(json.dumps({"documents": documents, "read": read, "grown": peak() - before}))
"""


@pytest.mark.slow
def test_a_file_of_200_megabytes_is_read_in_a_tenth_of_its_size(tmp_path):
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    line = json.dumps({"text": "0123456789abcdef" * 256})  # 4 kB
    small.write_text("".join(f"{line}\n" for _ in range(10)))
    with large.open("w") as file:
        for number in range(50_000):
            file.write(line.replace("0123", f"{number:06}") + "\n")
    assert large.stat().st_size > 200e6
    arguments = [str(small), str(large), "800"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["documents"] == 49_500
    assert found["read"] > 40e6, "several pools were read"
    # A pool of 8 MB, and the index.
    assert found["grown"] < 20e6


def test_a_batch_far_into_an_epoch_is_found_without_reading_what_comes_before():
    class Counted(Texts):
        read = 0

        def __getitem__(self, index):
            Counted.read += 1
            return super().__getitem__(index)

    documents = Counted([b"x" * 99] * 5000)
    batches = Batches(
        documents,
        cut_windows(documents, 100),
        scheme=IdScheme(),
        batch_bytes=1000,
        seed="s",
        shuffle_bytes=10_000,
    )
    assert batches[12_345].scored > 0
    assert Counted.read < 250
