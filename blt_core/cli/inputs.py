"""What commands share: finding configs, reading prompts, overriding ``[run]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from blt_core.config import Config, load_config
from blt_core.errors import DataError, near_match
from blt_core.files import is_stray
from blt_core.resources import resource

DEMO = "demo"
#: The file name that means stdin.
STDIN = "-"

ConfigArgument = Annotated[
    str,
    typer.Argument(metavar="[CONFIG]", help="A TOML file, or the name of a shipped config."),
]
PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", help="The text to continue (repeatable).")
]
PromptFileOption = Annotated[
    list[str] | None,
    typer.Option("--prompt-file", help="A file with it; - is stdin (repeatable)."),
]
MaxNewBytesOption = Annotated[
    int | None, typer.Option("--max-new-bytes", help="At most this many new bytes.")
]
CheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", help="A checkpoint folder, or demo:NAME.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps …")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float64.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


class ReaderGone(Exception):  # noqa: N818 -- no error: the reader has what it wanted
    """Whoever read stdout has closed it (``blt generate | head -c 9``): stop, and say nothing."""


def find_config(name: str) -> Config:
    """The config in the file ``name``, or the shipped config of that name.

    Raises ConfigError or DataError with what is there.
    """
    path = Path(name)
    if not path.suffix and len(path.parts) == 1:
        # A bare word names a shipped config first: a folder called demo must not hide the demo.
        found = resource("configs").glob("*.toml")
        shipped = {file.stem: file for file in found if not is_stray(file.name)}
        if name not in shipped and path.is_file():
            return load_config(path)
        if name not in shipped:
            raise DataError(
                f"{name}: no such file, and no shipped config of that name."
                f"{near_match(name, shipped)}\n  shipped configs: {', '.join(sorted(shipped))}"
            )
        path = shipped[name]
    return load_config(path)


def find_source(source: str) -> Config:
    """The config that ``source`` names, or one that runs the checkpoint ``source``."""
    if source.endswith(".toml"):
        return find_config(source)
    if ":" in source or is_folder(source) or len(Path(source).parts) > 1:
        return Config.from_mapping({"schema": 1, "run": {"checkpoint": source}}, source)
    return find_config(source)


def is_folder(source: str) -> bool:
    """Whether ``source`` is a folder, which may just be replaced by another one."""
    from blt_core.checkpoint import current_folder

    return current_folder(Path(source)).is_dir()


def with_sampler(config: Config, spec: str | None) -> Config:
    """The config with the sampler of ``--sampler``, if one is given."""
    from blt_core.config import parse_inline

    return config if spec is None else config.with_option("sampler", parse_inline(spec, "sampler"))


def read_prompts(prompts: Sequence[str] | None, files: Sequence[str] | None) -> list[bytes]:
    """All prompts as bytes: the texts, then the files; stdin if neither is given and it is piped.

    Raises DataError for a file that cannot be read, naming it.
    """
    from blt_core.pipeline import to_bytes

    if list(files or ()).count(STDIN) > 1:
        raise DataError(f"--prompt-file {STDIN}: stdin can be read once only")
    read = [to_bytes(text) for text in prompts or ()]
    read += [_read_file(name) for name in files or ()]
    if not read and sys.stdin is not None and not sys.stdin.isatty():
        read = [sys.stdin.buffer.read()]
    if not read:
        raise DataError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe one in")
    return read


def _read_file(name: str) -> bytes:
    if name == STDIN:
        if sys.stdin is None:
            raise DataError(f"--prompt-file {STDIN}: stdin is closed")
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"{name}: the prompt file cannot be read: {error.strerror}") from error


def given(**settings: Any) -> dict[str, Any]:
    """The settings that were given: all but those that are None."""
    return {key: value for key, value in settings.items() if value is not None}
