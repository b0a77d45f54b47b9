"""What needs no model imports no torch: help, version and completion answer at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.forks import BLT_IMPORTS, forks

#: Prints, after what a command line prints, the modules that it has imported.
RUN = """
import json, sys
from blt_core.cli.app import run
code = run(sys.argv[1:])
print("\\n" + json.dumps([code, sorted(sys.modules)]))
"""
HEAVY = {"torch", "numpy", "safetensors", "transformers", "deepspeed", "matplotlib", "pyarrow"}
HEAVY |= {"structlog", "rich.traceback"}


def imported(*arguments: str, first: str = "import blt_core.cli.app") -> tuple[str, set[str]]:
    """What a command line prints, and the modules that it imports; ``first`` is what any does."""
    done = forks(first).run(RUN, arguments)
    out, _, last = done.stdout.decode().rstrip("\n").rpartition("\n")
    assert last.startswith("["), done.stderr
    code, modules = json.loads(last)
    assert code == 0, done.stderr
    return out, set(modules)


def plugins_among(modules: set[str]) -> set[str]:
    return {name.split(".")[1] for name in modules if name.startswith("blt_plugins.")}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--version"], "blt 0."),
        (["--help"], "Continue prompts with a byte-latent model"),
        *((["generate", "--help"], "--max-new-bytes"), (["compare", "--help"], "--sampler")),
        *((["plugins", "--help"], "--json"), (["check", "--help"], "--checkpoint")),
        *((["convert", "--help"], "--force"), (["cost", "--help"], "--n-dec")),
        *((["train", "--help"], "--fresh"), (["calibrate", "--help"], "--target")),
        *((["evaluate", "--help"], "--rounds"), (["prepare", "--help"], "--workers")),
        (["docs", "--help"], "--source"),
        (["cost"], "BLT-D-4"),
    ],
    ids=" ".join,
)
def test_what_needs_no_model_imports_no_torch(arguments, expected):
    out, modules = imported(*arguments)
    assert expected in out
    assert not HEAVY & modules


def test_a_version_imports_no_plugin_and_no_command():
    _, modules = imported("--version")
    assert not plugins_among(modules)
    assert "blt_core.cli.generating" not in modules


def complete(words: str) -> set[str]:
    """The completions of the last word, as bash asks for them; imports nothing heavy."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "from blt_core.cli import main; main()"],
        check=False, capture_output=True, text=True, timeout=300,
        env={
            **os.environ,
            "_BLT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        },
    )  # fmt: skip
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "blt_core.cli.app" in modules
    assert not HEAVY & modules
    assert not plugins_among(modules)
    return set(done.stdout.split("\n")) - {""}


def test_completion_imports_no_torch():
    assert {"generate"} == complete("blt gen")
    assert "--max-new-bytes" in complete("blt generate --max")


def test_names_of_samplers_and_configs_are_completed():
    assert complete("blt generate --sampler blt") == {
        "blt-auto",
        "blt-cascade",
        "blt-d",
        "blt-dv",
        "blt-lookup",
        "blt-s",
    }
    assert complete("blt compare --sampler spec") == {"speculative"}
    assert "demo-ar" in complete("blt generate dem")


def test_the_core_is_imported_without_torch_and_gives_its_names_when_they_are_used():
    code = (
        "import sys, blt_core, blt_core.errors, blt_core.wiring.config, blt_core.plugins.loading\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(blt_core.__all__) <= set(dir(blt_core))\n"
        "from blt_core import Component, Pipeline, Sampling\n"
        "assert Pipeline.__module__ == 'blt_core.pipeline' and 'torch' in sys.modules\n"
        "assert all(getattr(blt_core, name) is not None for name in blt_core.__all__)\n"
        "try: blt_core.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "module 'blt_core' has no attribute 'nothing'\n", done.stderr


def test_generating_imports_the_plugins_of_its_model_alone():
    _, modules = imported("generate", "--prompt", "x", "--max-new-bytes", "2", first=BLT_IMPORTS)
    assert {"checkpoints", "demo", "sampling", "local"} <= plugins_among(modules)
    assert not {"training", "deepspeed", "huggingface"} & plugins_among(modules)


def test_a_sampler_imports_the_drafter_that_it_nests_alone():
    # Not `demo --sampler ar`: the table that an option replaces is checked too.
    short = ("--prompt", "x", "--max-new-bytes", "2")
    _, modules = imported("generate", "demo-ar", *short, first=BLT_IMPORTS)
    assert not {"drafting", "unmasking", "verification"} & plugins_among(modules)
