"""Commands are found by name and imported one at a time."""

from __future__ import annotations

import sys

import attrs
import pytest
import structlog

from blt_core.cli import app
from blt_core.plugins.commands import find_commands
from blt_core.plugins.entry_points import COMMANDS
from blt_core.plugins.registry_file import load_manifest

GROW = """
import typer

def grow(size: int = 1) -> None:
    '''Grow a tree.'''
    typer.echo("x" * size)

def draw(colour: int | str) -> None: ...

trees = typer.Typer(help="All about trees.")
trees.command()(grow)
trees.command()(lambda: None)
"""


@pytest.fixture
def commands(install, manifest):
    def commands(policy=manifest):
        return find_commands(policy)

    return commands


@attrs.frozen
class Outcome:
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command line that has these commands."""

    def call(commands, *arguments):
        monkeypatch.setattr(app, "find_commands", lambda _: commands)
        code = app.run(list(arguments))
        return Outcome(code, *capsys.readouterr())

    yield call
    structlog.reset_defaults()


def test_a_function_and_a_group_are_commands(install, commands, call) -> None:
    install("acme", {COMMANDS: {"grow": "acme_c:grow", "trees": "acme_c:trees"}}, {"acme_c": GROW})
    found = commands()
    assert call(found, "grow", "--size", "3").stdout == "xxx\n"
    assert call(found, "trees", "grow").stdout == "x\n"
    out = call(found, "--help").stdout
    assert "grow   Grow a tree." in out
    assert "trees  All about trees." in out
    assert found.broken() == ()


def test_running_a_command_imports_it_alone(install, commands, call) -> None:
    sources = {"acme_one": GROW, "acme_two": GROW}
    install("acme", {COMMANDS: {"one": "acme_one:grow", "two": "acme_two:grow"}}, sources)
    found = commands()
    assert list(found) == ["one", "two"]
    assert not {"acme_one", "acme_two"} & sys.modules.keys()
    assert call(found, "two").stdout == "x\n"
    assert {"acme_one", "acme_two"} & sys.modules.keys() == {"acme_two"}


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("acme_c:no", "acme_c has no 'no'"),
        ("acme_c", "the entry point leads to <module 'acme_c'"),
        ("acme_c:draw", "AssertionError: Typer"),
        ("acme_bad:x", "SystemExit: 4"),
        ("1x", "its entry point is '1x'; expected"),
    ],
)
def test_a_command_that_cannot_be_used_says_why_and_the_others_work(
    install, commands, call, value, cause
) -> None:
    sources = {"acme_c": GROW, "acme_bad": "raise SystemExit(4)"}
    install("acme", {COMMANDS: {"bad": value, "grow": "acme_c:grow"}}, sources)
    found = commands()
    message = f"command 'bad' (acme) is broken: {cause}"
    assert [str(each).startswith(message) for each in found.broken()] == [True]
    assert call(found, "grow").stdout == "x\n"
    assert call(found, "bad", "--any", "thing").stderr.startswith(message)
    help_page = call(found, "--help").stdout
    assert "bad   command 'bad' (acme) is broken" in help_page
    assert "grow  Grow a tree." in help_page


def test_the_first_owner_keeps_a_name_and_the_core_comes_before_all(
    install, commands, call
) -> None:
    for name in ("aardvark", "blt_core", "zebra"):
        source = f"import typer\ndef run():\n typer.echo({name!r})\n"
        install(name, {COMMANDS: {"it": f"acme_{name}:run"}}, {f"acme_{name}": source})
    found = commands()
    assert call(found, "it").stdout == "blt_core\n"
    assert [str(each) for each in found.broken()] == [
        "command 'it' (aardvark) is broken: there is a command 'it' already (blt_core)",
        "command 'it' (zebra) is broken: there is a command 'it' already (blt_core)",
    ]


def test_blocked_distributions_have_no_commands(install, tmp_path, shipped, commands) -> None:
    install("acme", {COMMANDS: {"grow": "acme_c:grow"}}, {"acme_c": GROW})
    policy = tmp_path / "registry.toml"
    policy.write_text('schema = 1\nblocked = ["Acme"]\n')
    assert list(commands(load_manifest([shipped, policy]))) == []


def test_an_unknown_command_may_be_of_a_distribution_that_cannot_be_read(
    install, commands, call
) -> None:
    install("bad", {}, info={"entry_points.txt": "[x]\ny\n"})
    install("acme", {COMMANDS: {"grow": "acme_c:grow"}}, {"acme_c": GROW})
    result = call(commands(), "grwo")
    assert result.code == 2
    assert "No such command 'grwo'. Did you mean 'grow'?" in result.stderr
    assert "distribution 'bad' is broken: entry_points.txt is malformed" in result.stderr


def test_an_installation_without_commands_says_so(commands, call) -> None:
    result = call(commands(), "generate")
    assert result.code == 2
    assert "No command is registered: install blt-core again." in result.stderr


def test_ctrl_c_during_an_import_names_the_command(install, commands, call) -> None:
    install("acme", {COMMANDS: {"grow": "acme_c:grow"}}, {"acme_c": "raise KeyboardInterrupt"})
    for arguments in (["grow"], ["--help"]):
        found = call(commands(), *arguments)
        assert found.stderr == "interrupted while command 'grow' (acme) was imported\n"
        assert found.code == 1


RAISES = """
def raiser() -> None:
    raise ValueError("no good")
"""


def test_an_error_in_a_command_of_a_plugin_names_it(install, commands, call) -> None:
    install("acme", {COMMANDS: {"raiser": "acme_r:raiser"}}, {"acme_r": RAISES})
    done = call(commands(), "raiser")
    assert (done.code, done.stdout) == (1, "")
    assert done.stderr == "command 'raiser' (acme) failed: ValueError: no good\n"


def test_help_and_version_need_no_policy_of_a_folder(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "registry.toml").write_text("schema = 1\nblocked = [\n")
    monkeypatch.chdir(tmp_path)
    assert app.run(["--version"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("blt ")
    assert shown.err.startswith("registry.toml:")
    assert app.run(["check"]) == 2
    assert capsys.readouterr().err.startswith("registry.toml:")


def test_the_core_s_commands_cannot_be_blocked(tmp_path, monkeypatch) -> None:
    (tmp_path / "registry.toml").write_text('schema = 1\nblocked = ["blt-core"]\n')
    monkeypatch.chdir(tmp_path)
    assert {"generate", "check", "plugins", "train"} <= set(find_commands(load_manifest()))
