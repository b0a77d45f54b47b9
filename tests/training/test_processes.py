"""Several processes train what one does: DDP and FSDP2, on the CPU, one run of them by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from blt_core.loading import read_checkpoint
from blt_core.plugins.loading import load_plugins
from blt_plugins.training.corpora import sources
from tests.training.forks import Forks

pytestmark = pytest.mark.slow

#: Sums in another order round apart.
CLOSE = {"rel": 1e-6, "abs": 1e-6}
BLOCKS = {"use": "block-diffusion", "block_bytes": 4, "share": 0.5, "stale_share": 0.5}

#: ``blt`` whose processes vanish after step HALT of the model, or whose launcher is pressed Ctrl-C
#: after step INTERRUPT; process 0 goes on once the launcher has told it. With SCORING, a folder,
#: process 0 gets a SIGTERM in the first batch of held-out text; each leaves the batches it scored.
#: In a score process 1 fails after its first batch with FAILING, and is gone with DYING.
#: INDEXED, a file, gets the rank of each process that reads texts to index them, and their number.
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
if (failing := os.environ.get("FAILING")) or os.environ.get("DYING"):
    each = Together.each

    def breaking(self, share):
        for item in each(self, share):
            yield item
            if os.environ["RANK"] == "1":
                if failing:
                    raise OSError("out of luck")
                os._exit(3)

    Together.each = breaking
if indexed := os.environ.get("INDEXED"):
    from blt_plugins.training.corpora import index_file
    find_all = index_file.find_all

    def finding(reader, files, *rest):
        with Path(indexed).open("a") as file:
            file.write(f"{os.environ.get('RANK')}:{len(files)} ")
        return find_all(reader, files, *rest)

    index_file.find_all = finding
if os.environ.get("PARTS"):
    from blt_plugins.training.cli import train
    from tests.training.parts import plugins
    train.load_plugins = plugins
main()
"""

#: Scores a module that FSDP2 spreads, before and after ``argv[1]`` steps, in one process thrice as
#: often as in the other; then trains, and says whether the scores were those of one process.
UNLIKE = """
import copy, sys, torch
from torch import nn
from blt_core.component import BuildContext
from blt_plugins.training.backends.torch import TorchBackend, TorchBackendParams

class Layer(nn.Linear):
    def forward(self, x):
        return x + super().forward(x)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([Layer(8, 8), Layer(8, 8)]), nn.Linear(8, 1)

    def part(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def forward(self, x):
        return self.part(x).mean()

torch.manual_seed(0)
net, x = Net(), torch.ones(2, 8)
alone = copy.deepcopy(net)
backend = TorchBackend(TorchBackendParams(strategy="fsdp"), BuildContext())
groups = [{"params": list(net.parameters()), "weight_decay": 0.0, "matrices": False}]
called = backend.start(net, groups, clip=1.0, accumulate=1)
for _ in range(int(sys.argv[1])):
    backend.backward([lambda: called(x)])
    backend.step(0.0)
for _ in range(2):
    with backend.whole(), torch.no_grad():
        for _ in range(1 + 2 * backend.rank):
            found = net.part(x)
    same = torch.equal(found, alone.part(x))
    backend.backward([lambda: called(x)])
    backend.step(0.0)
    backend.mean([])
    assert same
print("same")
backend.close()
"""
#: Within this a run of a tiny model that fails has ended, long before its collectives give up.
SECONDS = 120
#: What held-out text is scored by, beside figures whose names have a /.
SCORES = ("bits_per_byte", "mean_patch_bytes")


class Runs:
    """Trains the tiny config in a folder of its own; gives the records of a run."""

    def __init__(self, folder: Path, tables: dict[str, Any], forks: Forks) -> None:
        self.folder, self.tables, self.forks = folder, tables, forks
        self._made: dict[str, Any] = {}
        (folder / "program.py").write_text(PROGRAM)

    def config(
        self,
        out: str,
        strategy: str,
        *,
        blocks: bool = False,
        parts: dict[str, str] | None = None,
        optimizer: str = "adamw",
        dtype: str = "float32",
        **settings: Any,
    ) -> Path:
        """The config of a run; settings go into [train]."""
        backend = {"use": "torch", "strategy": strategy, "optimizer": optimizer}
        changed = {**self.tables, "training_backend": backend, "run": {"dtype": dtype}}
        changed["corpus"] = {**changed["corpus"], "index": str(self.folder / f"{out}-index")}
        train = {**self.tables["train"], "accumulate": 2}
        changed["train"] = {**train, "valid_drafts": 4, **settings}
        if blocks:
            changed |= {"objective": BLOCKS, "decoder": {**changed["decoder"], "denoises": True}}
        for kind, use in (parts or {}).items():
            changed[kind] = {**changed[kind], "use": use}
        config = self.folder / f"{out}.toml"
        config.write_text(tomli_w.dumps(changed))
        return config

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
        dtype: str = "float32",
        launcher: bool = False,
        **settings: Any,
    ) -> Any:
        config = self.config(
            out,
            strategy,
            blocks=blocks,
            parts=parts,
            optimizer=optimizer,
            dtype=dtype,
            **settings,
        )
        env = {**({"PARTS": "1"} if parts else {}), **(env or {})}
        env["INDEXED"] = str(self.indexed(out))
        program = [str(self.folder / "program.py"), "train", str(config)]
        program += ["--out", str(self.folder / out)]
        start = self._launch if launcher else self.forks.run
        done = start(processes, program, env)
        assert (done.returncode == 0) == (code == 0), done.stderr
        return records(self.folder / out) if code == 0 else {}, done

    def indexed(self, out: str) -> Path:
        """Who has read texts of a run's corpus to index them, and how many."""
        return self.folder / f"{out}-indexed"

    def _launch(
        self, processes: int, program: list[str], env: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """As users start a run."""
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return subprocess.run(
            [*launch, "--nproc-per-node", str(processes), *program],
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    def once(self, out: str, processes: int, **keys: Any) -> Any:
        """A run that several tests look at, which is made for the first of them."""
        if out not in self._made:
            self._made[out] = self.train(out, processes, **keys)
        return self._made[out]


@pytest.fixture(scope="module")
def runs(lasting_tables, tmp_path_factory, forks):
    texts = Path(lasting_tables["corpus"]["path"]).iterdir()
    # Until a file has settled each process reads it anew, for it may have changed unseen.
    settled = max(text.stat().st_ctime_ns for text in texts) + sources.SETTLED
    time.sleep(max(settled - time.time_ns() + 10**8, 0) / 1e9)
    return Runs(tmp_path_factory.mktemp("runs"), lasting_tables, forks)


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
    # Process 0 has indexed the twelve texts, once; the other has read what it kept.
    assert runs.indexed(strategy).read_text() == "0:12 "
    _, tensors = read_checkpoint(str(runs.folder / one / "model"), load_plugins())
    _, theirs = read_checkpoint(str(runs.folder / strategy / "model"), load_plugins())
    assert tensors.keys() == theirs.keys()
    for name in tensors:
        assert tensors[name].allclose(theirs[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.nightly(reason="its steps are each process's own, and DDP is held above")
def test_two_processes_take_the_steps_of_one_with_muon(runs):
    alone, _ = runs.train("muon-one", 1, optimizer="muon")
    two, _ = runs.train("muon-two", 2, optimizer="muon")
    assert_same(alone, two)


def test_a_run_goes_on_in_other_processes(runs):
    runs.train("moved", 1, "ddp", env={"HALT": "7"})
    _, done = runs.train("moved", 2, "fsdp", env={"HALT": "11"})
    assert "resumed at model step 5" in done.stderr
    found, done = runs.train("moved", 2, "ddp")
    assert "resumed at model step 10" in done.stderr
    assert_same(runs.once("one-False", 1)[0], found)


def test_ctrl_c_to_the_launcher_saves_the_state_and_the_same_command_goes_on(runs):
    _, done = runs.train("pressed", 2, launcher=True, env={"INTERRUPT": "7"}, code=1)
    assert "SIGINT: stopping after this step" in done.stderr
    assert "interrupted at model step 8, which is saved" in done.stderr
    found, done = runs.train("pressed", 2)
    assert "resumed at model step 8" in done.stderr
    whole, _ = runs.once("ddp", 2)
    for name in ("loss", "bits_per_byte"):
        assert [r.get(name) for r in found.values()] == [r.get(name) for r in whole.values()]


def test_a_sigterm_to_one_process_ends_the_scores_of_all_after_the_same_batch(runs, tmp_path):
    keys = {"accumulate": 4}  # passes of a window, of which each process has two to score
    _, done = runs.train("scoring", 2, env={"SCORING": str(tmp_path)}, code=1, **keys)
    assert "interrupted at scorer step 6, which is saved" in done.stderr
    assert {(tmp_path / rank).read_text() for rank in "01"} == {"0 "}
    found, done = runs.train("scoring", 2, **keys)
    assert "resumed at scorer step 6" in done.stderr
    whole, _ = runs.train("scoring-whole", 2, **keys)
    for name in ("loss", "bits_per_byte"):
        assert [r.get(name) for r in found.values()] == [r.get(name) for r in whole.values()]


#: One window of text, so that all processes but one have none; and one draft.
FEW = {"valid_bytes": 1, "valid_drafts": 1}


@pytest.mark.parametrize(
    "few",
    [
        pytest.param(
            False,
            marks=pytest.mark.nightly(reason="[True] scores in three processes, two without text"),
        ),
        True,
    ],
)
def test_scores_are_those_of_one_process_in_any_number(runs, few):
    scorer = {**runs.tables["train"]["scorer"], "steps": 2}
    # Steps after a score that wrote no model, where a process may have had nothing to score.
    steps = 4 if few else 2
    keys = {"steps": steps, "validate_every": 1, "accumulate": 6, "valid_drafts": 5}
    keys |= {"scorer": scorer}
    keys |= {"dtype": "float64", "blocks": True, **(FEW if few else {})}
    alone, _ = runs.train(f"scores-{few}-1", 1, **keys)
    for processes, strategy in ((3, "fsdp"),) if few else ((2, "fsdp"), (3, "ddp")):
        found, _ = runs.train(f"scores-{few}-{processes}", processes, strategy, **keys)
        for key, record in alone.items():
            scores = {k: v for k, v in record.items() if k in SCORES or "/" in k}
            assert scores == pytest.approx({k: found[key][k] for k in scores}, rel=1e-9, abs=0)
    names = {name for record in alone.values() for name in record}
    assert {*SCORES, "masked_accuracy/1.0", "accepted/blt-s draft_bytes=16"} <= names


def test_a_score_that_fails_in_one_process_ends_in_all(runs):
    began = time.monotonic()
    _, done = runs.train("failing", 2, env={"FAILING": "1"}, code=1)
    assert time.monotonic() - began < SECONDS
    assert "out of luck" in done.stderr
    assert "held-out score of scorer step 6: failed in process 1 of 2" in done.stderr


def test_a_process_that_dies_in_a_score_keeps_no_other_waiting(runs):
    """Started without a launcher, which would end the processes that are left."""
    config = runs.config("dying", strategy="ddp")
    command = [str(runs.folder / "program.py"), "train", str(config)]
    command += ["--out", str(runs.folder / "dying")]
    done = runs.forks.run(2, command, {"DYING": "1"}, seconds=SECONDS)
    assert done.codes == [1, 3]
    assert "score of scorer step 6: another process has ended, or does not answer" in done.stderr


@pytest.mark.parametrize("first", [0, 1])
def test_fsdp_scores_as_often_as_each_process_likes_also_before_the_first_step(runs, first):
    """Otherwise a process waits for the others at each layer, or the run cannot take a step."""
    program = runs.folder / "unlike.py"
    program.write_text(UNLIKE)
    done = runs.forks.run(2, [str(program), str(first)], {})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == 2


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
    tables, runs.tables = (
        runs.tables,
        {
            **runs.tables,
            "global_model": {**runs.tables["global_model"], "layers": 2},
        },
    )
    try:
        _, done = runs.train("shared", 2, "fsdp", parts=parts, code=1)
    finally:
        runs.tables = tables
    assert "fsdp gathers layers one at a time, and global_model.stack.layers.0.mlp.down.weight" in (
        done.stderr
    )
    assert "strategy = 'ddp'" in done.stderr
