"""Assembly of the command line, and how errors become one message and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from blt_core import __version__
from blt_core.cli import comparing, converting, generating, inspecting, streams
from blt_core.errors import BltError, DataError, RunError
from blt_core.faults import naming
from blt_core.log import configure, logger
from blt_core.plugins import Plugins, load_plugins

INTERRUPTED = 1
#: What the option parser returns after Ctrl-C.
_PARSER_INTERRUPTED = 130


def main() -> None:
    """Entry point of ``blt``."""
    try:
        streams.take_over()
    except streams.StdoutClosed:
        sys.exit(_say("stdout is closed: there is nowhere to write results", DataError.exit_code))
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line; returns the exit code. Errors are printed, never raised.

    Results go to ``sys.stdout``; what plugins print goes to ``sys.stderr``.
    """
    with streams.claimed():
        configure()
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        app = build_app(load_plugins())
        command = typer.main.get_command(app)
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
            raise
        show()
        return int(getattr(error, "exit_code", 2))
    return _say("interrupted", INTERRUPTED) if code == _PARSER_INTERRUPTED else code


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)  # noqa: T201 -- the one place where errors are shown
    return code


def build_app(plugins: Plugins) -> typer.Typer:
    """The app with all commands, those of plugins last."""
    app = typer.Typer(
        help="Byte-latent language models: generate, compare, train, inspect.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
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

    generating.add_command(app)
    comparing.add_command(app)
    inspecting.add_commands(app)
    converting.add_command(app)
    plugins.add_commands(app)
    return app


def _version(value: bool) -> None:  # noqa: FBT001 -- a typer callback
    if value:
        streams.output(f"blt {__version__}")
        raise typer.Exit
