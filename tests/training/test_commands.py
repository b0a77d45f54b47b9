"""``blt train`` and ``blt calibrate`` as they are typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli
import tomli_w
from safetensors.torch import load_file

from blt_core.errors import ConfigError
from blt_core.plugins.loading import load_plugins
from blt_core.resources import resource
from blt_core.wiring.config import Config, load_config
from blt_core.wiring.resolve import resolve
from blt_plugins.training.cli.calibrate import histogram_rows
from blt_plugins.training.run.make_job import make_job
from blt_plugins.training.setup.config import NEEDS


@pytest.fixture
def config(tables, tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tables))
    return path


@pytest.fixture
def trained(finished) -> Path:
    return finished()


def test_train_writes_a_model_and_says_where(blt, tables, config, tmp_path):
    tables["train"]["plot"] = True
    config.write_text(tomli_w.dumps(tables))
    outcome = blt("train", config, "--out", tmp_path / "out")
    assert outcome.code == 0
    score, losses, model = outcome.out.splitlines()
    assert Path(losses.removeprefix("losses: ")).read_bytes().startswith(b"\x89PNG")
    assert score.startswith("held-out bits per byte: ")
    assert model == f"model: {tmp_path / 'out' / 'model'}"
    assert "scorer 8/8" in outcome.err
    assert "model 12/12" in outcome.err
    again = blt("train", config, "--out", tmp_path / "out")
    assert again.code == 0
    assert "already finished (model step 12); --fresh trains anew" in again.err
    assert again.out == outcome.out


def test_an_option_hides_no_fault_of_the_corpus_table(tables, texts):
    tables["corpus"] |= {"path": 5, "valid_path": 6}
    with pytest.raises(ConfigError) as caught:
        make_job(Config.from_mapping(tables, "a.toml"), load_plugins(), corpus=texts)
    assert [str(each) for each in caught.value.problems] == [
        "a.toml: corpus.path: expected str, got int 5",
        "a.toml: corpus.valid_path: expected str, got int 6",
    ]


def test_another_corpus_can_be_given(blt, config, tables, tmp_path, texts):
    tables["corpus"]["path"] = "nowhere"
    config.write_text(tomli_w.dumps(tables))
    outcome = blt("train", config, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "nowhere: no such folder; corpus.path (or --corpus) names a folder" in outcome.err
    assert blt("train", config, "--out", tmp_path / "out", "--corpus", texts).code == 0


def test_the_device_can_be_given(blt, config, tmp_path):
    outcome = blt("train", config, "--out", tmp_path / "out", "--device", "gpu")
    assert outcome.code == 2
    assert "device 'gpu' is not available" in outcome.err


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
@pytest.mark.parametrize(
    "file", ["model/net.py", "state/notes.txt", "model-last/x", "metrics.jsonl"]
)
def test_files_of_others_are_never_removed(blt, config, tmp_path, file, fresh):
    path = tmp_path / "project" / file
    path.parent.mkdir(parents=True)
    path.write_text("mine\n2")
    outcome = blt("train", config, "--out", tmp_path / "project", *fresh)
    assert outcome.code == 2
    assert f"{tmp_path / 'project' / Path(file).parts[0]}:" in outcome.err
    assert "scorer 1/8" not in outcome.err
    assert path.read_text() == "mine\n2"


def test_an_out_that_is_no_folder_is_bad_input(blt, config, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", "/proc/nope"):
        outcome = blt("train", config, "--out", out)
        assert outcome.code == 2
        assert outcome.err.splitlines()[-1].startswith(f"{out}: ")


def test_out_comes_from_the_config_or_its_name(tables, tmp_path, config):
    job = make_job(load_config(config), load_plugins())
    assert job.out == Path("runs/tiny")
    tables["train"]["out"] = "elsewhere"
    config.write_text(tomli_w.dumps(tables))
    assert make_job(load_config(config), load_plugins()).out == Path("elsewhere")


def test_another_configuration_is_bad_input(blt, config, tables, tmp_path):
    out = tmp_path / "out"
    assert blt("train", config, "--out", out).code == 0
    tables["train"]["steps"] = 13
    config.write_text(tomli_w.dumps(tables))
    outcome = blt("train", config, "--out", out)
    assert outcome.code == 2
    assert "train.steps: 12 there, 13 now" in outcome.err
    assert blt("train", config, "--out", out, "--fresh").code == 0


@pytest.mark.parametrize("name", ["quickstart-train", "train-python", "train-python-hf"])
def test_the_shipped_training_configs_check(name):
    config = load_config(resource("configs") / f"{name}.toml")
    table = {**config.tables["patcher"], "threshold": 1.0}
    resolve(config.with_table("patcher", table), load_plugins(), needs=NEEDS)
    with pytest.raises(ConfigError, match="no/corpus: no such folder") as caught:
        make_job(config, load_plugins(), corpus=Path("no/corpus"))
    assert len(caught.value.problems) == 1  # all else is in order


def test_check_shows_a_training_config_that_trains_the_same(blt, tables, tmp_path):
    path, again = tmp_path / "tiny.toml", tmp_path / "again.toml"
    path.write_text(tomli_w.dumps(tables))
    shown = tomli.loads(blt("check", path).out)
    assert "threshold" not in shown["patcher"]  # it is yet to be calibrated
    assert shown["train"]["scorer"]["steps"] == 8
    assert shown["objective"] == {"use": "ar"}
    again.write_text(tomli_w.dumps(shown))
    assert tomli.loads(blt("check", again).out) == shown
    tables["train"]["clip"] = 0
    path.write_text(tomli_w.dumps(tables))
    outcome = blt("check", path)
    assert outcome.code == 2
    assert "train.clip: " in outcome.err


def test_check_shows_a_config_that_trains_a_checkpoint_further(blt, trained, tables, tmp_path):
    path, again = tmp_path / "more.toml", tmp_path / "again.toml"
    del tables["train"]["scorer"]
    kept = {key: tables[key] for key in ("schema", "corpus", "train")}
    more = {**kept, "run": {"checkpoint": str(trained)}, "decoder": {"denoises": True}}
    more["objective"] = {"use": "block-diffusion"}
    path.write_text(tomli_w.dumps(more))
    shown = tomli.loads(blt("check", path).out)
    assert shown["decoder"]["denoises"] is True
    assert shown["patcher"]["threshold"] > 0
    again.write_text(tomli_w.dumps(shown))
    assert tomli.loads(blt("check", again).out) == shown


@pytest.mark.parametrize("part", ["python-blocks", "python-decay", "translate-decay"])
def test_later_parts_of_the_demos_check_beside_a_checkpoint(trained, part):
    config = load_config(resource("configs") / f"train-{part}.toml")
    short = {**config.tables["train"], "context_bytes": 64}  # as much as this model serves
    config = config.with_table("train", short).with_run(checkpoint=str(trained))
    if "objective" in config.tables:  # the second part has taught the decoder
        config = config.with_table("decoder", {"denoises": True})
    with pytest.raises(ConfigError, match="no/corpus: no such f") as caught:
        make_job(config, load_plugins(), corpus=Path("no/corpus"))
    assert len(caught.value.problems) == 1


def test_calibrate_shows_the_threshold_and_a_histogram(blt, trained, texts):
    files = sorted(texts.glob("*/*.py"))
    outcome = blt("calibrate", trained, *files, "--target", 3)
    assert outcome.code == 0
    threshold, mean, *rows = outcome.out.splitlines()
    assert threshold.startswith("threshold = ")
    assert mean.startswith("mean patch length: ")
    assert "█" in outcome.out
    assert [int(row.split()[0]) for row in rows[1:]] == list(range(1, 9))
    record = json.loads(blt("calibrate", trained, *files, "--target", 3, "--json").out)
    assert record["mean_patch_bytes"] == pytest.approx(3, rel=0.05)
    assert f"threshold = {record['threshold']}" in threshold
    size = sum(file.stat().st_size for file in files)
    assert sum(int(n) * count for n, count in record["histogram"].items()) == size
    assert record["bytes"] == size


def test_calibrate_stores_the_threshold_and_nothing_else(blt, trained, texts):
    before = tomli.loads((trained / "config.toml").read_text())
    tensors = (trained / "model.safetensors").read_bytes()
    outcome = blt("calibrate", trained, *texts.glob("*/*.py"), "--target", 2, "--json", "--write")
    found = json.loads(outcome.out)["threshold"]
    after = tomli.loads((trained / "config.toml").read_text())
    assert found != before["patcher"]["threshold"]
    before["patcher"]["threshold"] = found
    assert after == before
    assert (trained / "model.safetensors").read_bytes() == tensors
    assert load_file(trained / "model.safetensors")


def test_calibrate_leaves_a_model_card_and_a_link_alone(blt, trained, texts, tmp_path):
    (trained / "README.md").write_text("a model card")
    (tmp_path / "link").symlink_to(trained)
    files = sorted(texts.glob("*/*.py"))
    assert blt("calibrate", tmp_path / "link", *files, "--write").code == 0
    assert (tmp_path / "link").is_symlink()
    assert (trained / "README.md").read_text() == "a model card"


def test_calibrate_takes_the_working_folder(blt, trained, texts, monkeypatch):
    monkeypatch.chdir(trained)
    assert blt("calibrate", ".", *texts.glob("*/*.py"), "--write").code == 0


def test_calibrate_reads_a_config_that_names_a_checkpoint(blt, trained, texts, tmp_path):
    path, files = tmp_path / "run.toml", sorted(texts.glob("*/*.py"))
    path.write_text(tomli_w.dumps({"schema": 1, "run": {"checkpoint": str(trained)}}))
    direct = blt("calibrate", trained, *files, "--json").out
    assert blt("calibrate", path, *files, "--json").out == direct
    refused = blt("calibrate", path, *files, "--write")
    assert refused.code == 2
    assert "fix: in your config, [patcher] threshold = " in refused.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "no.py"], "no.py: cannot be read"),
        (["{model}", "{file}", "--target", "9"], "9.0 bytes cannot be reached"),
        (["no/model", "{file}"], "no/model: no checkpoint; found nothing (looked at"),
        (["nothing", "{file}"], "nothing: "),
        (["{config}", "{file}"], "run.checkpoint: missing; only a trained model"),
    ],
)
def test_calibrate_names_what_is_wrong(blt, trained, texts, config, tables, arguments, message):
    # Without [train] a config of a model, which could be run if it had weights.
    kept = {k: v for k, v in tables.items() if k not in ("train", "corpus")}
    kept["patcher"] = {**kept["patcher"], "threshold": 1.0}
    config.write_text(tomli_w.dumps(kept))
    names = {"model": trained, "config": config, "file": next(texts.glob("*/*.py"))}
    outcome = blt("calibrate", *(argument.format(**names) for argument in arguments))
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.out == ""


def test_a_patcher_without_a_threshold_cannot_be_calibrated(blt, config, tables, tmp_path, texts):
    tables["patcher"] = {"use": "static"}
    config.write_text(tomli_w.dumps(tables))
    blt("train", config, "--out", tmp_path / "static")
    outcome = blt("calibrate", tmp_path / "static" / "model", *texts.glob("*/*.py"))
    assert outcome.code == 2
    assert "the patcher 'static' has no threshold to calibrate" in outcome.err


def test_long_patches_share_the_last_row():
    assert histogram_rows({1: 5, 3: 2}) == [("1", 5), ("2", 0), ("3", 2)]
    rows = histogram_rows({2: 5, 17: 2, 90: 3})
    assert len(rows) == 17
    assert rows[-1] == ("17+", 5)
