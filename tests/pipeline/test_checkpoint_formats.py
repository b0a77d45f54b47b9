"""Which format reads a checkpoint: the one that recognises what is there."""

from __future__ import annotations

import attrs
import pytest

from blt_core.component import Component
from blt_core.errors import CheckpointError, ConfigError
from blt_core.hookspecs import hookimpl
from blt_core.loading import read_checkpoint
from blt_core.plugins.loading import load_plugins


@attrs.frozen
class NoKeys:
    pass


def make_format(name: str, recognises) -> object:
    """A plugin with a format that reads any location to its own name."""

    class Format:
        def __init__(self, params, context): ...
        def recognises(self, location):
            return recognises(location)

        def read(self, location):
            return {"read by": name}, {}

        def write(self, location, config, tensors): ...

    class Plugin:
        @hookimpl
        def blt_components(self):
            return [Component("checkpoint_format", name, Format, NoKeys, f"what {name} reads")]

    return Plugin()


@pytest.fixture
def read():
    """Read a location with these formats beside those of the distribution."""

    def read(location, **formats):
        extra = [("blt-acme", name, make_format(name, known)) for name, known in formats.items()]
        return read_checkpoint(str(location), load_plugins(extra=extra))[0]

    return read


@pytest.mark.parametrize("name", ["aaa", "zzz"])
def test_a_format_is_asked_whatever_its_name(read, tmp_path, name):
    (tmp_path / "weights.zzz").touch()
    found = read(tmp_path / "weights.zzz", **{name: lambda at: at.endswith(".zzz")})
    assert found == {"read by": name}


def test_several_formats_that_recognise_one_location_are_named(read, checkpoint):
    with pytest.raises(ConfigError) as caught:
        read(checkpoint, zzz=lambda _: True)
    assert str(caught.value) == (
        f"{checkpoint}: several checkpoint formats recognise this: folder, zzz\n"
        '  fix: block one in registry.toml, as in blocked = ["checkpoint_format/zzz"]'
    )


def test_a_broken_format_is_named_where_none_reads_and_hinders_no_other(read, checkpoint, tmp_path):
    def fail(_):
        raise RuntimeError("out of ink")

    assert read(checkpoint, aaa=fail)["schema"] == 1
    with pytest.raises(CheckpointError, match=r"\n  aaa \(broken: out of ink\)\n"):
        read(tmp_path, aaa=fail)


LOOKED_FOR = """
  installed formats:
  demo: demo:NAME, a small model that ships with the package
  folder: a folder with model.safetensors and config.toml
  huggingface: a folder of transformers' BLT models, with config.json
  zzz: what zzz reads"""


def test_a_location_without_a_checkpoint_says_what_is_there_and_what_is_looked_for(read, tmp_path):
    def complaint(location) -> str:
        with pytest.raises(CheckpointError) as caught:
            read(location, zzz=lambda _: False)
        return str(caught.value).replace(f"{location}: no checkpoint; found ", "")

    gone, file, folder = tmp_path / "gone", tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    assert complaint(gone) == f"nothing (looked at {gone}){LOOKED_FOR}"
    assert complaint(file) == f"a file (looked at {file}){LOOKED_FOR}"
    assert complaint(folder) == f"an empty folder{LOOKED_FOR}"
    (folder / "notes.txt").touch()
    assert complaint(folder) == f"a folder with notes.txt{LOOKED_FOR}"
    for index in range(9):
        (folder / f"a{index}").touch()
    assert complaint(folder).startswith("a folder with a0, a1, a2, a3, a4, a5, a6, a7, …\n")
    assert complaint("hf:org/model").startswith("nothing (looked at ")


def test_the_name_of_a_format_before_a_colon_asks_it_alone(read):
    def fail(_):
        pytest.fail("the location is for the format 'demo'")

    assert read("demo:python", zzz=fail)["schema"] == 1
    assert read("zzz:mine", zzz=lambda at: at == "zzz:mine") == {"read by": "zzz"}
    with pytest.raises(CheckpointError, match="no such demo"):
        read("demo:pythn", zzz=fail)
