"""Components on the command line: ``blt-s draft_bytes=8 verification.use="greedy"``."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from blt_core.errors import ConfigError, Problem
from blt_core.files import DEEPEST, TOO_DEEP
from blt_core.tables.place import Place, Table, parse_toml

# A word ends at a space outside of quotes, brackets and braces. One that is left open runs to the
# end of the text, so that TOML can say what is wrong with it.
_WORD = re.compile(
    r"""(?: "(?:\\.|[^"\\])*"? | '[^']*'? | \[[^\]]*\]? | \{[^}]*\}? | [^\s"'\[{] )+""",
    re.VERBOSE,
)
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
# A bare word in a list or an inline table; quoted texts are passed over.
_LISTED = re.compile(
    r"""" (?:\\.|[^"\\])* " | '[^']*' | (?<=[\[,{=\s]) ([A-Za-z_][^\s"'\[\]{},=]*) (?=\s*[,\]}])""",
    re.VERBOSE,
)
_KNOWN_WORDS = ("true", "false", "inf", "nan")
#: Characters of a key that a message shows.
_SHOWN = 200
_BARE = re.compile(r"[^\s\"'\[\]{},=]+")


def parse_inline(text: str, kind: str) -> Table:
    """The table that a component's name and ``key=value`` settings stand for.

    Values are written as in TOML; a bare word that TOML does not know is a string, in lists too.
    Dotted keys reach nested tables. Raises ConfigError with all problems, at ``--kind``.
    """
    place = Place("--" + kind.replace("_", "-"))
    name, *settings = _WORD.findall(text) or [""]
    tables: dict[str, Any] = {"use": name}
    problems: list[Problem] = []
    if not name or "=" in name:
        wanted = kind.replace("_", " ")
        found = f"got {name!r}" if name else "got nothing"
        problems.append(place.problem(f"expected the name of a {wanted} first, {found}"))
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not _KEY.fullmatch(key):
            problems.append(place.problem(f"expected key=value, got {setting!r}"))
            continue
        try:
            _insert(tables, key.split("."), _value(value))
        except ValueError as error:
            problems.append(place.child(key[:_SHOWN]).problem(str(error)))
    if problems:
        raise ConfigError(problems)
    return Table(tables, place)


def _value(text: str) -> Any:
    try:
        (value,) = parse_toml(f"value = {text}").values()
    except ValueError as error:  # of the parser, or of unpacking more than one key
        if _BARE.fullmatch(text):
            return text
        quoted = _LISTED.sub(_quoted, text)
        if quoted != text:
            with contextlib.suppress(ValueError):
                return _value(quoted)
        raise ValueError(f"{text!r} is no TOML value: {error}") from error
    return value


def _quoted(found: re.Match[str]) -> str:
    word = found[1]
    return f"'{word}'" if word and word not in _KNOWN_WORDS else found[0]


def _insert(tables: dict[str, Any], path: list[str], value: Any) -> None:
    key, *below = path
    if len(below) >= DEEPEST:
        raise ValueError(TOO_DEEP)
    if below and isinstance(tables.setdefault(key, {}), dict):
        _insert(tables[key], below, value)
    elif below:
        raise ValueError(f"{key!r} is given a value and a key below it")
    elif key in tables:
        raise ValueError("given twice")
    else:
        tables[key] = value
