from __future__ import annotations

import json

import pytest

from blt_core.published import SCALES

ROW = {
    "name", "settings", "identical_to_ar", "near_ties", "n_dec", "n_enc", "rounds", "drafted",
    "accepted", "gigabytes", "relative_gigabytes", "bytes_per_second", "relative_speed",
}  # fmt: skip
SAMPLERS = ("ar", "blt-s draft_bytes=2", "blt-s draft_bytes=5")


@pytest.fixture
def report(blt, run_config):
    def call(*extra):
        specs = [part for spec in SAMPLERS for part in ("--sampler", spec)]
        outcome = blt("compare", run_config(), "--prompt", "ab", "--prompt", "import os",
                      "--max-new-bytes", 25, "--json", *specs, *extra)  # fmt: skip
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)

    return call


def test_verified_samplers_are_identical_and_totals_are_sums(report):
    rows = report()["samplers"]
    assert [row["name"] for row in rows] == ["ar", "blt-s", "blt-s"]
    for row in rows:
        assert row.keys() >= ROW
        assert row["identical_to_ar"] or row["near_ties"] == len(row["differences"])
        for key in ("n_dec", "n_enc", "rounds", "drafted", "accepted"):
            assert row[key] == sum(each[key] for each in row["per_prompt"])
        for each in row["per_prompt"]:
            assert each["n_enc"] <= 1 + each["rounds"]
    assert rows[0]["relative_gigabytes"] == 1
    assert rows[0]["n_dec"] == 50


def test_cost_parameters_price_the_counted_passes(report):
    for scale, size in SCALES.items():
        for row in report("--cost-parameters", scale)["samplers"]:
            passes = row["n_dec"] * size.decoder + row["n_enc"] * (size.encoder + size.global_model)
            assert row["gigabytes"] == pytest.approx(2 * passes / 1e9)


def test_table_names_every_sampler(blt, run_config):
    outcome = blt("compare", run_config(), "--prompt", "ab", "--max-new-bytes", 8)
    assert outcome.code == 0
    for spec in ("ar", "blt-s draft_bytes=8", "blt-lookup", "blt-cascade", "blt-auto"):
        assert spec in outcome.out.decode()


def test_labels_name_samplers_in_the_table_and_the_record(blt, run_config):
    common = ("compare", run_config(), "--prompt", "ab", "--max-new-bytes", 8, "--sampler", "ar")
    labels = ("--sampler", "short one: blt-s draft_bytes=2", "--sampler", "long: blt-s")
    rows = json.loads(blt(*common, *labels, "--json").out)["samplers"]
    assert [row["name"] for row in rows] == ["ar", "short one", "long"]
    assert [row["spec"] for row in rows] == ["ar", "blt-s draft_bytes=2", "blt-s"]
    out = blt(*common, *labels).out.decode()
    assert "short one" in out
    assert "draft_bytes" not in out
    twice = blt(*common, "--sampler", "a: ar", "--sampler", "a: blt-s")
    assert twice.code == 2
    assert "the label 'a' is given to two samplers" in twice.err


def test_long_samplers_are_shown_whole(blt, run_config):
    start = "speculative drafter.use=cascade drafter.draft_bytes=16 drafter.drafter.use=self "
    ends = [f"drafter.drafter.draft_bytes={n}" for n in (3, 4)]
    specs = [part for end in ends for part in ("--sampler", start + end)]
    out = blt("compare", run_config(), "--prompt", "ab", "--max-new-bytes", 8, *specs).out.decode()
    table = out.partition("slower than")[0]
    column = "".join(line[1:].split("  ")[0].strip() for line in table.splitlines())
    for end in ends:
        assert end in column, out


def test_who_is_slower_than_the_reference_is_said(report, blt, run_config, monkeypatch):
    from blt_core import compare

    speeds = iter([100.0, 83.0, 130.0])
    monkeypatch.setattr(compare, "_speed", lambda _: next(speeds))
    common = ("compare", run_config(), "--prompt", "ab", "--max-new-bytes", 8)
    specs = [part for spec in SAMPLERS for part in ("--sampler", spec)]
    out = blt(*common, *specs).out.decode()
    assert out.endswith("\nslower than ar: blt-s draft_bytes=2 (0.83)\n")


def test_plot_writes_png_and_svg(blt, run_config, tmp_path):
    common = ("compare", run_config(), "--prompt", "ab", "--max-new-bytes", 6, "--sampler", "ar")
    assert blt(*common, "--plot", tmp_path / "picture").code == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "picture.svg").read_bytes()
    assert sorted(p.name for p in tmp_path.glob("*picture*")) == ["picture.png", "picture.svg"]
    for bad, text in (("a.pdf", ".pdf"), ("none/a.png", "does not exist")):
        outcome = blt(*common, "--plot", tmp_path / bad)
        assert outcome.code == 2
        assert text in outcome.err
