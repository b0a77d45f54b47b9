from __future__ import annotations

import json

import tomli


def test_plugins_lists_every_kind_that_has_components(blt):
    listed = json.loads(blt("plugins", "--json").out)
    names = {(c["kind"], c["name"]) for c in listed["components"]}
    assert {("patcher", "entropy"), ("sampler", "ar"), ("drafter", "self")} <= names
    assert listed["broken"] == []


def test_plugins_of_one_kind_shows_keys(blt):
    out = blt("plugins", "sampler").out.decode()
    assert "draft_bytes" in out
    assert "patcher" not in out
    assert blt("plugins", "smapler").code == 2


def test_check_prints_a_config_that_checks_to_itself(blt, run_config, tmp_path):
    first = blt("check", run_config('[sampler]\nuse = "blt-s"')).out
    tables = tomli.loads(first.decode())
    assert tables["sampler"]["use"] == "speculative"
    assert tables["sampler"]["drafter"] == {"use": "self", "draft_bytes": 8}
    del tables["run"]["checkpoint"]
    path = tmp_path / "again.toml"
    path.write_bytes(first)
    whole = path.read_text().replace(
        f'checkpoint = "{tomli.loads(first.decode())["run"]["checkpoint"]}"', ""
    )
    path.write_text(whole)
    assert tomli.loads(blt("check", path).out.decode()) == tables


def test_cost_reproduces_the_printed_column_within_0_75_percent(blt):
    rows = json.loads(blt("cost", "--json").out)["rows"]
    assert len(rows) == 8
    assert all(abs(row["deviation_percent"]) <= 0.75 for row in rows)
    assert "deviation" in blt("cost").out.decode()


def test_cost_without_the_factor_is_half(blt):
    given = ("cost", "--n-dec", 512, "--n-enc", 308, "--json")
    two = json.loads(blt(*given).out)["gigabytes"]
    one = json.loads(blt(*given, "--bytes-per-parameter", 1).out)["gigabytes"]
    assert one == two / 2
    assert blt("cost", "--n-dec", 5).code == 2
    assert blt("cost", "--scale", "7b").code == 2


def test_version_and_help(blt):
    assert blt("--version").out.startswith(b"blt ")
    for command in ("generate", "compare", "plugins", "check", "cost", "train", "calibrate"):
        assert blt(command, "--help").code == 0
