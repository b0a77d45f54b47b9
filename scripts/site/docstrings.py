"""A griffe extension: docstrings are reStructuredText in two places, and become Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^(?:>>>|\.\.\.).*(?:\n|\Z))+", re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([\w.]+)`")


def as_markdown(text: str) -> str:
    """Roles as Markdown code, and examples of doctest as blocks of it."""
    text = _EXAMPLE.sub(_as_block, text)
    return _ROLE.sub(r"`\1`", text)


def _as_block(match: re.Match[str]) -> str:
    lines = re.sub(r"\s*# doctest:.*$", "", match[0].rstrip("\n"), flags=re.MULTILINE)
    return f"```pycon\n{lines}\n```\n"


class Docstrings(griffe.Extension):
    """Rewrites each docstring once, when its object is made."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
