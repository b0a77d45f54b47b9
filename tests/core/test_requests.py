"""What stands for a text, and how strict the settings of a request are."""

from __future__ import annotations

import array
import inspect
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_core.decoding.engine import Request
from blt_core.errors import RequestError
from blt_core.requests import (
    REQUEST_KEYS,
    RequestSettings,
    read_requests,
    shows_settings,
    to_bytes,
    to_texts,
)
from blt_core.types import Sampling, seed_of_prompt, seed_of_sample
from blt_core.wiring.config import RunSettings

DEFAULTS = RunSettings(max_new_bytes=9, stop=("end",), seed=4)


def refusal(prompts="a", **settings):
    """What a request is refused with."""
    with pytest.raises(RequestError) as caught:
        read_requests(prompts, settings, DEFAULTS)
    return str(caught.value)


def released():
    view = memoryview(b"ab")
    view.release()
    return view


TEXT = "expected a text (str or bytes)"
OTHER_ITEMS = "a memoryview of other items than bytes, or a released one"

#: What is no text, and how a message shows it. ``bytes`` would make zeros or digits of most.
NO_TEXTS = [
    (3, "int 3"),
    (5.5, "float 5.5"),
    (True, "bool true"),
    (None, "None"),
    (np.int64(3), "numpy.int64"),
    (np.zeros(3, np.uint8), "numpy.ndarray"),
    ({"a": 1}, "dict"),
    ({"a"}, "set"),
    ((each for each in "ab"), "generator"),
    (released(), OTHER_ITEMS),
    (memoryview(array.array("I", [1, 2])), OTHER_ITEMS),
    (memoryview(np.zeros((2, 2), np.uint8)), OTHER_ITEMS),
]
SHOWN = [type(value).__name__ + f" {index}" for index, (value, _) in enumerate(NO_TEXTS)]


@pytest.mark.parametrize(("value", "shown"), NO_TEXTS, ids=SHOWN)
def test_what_is_no_text_is_refused_alone_and_by_its_number_in_a_list(value, shown):
    alone = refusal(value)
    assert alone.startswith("prompt")
    assert alone.endswith(f", got {shown}")
    assert refusal(["a", value]) == f"prompt 2: {TEXT}, got {shown}"
    assert refusal(stop=["x", "y", value]) == f"stop 3: {TEXT}, got {shown}"


def test_a_stop_of_no_text_is_refused_and_none_is_that_of_the_defaults():
    assert refusal(stop=5) == f"stop: {TEXT} or a list of texts, got int 5"
    assert refusal(stop=[5]) == f"stop 1: {TEXT}, got int 5"
    [request], _ = read_requests("a", {"stop": None}, DEFAULTS)
    assert request.stop == (b"end",)
    [request], _ = read_requests("a", {"stop": []}, DEFAULTS)
    assert request.stop == ()


def test_lists_in_lists_are_no_texts():
    assert refusal([["a"]]) == f"prompt 1: {TEXT}, got list"
    assert refusal(range(3)) == f"prompt 1: {TEXT}, got int 0"
    assert refusal(array.array("B", b"abc")).endswith(("int 97", "array.array"))


class Loud(str):
    """A string that lies about its encoding."""

    __slots__ = ()

    def encode(self, *_args, **_keywords):
        return b"loud"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("é", b"\xc3\xa9"),
        (Loud("a"), b"a"),
        (b"\xff", b"\xff"),
        (bytearray(b"\xff\x00"), b"\xff\x00"),
        (memoryview(b"\xffab"), b"\xffab"),
        (memoryview(b"abcdef")[::2], b"ace"),
        (memoryview(np.array([1, 255], np.uint8)), b"\x01\xff"),
        (memoryview(b"ab").cast("c"), b"ab"),
        ("\udcff\udc80", b"\xff\x80"),
        ("", b""),
    ],
)
def test_texts_are_their_bytes(text, expected):
    found = to_bytes(text)
    assert (found, type(found)) == (expected, bytes)
    assert to_texts(text, "prompt") == to_texts([text], "prompt") == (expected,)


@given(st.binary())
def test_bytes_come_back_from_the_strings_that_stand_for_them(data):
    assert to_bytes(os.fsdecode(data)) == data


@pytest.mark.parametrize("surrogate", [0xD800, 0xDC7F, 0xDFFF], ids=hex)
def test_surrogates_that_stand_for_no_byte_are_refused_with_their_place(surrogate):
    text = "ab" + chr(surrogate)
    assert refusal(["a", text]).startswith(f"prompt 2: {text[2]!r} at 2 is no character")
    assert refusal(stop=text).startswith(f"stop 1: {text[2]!r} at 2 is no character")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"max_new_bytes": "5"}, ["request: max_new_bytes: expected int, got str '5'"]),
        ({"max_new_bytes": 0}, ["max_new_bytes: expected at least 1, got 0"]),
        ({"seed": True}, ["request: seed: expected int, got bool true"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": 2**63}, ["seed"]),
        ({"top_p": 0}, ["top_p", "more than 0"]),
        ({"top_k": False}, ["top_k: expected int", "got bool false"]),
        ({"temperature": float("inf")}, ["temperature"]),
        ({"temperature": "hot", "seed": 1.5}, ["temperature: expected", "seed: expected int"]),
        ({"max_bytes": 3}, ["max_bytes: no such request setting. Did you mean 'max_new_bytes'?"]),
        ({"Seed": None}, ["Seed: no such request setting. Did you mean 'seed'?"]),
        ({"device": "cpu"}, ["device: no such request setting. There are: max_new_bytes, temp"]),
    ],
    ids=str,
)  # fmt: skip
def test_settings_are_as_strict_as_a_file_and_all_faults_are_told(settings, parts):
    found = refusal(**settings)
    for part in parts:
        assert part in found


def test_what_is_not_given_comes_from_the_defaults():
    requests, sampling = read_requests(["a", b"\xff"], {"top_k": 3, "seed": None}, DEFAULTS)
    other = seed_of_prompt(4, 1)
    assert requests == (Request(b"a", 9, (b"end",), 4), Request(b"\xff", 9, (b"end",), other))
    assert sampling == Sampling(0.0, 3)


def test_a_function_shows_the_settings_that_it_takes():
    @shows_settings
    def serve(prompt: str, **request) -> int: ...

    shown = inspect.signature(serve)
    assert list(shown.parameters) == ["prompt", *REQUEST_KEYS]
    assert set(REQUEST_KEYS) == RequestSettings.__annotations__.keys()
    assert all(shown.parameters[key].default is None for key in REQUEST_KEYS)
    assert shown.return_annotation in (int, "int")


SEEDS = st.integers(0, 2**63 - 1)


@given(SEEDS, st.integers(0, 50), st.integers(0, 50))
def test_each_text_of_a_call_has_a_seed_of_its_own_with_which_it_can_be_made_alone(seed, i, j):
    requests, _ = read_requests(["a"] * 51, {"seed": seed, "samples": 51}, DEFAULTS)
    seeds = [request.seed for request in requests]
    assert seeds[0] == seed
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= each < 2**53 for each in seeds[1:])
    # No matter how the call is split: by prompts, then by samples, then each alone.
    own = seeds[51 * i]
    [*of_prompt], _ = read_requests("a", {"seed": own, "samples": 51}, DEFAULTS)
    assert [request.seed for request in of_prompt] == seeds[51 * i : 51 * i + 51]
    alone, _ = read_requests(["a"], {"seed": [seeds[51 * i + j]]}, DEFAULTS)
    assert alone[0].seed == seeds[51 * i + j]


def test_seeds_are_not_shifted_by_one_another():
    """Calls with seeds that follow one another, as people number them, share no seed."""
    found = [seed_of_prompt(seed, index) for seed in range(50) for index in range(50)]
    found += [seed_of_sample(seed, index) for seed in range(50) for index in range(1, 50)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("seed", "part"),
    [
        ([1], "seed: 1 seeds for 2 prompts; give one number, or one a prompt"),
        ([1, 2, 3], "seed: 3 seeds for 2 prompts"),
        ([1, -2], "seed: expected 0 to"),
        ([1, True], "seed: expected int, got"),
        ("12", "seed: expected int, got"),
    ],
)
def test_a_list_of_seeds_has_one_for_each_prompt(seed, part):
    assert part in refusal(["a", "b"], seed=seed)
