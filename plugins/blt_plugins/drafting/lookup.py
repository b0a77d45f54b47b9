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
from blt_plugins.drafting.suffixes import LONGEST, SuffixCache, Suffixes


@attrs.frozen(kw_only=True)
class LookupParams:
    """draft_bytes: at most so many bytes are proposed. max_bytes, min_bytes: of the match.

    files: texts to look in besides, such as the source that is being edited.
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
    before one in the files, then the most recent. Where it reaches the end of the text, the
    proposal goes on with itself: text that repeats with a period is proposed as it would go on.
    Nothing is proposed without a match.
    """

    def __init__(self, params: LookupParams, context: BuildContext) -> None:
        self.draft_bytes = params.draft_bytes
        self._new = partial(Suffixes, params.min_bytes, params.max_bytes)
        self._files = _read_files(params.files, self._new(), context.scheme)

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
        found, source = text.last_match, text
        if self._files:
            other = self._files.longest(text.tail())
            if other is not None and (found is None or other.length > found.length):
                found, source = other, self._files
        return source.after(found.end, count) if found is not None else []


def _read_files(names: Sequence[str], index: Suffixes, scheme: IdScheme) -> Suffixes | None:
    """All files in one index; None without any. Raises DataError for what is no file."""
    for name in names:
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
        index.extend(scheme.encode(text))
        index.end()
    return index if names else None


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
