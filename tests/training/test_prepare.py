"""``blt prepare``: the patches of training, made once; exact, restartable, and never mistaken."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tomli_w
import torch

from blt_core.component import BuildContext
from blt_core.errors import ConfigError, DataError
from blt_core.loading import read_checkpoint
from blt_core.plugins.loading import load_plugins
from blt_core.types import Rows
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import build_node, resolve_component
from blt_plugins.training.corpora.prepared import PreparedCorpus, PreparedCorpusParams, open_shards
from blt_plugins.training.corpora.shards import load_manifest
from blt_plugins.training.data.load import load_data
from blt_plugins.training.data.prepare import Source, prepare
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.run.phases import make_phases
from blt_plugins.training.run.trainer import Trainer
from tests.tiny import write_checkpoint


@pytest.fixture
def more(tmp_path, texts) -> dict[str, Any]:
    """A config that trains a checkpoint of a random but lively model further."""
    return {
        "schema": 1,
        "run": {"checkpoint": str(write_checkpoint(tmp_path / "checkpoint"))},
        "corpus": {"use": "folder", "path": str(texts), "valid_percent": 20},
        "train": {"steps": 8, "batch_bytes": 256, "context_bytes": 64, "valid_bytes": 300,
                  "validate_every": 4},
    }  # fmt: skip


def config(tables: dict[str, Any]) -> Config:
    return Config.from_mapping(tables, "more.toml")


def on(tables: dict[str, Any], folder: Path, **train: Any) -> Config:
    """The same run on a prepared corpus."""
    corpus = {"use": "prepared", "path": str(folder)}
    return config({**tables, "corpus": corpus, "train": {**tables["train"], **train}})


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# -- what is written -----------------------------------------------------------------------------


def test_shards_hold_the_documents_and_the_flags_of_their_windows(more, tmp_path):
    found = prepare(config(more), tmp_path / "out", shard_bytes=400)
    source = Source.load(config(more))
    prepared = PreparedCorpus(PreparedCorpusParams(path=str(tmp_path / "out")), BuildContext())
    patches = opened = 0
    for split in ("train", "valid"):
        there, ours = source.documents[split], prepared.documents(split)
        assert list(ours) == list(there)
        assert ours.digest == there.digest
        assert ours.sizes.tolist() == there.sizes.tolist()
        for index, text in enumerate(ours):
            assert ours.source(index) == there.source(index)
            opens = ours.opens(index)
            assert len(opens) == len(text) + 1
            for start in range(0, len(text) + 1, 64):
                ids = [source.model.scheme.bos, *text[start : start + 63]]
                rows = torch.tensor([ids[: len(opens) - start]])
                flags = source.model.patcher.flags(Rows(rows, (rows.shape[1],)), None)
                assert opens[start : start + 64].tolist() == flags[0].tolist()
            patches, opened = patches + int(opens[:-1].sum()), opened + len(text)
    assert len(prepared.documents("train")) > 3 < found.shards
    assert (found.patches, found.bytes) == (patches, opened)
    assert 1 < found.mean_patch_bytes < 6, "the patches vary"


def test_the_schema_is_the_documented_one(more, tmp_path):
    prepare(config(more), tmp_path / "out", shard_bytes=400)
    manifest = load_manifest(tmp_path / "out")
    with pa.ipc.open_file(str(tmp_path / "out" / "train" / "000000.arrow")) as file:
        schema = file.schema
    assert schema.remove_metadata() == pa.schema(
        {"text": pa.large_binary(), "opens": pa.list_(pa.bool_()), "source": pa.string()}
    )
    metadata = json.loads(schema.metadata[b"blt"])
    assert metadata["patching"] == manifest.patching
    assert metadata["patching"]["threshold"] == 4.3
    assert metadata["patching"]["max_patch_bytes"] == 6
    assert metadata["patching"]["context_bytes"] == 64
    assert metadata["corpus"] == manifest.digests["train"]
    assert manifest.complete
    assert manifest.shards.keys() == files(tmp_path / "out").keys() - {"manifest.json"}


def test_training_on_shards_is_training_on_the_corpus_bit_for_bit(more, tmp_path, silent):
    prepare(config(more), tmp_path / "shards", shard_bytes=400)
    losses, weights = [], []
    for own in (config(more), on(more, tmp_path / "shards")):
        job, report = make_job(own, load_plugins(), out=tmp_path / f"out{len(losses)}"), silent()
        patcher, calls = job.model.patcher, []
        flags = patcher.flags
        patcher.flags = lambda *a, flags=flags, calls=calls: calls.append(1) or flags(*a)
        data = load_data(job.corpus, job.settings, job.model)
        phase = make_phases(job.model, job.objective, job.settings, data.documents, data.windows)[0]
        batch = phase.batches[0]
        assert (batch.opens_br is None) == (not losses)
        Trainer(job, report).run()
        losses.append((report.losses, data.digest))
        weights.append({k: t.clone() for k, t in job.model.module_dict().state_dict().items()})
        calls_of_steps = len(calls)
    assert losses[0] == losses[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert calls_of_steps < 8, "only held-out scores ask the patcher"


def spread(tables):
    """The same work in two processes."""
    return {**tables, "executor": {"use": "local", "workers": 2}}


def test_one_worker_and_two_write_the_same_files(more, tmp_path):
    one = prepare(config(more), tmp_path / "one", shard_bytes=300)
    two = prepare(config(spread(more)), tmp_path / "two", shard_bytes=300)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert one.shards == two.shards > 3


def test_a_scorer_is_rounded_to_what_is_stored_before_it_makes_patches(more, tmp_path, silent):
    more["train"]["save_dtype"] = "bfloat16"
    prepare(config(more), tmp_path / "shards")
    losses = []
    for own in (config(more), on(more, tmp_path / "shards")):
        job, report = make_job(own, load_plugins(), out=tmp_path / f"out{len(losses)}"), silent()
        Trainer(job, report).run()
        losses.append(report.losses)
    assert losses[0] == losses[1]
    more["train"]["save_dtype"] = "float32"
    text = refusal(on(more, tmp_path / "shards"), tmp_path)
    assert re.search(r"\n  scorer: \w{12}… there, \w{12}… now\n  fix: ", text)


def test_a_mixture_keeps_its_weights(more, texts, tmp_path):
    parts = {"a": more["corpus"], "b": {"use": "folder", "path": str(texts / "part0")}}
    more["corpus"] = {"use": "mixture", "parts": parts, "weights": {"a": 0.5}}
    prepare(config(more), tmp_path / "out")
    read = {}
    for name, table in (("mixed", more["corpus"]), ("out", {"use": "prepared",
                        "path": str(tmp_path / "out")})):  # fmt: skip
        job = make_job(config({**more, "corpus": table}), load_plugins(), out=tmp_path / "run")
        data = load_data(job.corpus, job.settings, job.model)
        phase = make_phases(job.model, job.objective, job.settings, data.documents, data.windows)[0]
        read[name] = [phase.batches[n].rows.ids_br.tolist() for n in range(20)]
    assert read["mixed"] == read["out"]


def test_mixtures_of_prepared_corpora_know_their_patches(more, texts, tmp_path):
    prepare(config(more), tmp_path / "a")
    prepare(config({**more, "corpus": {**more["corpus"], "path": str(texts / "part0")}}),
            tmp_path / "b")  # fmt: skip

    def mixed(*tables: dict[str, Any]):
        table = {"use": "mixture", "parts": dict(zip("xyz", tables, strict=False))}
        plugins = load_plugins()
        node = resolve_component("corpus", table, plugins)
        return build_node(node, BuildContext(), plugins.registry).documents("train")

    a, b = ({"use": "prepared", "path": str(tmp_path / name)} for name in "ab")
    both = mixed(a, b)
    assert both.patching == load_manifest(tmp_path / "a").patching
    last = PreparedCorpus(PreparedCorpusParams(path=b["path"]), BuildContext()).documents("train")
    assert np.array_equal(both.opens(len(both) - 1), last.opens(len(last) - 1))
    assert mixed(a, more["corpus"]).patching is None
    more["train"]["context_bytes"] = 32
    prepare(config(more), tmp_path / "c")
    with pytest.raises(DataError, match=r"'x' and 'y' were prepared differently: context_bytes 64"):
        mixed(a, {"use": "prepared", "path": str(tmp_path / "c")})


def test_a_corpus_without_held_out_text_has_none_prepared(more, tmp_path):
    more["corpus"]["valid_percent"] = 0
    prepare(config(more), tmp_path / "out")
    own = on(more, tmp_path / "out", valid_bytes=0)
    job = make_job(own, load_plugins(), out=tmp_path / "run")
    data = load_data(job.corpus, job.settings, job.model)
    assert (list(data.valid), data.valid.rounds) == ([], 0)
    assert len(data.documents) == 12
    assert len(job.corpus.documents("valid")) == 0


# -- stopping and going on -----------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
from pathlib import Path
from blt_core.wiring.config import Config
from blt_plugins.training.data import prepare

if __name__ == "__main__":
    def progress(done, total):
        if len(json.loads((out / "manifest.json").read_text())["shards"]) >= 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def patch(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a shard
        return original(*arguments)

    out, workers, calls = Path(sys.argv[2]), int(sys.argv[3]), []
    config = Config.from_mapping(json.loads(sys.argv[1]), "more.toml")
    if workers == 1:
        prepare.GROUP_BYTES = 1
        original, prepare.patch_documents = prepare.patch_documents, patch
        progress = lambda done, total: None
    prepare.prepare(config, out, shard_bytes=300, progress=progress)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_goes_on_and_writes_the_same_shards(more, tmp_path, monkeypatch, workers):
    if workers == 1:
        monkeypatch.setattr("blt_plugins.training.data.prepare.GROUP_BYTES", 1)
    whole = tmp_path / "whole"
    prepare(config(more), whole, shard_bytes=300)
    script, out = tmp_path / "killed.py", tmp_path / "killed"
    script.write_text(KILLED)
    arguments = [json.dumps(more if workers == 1 else spread(more)), str(out), str(workers)]
    # The pipe is closed when the last process that holds it has ended: workers do not stay behind.
    done = subprocess.run(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, timeout=300, check=False
    )
    assert done.returncode == -signal.SIGKILL
    stopped = load_manifest(out)
    assert not stopped.complete
    kept = len(stopped.shards)
    assert kept > 0
    times = {name: (out / name).stat().st_mtime_ns for name in stopped.shards}
    with pytest.raises(DataError, match="killed: not finished; run its blt prepare command again"):
        PreparedCorpus(PreparedCorpusParams(path=str(out)), BuildContext())
    found = prepare(config(more), out, shard_bytes=300)
    assert found.kept == kept < found.shards
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    ours, theirs = files(whole), files(out)
    assert {name: ours[name] for name in ours if name.endswith(".arrow")} == {
        name: theirs[name] for name in theirs if name.endswith(".arrow")
    }
    assert load_manifest(out).shards == load_manifest(whole).shards
    again = prepare(config(more), out, shard_bytes=300)
    assert (again.kept, again.bytes_per_second) == (found.shards, None)


def test_a_damaged_shard_is_made_anew(more, tmp_path):
    prepare(config(more), tmp_path / "out", shard_bytes=300)
    before, name = files(tmp_path / "out"), "train/000001.arrow"
    (tmp_path / "out" / name).write_bytes(bytes(len(before[name])))
    found = prepare(config(more), tmp_path / "out", shard_bytes=300)
    assert found.kept == found.shards - 1
    assert files(tmp_path / "out") == before


# -- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def shards(more, tmp_path) -> Path:
    prepare(config(more), tmp_path / "shards")
    return tmp_path / "shards"


def refusal(own: Config, tmp_path: Path) -> str:
    job = make_job(own, load_plugins(), out=tmp_path / "run")
    with pytest.raises(DataError) as caught:
        load_data(job.corpus, job.settings, job.model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("patcher", "train", "message"),
    [
        ({"threshold": 4.5}, {}, "threshold: 4.3 there, 4.5 now"),
        ({"max_patch_bytes": 5}, {}, "max_patch_bytes: 6 there, 5 now"),
        ({}, {"context_bytes": 65}, "context_bytes: 64 there, 65 now"),
        ({"byte_scorer": {"window": 15}}, {}, r"scorer: '?\w{12}… there, \w{12}… now"),
    ],
)
def test_patches_of_another_configuration_are_refused_with_both(
    more, shards, tmp_path, patcher, train, message
):
    more["patcher"] = patcher
    text = refusal(on(more, shards, **train), tmp_path)
    assert text.startswith("the corpus was prepared for other patches than this run makes:\n")
    assert re.search(message, text)
    assert text.count(" there, ") == 1
    assert "fix: run blt prepare with this configuration, or" in text


def test_a_scorer_that_will_be_rounded_is_refused(more, shards, tmp_path):
    text = refusal(on(more, shards, save_dtype="bfloat16"), tmp_path)
    assert re.search(
        r"\n  scorer: \w{12}… there, \w{12}… now"
        r"\n  \(the scorer now is rounded to train.save_dtype = 'bfloat16'\)\n  fix: ",
        text,
    )


def test_a_shard_of_another_folder_is_refused_though_it_is_as_long(more, texts, tmp_path):
    prepare(config(more), tmp_path / "a", shard_bytes=400)
    more["patcher"] = {"threshold": 4.5}
    prepare(config(more), tmp_path / "b", shard_bytes=400)
    first, second = "train/000000.arrow", "train/000001.arrow"

    def refused(copied: Path) -> str:
        shutil.copy(copied, tmp_path / "a" / second)
        with pytest.raises(DataError) as caught:
            open_shards(tmp_path / "a", load_manifest(tmp_path / "a"), "train")
        return str(caught.value)

    kept = (tmp_path / "a" / second).read_bytes()
    assert (tmp_path / "b" / second).stat().st_size == len(kept)
    text = refused(tmp_path / "b" / second)
    with pytest.raises(DataError, match=re.escape(text)):
        PreparedCorpus(PreparedCorpusParams(path=str(tmp_path / "a")), BuildContext()).documents(
            "train"
        )
    assert text == (
        f"{tmp_path / 'a' / second}: a shard of other prepared documents than the rest of its "
        "folder:\n  threshold: 4.5 there, 4.3 in manifest.json\n"
        "  fix: run blt prepare again, which makes it anew"
    )
    assert re.search(r"\n  first: 0 there, \d+ in manifest.json\n", refused(tmp_path / "a" / first))
    text = refused(tmp_path / "a" / "valid" / "000000.arrow")
    assert "\n  split: 'valid' there, 'train' in manifest.json\n" in text
    assert re.search(r"\n  corpus: \w{12}… there, \w{12}… in manifest.json\n", text)
    del more["patcher"]
    prepare(config(more), tmp_path / "a", shard_bytes=400)
    assert (tmp_path / "a" / second).read_bytes() == kept, "as the message says"


@pytest.mark.parametrize("metadata", [None, {b"blt": b"[]"}, {b"blt": b"{"}])
def test_a_shard_that_says_nothing_of_itself_is_refused(more, shards, metadata):
    path = shards / "train" / "000000.arrow"
    with pa.ipc.open_file(str(path)) as file:
        table = file.read_all().replace_schema_metadata(metadata)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"000000\.arrow: no shard of prepared documents: its meta"):
        open_shards(shards, load_manifest(shards), "train")


def test_patches_of_another_scorer_are_refused(more, shards, tmp_path):
    other = write_checkpoint(tmp_path / "other", seed=1)
    text = refusal(on({**more, "run": {"checkpoint": str(other)}}, shards), tmp_path)
    assert re.search(r"\n  scorer: \w{12}… there, \w{12}… now\n", text)


def test_a_run_that_trains_its_own_scorer_cannot_use_them(more, shards, tables, tmp_path):
    tables["corpus"] = {"use": "prepared", "path": str(shards)}
    text = refusal(config(tables), tmp_path)
    assert "but this run trains a scorer of its own" in text


def test_a_folder_that_holds_something_else_is_left_alone(more, shards, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    with pytest.raises(DataError, match="full: not empty, and no prepared corpus"):
        prepare(config(more), full)
    before = files(shards)
    more["train"]["context_bytes"] = 32
    with pytest.raises(DataError, match="prepared with other patching and shard_bytes\n  fix: "):
        prepare(config(more), shards, shard_bytes=7)
    assert files(shards) == before


def test_a_folder_that_is_not_whole_is_no_corpus(more, shards, tmp_path):
    def opened():
        PreparedCorpus(PreparedCorpusParams(path=str(shards)), BuildContext())

    file = shards / "train" / "000000.arrow"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"000000.arrow: has {len(content) - 1} bytes of"):
        opened()
    file.unlink()
    with pytest.raises(DataError, match=r"000000\.arrow: is missing; run blt prepare again"):
        opened()
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\n")
    with pytest.raises(DataError, match=r"000000\.arrow: a Git-LFS pointer, .*git lfs pull"):
        opened()
    (shards / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"manifest\.json: .*nested too deeply"):
        opened()
    (shards / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json: no manifest of prepared documents"):
        opened()
    (shards / "manifest.json").write_text('{"version": 9}')
    with pytest.raises(DataError, match="has version 9; this program reads version 1"):
        opened()
    shutil.rmtree(shards)
    with pytest.raises(DataError, match="shards: no prepared corpus; blt prepare makes one"):
        opened()


# -- the command ---------------------------------------------------------------------------------


def test_the_command_takes_a_checkpoint_and_a_folder(blt, more, texts, tmp_path):
    arguments = ["prepare", more["run"]["checkpoint"], "--corpus", texts, "--out", tmp_path / "out"]
    outcome = blt(*arguments, "--context-bytes", 64, "--json")
    assert outcome.code == 0
    record = json.loads(outcome.out)
    assert record.keys() == {
        "out", "documents", "bytes", "patches", "mean_patch_bytes", "shards", "kept", "seconds",
        "bytes_per_second",
    }  # fmt: skip
    assert record["documents"] == 12
    assert load_manifest(tmp_path / "out").patching["context_bytes"] == 64
    again = blt(*arguments, "--context-bytes", 64)
    assert "nothing was left to do" in again.out
    assert again.out.splitlines()[-1] == f"prepared: {tmp_path / 'out'}"
    refused = blt(*arguments)  # the model's own context is another
    assert refused.code == 2
    assert "prepared with other patching" in refused.err


@pytest.mark.parametrize("source", ["config", "checkpoint"])
def test_a_scorer_trained_alone_prepares_a_corpus_for_a_model(blt, tables, texts, tmp_path, source):
    parts = {kind: tables.pop(kind) for kind in ("encoder", "global_model", "decoder")}
    tables["corpus"] = {"use": "folder", "path": str(texts)}
    steps = tables["train"].pop("steps")

    def write(name: str) -> Path:
        (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(tables))
        return tmp_path / f"{name}.toml"

    def losses(config: Path) -> list[float]:
        outcome = blt("train", config, "--out", tmp_path / config.stem)
        assert outcome.code == 0, outcome.err
        lines = (tmp_path / config.stem / "metrics.jsonl").read_text().splitlines()
        return [record["loss"] for record in map(json.loads, lines) if "loss" in record]

    losses(write("scorer"))
    scorer = tmp_path / "scorer" / "model"
    del tables["patcher"]
    tables["train"] |= {"steps": steps, "scorer": {"checkpoint": str(scorer)}}
    tables |= parts
    raw, out = write("raw"), tmp_path / "prepared"
    given = [raw] if source == "config" else [scorer, "--corpus", texts]
    assert blt("prepare", *given, "--out", out).code == 0
    tables["corpus"] = {"use": "prepared", "path": str(out)}
    found = losses(write("patched"))
    assert len(found) == steps
    assert found == losses(raw)


def test_a_trained_scorer_without_a_model_is_prepared_with_and_not_trained(blt, more, tmp_path):
    folder, plugins = tmp_path / "scorer", load_plugins()
    tables, tensors = read_checkpoint(more["run"]["checkpoint"], plugins)
    node = resolve_component("checkpoint_format", {"use": "folder"}, plugins)
    build_node(node, BuildContext(), plugins.registry).write(
        folder,
        {key: tables[key] for key in ("schema", "model", "patcher")},
        {name: tensors[name] for name in tensors if name.startswith("patcher.")},
    )
    own = {**more, "run": {"checkpoint": str(folder)}, "patcher": {"threshold": 4.5}}
    del own["train"]["steps"]
    (tmp_path / "own.toml").write_text(tomli_w.dumps(own))
    outcome = blt("prepare", tmp_path / "own.toml", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    there = load_manifest(tmp_path / "out").patching
    assert (there["threshold"], there["context_bytes"]) == (4.5, 64)
    tables = {"corpus": more["corpus"], "model": tables["model"], "schema": 1,
              "train": {"scorer": {"checkpoint": str(folder)}}}  # fmt: skip
    with pytest.raises(ConfigError, match=r"train\.scorer: there is nothing to train: .*no model"):
        make_job(config(tables), plugins, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": {}}, "run.checkpoint: missing; only a trained scorer has patches to prepare"),
        ({"corpus": None}, "corpus: missing; this needs a table [corpus]"),
        ({"train": {"steps": 1, "context_bytes": 301}}, "train.context_bytes: 301 is more than"),
    ],
)
def test_what_cannot_be_prepared_is_told(blt, more, tmp_path, change, message):
    path, tables = tmp_path / "more.toml", {**more, **change}
    path.write_text(tomli_w.dumps({k: v for k, v in tables.items() if v is not None}))
    outcome = blt("prepare", path, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert message in outcome.err


def test_a_checkpoint_without_a_threshold_has_no_patches(more, tmp_path):
    path = Path(more["run"]["checkpoint"]) / "config.toml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("threshold")))
    with pytest.raises(ConfigError, match=r"patcher\.threshold: missing; patches depend on it"):
        prepare(config(more), tmp_path / "out")


def test_faults_of_a_config_are_not_hidden_by_its_options(more, tmp_path):
    more["train"]["stepz"] = 1
    with pytest.raises(ConfigError, match=r"train\.stepz: unknown key"):
        prepare(config(more), tmp_path / "out")
