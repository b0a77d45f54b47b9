"""Several processes train what one does: DDP and FSDP2 under torchrun, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from blt_core.loading import read_checkpoint
from blt_core.plugins.loading import load_plugins

pytestmark = pytest.mark.slow

#: Sums in another order round apart.
CLOSE = {"rel": 1e-6, "abs": 1e-6}
BLOCKS = {"use": "block-diffusion", "block_bytes": 4, "share": 0.5, "stale_share": 0.5}

#: ``blt`` whose processes vanish after step HALT of the model, or whose launcher is pressed Ctrl-C
#: after step INTERRUPT; process 0 goes on once the launcher has told it. With SCORING, a folder,
#: process 0 gets a SIGTERM in the first batch of held-out text; each leaves the batches it scored.
PROGRAM = """
import os, signal, time
from pathlib import Path
from blt_core.cli import main
from blt_plugins.training.run.together import Together
from blt_plugins.training.run.trainer import Trainer

look_after = Trainer._look_after

def halting(self, phase, done, backend):
    look_after(self, phase, done, backend)
    here = str(done) if phase.name == "model" else ""
    if here == os.environ.get("HALT"):
        os._exit(0)
    if here == os.environ.get("INTERRUPT") and os.environ["RANK"] == "0":
        os.kill(os.getppid(), signal.SIGINT)
        while not self._interrupts.asked:
            time.sleep(0.01)

Trainer._look_after = halting
if folder := os.environ.get("SCORING"):
    each = Together.each

    def scoring(self, share):
        for number, item in enumerate(each(self, share)):
            with Path(folder, os.environ["RANK"]).open("a") as file:
                file.write(f"{number} ")
            if os.environ["RANK"] == "0":
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    Together.each = scoring
if os.environ.get("PARTS"):
    from blt_plugins.training.cli import train
    from tests.training.parts import plugins
    train.load_plugins = plugins
main()
"""
#: The environment of processes that have the parts of a plugin of our own.
PARTS = {"PARTS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}


class Runs:
    """Trains the tiny config in a folder of its own; gives the records of a run."""

    def __init__(self, folder: Path, tables: dict[str, Any]) -> None:
        self.folder, self._tables = folder, tables
        self._made: dict[str, Any] = {}
        (folder / "program.py").write_text(PROGRAM)

    def train(
        self,
        out: str,
        processes: int,
        strategy: str = "ddp",
        *,
        blocks: bool = False,
        parts: dict[str, str] | None = None,
        optimizer: str = "adamw",
        env: dict[str, str] | None = None,
        code: int = 0,
        **settings: Any,
    ) -> Any:
        backend = {"use": "torch", "strategy": strategy, "optimizer": optimizer}
        changed = {**self._tables, "training_backend": backend}
        changed["train"] = {**self._tables["train"], "accumulate": 2, **settings}
        if blocks:
            changed |= {"objective": BLOCKS, "decoder": {**changed["decoder"], "denoises": True}}
        for kind, use in (parts or {}).items():
            changed[kind] = {**changed[kind], "use": use}
        env = {**(PARTS if parts else {}), **(env or {})}
        config = self.folder / f"{out}.toml"
        config.write_text(tomli_w.dumps(changed))
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone"]
            launch += ["--nproc-per-node", str(processes)]
        program = [str(self.folder / "program.py"), "train", str(config)]
        done = subprocess.run(
            [*launch, *program, "--out", str(self.folder / out)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert (done.returncode == 0) == (code == 0), done.stderr
        return records(self.folder / out) if code == 0 else {}, done

    def once(self, out: str, processes: int, **keys: Any) -> Any:
        """A run that several tests look at, which is made for the first of them."""
        if out not in self._made:
            self._made[out] = self.train(out, processes, **keys)
        return self._made[out]


@pytest.fixture(scope="module")
def runs(lasting_tables, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"), lasting_tables)


def records(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What was logged of each step of each phase."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        key = record.pop("phase"), record.pop("step")
        found[key] = found.get(key, {}) | record
    return found


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for key, record in one.items():
        assert record.keys() == other[key].keys()
        # A name with / is of how often something was the likeliest, which may be a tie.
        for name in (n for n in record if n != "bytes_per_second" and "/" not in n):
            assert record[name] == pytest.approx(other[key][name], **CLOSE), (key, name)


@pytest.mark.parametrize(
    ("strategy", "blocks", "settings"),
    [("ddp", False, {}), ("fsdp", True, {"gradient_checkpointing": True})],
)
def test_two_processes_take_the_steps_of_one(runs, strategy, blocks, settings):
    one = f"one-{blocks}"
    alone, _ = runs.once(one, 1, blocks=blocks)
    two, done = runs.once(strategy, 2, strategy=strategy, blocks=blocks, **settings)
    assert_same(alone, two)
    assert ("mask_loss" in two["model", 1]) == blocks
    assert done.stdout.count("model: ") == 1  # the second process is silent
    _, tensors = read_checkpoint(str(runs.folder / one / "model"), load_plugins())
    _, theirs = read_checkpoint(str(runs.folder / strategy / "model"), load_plugins())
    assert tensors.keys() == theirs.keys()
    for name in tensors:
        assert tensors[name].allclose(theirs[name], rtol=1e-4, atol=1e-5), name


def test_two_processes_take_the_steps_of_one_with_muon(runs):
    alone, _ = runs.train("muon-one", 1, optimizer="muon")
    two, _ = runs.train("muon-two", 2, optimizer="muon")
    assert_same(alone, two)


@pytest.mark.parametrize(
    ("before", "after"), [((1, "ddp"), (2, "fsdp")), ((2, "fsdp"), (2, "ddp"))]
)
def test_a_run_goes_on_in_other_processes(runs, before, after):
    out = f"from-{before[0]}"
    runs.train(out, *before, env={"HALT": "7"})
    found, done = runs.train(out, *after)
    assert "resumed at model step 5" in done.stderr
    assert_same(runs.once("one-False", 1)[0], found)


def test_ctrl_c_to_the_launcher_saves_the_state_and_the_same_command_goes_on(runs):
    _, done = runs.train("pressed", 2, env={"INTERRUPT": "7"}, code=1)
    assert "SIGINT: stopping after this step" in done.stderr
    assert "interrupted at model step 8, which is saved" in done.stderr
    found, done = runs.train("pressed", 2)
    assert "resumed at model step 8" in done.stderr
    whole, _ = runs.once("ddp", 2)
    for name in ("loss", "bits_per_byte"):
        assert [r.get(name) for r in found.values()] == [r.get(name) for r in whole.values()]


def test_a_sigterm_to_one_process_ends_the_scores_of_all_after_the_same_batch(runs, tmp_path):
    _, done = runs.train("scoring", 2, env={"SCORING": str(tmp_path)}, code=1)
    assert "interrupted at scorer step 6, which is saved" in done.stderr
    assert {(tmp_path / rank).read_text() for rank in "01"} == {"0 "}
    found, done = runs.train("scoring", 2)
    assert "resumed at scorer step 6" in done.stderr
    whole, _ = runs.once("ddp", 2)
    for name in ("loss", "bits_per_byte"):
        assert [r.get(name) for r in found.values()] == [r.get(name) for r in whole.values()]


def test_passes_that_cannot_be_dealt_out_are_refused(runs):
    _, done = runs.train("uneven", 2, accumulate=3, code=2)
    assert "uneven.toml: train.accumulate: 3 passes cannot be dealt out to 2 processes" in (
        done.stderr
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_tied_weights_are_trained_by_two_processes_as_by_one(runs, strategy):
    parts = {"decoder": "acme/tied"}
    alone, _ = runs.once("tied-alone", 1, parts=parts)
    two, _ = runs.train(f"tied-{strategy}", 2, strategy, parts=parts)
    assert_same(alone, two)
    _, tensors = read_checkpoint(str(runs.folder / f"tied-{strategy}" / "model"), load_plugins())
    assert tensors["decoder.head.weight"].equal(tensors["decoder.embed.weight"])


def test_fsdp_refuses_a_weight_that_two_layers_share(runs):
    parts = {"global_model": "acme/layers"}
    tables, runs._tables = (
        runs._tables,
        {
            **runs._tables,
            "global_model": {**runs._tables["global_model"], "layers": 2},
        },
    )
    try:
        _, done = runs.train("shared", 2, "fsdp", parts=parts, code=1)
    finally:
        runs._tables = tables
    assert "fsdp gathers layers one at a time, and global_model.stack.layers.0.mlp.down.weight" in (
        done.stderr
    )
    assert "strategy = 'ddp'" in done.stderr
