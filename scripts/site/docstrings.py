"""A griffe extension: docstrings are reStructuredText in two places, and become Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([\w.]+)`")


def as_markdown(text: str) -> str:
    """``code`` and roles as Markdown code; what stands indented stays as it is, as code does."""
    return _ROLE.sub(r"`\1`", text)


class Docstrings(griffe.Extension):
    """Rewrites each docstring once, when its object is made."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
