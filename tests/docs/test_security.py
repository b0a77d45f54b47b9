"""Each statement of docs/security.md is true: a test a statement, named by its mark."""

from __future__ import annotations

import ast
import gzip
import json
import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
import tomli
import tomli_w
import torch
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from blt_core.compiling import load
from blt_core.component import BuildContext
from blt_core.errors import CheckpointError, ConfigError, DataError, PluginError, RequestError
from blt_core.evaluation import sandbox
from blt_core.loading import plan_run, read_checkpoint
from blt_core.pipeline import Pipeline
from blt_core.plugins.loading import load_plugins
from blt_core.plugins.registry_file import load_manifest
from blt_core.requests import REQUEST_KEYS
from blt_core.resources import resource
from blt_core.storage.folders import replace_folder
from blt_core.storage.user_cache import open_to_others
from blt_core.tables.place import LARGEST
from blt_core.wiring.config import Config, load_config
from blt_core.wiring.resolve import build_node, resolve_component
from blt_plugins.executors.ray import _take_token
from blt_plugins.training.corpora import index_file
from blt_plugins.training.corpora import sources as corpus_files
from tests.tiny import config, write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
HELD: dict[str, Callable[..., None]] = {}


def holds(statement: str):
    """Mark the test of a statement."""

    def mark(test):
        assert statement not in HELD
        HELD[statement] = test
        return test

    return mark


def test_every_statement_has_a_test_and_every_test_a_statement():
    page = (ROOT / "docs" / "security.md").read_text("utf-8")
    statements = re.findall(r"^- (.*?)(?=^- |^## |^$|\Z)", page, re.MULTILINE | re.DOTALL)
    marks = [re.findall(r"<!-- holds: ([a-z-]+) -->", each) for each in statements]
    assert all(len(each) == 1 for each in marks), marks
    named = [mark for [mark] in marks]
    assert sorted(named) == sorted(HELD)
    assert all(test.__name__ in globals() for test in HELD.values()), "a test hides another"


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "model")


class Payload:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def rewrite(folder: Path, change) -> None:
    tables = tomli.loads((folder / "config.toml").read_text("utf-8"))
    change(tables)
    (folder / "config.toml").write_text(tomli_w.dumps(tables), encoding="utf-8")


def registry(path: Path, text: str) -> Path:
    path.write_text(f"schema = 1\n{text}", encoding="utf-8")
    return path


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """An installed distribution whose plugin makes a file when it is imported."""
    name, site = f"stranger_{tmp_path.name.replace('-', '_')}", tmp_path / "site"
    info = site / "blt_stranger-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: blt-stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[blt_core]\nstranger = {name}\n")
    made = tmp_path / "was-imported"
    (site / f"{name}.py").write_text(
        f"from pathlib import Path\nPath({str(made)!r}).touch()\n"
        "import blt_core\n\n@blt_core.hookimpl\ndef blt_components():\n    return []\n"
    )
    monkeypatch.syspath_prepend(str(site))
    return made


# -- plugins ---------------------------------------------------------------------------------------


@holds("import-alone")
def test_importing_the_core_imports_no_plugin(stranger, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import blt_core\nfrom blt_core.cli.app import run\nassert run(['--version']) == 0\n"
        "assert not any(m.startswith('blt_plugins.') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert not stranger.exists()


@holds("plugins-run")
def test_a_look_up_imports_every_installed_plugin(stranger):
    plugins = load_plugins(load_manifest([resource("registry.toml")]))
    plugins.registry.names("sampler")
    assert stranger.exists()


@holds("blocked")
def test_a_blocked_distribution_is_not_imported(stranger, tmp_path):
    file = registry(tmp_path / "registry.toml", 'blocked = ["blt-stranger"]\n')
    plugins = load_plugins(load_manifest([resource("registry.toml"), file]))
    assert plugins.registry.names("sampler")
    assert plugins.loaded
    assert not stranger.exists()


@holds("blocks-add-up")
def test_no_file_unblocks(tmp_path):
    user = registry(tmp_path / "user.toml", 'blocked = ["blt-stranger"]\n')
    project = registry(tmp_path / "project.toml", "blocked = []\n")
    manifest = load_manifest([resource("registry.toml"), user, project])
    assert manifest.blocks_distribution("blt-stranger") == str(user)


@holds("registry-data")
@pytest.mark.parametrize("table", ["kinds.sampler", "settings.train"])
def test_a_registry_file_has_no_code_imported(tmp_path, table):
    file = registry(tmp_path / "registry.toml", f'[{table}]\nprotocol = "antigravity:fly"\n')
    with pytest.raises(ConfigError, match="a file cannot have code imported"):
        load_manifest([resource("registry.toml"), file])
    assert "antigravity" not in sys.modules


def rivals(text: str, tmp_path: Path):
    import attrs

    from blt_core import Component, hookimpl

    @attrs.frozen
    class Params:
        pass

    class Rival:
        def __init__(self, params, context): ...
        def cost(self, passes, parameters): ...

    class Plugin:
        @hookimpl
        def blt_components(self):
            return [Component("cost_model", "bandwidth", Rival, Params, "takes a name")]

    manifest = load_manifest([resource("registry.toml"), registry(tmp_path / "r.toml", text)])
    return load_plugins(manifest, extra=[("blt-rival", "rival", Plugin())])


@holds("registry-prefers")
def test_a_registry_file_chooses_between_what_is_installed(tmp_path):
    plugins = rivals('[prefer.cost_model]\nbandwidth = "blt-rival"\n', tmp_path)
    assert plugins.registry.lookup("cost_model", "bandwidth").origin.distribution == "blt-rival"


@holds("no-takeover")
def test_a_name_of_two_distributions_is_refused(tmp_path):
    with pytest.raises(PluginError, match="'bandwidth' is supplied by"):
        rivals("", tmp_path).registry.lookup("cost_model", "bandwidth")


# -- configs ---------------------------------------------------------------------------------------


@holds("config-names")
@pytest.mark.parametrize("name", ["antigravity:fly", "antigravity", "blt_core.cli:main"])
def test_an_import_path_is_no_name(name):
    with pytest.raises(ConfigError, match=f"no sampler named '{name}'"):
        plan_run(Config.from_mapping(config(sampler={"use": name})), load_plugins())
    assert "antigravity" not in sys.modules


@holds("config-text")
def test_text_of_a_config_stays_text(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("$HOME/x", "${HOME}/x", "{run.seed}", "%(seed)s", "`id`", "x/~"):
        plan = Config.from_mapping({"schema": 1, "run": {"checkpoint": text}})
        assert plan.checkpoint == text
    home = Config.from_mapping({"schema": 1, "run": {"checkpoint": "~/x"}})
    assert home.checkpoint == str(tmp_path / "x")


@holds("config-bounded")
def test_endless_and_deep_files_are_refused(tmp_path):
    assert LARGEST == 16 * 1024**2
    large, deep = tmp_path / "large.toml", tmp_path / "deep.toml"
    large.write_bytes(b"#" * (LARGEST + 1))
    deep.write_text("a = " + "[" * 51 + "]" * 51)
    with pytest.raises(ConfigError, match="larger than"):
        load_config(large)
    with pytest.raises(ConfigError, match="nested more than 50 levels"):
        load_config(deep)
    with pytest.raises(ConfigError, match="larger than"):
        load_config(Path("/dev/zero"))


def huge():
    tables = config()
    tables["global_model"] |= {"latent_dim": 1 << 20, "layers": 1 << 20, "hidden": 1 << 22}
    for kind in ("encoder", "decoder"):
        tables[kind]["latent_dim"] = 1 << 20
    return Config.from_mapping(tables)


@holds("check-builds-nothing")
def test_a_plan_of_a_huge_model_takes_no_memory():
    import tracemalloc

    plugins = load_plugins()
    plan_run(Config.from_mapping(config()), plugins)
    tracemalloc.start()
    try:
        plan, tensors = plan_run(huge(), plugins)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()
    assert tensors is None
    assert plan.node("global_model").params.layers == 1 << 20


@holds("config-unbounded")
def test_a_huge_model_is_not_refused_by_a_check():
    plan, _ = plan_run(huge(), load_plugins())
    assert plan.node("global_model").params.latent_dim == 1 << 20


@holds("config-paths")
def test_a_config_reads_what_it_names_wherever_it_lies(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for location in (str(checkpoint), "../model"):
        found = Pipeline.from_config({"schema": 1, "run": {"checkpoint": location}})
        assert found.generate("x", max_new_bytes=2).output is not None


# -- checkpoints -----------------------------------------------------------------------------------


@holds("no-pickle")
def test_a_pickle_is_refused_and_not_loaded(checkpoint, tmp_path):
    made = tmp_path / "was-run"
    (checkpoint / "model.safetensors").write_bytes(pickle.dumps(Payload(made)))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_checkpoint(str(checkpoint), load_plugins())
    other = tmp_path / "published"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "blt"}')
    (other / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(made)))
    with pytest.raises(CheckpointError, match="pickled weights can run any program"):
        read_checkpoint(str(other), load_plugins())
    assert not made.exists()
    pickle.loads(pickle.dumps(Payload(made)))
    assert made.exists(), "the pickle would have done something"


def sources():
    return [p for folder in ("blt_core", "plugins") for p in (ROOT / folder).rglob("*.py")]


def called(tree: ast.AST) -> set[str]:
    """Names of the functions that are called: ``eval``, ``torch.load``."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@holds("no-eval")
def test_no_source_unpickles_or_evaluates_text():
    calls = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "runpy.run_path"}
    modules = {"pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
    guilty = {
        path.relative_to(ROOT).as_posix()
        for path in sources()
        for tree in [ast.parse(path.read_text("utf-8"))]
        if calls & called(tree) or modules & imported(tree)
    }
    assert guilty == {"blt_core/evaluation/jail.py"}


@holds("workers-pickle")
def test_only_executors_talk_to_other_processes_in_pickles():
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sources()}
    pickling = {"multiprocessing", "ray", "socketserver", "xmlrpc"}
    talking = {
        path.relative_to(ROOT).as_posix()
        for path, tree in trees.items()
        if imported(tree) & pickling
    }
    executors = {f"plugins/blt_plugins/executors/{name}.py" for name in ("local", "ray")}
    contracts = {"blt_core/testing/kinds/executors.py"}  # looks for processes that are left
    assert talking == executors | contracts
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Attribute, ast.alias))
    }
    objects = ("_object", "_object_list", "ProcessPoolExecutor")  # of torch.distributed; of Python
    assert not [name for name in names if name.endswith(objects)]


@holds("local-pipes")
def test_local_workers_are_reached_by_pipes_alone():
    tree = ast.parse((ROOT / "plugins/blt_plugins/executors/local.py").read_text("utf-8"))
    assert "context.Pipe" in called(tree)
    assert not {"socket", "asyncio"} & imported(tree)
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not {"Listener", "Client", "Manager"} & names


@holds("ray-token")
def test_a_token_that_is_there_is_shown_to_any_cluster(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # to be as before after this
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    _take_token()
    assert "RAY_AUTH_MODE" not in os.environ
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 32)
    _take_token()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    _take_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@holds("deepspeed-states")
def test_only_the_backend_deepspeed_has_states_that_are_pickles(tmp_path):
    loads = {
        path.parent.name
        for path in sources()
        for call in called(ast.parse(path.read_text("utf-8")))
        if call.endswith(".load_checkpoint")
    }
    assert loads == {"deepspeed"}


@holds("no-remote-code")
def test_python_beside_weights_is_not_run(checkpoint, tmp_path):
    made = tmp_path / "was-run"
    code = f"from pathlib import Path\nPath({str(made)!r}).touch()\n"
    names = ("modeling_blt.py", "configuration_blt.py", "__init__.py", "sitecustomize.py")
    other = tmp_path / "published"
    other.mkdir()
    for name in names:
        (checkpoint / name).write_text(code)
        (other / name).write_text(code)
    said = {"model_type": "blt", "auto_map": {"AutoModel": "modeling_blt.Model"}}
    (other / "config.json").write_text(json.dumps(said))
    Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(checkpoint)}})
    with pytest.raises(CheckpointError, match="no weights"):
        read_checkpoint(str(other), load_plugins())
    assert not made.exists()


@holds("checkpoint-config")
def test_a_stored_config_is_as_strict_as_any(checkpoint):
    def change(tables):
        tables["patcher"]["use"] = "antigravity:fly"
        tables["decoder"]["surplus"] = 1

    rewrite(checkpoint, change)
    with pytest.raises(ConfigError) as found:
        Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(checkpoint)}})
    text = str(found.value)
    assert "no patcher named 'antigravity:fly'" in text
    assert "decoder.surplus: unknown key" in text
    assert "antigravity" not in sys.modules


@holds("tensors-fit")
def test_tensors_are_those_of_the_model(checkpoint):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    run = {"schema": 1, "run": {"checkpoint": str(checkpoint)}}
    for changed, message in (
        ({**tensors, "more": torch.zeros(1)}, "more: not a parameter of this model"),
        ({k: v for k, v in tensors.items() if k != name}, f"{name}: missing"),
        ({**tensors, name: torch.zeros(1, 1, 1)}, f"{name}: expected"),
    ):
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            Pipeline.from_config(run)


@holds("cut-short")
def test_a_file_that_is_cut_short_is_refused(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(str(checkpoint), load_plugins())


@holds("no-checksum")
def test_a_changed_weight_is_not_noticed(checkpoint):
    file = checkpoint / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-4] ^= 1
    file.write_bytes(data)
    Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(checkpoint)}})


@holds("index-outside")
def test_an_index_can_name_files_elsewhere(tmp_path):
    from blt_plugins.huggingface.format import _weight_files

    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "elsewhere").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../elsewhere"}}')
    [found] = _weight_files(folder)
    assert found.resolve() == tmp_path / "elsewhere"


@holds("no-download")
@pytest.mark.parametrize("location", ["https://example.org/model", "hf:org/model", "org/model"])
def test_a_location_is_never_fetched(location, monkeypatch, tmp_path):
    def refuse(*_, **__):
        pytest.fail("the network was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(CheckpointError, match="no checkpoint; found nothing"):
        read_checkpoint(location, load_plugins())


# -- requests --------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(checkpoint):
    return Pipeline.from_config({"schema": 1, "run": {"checkpoint": str(checkpoint)}})


@holds("request-keys")
def test_a_request_names_no_file_and_no_component(pipeline):
    assert set(REQUEST_KEYS) == {
        *("max_new_bytes", "temperature", "top_k", "top_p", "seed", "samples", "logprobs", "stop")
    }
    for key in ("checkpoint", "device", "sampler", "out"):
        with pytest.raises(RequestError, match=key):
            pipeline.generate("x", **{key: "x"})


@holds("prompt-bytes")
def test_no_prompt_stands_for_a_special_id(pipeline):
    scheme = pipeline.model.scheme
    specials = {scheme.bos, scheme.eos, scheme.mask} - {None}
    ids = {scheme.byte_offset + value for value in range(256)}
    assert len(specials) >= 2
    assert not specials & ids
    [request] = pipeline.requests([bytes(range(256))])
    assert request.prompt == bytes(range(256))


@holds("request-fits")
def test_what_does_not_fit_the_context_is_refused_before_any_work(pipeline, monkeypatch):
    monkeypatch.setattr(
        type(pipeline.model.decoder), "forward", lambda *_, **__: pytest.fail("ran")
    )
    with pytest.raises(RequestError, match="context"):
        pipeline.generate("x" * pipeline.model.context_bytes, max_new_bytes=5)


# -- programs --------------------------------------------------------------------------------------


@holds("asked-first")
def test_programs_run_only_where_that_is_asked_for():
    with pytest.raises(DataError, match="--allow-code-execution"):
        sandbox.make_sandbox(allowed=False, unsafe=True, seconds=1)


@holds("sandbox-or-not")
def test_without_namespaces_the_task_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda isolated=True: "none here" if isolated else "")
    with pytest.raises(DataError, match="none here"):
        sandbox.make_sandbox(allowed=True, unsafe=False, seconds=1)
    assert not sandbox.make_sandbox(allowed=True, unsafe=True, seconds=1).isolated
    monkeypatch.setattr(sandbox, "why_not", lambda isolated=True: "")
    assert sandbox.make_sandbox(allowed=True, unsafe=False, seconds=1).isolated


# -- writing ---------------------------------------------------------------------------------------


@holds("replaces-its-own")
def test_a_folder_of_something_else_is_left_alone(tmp_path):
    target = tmp_path / "thesis"
    target.mkdir()
    (target / "chapter.md").write_text("x")
    with (
        pytest.raises(DataError, match="not replaced"),
        replace_folder(target, ("config.toml", "model.safetensors")),
    ):
        pytest.fail("nothing is to be written")
    assert (target / "chapter.md").read_text() == "x"


# -- corpora --------------------------------------------------------------------------------------


def open_corpus(path: str, **keys):
    plugins = load_plugins()
    node = resolve_component("corpus", {"use": "jsonl", "path": path, **keys}, plugins)
    return build_node(node, BuildContext(), plugins.registry)


@holds("corpus-reads")
def test_a_corpus_is_read_from_a_url_and_its_index_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_file, "SMALL_FILES", 0)
    fsspec.filesystem("memory").pipe_file("/texts/a", b'{"text": "there"}')
    (tmp_path / "a").write_text('{"text": "here"}')
    for path, text in (("memory://texts/a", b"there"), (str(tmp_path / "a"), b"here")):
        assert list(open_corpus(path, valid_percent=0).documents("train")) == [text]
    assert list((tmp_path / "cache" / "blt-core" / "index").glob("*.safetensors"))
    assert list((tmp_path / ".blt-index").glob("*.safetensors"))


@holds("corpus-secrets")
def test_urls_are_shown_and_kept_without_what_gives_access(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    texts = gzip.compress(b'{"text": "there"}')
    for name, data in (("/a.gz?key=secret", texts), ("/b.gz?key=secret", texts[:-9])):
        fsspec.filesystem("memory").pipe_file(name, data)
    found = open_corpus("memory://a.gz?key=secret", valid_percent=0).documents("train")
    assert (list(found), found.source(0)) == ([b"there"], "memory:///a.gz@0")
    with pytest.raises(DataError, match=r"^memory:///b.gz: cannot be decompressed"):
        open_corpus("memory://b.gz?key=secret").documents("train")
    for folder in (tmp_path / "cache" / "blt-core").iterdir():
        assert sys.platform == "win32" or folder.stat().st_mode & 0o77 == 0
        assert not any(b"secret" in each.read_bytes() for each in folder.iterdir())


@holds("own-code")
def test_code_of_the_cache_is_loaded_only_where_nobody_else_may_write(tmp_path):
    path = tmp_path / "blt-core" / "compiled" / "layers.pt2"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"code")
    for each in (path, path.parent, path.parent.parent):
        each.chmod(0o700)
    assert open_to_others(path) is None
    for each in (path, path.parent, path.parent.parent):
        each.chmod(0o770)
        assert open_to_others(path) == each
        assert load(path, torch.device("cpu")) is None
        each.chmod(0o700)


@holds("index-data")
def test_an_index_runs_nothing_and_is_compared_with_the_texts(tmp_path, monkeypatch):
    monkeypatch.setattr(index_file, "SMALL_FILES", 0)
    monkeypatch.setattr(corpus_files, "SETTLED", -(10**12))
    path = tmp_path / "a"
    path.write_text('{"text": "one"}\n')
    open_corpus(str(path), valid_percent=0).documents("train")
    [kept] = (tmp_path / ".blt-index").glob("*.safetensors")
    tensors, metadata = {}, {}
    with safe_open(str(kept), "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in index_file._TENSORS}
        metadata = file.metadata()
    tensors["keys"] = tensors["keys"] ^ 1
    checksum = index_file._checksum(tensors, metadata["of"])
    save_arrays(tensors, kept, {**metadata, "sha256": checksum})
    with pytest.raises(DataError, match="changed while it was in use"):
        list(open_corpus(str(path), valid_percent=0).documents("train"))
    kept.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    assert list(open_corpus(str(path), valid_percent=0).documents("train")) == [b"one"]
    assert not (tmp_path / "ran").exists()
