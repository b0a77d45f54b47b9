from __future__ import annotations

import re
import string
from pathlib import Path

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from blt_core.plugins.loading import load_plugins
from blt_core.tables.inline import parse_inline
from blt_core.types import IdScheme, Sampling
from blt_core.wiring.config import Config, IdSettings, ModelSettings, load_config
from blt_core.wiring.resolve import resolve

# -- files ---------------------------------------------------------------------------------------


def test_a_file_gives_its_tables(tmp_path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text('schema = 1\n[run]\ncheckpoint = "demo:x"\n[sampler]\nuse = "ar"\n')
    config = load_config(path)
    assert config.tables == {"schema": 1, "run": {"checkpoint": "demo:x"}, "sampler": {"use": "ar"}}
    assert config.checkpoint == "demo:x"
    assert str(config.tables["sampler"].place_of("use")) == f"{path}: sampler.use"


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="a file without an end")
def test_a_file_without_an_end_is_refused(problems) -> None:
    [problem] = problems(load_config, Path("/dev/zero"))
    assert problem.startswith("/dev/zero: larger than 16777216 bytes, or without an end")


def test_syntax_errors_have_line_and_column(tmp_path, problems) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("schema = 1\n[run]\nseed = \n")
    assert problems(load_config, path) == [f"{path}:3:8: Invalid value"]


def test_a_byte_order_mark_is_passed_over(tmp_path) -> None:
    path = tmp_path / "marked.toml"
    path.write_text("schema = 1\n", encoding="utf-8-sig")
    assert load_config(path).tables == {"schema": 1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("schema = 1\n".encode("utf-16"), "UTF-16 text, not UTF-8; save it as UTF-8"),
        ("schema = 1\n".encode("utf-16-le"), "UTF-16 or UTF-32 text, not UTF-8; save it as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git-LFS pointer, not"),
        (b"<html><body>Not found", "an HTML page, not the file itself"),
    ],
)
def test_files_that_are_no_toml_at_all_are_named(tmp_path, problems, data, message) -> None:
    path = tmp_path / "odd.toml"
    path.write_bytes(data)
    (found,) = problems(load_config, path)
    assert found.startswith(f"{path}: {message}")


def test_a_checkpoint_may_lie_in_the_home_folder(plugins, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = Config.from_mapping({"schema": 1, "run": {"checkpoint": "~/model"}})
    assert config.checkpoint == "/home/me/model"
    assert resolve(config, plugins).run.checkpoint == "/home/me/model"


def test_options_hide_no_fault_of_the_file(plugins, problems) -> None:
    tables = {"schema": 1, "run": {"max_new_bytes": 16.5, "seed": "x"}, "sampler": {"use": "aar"}}
    config = Config.from_mapping(tables, "a.toml")
    config = config.with_run(max_new_bytes=0).with_option(
        "sampler", parse_inline("blt-z", "sampler")
    )
    found = [each.splitlines()[0] for each in problems(resolve, config, plugins)]
    assert found == [
        "a.toml: run.max_new_bytes: expected int, got float 16.5",
        "a.toml: run.seed: expected int, got str 'x'",
        "a.toml: sampler.use: no sampler named 'aar'. Did you mean 'ar'?",
        "--max-new-bytes: expected at least 1, got 0",
        found[-1],
    ]
    assert found[-1].startswith("--sampler: use: no sampler named 'blt-z'.")


def test_unreadable_files(tmp_path, problems) -> None:
    missing = tmp_path / "missing.toml"
    assert problems(load_config, missing) == [f"{missing}: no such file"]
    assert problems(load_config, tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]
    latin = tmp_path / "latin.toml"
    latin.write_bytes("# schön\n".encode("latin-1"))
    (message,) = problems(load_config, latin)
    assert message.startswith(f"{latin}: not UTF-8 text: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "9" * 5000, "an integer has too many digits"),
        ("x = " + "[" * 3000 + "]" * 3000, "nested more than 50 levels deep"),
        ("x = " + "[" * 50 + "]" * 50, "nested more than 50 levels deep"),
        ("[" + ".".join("a" * 3000) + "]", "nested more than 50 levels deep"),
    ],
)
def test_files_beyond_the_limits_of_python(tmp_path, problems, text, message) -> None:
    path = tmp_path / "vast.toml"
    path.write_text(text)
    assert problems(load_config, path) == [f"{path}: {message}"]


def test_49_nested_lists_are_still_read(tmp_path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text("x = " + "[" * 49 + "]" * 49)
    load_config(path)


# -- settings ------------------------------------------------------------------------------------


@pytest.fixture
def settings(plugins):
    """The plan of a config that has settings only."""

    def settings(**tables):
        return resolve(Config.from_mapping({"schema": 1, **tables}, "a.toml"), plugins)

    return settings


def test_defaults_of_a_run(settings) -> None:
    run = settings().run
    assert (run.checkpoint, run.device, run.dtype, run.seed) == (None, "cpu", "float32", 0)
    assert (run.max_new_bytes, run.sampling, run.stop) == (256, Sampling(), ())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "dtype",
            "float16",
            "expected one of 'float32', 'float64', 'bfloat16', got str 'float16'.",
        ),
        ("max_new_bytes", 0, "expected at least 1, got 0"),
        ("max_new_bytes", 8.0, "expected int, got float 8.0"),
        ("temperature", -1, "expected at least 0.0, got -1.0"),
        ("top_k", 0, "expected at least 1, got 0"),
        ("top_p", 0, "expected more than 0.0, got 0.0"),
        ("top_p", 1.5, "expected 0.0 to 1.0, got 1.5"),
        ("temperature", float("inf"), "expected a finite number, got inf"),
        ("seed", -1, "expected 0 to 9223372036854775807, got -1"),
        ("seed", 2**63, "expected 0 to 9223372036854775807, got 9223372036854775808"),
        ("checkpoint", "", "expected a text that is not empty, got ''"),
        ("stop", "end", "expected a list of str, got str 'end'"),
        ("stop", [""], "an empty stop string would end every text at once"),
        ("seeds", 1, "unknown key. Did you mean 'seed'?"),
    ],
)
def test_run_settings_are_strict(settings, problems, key, value, message) -> None:
    (found,) = problems(settings, run={key: value})
    assert found.startswith(f"a.toml: run.{key}: {message}")


def test_the_default_ids_of_a_model_are_the_default_scheme(settings) -> None:
    assert settings(model={"context_bytes": 8}).model.scheme == IdScheme()


def test_an_id_table_without_mask_means_no_mask(settings) -> None:
    ids = {"byte_offset": 4, "bos": 1, "eos": 2, "size": 260}
    scheme = settings(model={"context_bytes": 8, "ids": ids}).model.scheme
    assert scheme == IdScheme(4, 1, 2, None, 260)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"bos": 255}, "bos = 255 is taken by the bytes"),
        ({"bos": 257}, "eos = 257 is taken by bos"),
        ({"mask": 257}, "mask = 257 is taken by eos"),
        ({"size": 258, "mask": 258}, "size = 258 is too small for these ids"),
        ({"byte_offset": 4, "bos": 0, "eos": 1}, "size = 259 is too small for these ids"),
    ],
)
def test_ids_may_not_collide(settings, problems, ids, message) -> None:
    found = problems(settings, model={"context_bytes": 8, "ids": ids})
    assert found == [f"a.toml: model.ids: {message}"]


@given(st.integers(0, 9), st.permutations(range(5)), st.booleans())
def test_id_settings_describe_every_scheme(offset, order, masked) -> None:
    free = [i for i in range(offset + 261) if not offset <= i < offset + 256]
    bos, eos, mask = (free[i] for i in order[:3])
    scheme = IdScheme(offset, bos, eos, mask if masked else None, offset + 261)
    assert IdSettings(offset, bos, eos, scheme.mask, scheme.size).scheme == scheme
    assert ModelSettings(1, IdSettings(offset, bos, eos, scheme.mask, scheme.size)).scheme == scheme


def test_the_schema_is_required(plugins, problems) -> None:
    def check(tables):
        return problems(resolve, Config.from_mapping(tables, "a.toml"), plugins)

    assert check({}) == ["a.toml: schema: missing; write schema = 1"]
    wrong = "a.toml: schema: expected 1, the one schema that this version reads, got "
    assert check({"schema": 2}) == [f"{wrong}int 2"]
    assert check({"schema": True}) == [f"{wrong}bool true"]


# -- options -------------------------------------------------------------------------------------


def test_options_replace_settings_and_are_named_in_messages(plugins, problems) -> None:
    config = Config.from_mapping({"schema": 1, "run": {"seed": 1, "max_new_bytes": 2}}, "a.toml")
    run = resolve(config.with_run(seed=3, device=None), plugins).run
    assert (run.seed, run.max_new_bytes, run.device) == (3, 2, "cpu")
    assert problems(resolve, config.with_run(max_new_bytes=0), plugins) == [
        "--max-new-bytes: expected at least 1, got 0"
    ]
    assert config.tables["run"]["seed"] == 1, "the config itself stays as it is"


def test_options_do_not_hide_a_malformed_run_table(plugins, problems) -> None:
    config = Config.from_mapping({"schema": 1, "run": 3}, "a.toml").with_run(seed=1)
    assert problems(resolve, config, plugins) == ["a.toml: run: expected a table, got int 3"]


def test_an_inline_component_replaces_a_table(plugins) -> None:
    config = Config.from_mapping({"schema": 1, "sampler": {"use": "nonsense"}}, "a.toml")
    inline = parse_inline("speculative drafter.use=self", "sampler")
    node = resolve(config.with_table("sampler", inline), plugins).node("sampler")
    assert (node.name, node.children["drafter"].name) == ("speculative", "self")


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("ar", {}),
        ("x a=8 b=1.5 c=true d=inf", {"a": 8, "b": 1.5, "c": True, "d": float("inf")}),
        ("x a=entropy-bound b=demo:py", {"a": "entropy-bound", "b": "demo:py"}),
        ("x a='y z' b=\"c d\"", {"a": "y z", "b": "c d"}),
        ("x a.use=greedy a.b.c=1", {"a": {"use": "greedy", "b": {"c": 1}}}),
        ("x a=[self,diffusion]", {"a": ["self", "diffusion"]}),
        ("x b=[x, 'y z',true]", {"b": ["x", "y z", True]}),
        ("x a={use=cascade} b=[[p/q],[r]]", {"a": {"use": "cascade"}, "b": [["p/q"], ["r"]]}),
        ("x a=[1, 2] b={c = 1, d = 2}", {"a": [1, 2], "b": {"c": 1, "d": 2}}),
        ("  x   a=1  ", {"a": 1}),
    ],
)  # fmt: skip
def test_inline_components(text, table) -> None:
    name = "ar" if text == "ar" else "x"
    assert parse_inline(text, "sampler") == {"use": name, **table}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--cost-model: expected the name of a cost model first, got nothing"),
        ("a=1", "--cost-model: expected the name of a cost model first, got 'a=1'"),
        ("x foo", "--cost-model: expected key=value, got 'foo'"),
        ("x =3", "--cost-model: expected key=value, got '=3'"),
        ("x a=1 a=2", "--cost-model: a: given twice"),
        ("x use=y", "--cost-model: use: given twice"),
        ("x a=1 a.b=2", "--cost-model: a.b: 'a' is given a value and a key below it"),
        ("x a.b=2 a=1", "--cost-model: a: given twice"),
        ('x a="foo', "--cost-model: a: '\"foo' is no TOML value: Unterminated string"),
        ("x a=[" + "[" * 99, "--cost-model: a: "),
        ("x a=[1, 2", "--cost-model: a: '[1, 2' is no TOML value: Unclosed array"),
        ("x a=", "--cost-model: a: '' is no TOML value: Invalid value"),
        ("x a=b=c", "--cost-model: a: 'b=c' is no TOML value"),
    ],
)
def test_inline_mistakes(problems, text, message) -> None:
    (found,) = problems(parse_inline, text, "cost_model")
    assert found.startswith(message)


def test_inline_mistakes_are_gathered(problems) -> None:
    assert len(problems(parse_inline, "x foo a= b=1 b=2", "sampler")) == 3


def test_problems_of_inline_components_name_the_option(plugins, problems) -> None:
    config = Config.from_mapping({"schema": 1}, "a.toml")
    inline = parse_inline("blt-dv block_byte=4 verification.use=greedie", "sampler")
    found = problems(resolve, config.with_table("sampler", inline), plugins)
    assert found[0].startswith("--sampler: block_byte: unknown key. Did you mean 'block_bytes'?")
    assert found[1].startswith("--sampler: verification.use: no verification named 'greedie'.")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("speculative drafters=[self,diffusion]",
         "--sampler: drafters: unknown key. Did you mean 'drafter'?", ""),
        ("speculative drafter=cascade",
         "--sampler: drafter: expected a table, got str 'cascade'",
         "write drafter.use=cascade"),
        ("cascade draft_bytes=8",
         "--sampler: use: no sampler named 'cascade'; it is a drafter:",
         "speculative drafter.use=cascade"),
        ("confidence", "--sampler: use: no sampler named 'confidence'; it is an unmasking:",
         "blt-d unmasking.use=confidence"),
        ("speculative drafter.use=bandwidth",
         "--sampler: drafter.use: no drafter named 'bandwidth'; it is a cost model:",
         '[cost_model] use = "bandwidth"'),
    ],
)  # fmt: skip
def test_a_component_at_the_wrong_place_says_where_it_goes(problems, text, message, hint) -> None:
    config = Config.from_mapping({"schema": 1}, "a.toml")
    config = config.with_table("sampler", parse_inline(text, "sampler"))
    found = problems(resolve, config, load_plugins())[0]
    assert found.startswith(message)
    assert hint in found


def test_a_name_in_place_of_a_table_in_a_file(problems, tmp_path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('schema = 1\nsampler = "ar"\n')
    (found,) = problems(resolve, load_config(path), load_plugins())
    assert found.endswith("got str 'ar'\n  write sampler.use = \"ar\"")


def test_an_inline_key_is_no_deeper_than_a_file(problems) -> None:
    (found,) = problems(parse_inline, "x " + ".".join("a" * 3000) + "=1", "sampler")
    assert found.startswith("--sampler: a.a.a.")
    assert found.endswith(": nested more than 50 levels deep")


keys = st.text(string.ascii_lowercase + "_", min_size=1, max_size=6).filter(lambda k: k != "use")
leaves = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
)
tables = st.dictionaries(keys, leaves | st.dictionaries(keys, leaves, min_size=1), max_size=5)


@given(tables)
def test_inline_components_can_say_what_a_file_can(table) -> None:
    words = ["name"]
    for key, value in table.items():
        below = value.items() if isinstance(value, dict) else [("", value)]
        for last, leaf in below:
            (text,) = re.findall(r"\Ax = (.*)\n\Z", tomli_w.dumps({"x": leaf}), re.DOTALL)
            words.append(f"{key}.{last}={text}" if last else f"{key}={text}")
    assert parse_inline(" ".join(words), "sampler") == {"use": "name", **table}
