"""Compiled passes give what the others give: ``[run] compile``.

What is compiled is first run as it is written, over all models and samplers; then a compiler makes
programs of it for one model.
"""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core.compiling import compile_passes
from blt_core.decoding.engine import Request
from blt_core.model import Model
from blt_core.nn import Transformer, compiled
from blt_core.nn.compiled import CompiledPass, pieces
from blt_core.pipeline import Pipeline
from blt_core.types import Sampling
from tests.engine import models, strategies
from tests.engine.runs import ar, ar_alone, counts, run, self_drafter, speculative
from tests.engine.seen import saw
from tests.tiny import write_checkpoint

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def compiling(model: Model, how: Compile) -> AbstractContextManager[None]:
    """All passes of a model that can be compiled are, by ``how``."""
    return compiling_stack(model.module_dict(), how)


@contextmanager
def compiling_stack(module: torch.nn.Module, how: Compile) -> Iterator[None]:
    """All passes of a module that can be compiled are, by ``how``."""
    parts = [part for part in module.modules() if hasattr(part, "compiles")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "compiled", how)
        for part in parts:
            patch.setattr(part, "compiles", True)
            own = part._compiled
            patch.setattr(part, "_compiled", CompiledPass(own._name, own._function))
        yield


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself, its calls counted."""

    def called(x: torch.Tensor, *args: Any) -> Any:
        saw("a pass of one row as it is compiled", x.shape[:2] == (1, 1))
        saw("a pass of a draft as it is compiled", len(x) == 1 and x.shape[1] > 1)
        saw("a pass of a batch as it is compiled", len(x) > 1)
        return function(x, *args)

    return called


def same_as_ar(index: int, batch: list[Request], drafter: Any, sampling: Sampling) -> None:
    """With compiled passes, rows have the bytes and the passes that ``ar`` gives them without."""
    model = models.model(index)
    with compiling(model, as_written):
        alone = run(model, ar(), batch, sampling)
        drafted = run(model, speculative(drafter), batch, sampling)
    for request, one, other in zip(batch, alone, drafted, strict=True):
        want = ar_alone(index, request, sampling)
        assert one.ids == other.ids == want.ids
        assert counts(one.passes) == counts(want.passes)


@strategies.examples(100)
@given(st.data(), strategies.model_indices)
def test_what_is_compiled_gives_the_bytes_of_ar(data, index):
    sampling = data.draw(st.sampled_from([Sampling(), Sampling(0.8)]))
    batch = data.draw(strategies.batches(index, sampling=sampling))
    same_as_ar(index, batch, data.draw(strategies.drafters(index, batch, sampling)), sampling)


@pytest.mark.parametrize("index", range(6))
def test_rows_that_go_on_together_are_compiled_as_one_pass(index):
    batch = [Request(b"a b c d e f", 20, seed=1), Request(b"the other text", 20, seed=2)]
    same_as_ar(index, batch, self_drafter(4), Sampling(1.0))


def hooked(decoder: torch.nn.Module) -> None:
    decoder.head.register_forward_hook(lambda _, __, out: out.flip(-1))


def replaced(decoder: torch.nn.Module) -> None:
    decoder.norm = torch.nn.LayerNorm(models.DIM).double()


@pytest.mark.parametrize("change", [hooked, replaced])
def test_a_norm_or_a_head_that_is_more_than_its_class_says_is_called(change):
    decoder = copy.deepcopy(models.model(0).decoder)
    change(decoder)
    model = attrs.evolve(models.model(0), decoder=decoder)
    wanted = run(model, ar(), [Request(b"a b c d e f", 20)])
    with compiling(model, as_written):
        assert run(model, ar(), [Request(b"a b c d e f", 20)])[0].ids == wanted[0].ids


def a_pass(stack: Transformer, rows: int = 1) -> torch.Tensor:
    """A pass over some rows after four others."""
    cache = stack.new_cache(1)
    x = torch.ones(1, 4 + rows, 16).cumsum(1)
    with torch.inference_mode():
        stack(x[:, :4], (4,), cache)
        return stack(x[:, 4:], (rows,), cache)


def test_what_a_pass_is_compiled_for_is_of_these_weights_and_threads():
    stack = Transformer(dim=16, layers=1, heads=2, hidden=24, rope_theta=1e4)
    made: list[object] = []
    with compiling_stack(stack, lambda function: made.append(function) or function):
        for _ in range(2):
            a_pass(stack)
        assert len(made) == 1
        stack.layers[0].mlp.gate_up.weight.data = torch.rand(16, 48).t()
        a_pass(stack)
        assert len(made) == 2
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            a_pass(stack)
        finally:
            torch.set_num_threads(threads)
        assert len(made) == 3


def test_a_pass_whose_compilation_fails_is_compiled_anew_by_the_next():
    stack = Transformer(dim=16, layers=1, heads=2, hidden=24, rope_theta=1e4)
    tries: list[int] = []

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            tries.append(1)
            if len(tries) == 1:
                raise KeyboardInterrupt
            return function(*args)

        return call

    with compiling_stack(stack, failing):
        with pytest.raises(KeyboardInterrupt):
            a_pass(stack)
        given = a_pass(stack)
    torch.testing.assert_close(given, a_pass(stack))


def test_a_module_that_has_compiled_passes_is_pickled_without_them():
    stack = Transformer(dim=16, layers=1, heads=2, hidden=24, rope_theta=1e4)
    with compiling_stack(stack, lambda function: function):
        wanted = a_pass(stack)
        assert stack._compiled._compiled
        again = pickle.loads(pickle.dumps(stack))
        assert not again._compiled._compiled
        torch.testing.assert_close(a_pass(again), wanted)


@pytest.mark.parametrize(
    ("count", "lengths"), [(1, [1]), (8, [8]), (9, [8, 1]), (14, [7, 7]), (25, [5] * 5)]
)
def test_deep_stacks_are_called_in_runs_of_equal_length_where_that_goes(count, lengths):
    assert [piece.stop - piece.start for piece in pieces(count)] == lengths
    assert [at for piece in pieces(count) for at in range(count)[piece]] == list(range(count))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is kept in the folder of the test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))


COMPILER_WARNS = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


@NO_COMPILER
@COMPILER_WARNS
def test_a_compiled_stack_goes_on_over_turns_of_its_ring_and_is_compiled_once(own_cache):
    torch.manual_seed(0)
    stack = Transformer(dim=16, layers=1, heads=2, hidden=24, window=5, rope_theta=1e4).double()
    x = torch.randn(1, 160, 16, dtype=torch.float64)
    with torch.inference_mode():
        wanted = stack(x, (160,), None)
        stack.compiles = True
        cache = stack.new_cache(1)
        given = [stack(x[:, :9], (9,), cache), stack(x[:, 9:10], (1,), cache)]
        with torch.compiler.set_stance("fail_on_recompile"):
            for at in range(10, 160):
                cache.settle([at])
                given.append(stack(x[:, at : at + 1], (1,), cache))
    assert len(stack._compiled._compiled) == 1
    torch.testing.assert_close(torch.cat(given, 1), wanted, rtol=0, atol=1e-12)


@NO_COMPILER
@COMPILER_WARNS
@pytest.mark.nightly(reason="a whole model is compiled: one to three minutes")
def test_a_compiled_model_gives_the_same_bytes_and_is_not_compiled_again(tmp_path, own_cache):
    checkpoint = str(write_checkpoint(tmp_path / "model"))
    tables = {
        "schema": 1,
        "sampler": {"use": "blt-s", "draft_bytes": 4},
        "run": {"checkpoint": checkpoint, "dtype": "float64", "max_new_bytes": 120},
    }
    plain = Pipeline.from_config(tables)
    fast = Pipeline.from_config({**tables, "run": {**tables["run"], "compile": True}})
    prompts = [b"a prompt", b"one that is longer than the windows of its model are, by far"]
    fast.generate(prompts[0])
    fast.with_sampler("ar").generate(prompts[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for prompt in prompts:
            for sampler in ("blt-s draft_bytes=4", "ar"):
                made, wanted = (
                    each.with_sampler(sampler).generate(prompt, max_new_bytes=200)
                    for each in (fast, plain)
                )
                assert (made.ids, made.passes) == (wanted.ids, wanted.passes)


def test_without_a_compiler_one_warning_is_given_and_nothing_is_compiled(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    stack = Transformer(dim=16, layers=1, heads=2, hidden=24, rope_theta=1e4)
    assert not compile_passes(stack, torch.device("cpu"))
    assert not stack.compiles
    assert capsys.readouterr().err.count("no C++ compiler (no-such-compiler)") == 1


def test_a_model_whose_parts_cannot_compile_is_warned_of(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "true")
    assert not compile_passes(torch.nn.Linear(2, 2), torch.device("cpu"))
    assert "no part of this model can compile" in capsys.readouterr().err
