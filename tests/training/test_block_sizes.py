"""A checkpoint tells which blocks its decoder was trained on, and whoever asks for more is told."""

from __future__ import annotations

import json

import pytest
import tomli

from blt_core.errors import ConfigError
from blt_core.pipeline import Pipeline
from blt_core.plugins.loading import load_plugins
from blt_core.wiring.config import Config
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.run.trainer import Trainer

BLOCKS = {"use": "block-diffusion", "block_bytes": 4, "share": 0.5}


def sizes(folder) -> object:
    return tomli.loads((folder / "config.toml").read_text())["decoder"].get("block_bytes")


@pytest.fixture
def blocks(finished):
    """The folder of a model that was trained on blocks of 4 bytes."""
    return finished(train={"steps": 2}, objective=BLOCKS, decoder={"denoises": True})


@pytest.fixture
def further(blocks, silent, tables, tmp_path):
    """Trains on from that model; gives what the new one's checkpoint says."""

    def train(objective, **changes) -> object:
        kept = {k: tables[k] for k in ("schema", "corpus")}
        kept["train"] = {**tables["train"], "steps": 2}
        del kept["train"]["scorer"]
        run = {"checkpoint": str(blocks)}
        config = Config.from_mapping({**kept, "run": run, "objective": objective, **changes})
        job = make_job(config, load_plugins(), out=tmp_path / "more")
        Trainer(job, silent()).run()
        return sizes(job.out / "model")

    return train


def test_training_on_blocks_stores_their_size(blocks):
    assert sizes(blocks) == [4]


@pytest.mark.parametrize(
    ("objective", "stored"),
    [
        ({**BLOCKS, "block_bytes": 6}, [4, 6]),
        ({**BLOCKS, "block_bytes": [8, 2, 4]}, [2, 4, 8]),
        (BLOCKS, [4]),
        ({"use": "ar"}, [4]),
    ],
)
def test_further_training_adds_its_own_size(further, objective, stored):
    assert further(objective) == stored


def test_a_size_that_nothing_trains_cannot_be_claimed(further, blocks):
    with pytest.raises(ConfigError, match=r"decoder\.block_bytes: the objective 'block-diffusion'"):
        further(BLOCKS, decoder={"block_bytes": [4, 9]})
    assert further(BLOCKS, decoder={"block_bytes": [4]}) == [4]
    config = {"schema": 1, "run": {"checkpoint": str(blocks)}, "decoder": {"block_bytes": [64]}}
    with pytest.raises(ConfigError, match=r"decoder\.block_bytes: comes from the checkpoint"):
        Pipeline.from_config(config)


def test_sizes_that_are_trained_may_be_claimed(further):
    mixed = {**BLOCKS, "block_bytes": [4, 9]}
    assert further(mixed, decoder={"block_bytes": [4, 9]}) == [4, 9]


def test_without_blocks_nothing_is_stored(new_job, silent):
    job = new_job(steps=1)
    Trainer(job, silent()).run()
    assert sizes(job.out / "model") is None


ASKS = (
    "blt-dv block_bytes={}",
    "blt-d block_bytes={}",
    "speculative drafter.use=cascade drafter.drafter.use=diffusion drafter.drafter.block_bytes={}",
)


@pytest.mark.parametrize("spec", ASKS)
@pytest.mark.parametrize("asked", [4, 5])
def test_a_sampler_that_asks_for_longer_blocks_is_told_once(blt, blocks, spec, asked):
    sampler = spec.format(asked)
    called = ("--checkpoint", blocks, "--sampler", sampler)
    for done in (
        blt("generate", "demo", *called, "--prompt", "def ", "--max-new-bytes", 9),
        blt("check", "demo", *called),
    ):
        assert done.code == 0
        told = [line for line in done.err.splitlines() if "asks for blocks" in line]
        assert len(told) == (asked > 4)
        if told:
            assert "asks for blocks of 5 bytes" in told[0]
            assert "the decoder was trained on blocks of at most 4" in told[0]
            assert "block_bytes = 4, or train on with block_bytes = 5" in told[0]


def test_a_checkpoint_without_the_key_says_nothing(blt, blocks):
    file = blocks / "config.toml"
    file.write_text(file.read_text().replace("block_bytes = [\n    4,\n]\n", ""))
    assert sizes(blocks) is None
    done = blt("check", "demo", "--checkpoint", blocks, "--sampler", "blt-d block_bytes=64")
    assert (done.code, done.err) == (0, "")


def test_the_demo_tells_what_it_was_trained_on(blt):
    done = blt("check", "demo", "--json")
    assert json.loads(done.out)["decoder"]["block_bytes"] == [8]
