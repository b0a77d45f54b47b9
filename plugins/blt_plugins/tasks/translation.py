"""The task of translation: BLEU and chrF of greedy outputs, as sacrebleu computes them."""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np

from blt_core.component import BuildContext, Component, at_least, not_empty
from blt_core.errors import DataError
from blt_core.evaluation.data import as_bytes, fitted, read_lines, read_records, spaced
from blt_core.evaluation.figures import Figure, Summed
from blt_core.evaluation.protocol import Answer, Asked, Part, Question
from blt_core.files import expand_home

FETCHED_PAIRS = "corpora/translate/test.jsonl"
"""What is read where no texts are given: where the documented fetch puts held-out pairs."""


def _fields(*names: str) -> Any:
    """A validator of templates that may have these fields, and must have the first."""

    def check(_: object, __: attrs.Attribute[Any], value: str) -> None:
        try:
            found = {name for _, name, _, _ in string.Formatter().parse(value) if name is not None}
        except ValueError as error:
            raise ValueError(f"{value!r} is no template: {error}") from error
        if names[0] not in found or found - {*names}:
            fields = ", ".join(f"{{{name}}}" for name in names)
            raise ValueError(
                f"expected a template with {{{names[0]}}} and no fields but {fields}; got {value!r}"
            )

    return check


@attrs.frozen(kw_only=True)
class TranslationParams:
    """Pairs, and how a model is asked for translations.

    pairs: JSON Lines with the keys source, target and, where there are several, language; without
    any text, ``corpora/translate/test.jsonl``, held-out pairs of the demo's corpus.
    source, reference: in place of pairs two text files with as many lines, one sentence each, as
    FLORES is downloaded. language: what sources without one are in. template: the prompt of a pair.
    shots: pairs that stand before it with their answers. shot_pairs: where these are
    from, the first ones in it, in the format of pairs; of the same language, if they tell it.
    shot_source, shot_reference: in place of it, two text files as above.
    max_new_bytes: the longest translation. stop: what ends a translation.
    """

    pairs: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home), validator=not_empty()
    )
    source: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home), validator=not_empty()
    )
    reference: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home), validator=not_empty()
    )
    language: str = "fr"
    template: str = attrs.field(
        default="{language}: {source}\nen:", validator=_fields("source", "language")
    )
    shots: int = attrs.field(default=0, validator=at_least(0))
    shot_pairs: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home), validator=not_empty()
    )
    shot_source: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home), validator=not_empty()
    )
    shot_reference: str | None = attrs.field(
        default=None, converter=attrs.converters.optional(expand_home), validator=not_empty()
    )
    stop: str = attrs.field(default="\n", validator=not_empty())
    max_new_bytes: int = attrs.field(default=300, validator=at_least(1))

    def __attrs_post_init__(self) -> None:
        aligned = (self.source is not None, self.reference is not None)
        if aligned[0] != aligned[1]:
            raise ValueError("source and reference are two files with the same lines: give both")
        if self.pairs is not None and aligned[0]:
            raise ValueError('expected pairs = "FILE.jsonl", or source and reference, two texts')
        shown = (self.shot_source is not None, self.shot_reference is not None)
        if shown[0] != shown[1] or (self.shot_pairs is not None and shown[0]):
            raise ValueError("expected shot_pairs, or shot_source and shot_reference, two texts")
        if bool(self.shots) != (self.shot_pairs is not None or shown[0]):
            raise ValueError("shots says how many, and shot_pairs or two texts from where")


@attrs.frozen
class Pair:
    """A text in a language, and its translation."""

    language: str
    source: str
    target: str


class Translation:
    """Corpus BLEU and chrF of each language, and of all together where there are several."""

    asks: Literal["text", "likelihood"] = "text"

    def __init__(self, params: TranslationParams, context: BuildContext) -> None:
        self.params = params
        self._metrics = metrics()

    def run(self, model: Asked, limit: int | None) -> list[Part]:
        """Translate all pairs, or ``limit`` of each language, and score them."""
        pairs = self.read_pairs()
        languages = dict.fromkeys(pair.language for pair in pairs)
        chosen = [
            pair
            for language in languages
            for pair in spaced([each for each in pairs if each.language == language], limit)
        ]
        shots = self._shots(languages)
        questions = [
            self._question(number, pair, shots, model) for number, pair in enumerate(chosen)
        ]
        answers = model.generate(questions)
        found = list(zip(chosen, questions, answers, strict=True))
        parts = [
            self._part(language, [each for each in found if each[0].language == language])
            for language in languages
        ]
        return parts if len(parts) == 1 else [*parts, self._part("", found)]

    def read_pairs(self) -> list[Pair]:
        """The pairs to translate; DataError with the line that is wrong."""
        given = self.params
        return self._read(self._records(), given.source, given.reference)

    def _records(self) -> str | None:
        """The file of pairs; None where two texts are given, DataError where nothing is."""
        given = self.params
        if given.pairs is None and given.source is None and not Path(FETCHED_PAIRS).is_file():
            raise DataError(
                f"the task has no text, and there is no {FETCHED_PAIRS}\n"
                '  fix: give pairs = "FILE.jsonl", or source and reference, two texts; or run '
                "`python scripts/fetch_translation_corpus.py --output "
                f"{Path(FETCHED_PAIRS).parent}`"
            )
        return given.pairs or (FETCHED_PAIRS if given.source is None else None)

    @property
    def _data(self) -> str:
        """Which files the pairs are from."""
        given = self.params
        aligned = f"{given.source}, {given.reference}"
        return given.pairs or (FETCHED_PAIRS if given.source is None else aligned)

    def _read(
        self, records: str | None, source_file: str | None, reference_file: str | None
    ) -> list[Pair]:
        """Pairs from JSON Lines, or from two text files."""
        if records is not None:
            return self._from_records(records)
        source, reference = Path(str(source_file)), Path(str(reference_file))
        lines, targets = read_lines(source), read_lines(reference)
        if len(lines) != len(targets):
            raise DataError(
                f"{source} has {len(lines)} lines and {reference} {len(targets)}: line by line, "
                "they must translate each other"
            )
        return [Pair(self.params.language, *both) for both in zip(lines, targets, strict=True)]

    def _from_records(self, path: str) -> list[Pair]:
        return [
            Pair(
                str(record.get("language") or self.params.language),
                record["source"],
                record["target"],
            )
            for record in read_records(Path(path), {"source": str, "target": str})
        ]

    def _shots(self, languages: Mapping[str, None]) -> dict[str, str]:
        """What stands before each prompt, by language."""
        if not self.params.shots:
            return dict.fromkeys(languages, "")
        places = self.params.shot_pairs, self.params.shot_source, self.params.shot_reference
        pairs, shots, own_language = self._read(*places), {}, self.params.language
        for language in languages:
            own = [pair for pair in pairs if pair.language == language][: self.params.shots]
            if len(own) < self.params.shots:
                raise DataError(
                    f"{places[0] or places[1]}: {len(own)} pairs of the language {language!r}, "
                    f"and shots = {self.params.shots}"
                    + ("" if places[0] else f"; text files are in language = {own_language!r}")
                )
            texts = (f"{self._prompt(each)} {each.target}{self.params.stop}" for each in own)
            shots[language] = "".join(texts)
        return shots

    def _prompt(self, pair: Pair) -> str:
        return self.params.template.format(language=pair.language, source=pair.source)

    def _question(
        self, number: int, pair: Pair, shots: Mapping[str, str], model: Asked
    ) -> Question:
        prompt = as_bytes(shots[pair.language] + self._prompt(pair))
        most = min(self.params.max_new_bytes, max(model.context_bytes // 2, 1))
        kept = fitted(prompt, model.context_bytes - most)
        return Question(
            key=f"{pair.language}/{number}",
            prompt=kept,
            max_new_bytes=most,
            stop=(self.params.stop.encode(),),
            truncated=len(kept) < len(prompt),
        )

    def _part(self, name: str, found: Sequence[tuple[Pair, Question, Answer]]) -> Part:
        pairs, questions, answers = zip(*found, strict=True)
        outputs = [self.output(answer) for answer in answers]
        targets = [pair.target for pair in pairs]
        copies = {
            key: metric.corpus_score([pair.source for pair in pairs], [targets]).score
            for key, metric in self._metrics.items()
        }
        return Part(
            name=name,
            items=len(pairs),
            figures={k: corpus_figure(m, outputs, targets) for k, m in self._metrics.items()},
            keys=tuple(question.key for question in questions),
            told={
                "data": self._data,
                "copy_of_source": copies,
                "signatures": {k: str(m.get_signature()) for k, m in self._metrics.items()},
                "truncated_share": sum(q.truncated for q in questions) / len(questions),
            },
        )

    def output(self, answer: Answer) -> str:
        """The translation: the output without the space before it and what ended it."""
        return answer.texts[0].removesuffix(self.params.stop).strip()


def metrics() -> dict[str, Any]:
    """BLEU and chrF2 with sacrebleu's defaults; DataError with the fix if it is not installed."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise DataError(
            "BLEU is sacrebleu's, which is not installed\n  fix: pip install 'blt-core[bleu]'"
        ) from error
    found = {"bleu": BLEU(), "chrf": CHRF()}
    for metric in found.values():
        metric.corpus_score(["a"], [["a"]])  # a signature counts the references it has met
    return found


def corpus_figure(metric: Any, outputs: Sequence[str], targets: Sequence[str]) -> Figure:
    """A corpus score of sacrebleu from the statistics of its segments, which it sums up."""
    stats = np.array(metric._extract_corpus_statistics(outputs, [targets]), dtype=np.float64)  # noqa: SLF001 -- its own bootstrap does the same
    return Summed(stats, functools.partial(_corpus_score, metric))


def _corpus_score(metric: Any, sums: Any) -> float:
    score: float = metric._compute_score_from_stats([int(each) for each in sums]).score  # noqa: SLF001
    return score


TRANSLATION = Component(
    kind="task",
    name="translation",
    factory=Translation,
    params=TranslationParams,
    summary="BLEU and chrF of translations, from pairs or two aligned files",
)
