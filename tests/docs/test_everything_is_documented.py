"""What exists has a heading, an anchor or a row of a table on the site, which is built strictly."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import types
from functools import cache
from pathlib import Path

import attrs
import pytest

import blt_core
from blt_core import errors, hookspecs
from blt_core.cli.describing import describe
from blt_core.plugins.commands import find_commands
from blt_core.plugins.loading import load_plugins
from blt_core.plugins.registry_file import load_manifest
from tests.core.test_layers import PUBLIC
from tests.docs.site import build, read

ROOT = Path(__file__).resolve().parents[2]
HOOKS = [name for name in vars(hookspecs) if name.startswith("blt_")]
COMMANDS = list(find_commands(load_manifest()))
COMPONENTS = list(load_manifest().components)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    # With pytest-xdist each process has a folder below that of all.
    return build(base.parent if base.name.startswith("popen-") else base)


@pytest.fixture(scope="module")
def page(built):
    return cache(lambda name: read(built[0] / name))


def test_the_site_is_built_strictly_and_without_a_warning(built):
    _, log = built
    assert log.splitlines()[0] == "0", log
    assert "WARNING" not in log
    assert "ERROR" not in log


def test_the_pages_load_nothing_from_elsewhere(built):
    pages = sorted(built[0].rglob("*.html"))
    assert len(pages) > 100
    loading = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|"""
                         r"""<link[^>]*\shref=["']?(?:https?:)?//""")  # fmt: skip
    assert [p.name for p in pages if loading.search(p.read_text("utf-8"))] == []
    assert loading.search('<link rel="stylesheet" href="https://fonts.example/x.css">')


def test_every_page_is_reached_from_the_start(built, page):
    start = (built[0] / "index.html").read_text("utf-8")
    for folder in ("howto", "kinds", "hooks", "components", "reference/commands"):
        for path in (built[0] / folder).rglob("*.html"):
            address = path.relative_to(built[0]).as_posix()
            assert f'href="{address}"' in start, address


# -- the API ---------------------------------------------------------------------------------------


@cache
def site_code():
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts/site/pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules(public: str) -> list[str]:
    """The names of a public module, and of those below it."""
    folder = ROOT / "blt_core" / public.replace(".", "/")
    # The jail is a program, which reads its standard input when it is imported.
    below = [p for p in folder.rglob("*.py") if not p.name.startswith("_") and p.stem != "jail"]
    dotted = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in below]
    return [f"blt_core.{public}", *sorted(dotted)]


def own_names(module: types.ModuleType) -> list[str]:
    """The classes and functions that a module defines."""
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__ == module.__name__
    ]


def constants(module: types.ModuleType) -> list[str]:
    """The names that a module assigns to."""
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    assigned = [node for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    targets = [t for node in assigned for t in getattr(node, "targets", None) or [node.target]]
    names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return [name for name in names if not name.startswith("_")]


@pytest.mark.parametrize("public", [*PUBLIC, "testing"])
def test_every_public_name_has_an_anchor(page, public):
    for name in modules(public):
        module = importlib.import_module(name)
        ids = page(f"reference/api/{name.removeprefix('blt_core.')}.html").ids
        assert name in ids
        for own in (*own_names(module), *constants(module)):
            assert f"{name}.{own}" in ids, f"{name}.{own}"


def test_every_name_of_the_package_has_a_row_and_an_anchor(page):
    cells = page("reference/api/index.html").cells
    assert cells == blt_core.__all__
    for name in blt_core.__all__:
        thing = getattr(blt_core, name)
        module = getattr(thing, "__module__", "")
        if module.startswith("blt_core."):
            ids = page(f"reference/api/{module.removeprefix('blt_core.')}.html").ids
            assert f"{module}.{name}" in ids


def test_every_method_of_a_public_class_has_an_anchor(page):
    from blt_core import protocols
    from blt_core.pipeline import Pipeline

    for cls in (Pipeline, *map(protocols.__dict__.get, ("Sampler", "Drafter", "DecodeOps"))):
        ids = page(f"reference/api/{cls.__module__.removeprefix('blt_core.')}.html").ids
        own = [n for n, v in vars(cls).items() if inspect.isfunction(v) and not n.startswith("_")]
        assert own
        for name in own:
            assert f"{cls.__module__}.{cls.__name__}.{name}" in ids


def test_docstrings_have_no_markup_of_another_kind(built):
    for path in (built[0] / "reference" / "api").rglob("*.html"):
        left = re.findall(r":(?:class|func|meth|mod|data):", path.read_text("utf-8"))
        assert left == [], path


# -- errors, hooks, kinds --------------------------------------------------------------------------


def test_every_error_class_has_a_row_with_its_exit_code(page):
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    raised = {c.__name__: c for c in classes if issubclass(c, errors.BltError)}
    assert len(raised) >= 9
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d) \|$", text, re.MULTILINE))
    assert {name: int(code) for name, code in rows.items()} == {
        name: c.exit_code for name, c in raised.items()
    }
    assert set(page("errors.html").cells) == set(raised)


def test_hooks_have_pages_and_there_are_no_others(page):
    pages = {p.stem for p in (ROOT / "docs" / "hooks").glob("*.md")} - {"index"}
    assert pages == set(HOOKS)
    assert page("hooks/index.html").cells == HOOKS


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_s_page_has_its_signature_and_an_example_that_works(page, hook):
    assert hook in page(f"hooks/{hook}.html").headings
    text = (ROOT / "docs" / "hooks" / f"{hook}.md").read_text("utf-8")
    signature = inspect.signature(getattr(hookspecs, hook))
    told = re.search(r"^Signature: `\(([^)]*)\) -> (.*)`\.$", text, re.MULTILINE)
    assert [each.split(":")[0].strip() for each in told[1].split(",") if each] == list(
        signature.parameters
    )
    if signature.return_annotation != "None":
        assert told[2] == signature.return_annotation
    [source] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    EXAMPLES[hook](run_example(hook, source))


def run_example(hook: str, source: str) -> types.ModuleType:
    import sys

    module = types.ModuleType(f"example_of_{hook}")
    sys.modules[module.__name__] = module
    exec(source, vars(module))
    return module


def plugins_with(module: types.ModuleType):
    plugins = load_plugins(extra=[("blt-example", "example", module)])
    assert plugins.broken == ()
    return plugins


def watched(module: types.ModuleType):
    """What a short generation gives while the plugin looks on."""
    from blt_core.pipeline import Pipeline
    from blt_core.wiring.config import Config
    from tests.tiny import config

    return Pipeline.load(Config.from_mapping(config()), plugins_with(module)).generate(
        "abc", max_new_bytes=4
    )


def example_of_kinds(module):
    assert plugins_with(module).manifest.kinds["stop_rule"].summary == "says when a text is over"


def example_of_components(module):
    entry = plugins_with(module).registry.lookup("drafter", "acme/echo")
    assert describe(plugins_with(module), entry)["keys"][0]["meaning"]


def example_of_settings(module):
    assert plugins_with(module).settings["serve"] is module.ServeSettings


def example_of_check(module):
    from blt_core.wiring.config import Config

    plugins = plugins_with(module)
    found = plugins.check(Config.from_mapping({"schema": 1, "serve": {"port": 9}}))
    assert found == {"schema": 1, "serve": {"port": 9}}
    assert plugins.check(Config.from_mapping({"schema": 1})) is None


def example_of_run_start(module):
    watched(module)
    assert module.started == [[3]]


def example_of_run_step(module):
    result = watched(module)
    assert bytes(module.text) == result.output != b""


def example_of_run_end(module):
    result = watched(module)
    assert module.passes == [result.passes.decoder]


EXAMPLES = {f"blt_{name.removeprefix('example_of_')}": value
            for name, value in list(vars().items()) if name.startswith("example_of_")}  # fmt: skip


def test_every_kind_has_a_page_and_a_row(page):
    kinds = list(load_plugins().manifest.kinds)
    assert page("kinds/index.html").cells == kinds
    for kind in kinds:
        assert f"Kind {kind}" in page(f"kinds/{kind}.html").headings


# -- components ------------------------------------------------------------------------------------


def test_every_component_has_a_page_with_a_row_for_each_key(page):
    plugins = load_plugins()
    entries = [e for e in plugins.registry.entries if e.origin.distribution == "blt-core"]
    assert len(entries) > 40
    for entry in entries:
        kind, name = entry.record.kind, entry.record.name
        found = page(f"components/{kind}/{name}.html")
        assert f"{kind} {name}" in found.headings
        assert found.cells == [field.name for field in attrs.fields(entry.record.params)]


def test_every_key_says_what_it_means(page):
    plugins = load_plugins()
    silent = [
        f"{e.record.kind} {e.record.name}: {key['name']}"
        for e in plugins.registry.entries
        for key in describe(plugins, e)["keys"]
        if not key["meaning"]
    ]
    assert silent == []


@pytest.mark.parametrize(
    "arguments", [(), ("drafter",), ("sampler", "blt-s")], ids=lambda a: " ".join(a) or "list"
)
def test_blt_docs_tells_what_the_site_is_made_of(arguments, capsys):
    from blt_core.cli.app import run

    assert run(["docs", *arguments]) == 0
    told = capsys.readouterr().out
    made = dict(site_code().made_pages())
    match arguments:
        case ():
            for kind, name in COMPONENTS:
                assert f"| `{kind}` | `{name}` |" in told
        case (kind,):
            assert told == (ROOT / "docs" / "kinds" / f"{kind}.md").read_text("utf-8")
        case (kind, name):
            assert told.rstrip() == made[f"components/{kind}/{name}.md"].rstrip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["drafer"], "Did you mean 'drafter'?"), (["drafter", "slef"], "Did you mean 'self'?")],
)
def test_blt_docs_has_near_matches(arguments, message, capsys):
    from blt_core.cli.app import run

    assert run(["docs", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_reference_tells_of_all_that_plugins_may_import():
    assert set(PUBLIC) <= set(site_code().MODULES)


# -- commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_has_a_row(page, name):
    command = find_commands(load_manifest())[name]
    found = page(f"reference/commands/{name}.html")
    assert f"blt {name}" in found.headings
    options = [p for p in command.params if p.param_type_name == "option"]
    wanted = [", ".join((*p.opts, *p.secondary_opts)) for p in options]
    assert [cell for cell in found.cells if cell.startswith("-")] == wanted
    assert all(p.help for p in command.params), "a parameter without help"
    page_of_commands = (ROOT / "docs" / "cli.md").read_text("utf-8")
    assert re.search(rf"^blt {name}\s", page_of_commands, re.MULTILINE)


# -- code ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["index", "errors", "howto/compose", "howto/serve", "howto/paper"])
def test_the_code_of_a_page_runs(name, capsys):
    text = (ROOT / "docs" / f"{name}.md").read_text("utf-8")
    parts = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert parts
    namespace: dict[str, object] = {}
    for source in parts:
        exec(source, namespace)
    if name == "howto/serve":
        served(namespace["server"])


def served(server) -> None:
    """The server of the page answers, and refuses what cannot be served."""
    import json
    import threading
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    def ask(**asked):
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        with urlopen(Request(address, json.dumps(asked).encode()), timeout=60) as answer:
            return answer.read()

    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert len(ask(prompt="import ", max_new_bytes=5)) == 5
        with pytest.raises(HTTPError) as refused:
            ask(prompt="import ", max_new_bytes=0)
        refused.value.close()
        assert refused.value.code == 400
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
