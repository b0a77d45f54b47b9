"""Every error that blt-core raises on purpose.

Each message names the place, what was found there, what exists, and the fix. The command line
prints the message alone and exits with ``exit_code``; programs catch :class:`BltError`.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Sequence

import attrs


class BltError(Exception):
    """Base class: a mistake that the user can mend. ``exit_code`` is what the CLI returns."""

    exit_code = 2


@attrs.frozen
class Problem:
    """One thing wrong in a configuration.

    place: file and dotted path (``tiny.toml: sampler.use``); text: what is wrong there;
    hints: further lines, printed indented (what exists, how to fix it).
    """

    place: str
    text: str
    hints: tuple[str, ...] = ()

    def __str__(self) -> str:
        return _with_hints(f"{self.place}: {self.text}", self.hints)


class ConfigError(BltError):
    """All the problems of one configuration, gathered: ``error.problems``."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[Problem, ...]]]:
        """How it is pickled, on its way from another process."""
        return type(self), (self.problems,)


class PluginError(BltError):
    """A plugin that cannot be loaded, or whose hooks or components break their contract.

    ``text`` and ``hints`` are those of a :class:`Problem` whose place is not known yet.
    """

    def __init__(self, text: str, hints: Sequence[str] = ()) -> None:
        self.text = text
        self.hints = tuple(hints)
        super().__init__(_with_hints(text, self.hints))


class ComponentError(PluginError):
    """A component that failed, or broke the contract of its kind, while it ran.

    The message names it and its distribution; an error of its own is the ``__cause__``.
    ``contract``: what it broke, as ``patcher.shape``; empty where it failed otherwise.
    """

    exit_code = 1

    def __init__(self, text: str, hints: Sequence[str] = (), contract: str = "") -> None:
        self.contract = contract
        super().__init__(text, (*hints, *contract_hints(contract)))


class CheckpointError(BltError):
    """A checkpoint that is missing, truncated, or at odds with its own configuration."""


class RequestError(BltError):
    """A generation request that cannot be served, such as one that overflows the context."""


class EngineError(BltError):
    """A decode operation used against its contract, by a sampler or drafter: ``component``.

    ``contract``: what was broken, as ``sampler.commits``; empty where it has no name.
    """

    exit_code = 1

    def __init__(self, text: str, component: str = "", contract: str = "") -> None:
        self.text = text
        self.component = component
        self.contract = contract
        named = f"{component}: {text}" if component else text
        super().__init__(_with_hints(named, contract_hints(contract)))


class DataError(BltError):
    """Input files that are missing, unreadable or unfit."""


#: What is said of logits that are no numbers.
NO_NUMBERS = "the model's logits are no numbers: its weights are damaged"


class RunError(BltError):
    """A run that began properly and failed; the inputs were fine."""

    exit_code = 1


def near_match(name: str, candidates: Iterable[str]) -> str:
    """Suggest the candidate closest to ``name``: `` Did you mean 'x'?``, or the empty string.

    Letters swapped and words reordered count as near: ``blt-vd`` finds ``blt-dv``.
    """
    names = list(candidates)
    swapped = [other for other in names if sorted(other) == sorted(name)]
    close = swapped or difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def contract_page(kind: str) -> str:
    """The page that tells the contracts of a kind."""
    return f"docs/kinds/{kind}.md"


def contract_hints(contract: str) -> tuple[str, ...]:
    """What a message says of a broken contract, as ``patcher.shape``: its name and its page."""
    kind, _, name = contract.partition(".")
    return (f"contract: {contract} ({contract_page(kind)}#{name})",) if contract else ()


def _with_hints(text: str, hints: Iterable[str]) -> str:
    return "\n".join((text, *(textwrap.indent(hint, "  ") for hint in hints)))
