"""The look-up drafter: what followed the last bytes of the text when they stood there before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import attrs

from blt_core.component import BuildContext, Component, at_least, between
from blt_core.errors import DataError
from blt_core.files import expand_home
from blt_core.protocols import DecodeOps
from blt_core.types import Draft, Draws, IdScheme, Sampling
from blt_plugins.drafting.continuations import Continuations
from blt_plugins.drafting.suffixes import LONGEST, SuffixCache, Suffixes


@attrs.frozen(kw_only=True)
class LookupParams:
    """draft_bytes: at most so many bytes are proposed. max_bytes, min_bytes: of the match.

    files: texts to look in besides: the source that is being edited, or others of the kind that is
    written, a few megabytes at most.
    """

    draft_bytes: int = attrs.field(default=16, validator=at_least(1))
    max_bytes: int = attrs.field(default=8, validator=between(1, LONGEST))
    min_bytes: int = attrs.field(default=3, validator=at_least(1))
    files: tuple[str, ...] = ()

    def __attrs_post_init__(self) -> None:
        if self.min_bytes > self.max_bytes:
            raise ValueError(
                f"min_bytes: expected at most max_bytes = {self.max_bytes}, got {self.min_bytes}"
            )


class LookupDrafter:
    """Proposes what followed the longest end of the text that stood earlier; runs no pass.

    The longest match of ``max_bytes`` down to ``min_bytes`` wins, then one in the text itself
    before one in the files. Of several in the text the most recent is copied; where that reaches
    the end of the text, the proposal goes on with itself: text that repeats with a period is
    proposed as it would go on. Of several in the files what followed most often is proposed, byte
    by byte. Nothing is proposed without a match.
    """

    def __init__(self, params: LookupParams, context: BuildContext) -> None:
        self.draft_bytes = params.draft_bytes
        self._new = partial(Suffixes, params.min_bytes, params.max_bytes)
        self._files = None
        if params.files:
            texts = map(partial(_read, scheme=context.scheme), params.files)
            self._files = Continuations(texts, params.min_bytes, params.max_bytes)

    def draft(
        self, ops: DecodeOps, limit: Sequence[int], sampling: Sampling, draws: Draws
    ) -> Draft:
        """At most ``draft_bytes`` ids of each row."""
        cache = ops.attach(self, lambda batch: SuffixCache([self._new() for _ in range(batch)]))
        ids: list[list[int]] = []
        for row, (text, most) in enumerate(zip(cache.rows, limit, strict=True)):
            if most:
                text.extend(ops.text(row, len(text)))
            ids.append(self._propose(text, min(self.draft_bytes, most)) if most else [])
        return Draft(ids)

    def _propose(self, text: Suffixes, count: int) -> list[int]:
        found, tail = text.last_match, text.tail()
        if self._files is not None:
            other = self._files.longest(tail)
            if other is not None and (found is None or other.length > found.length):
                return self._files.after(tail, count)
        return text.after(found.end, count) if found is not None else []


def _read(name: str, scheme: IdScheme) -> Sequence[int]:
    """The ids of a file. Raises DataError for what is no file."""
    path = Path(expand_home(name))
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: the drafter 'lookup' reads files, and this is none")
        text = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: not read for the drafter 'lookup': {error.strerror}\n"
            "  fix: name a file that is there in its files"
        ) from error
    return scheme.encode(text)


def lookup_notes(params: LookupParams) -> Iterator[str]:
    """Matches that are mere chance."""
    if params.max_bytes < 3:  # noqa: PLR2004 -- a pair of bytes stands almost everywhere
        yield f"matches of {params.max_bytes} bytes are found almost everywhere, and mean little"


LOOKUP = Component(
    kind="drafter",
    name="lookup",
    factory=LookupDrafter,
    params=LookupParams,
    summary="what followed the last bytes where they stood before; runs no pass",
    notes=lookup_notes,
    provides=lambda _: frozenset({"gives_q"}),  # a point mass on each byte
)
