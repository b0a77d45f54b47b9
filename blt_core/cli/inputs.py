"""What commands share: finding configs, reading prompts, overriding ``[run]``."""

from __future__ import annotations

import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from blt_core.errors import DataError, RequestError, near_match
from blt_core.files import is_stray
from blt_core.plugins.registry_file import load_manifest
from blt_core.resources import resource
from blt_core.wiring.config import Config, load_config

if TYPE_CHECKING:
    from blt_core.pipeline import Pipeline
    from blt_core.types import Parameters
    from blt_core.wiring.resolve import Plan

DEMO = "demo"
#: The file name that means stdin.
STDIN = "-"


def _shipped_configs() -> dict[str, Path]:
    found = resource("configs").glob("*.toml")
    return {file.stem: file for file in found if not is_stray(file.name)}


def _complete_config(incomplete: str) -> list[str]:
    files = [str(path) for path in Path().glob("*.toml")]
    return [name for name in (*sorted(_shipped_configs()), *files) if name.startswith(incomplete)]


def complete_sampler(incomplete: str) -> list[str]:
    """Names of samplers that begin so, as far as registry.toml knows them."""
    known = load_manifest().components
    return sorted(n for kind, n in known if kind == "sampler" and n.startswith(incomplete))


ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="[CONFIG]",
        help="A TOML file, or the name of a shipped config.",
        autocompletion=_complete_config,
    ),
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
TopKOption = Annotated[int | None, typer.Option("--top-k", help="Keep the k likeliest bytes.")]
TopPOption = Annotated[float | None, typer.Option("--top-p", help="Keep this much probability.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Of the random draws.")]
SamplesOption = Annotated[
    int | None, typer.Option("--samples", min=1, help="Texts of each prompt, each with its draws.")
]
CheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", help="A checkpoint folder, or demo:NAME.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps …")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float64.")]
CompileOption = Annotated[
    bool | None, typer.Option("--compile", help="Compile passes on first use, for long runs.")
]
KernelsOption = Annotated[
    str | None, typer.Option("--kernels", help="measured, fixed, or a file with a choice.")
]
BatchOption = Annotated[
    int | None, typer.Option("--batch", min=1, help="So many at once; default: one by one.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", help="Where their records go, a line each; resumable.")
]
ExecutorOption = Annotated[
    str | None, typer.Option("--executor", help='Who does the work: "local workers=4", "ray".')
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def find_config(name: str) -> Config:
    """The config in the file ``name``, or the shipped config of that name.

    Raises ConfigError or DataError with what is there.
    """
    path = Path(name)
    if not path.suffix and len(path.parts) == 1:
        # A bare word names a shipped config first: a folder called demo must not hide the demo.
        shipped = _shipped_configs()
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
    from blt_core.storage.folders import current_folder

    return current_folder(Path(source)).is_dir()


def with_sampler(config: Config, spec: str | None) -> Config:
    """The config with the sampler of ``--sampler``, if one is given."""
    from blt_core.tables.inline import parse_inline

    return config if spec is None else config.with_option("sampler", parse_inline(spec, "sampler"))


def with_executor(config: Config, spec: str | None) -> Config:
    """The config with the executor of ``--executor``, if one is given."""
    from blt_core.tables.inline import parse_inline

    if spec is None:
        return config
    return config.with_option("executor", parse_inline(spec, "executor"))


def check_files(
    option: str, given: Path | None, output: Path | None, others: Mapping[str, object]
) -> None:
    """Raise BadParameter unless a file of items and ``--output`` come together, and alone."""
    if (given is None) != (output is None):
        missing, there = ("--output", option) if output is None else (option, "--output")
        raise typer.BadParameter(f"goes with {missing}", param_hint=there)
    for name, value in others.items():
        if given is not None and value:
            raise typer.BadParameter(f"does not go with {name}", param_hint=option)


def refuse_executor(executor: str | None, option: str, given: object) -> None:
    """Raise BadParameter for ``--executor`` without the option that gives it many items."""
    if executor is not None and not given:
        raise typer.BadParameter(f"goes with {option}", param_hint="--executor")


def read_prompts(
    prompts: Sequence[str] | None, files: Sequence[str] | None, most: int
) -> list[bytes]:
    """All prompts as bytes: the texts, then the files; stdin if neither is given and it is piped.

    most: bytes that a prompt may have, those of the model's context; no more is read of a file, so
    one without an end is refused like any that is too long. Raises DataError for a file that cannot
    be read, RequestError for one that is too long, naming it.
    """
    from blt_core.requests import to_bytes

    if list(files or ()).count(STDIN) > 1:
        raise DataError(f"--prompt-file {STDIN}: stdin can be read once only")
    read = [to_bytes(text, f"prompt {at}") for at, text in enumerate(prompts or (), 1)]
    read += [_read_file(name, most) for name in files or ()]
    if not read and sys.stdin is not None and not sys.stdin.isatty():
        read = [_read_file(STDIN, most)]
    if not read:
        raise DataError("no prompt: give --prompt TEXT or --prompt-file FILE, or pipe one in")
    return read


#: A text to score is read whole.
_MOST_SCORED = 1 << 30


def read_text(name: str) -> bytes:
    """A text to score; DataError for one that cannot be read whole. ``-`` is stdin."""
    text = _read(name, _MOST_SCORED, "the text")
    if len(text) > _MOST_SCORED:
        raise DataError(f"{name}: more than 1 GiB cannot be scored at once. Split it")
    return text


def _read(name: str, most: int, what: str) -> bytes:
    """The first ``most`` bytes of a file or of stdin, and one more if there are any."""
    label = "stdin" if name == STDIN else name
    try:
        if name == STDIN:
            if sys.stdin is None:
                raise DataError(f"{STDIN}: {what} cannot be read: stdin is closed")
            return _read_up_to(sys.stdin.buffer, most + 1)
        _refuse_named_pipe(name, what)
        with Path(name).open("rb", buffering=0) as file:  # a buffer would read ahead
            return _read_up_to(file, most + 1)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{label}: {what} cannot be read: {reason}") from error


def _read_file(name: str, most: int) -> bytes:
    label = "stdin" if name == STDIN else name
    text = _read(name, most, "the prompt file")
    if len(text) > most:
        raise RequestError(
            f"{label}: more than {most} bytes exceed the model's context of {most} bytes. "
            "Shorten the prompt"
        )
    return text


def _read_up_to(file: BinaryIO, count: int) -> bytes:
    """The first ``count`` bytes of a file, or all if it has fewer."""
    pieces, left = [], count
    while left and (piece := file.read(min(left, _PIECE))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


#: Read at a time: a reader asked for a whole context at once reserves that much for any file.
_PIECE = 1 << 20


def _refuse_named_pipe(name: str, what: str) -> None:
    """Raise DataError for a pipe in the file system: opening it waits until somebody writes to it.

    Those of ``<(command)`` are open already.
    """
    is_pipe = stat.S_ISFIFO(Path(name).stat().st_mode)
    if is_pipe and not name.startswith(("/dev/", "/proc/")):
        raise DataError(f"{name}: {what} is a named pipe. Pass it as stdin: < {name}")


def note_idle(pipeline: Pipeline, **options: object) -> None:
    """Say on stderr which of the given ``options`` do nothing, as the temperature is 0."""
    settings = pipeline.settings
    if settings.checkpoint is None:
        options.pop("seed", None)  # the random weights are drawn from it
    samples = options.pop("samples", None)
    if isinstance(samples, int) and samples > 1 and settings.sampling.greedy:
        note("at temperature 0 all samples of a prompt are the same text")
    idle = [f"--{name.replace('_', '-')}" for name in given(**options)]
    if idle and settings.sampling.greedy:
        verb = "do" if len(idle) > 1 else "does"
        note(f"{', '.join(idle)} {verb} nothing at temperature 0")


def show_notes(*plans: Plan) -> None:
    """Tell, on stderr, what the components of plans say of keys that are hardly meant."""
    for each in dict.fromkeys(text for plan in plans for text in plan.notes):
        note(each)


def note(text: str) -> None:
    """Tell something on stderr."""
    print(f"note: {text}", file=sys.stderr)  # noqa: T201 -- no result


def find_scale(name: str | None) -> Parameters | None:
    """The parameter counts that ``--cost-parameters`` names; None without a name."""
    if name is None:
        return None
    from blt_core.published import SCALES

    if name not in SCALES:
        raise RequestError(
            f"--cost-parameters: no scale named {name!r}.{near_match(name, SCALES)} "
            f"There are: {', '.join(SCALES)}"
        )
    return SCALES[name]


def given(**settings: Any) -> dict[str, Any]:
    """The settings that were given: all but those that are None."""
    return {key: value for key, value in settings.items() if value is not None}
