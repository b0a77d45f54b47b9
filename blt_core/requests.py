"""What a request may say: texts of several types as bytes, settings as strict as those of a file.

Everything is refused by a RequestError, before any work, that names what is at fault.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, get_type_hints

import attrs

from blt_core.component import at_least
from blt_core.decoding.engine import Request
from blt_core.errors import RequestError, near_match
from blt_core.tables.place import Place, Table
from blt_core.tables.structure import Invalid, plain, read_table, show
from blt_core.types import Sampling, seed_of_prompt, seed_of_sample
from blt_core.wiring.config import RunSettings

#: What stands for a text: a string for its UTF-8, anything else for its bytes.
TextLike = str | bytes | bytearray | memoryview

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])


class RequestSettings(TypedDict, total=False):
    """What a request may set; ``[run]`` says what is not given, or None.

    temperature: 0 is greedy, where top_k, top_p and seed have nothing to do. seed: one number, from
    which each prompt gets a seed of its own (the first this one), or a number for each prompt.
    samples: texts of each prompt, with a seed each; the prompt is read once. logprobs: 0 tells the
    log-probability of each byte of the output, k that of the k likeliest in its place too. stop: a
    text, or several, that end the output; they are looked for in the output alone, not across the
    prompt.
    """

    max_new_bytes: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | Sequence[int] | None
    samples: int | None
    logprobs: int | None
    stop: TextLike | Sequence[TextLike] | None


#: The settings of a request: keys of ``[run]``, and those of :class:`CallSettings`.
REQUEST_KEYS = tuple(RequestSettings.__annotations__)


def shows_settings(function: FunctionT) -> FunctionT:
    """Have ``help`` and notebooks list the settings that ``function`` takes as ``**request``."""
    signature = inspect.signature(function)
    named = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    named += [
        inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for key, kind in get_type_hints(RequestSettings).items()
    ]
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return function


def read_requests(
    prompts: TextLike | Sequence[TextLike], given: Mapping[str, Any], defaults: RunSettings
) -> tuple[tuple[Request, ...], Sampling]:
    """The requests of each prompt from what was given, and from ``defaults`` where it is silent.

    Those of one prompt, a request for each of its samples, follow one another.
    """
    _refuse_surplus(given)
    texts = to_texts(prompts, "prompt")
    given = {key: value for key, value in given.items() if value is not None}
    stop = to_texts(given.pop("stop", defaults.stop), "stop")
    called = _read_call({k: given.pop(k) for k in ("samples", "logprobs") if k in given})
    own = given.pop("seed") if _is_list(given.get("seed")) else None
    run = _read_settings(defaults, given)
    seeds = _own_seeds(own, texts, defaults) if own is not None else None
    seeds = seeds or [seed_of_prompt(run.seed, index) for index in range(len(texts))]
    requests = (
        Request(text, run.max_new_bytes, stop, seed_of_sample(seed, sample), called.logprobs)
        for text, seed in zip(texts, seeds, strict=True)
        for sample in range(called.samples)
    )
    return tuple(requests), run.sampling


@attrs.frozen
class CallSettings:
    """What a call may ask for that has no default in ``[run]``."""

    samples: int = attrs.field(default=1, validator=at_least(1))
    logprobs: int | None = attrs.field(default=None, validator=at_least(0))


def _read_call(given: Mapping[str, Any]) -> CallSettings:
    try:
        return read_table(CallSettings, Table(dict(given), Place("request")), "a request")
    except Invalid as error:
        raise RequestError("\n".join(map(str, error.problems))) from error


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, TextLike)


def _own_seeds(seeds: Sequence[Any], texts: Sequence[bytes], defaults: RunSettings) -> list[int]:
    """A seed for each prompt, checked as one is; RequestError for fewer or more."""
    if len(seeds) != len(texts):
        raise RequestError(
            f"seed: {len(seeds)} seeds for {len(texts)} prompts; give one number, or one a prompt"
        )
    return [_own_seed(seed, number, defaults) for number, seed in enumerate(seeds, 1)]


def _own_seed(seed: object, number: int, defaults: RunSettings) -> int:
    try:
        return _read_settings(defaults, {"seed": seed}).seed
    except RequestError as error:
        raise RequestError(f"seed of prompt {number}: {error}") from error


def _refuse_surplus(given: Mapping[str, Any]) -> None:
    """Raise RequestError for a key that is no setting of a request, whatever its value."""
    surplus = [key for key in given if key not in REQUEST_KEYS]
    if surplus:
        raise RequestError(
            f"{surplus[0]}: no such request setting.{near_match(surplus[0], REQUEST_KEYS)} "
            f"There are: {', '.join(REQUEST_KEYS)}"
        )


def _read_settings(defaults: RunSettings, given: Mapping[str, Any]) -> RunSettings:
    """``[run]`` with what a request gives, as strictly as a file; RequestError with all faults."""
    table = Table({**plain(defaults), **given}, Place("request"))
    try:
        return read_table(RunSettings, table, "a request")
    except Invalid as error:
        raise RequestError("\n".join(map(str, error.problems))) from error


def to_texts(texts: TextLike | Sequence[TextLike], name: str) -> tuple[bytes, ...]:
    """The bytes of one text or of several; messages call them ``name`` and a number from 1 on."""
    if isinstance(texts, TextLike):
        return (to_bytes(texts, f"{name} 1"),)
    if not isinstance(texts, Sequence):
        raise RequestError(
            f"{name}: expected a text (str or bytes) or a list of texts, got {_found(texts)}"
        )
    return tuple(to_bytes(text, f"{name} {index}") for index, text in enumerate(texts, 1))


def to_bytes(text: object, name: str = "text") -> bytes:
    """The bytes of a text: a string as UTF-8, anything else as it is; messages call it ``name``.

    Surrogates that stand for bytes (as in ``os.fsdecode``) become those bytes. RequestError for
    others, which no byte stands for, and for what is no text: a number of bytes is none.
    """
    if isinstance(text, str):
        try:
            return str.encode(text, "utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at {error.start}"
            raise RequestError(f"{name}: {found} is no character: {error.reason}") from error
    if isinstance(text, (bytes, bytearray)):
        return bytes(text)
    if isinstance(text, memoryview) and _holds_bytes(text):
        return text.tobytes()
    raise RequestError(f"{name}: expected a text (str or bytes), got {_found(text)}")


def _holds_bytes(view: memoryview) -> bool:
    """Whether a view is of a row of bytes, contiguous or not; of other items it sees the inside."""
    try:
        return view.ndim == 1 and view.format in ("B", "c")
    except ValueError:  # it was released
        return False


def _found(value: object) -> str:
    """What was given in place of a text: a number itself, of anything else the type."""
    if isinstance(value, (bool, int, float)):
        return show(value)
    if isinstance(value, memoryview):
        return "a memoryview of other items than bytes, or a released one"
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return "None" if value is None else module + kind.__qualname__
