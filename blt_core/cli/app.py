"""Assembly of the command line, and how errors become one message and an exit code."""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from blt_core import __version__
from blt_core.cli import streams
from blt_core.errors import BltError, ConfigError, DataError, RunError
from blt_core.faults import naming
from blt_core.log import configure, logger
from blt_core.plugins.commands import Commands, find_commands, new_app
from blt_core.plugins.entry_points import let_torch_be_imported
from blt_core.plugins.registry_file import Manifest, load_manifest, manifest_files

INTERRUPTED = 1
#: What the option parser returns after Ctrl-C.
_PARSER_INTERRUPTED = 130


def main() -> None:
    """Entry point of ``blt``."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _press)
    try:
        streams.take_over()
    except streams.StdoutClosed:
        sys.exit(_say("stdout is closed: there is nowhere to write results", DataError.exit_code))
    sys.exit(run(sys.argv[1:]))


def _press(_number: int, _frame: FrameType | None) -> None:
    """Have SIGTERM, which schedulers send, end a command as Ctrl-C does."""
    raise KeyboardInterrupt


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code. Errors are printed, never raised.

    Results go to ``sys.stdout``; what plugins print goes to ``sys.stderr``.
    """
    with streams.claimed():
        configure()
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    commands = None
    try:
        commands = find_commands(_policy(arguments))
        if commands.unreadable:
            let_torch_be_imported()
        command = build_group(commands)
        with naming():
            result = command.main(arguments, prog_name="blt", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except BltError as error:
        logger().debug("where the error comes from", exc_info=error)
        return _say(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _PARSER_INTERRUPTED
    except streams.ReaderGone:
        return 0
    except OSError as error:
        return _say(f"cannot read or write: {error}", RunError.exit_code)
    except Exception as error:
        # Usage errors of the option parser know how to show themselves; all else is a bug.
        show = getattr(error, "show", None)
        if show is None:
            name = next((each for each in arguments if not each.startswith("-")), "")
            owner = commands.owner(name) if commands is not None else None
            if owner is None:
                raise
            logger().debug("where the error comes from", exc_info=error)
            what = "".join(traceback.format_exception_only(error)).strip()
            return _say(f"command {name!r} ({owner}) failed: {what}", RunError.exit_code)
        show()
        return int(getattr(error, "exit_code", 2))
    return _say("interrupted", INTERRUPTED) if code == _PARSER_INTERRUPTED else code


def _policy(arguments: list[str]) -> Manifest:
    """The policy of plugins; where a file of it is faulty, for what needs none the shipped one."""
    try:
        return load_manifest()
    except ConfigError as error:
        if arguments not in (["--version"], ["--help"]):
            raise
        _say(str(error), error.exit_code)
        return load_manifest(manifest_files()[:1])


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)  # noqa: T201 -- the one place where errors are shown
    return code


class _Group(TyperGroup):
    """All commands, in the order of their names; each is imported when it is looked up."""

    commands: Commands  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands; imports none."""
        return list(self.commands)

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """As typer's."""
        with _keeping_what_was_interrupted():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        """As typer's."""
        with _keeping_what_was_interrupted():
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer's; a name that is not found may be of a distribution that cannot be read."""
        try:
            return super().resolve_command(ctx, args)
        except Exception as error:
            # A usage error, whose class is private to some versions of typer.
            if hasattr(error, "message"):
                hints = [str(each) for each in self.commands.unreadable]
                if not self.commands:
                    hints.append("No command is registered: install blt-core again.")
                error.message = "\n".join((error.message, *hints))
            raise


@contextlib.contextmanager
def _keeping_what_was_interrupted() -> Iterator[None]:
    # typer makes an exit code of KeyboardInterrupt, and drops what it says.
    try:
        yield
    except KeyboardInterrupt as error:
        if error.args:
            raise RunError(str(error)) from error
        raise


def build_group(commands: Commands) -> TyperGroup:
    """The command line with these commands."""
    app = new_app(
        cls=_Group,
        help="Byte-latent language models: generate, compare, train, inspect.",
        no_args_is_help=True,
    )

    @app.callback()
    def common(
        *,
        verbose: Annotated[bool, typer.Option("--verbose", help="Log to stderr.")] = False,
        show_version: Annotated[  # noqa: ARG001 -- acts through its callback
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
        ] = False,
    ) -> None:
        configure(verbose=verbose)

    group = typer.main.get_command(app)
    group.commands = commands  # type: ignore[attr-defined]
    return group  # type: ignore[return-value]


def _version(value: bool) -> None:  # noqa: FBT001 -- a typer callback
    if value:
        streams.output(f"blt {__version__}")
        raise typer.Exit
