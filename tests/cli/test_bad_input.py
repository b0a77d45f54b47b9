"""Every mistake gets one clear message on stderr, exit code 2, and no traceback."""

from __future__ import annotations

import shutil

import pytest
import tomli_w

from tests.tiny import config

RUN = ("--prompt", "x", "--max-new-bytes", 4)


def refused(outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.out == b""
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err


def test_unknown_sampler_with_near_match(blt, run_config):
    path = run_config('[sampler]\nuse = "blt-z"')
    refused(blt("generate", path, *RUN),
            f"{path}: sampler.use: no sampler named 'blt-z'. Did you mean 'blt-s'?",
            "installed samplers: ar, blt-auto, blt-cascade, blt-d, blt-dv, blt-lookup, blt-s, ",
            "blt plugins")  # fmt: skip


def test_misspelt_key_with_near_match(blt, run_config):
    path = run_config('[sampler]\nuse = "blt-s"\ndraft_byte = 4')
    refused(blt("generate", path, *RUN),
            "sampler.draft_byte: unknown key. Did you mean 'draft_bytes'?",
            "sampler 'blt-s' (blt-core) takes: draft_bytes, verification")  # fmt: skip


def test_wrong_types_and_ranges_all_at_once(blt, run_config):
    path = run_config('[sampler]\nuse = "blt-s"\ndraft_bytes = 8.5',
                      run='max_new_bytes = 0\ndtype = "float31"\nseed = "7"')  # fmt: skip
    refused(blt("generate", path, "--prompt", "x"),
            "sampler.draft_bytes: expected int, got float 8.5",
            "run.max_new_bytes: expected at least 1, got 0",
            "run.dtype", "float32", "run.seed: expected int")  # fmt: skip


def test_inline_sampler_is_as_strict_as_a_file(blt, run_config):
    refused(blt("generate", run_config(), *RUN, "--sampler", "blt-s draft_bytes=true"),
            "--sampler", "draft_bytes: expected int, got bool true")  # fmt: skip
    refused(blt("generate", run_config(), *RUN, "--sampler", "blt-s draft_bytes"), "--sampler")
    refused(blt("generate", run_config(), *RUN, "--sampler", ""), "--sampler")


def test_out_of_range_options(blt, run_config):
    for option, value, text in (
        ("--max-new-bytes", 0, "expected at least 1, got 0"),
        ("--temperature", -1, "expected at least 0"),
        ("--top-p", 1.5, "top-p"),
        ("--top-k", 0, "expected at least 1, got 0"),
    ):
        refused(blt("generate", run_config(), "--prompt", "x", option, value), text)


def test_greedy_verification_refuses_a_temperature(blt, run_config):
    sampler = "blt-s verification.use=greedy"
    refused(blt("generate", run_config(), *RUN, "--sampler", sampler, "--temperature", 0.8),
            "temperature 0 only", "'replay'")  # fmt: skip


def test_broken_toml_names_the_line(blt, tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text("schema = 1\n[run\n")
    refused(blt("generate", path, *RUN), f"{path}:2:5: Expected")


def test_missing_config(blt, tmp_path):
    refused(blt("generate", tmp_path / "none.toml", *RUN), "none.toml")
    refused(blt("generate", "dmo", *RUN), "Did you mean 'demo'?")


def test_missing_checkpoint(blt, run_config):
    refused(blt("generate", run_config(), *RUN, "--checkpoint", "no/such/folder"),
            "no/such/folder", "checkpoint")  # fmt: skip
    refused(blt("generate", run_config(), *RUN, "--checkpoint", "demo:pyhton"), "no such demo")


def test_truncated_checkpoint(blt, run_config, checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "cut")
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(blt("generate", run_config(), *RUN, "--checkpoint", broken),
            "model.safetensors", "truncated")  # fmt: skip


def test_checkpoint_whose_config_disagrees_with_its_tensors(blt, run_config, checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "odd")
    tables = config()
    tables["decoder"]["hidden"] = 32
    tables["decoder"]["layers"] = 3
    (broken / "config.toml").write_text(tomli_w.dumps(tables))
    refused(blt("generate", run_config(), *RUN, "--checkpoint", broken),
            "decoder.layers.0.mlp.down.weight: expected (16, 32), found (16, 24)",
            "decoder.layers.2.mlp.down.weight: missing")  # fmt: skip


def test_dims_that_disagree(blt, tmp_path):
    tables = config()
    tables["decoder"]["latent_dim"] = 32
    path = tmp_path / "dims.toml"
    path.write_text(tomli_w.dumps(tables))
    refused(blt("generate", path, *RUN), "components disagree on latent_dim",
            "global_model says 24 (global_model.latent_dim)",
            "decoder says 32 (decoder.latent_dim)")  # fmt: skip


def test_dims_of_a_checkpoint_cannot_be_overridden(blt, run_config):
    refused(blt("generate", run_config("[decoder]\ndim = 32"), *RUN),
            "decoder.dim", "comes from the checkpoint", "window")  # fmt: skip


def test_context_overflow_before_any_work(blt, run_config):
    refused(blt("generate", run_config(), "--prompt", "x" * 290, "--max-new-bytes", 20),
            "290 bytes + 20 new bytes exceed the model's context of 300 bytes")  # fmt: skip


@pytest.mark.parametrize("device", ["cuda:7", "meta", "gpu"])
def test_unavailable_device(blt, run_config, device):
    refused(blt("generate", run_config(), *RUN, "--device", device), device)


def test_unreadable_prompt_file(blt, run_config, tmp_path):
    refused(
        blt("generate", run_config(), "--prompt-file", tmp_path / "gone"), "gone", "prompt file"
    )
    refused(blt("generate", run_config(), "--prompt-file", tmp_path), str(tmp_path))


def test_compare_checks_every_sampler_before_any_work(blt, run_config):
    refused(blt("compare", run_config(), *RUN, "--sampler", "ar",
                "--sampler", "blt-s draft_bytes=0"),
            "draft_bytes: expected at least 1, got 0")  # fmt: skip
    refused(blt("compare", run_config(), *RUN, "--cost-parameters", "2b"), "1b, 3b")


def test_unknown_command_and_option(blt):
    assert blt("generat").code == 2
    assert blt("generate", "--promt", "x").code == 2


def test_stdin_is_read_once(blt, run_config):
    refused(blt("generate", run_config(), "--prompt-file", "-", "--prompt-file", "-"), "once only")


def test_a_folder_of_that_name_does_not_hide_a_shipped_config(blt, tmp_path, monkeypatch):
    (tmp_path / "blt-1b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert blt("check", "blt-1b").code == 0


def test_heads_that_do_not_divide_are_found_by_check(blt, tmp_path):
    tables = config()
    tables["decoder"]["heads"] = 3
    path = tmp_path / "heads.toml"
    path.write_text(tomli_w.dumps(tables))
    refused(blt("check", path), "heads: 3 heads do not divide dim 16")


def test_compare_of_one_byte_has_no_speed_to_compare(blt, run_config):
    outcome = blt("compare", run_config(), "--prompt", "x", "--max-new-bytes", 1)
    assert outcome.code == 0
    assert "–" in outcome.out.decode()


def test_plot_into_a_folder(blt, run_config, tmp_path):
    refused(blt("compare", run_config(), *RUN, "--plot", tmp_path), "is a folder")


def test_cost_of_no_number(blt):
    for value in ("nan", "inf", "0"):
        refused(blt("cost", "--bytes-per-parameter", value), "expected more than 0")
