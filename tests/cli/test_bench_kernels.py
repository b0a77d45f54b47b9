from __future__ import annotations

import json

import pytest

from blt_core.kernels import machine, measuring


@pytest.fixture(autouse=True)
def little(monkeypatch, tmp_path):
    """A cache folder of its own, and little to read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "last_level_cache", lambda: 1 << 14)
    monkeypatch.setattr(machine.read_bandwidth, "__defaults__", (1 << 20,))


def test_it_shows_each_kernel_and_stores_the_choice_that_a_run_then_has(blt, checkpoint, tmp_path):
    outcome = blt("bench-kernels", checkpoint, "--json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    assert record["read_bandwidth"] > 0
    assert record["native"] is None
    for weight in record["weights"]:
        assert set(weight["chosen"]) == {"1", "2-4", "5-16", "more"}
        for rows, speeds in weight["gigabytes_per_second"].items():
            assert weight["chosen"][rows] in speeds
            assert min(speeds.values()) > 0
    assert f"stored in {record['stored']}" in outcome.err
    assert "--build" in outcome.err
    common = (
        "generate",
        "--checkpoint",
        checkpoint,
        "--prompt",
        "a",
        "--max-new-bytes",
        5,
        "--json",
    )
    for kernels in ("measured", record["stored"]):
        [run] = map(json.loads, blt(*common, "--kernels", kernels).out.splitlines())
        assert run["kernels"] == record["kernels"]
    [run] = map(json.loads, blt(*common).out.splitlines())
    assert "kernels" not in run


def test_the_table_has_a_line_for_each_class_of_rows(blt, checkpoint):
    outcome = blt("bench-kernels", checkpoint, "--dtype", "bfloat16")
    lines = outcome.out.decode().splitlines()
    assert "a plain sum reads" in lines[0]
    assert all(name in lines[1] for name in ("linear", "mv", "chosen"))
    record = json.loads(blt("bench-kernels", checkpoint, "--dtype", "bfloat16", "--json").out)
    count = len(record["weights"])
    assert len(lines) == 2 + 4 * count


def test_what_cannot_be_measured_or_followed_is_said(blt, checkpoint, tmp_path, monkeypatch):
    outcome = blt("bench-kernels", checkpoint, "--dtype", "float64")
    assert outcome.code == 2
    assert "fix: --dtype float32" in outcome.err
    outcome = blt("generate", "--checkpoint", checkpoint, "--prompt", "a", "--kernels", "quick")
    assert outcome.code == 2
    assert "quick: no choice of kernels" in outcome.err
    monkeypatch.setenv("CXX", "no-such-compiler")
    outcome = blt("bench-kernels", checkpoint, "--build")
    assert outcome.code == 1
    assert "no C++ compiler" in outcome.err
