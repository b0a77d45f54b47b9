"""Compiled passes give what the others give: ``[run] compile``.

What is compiled is first run as it is written, over all models and samplers; then a compiler makes
programs of it for one model.
"""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blt_core import compiling as compiling_module
from blt_core.capturing import CapturingCompiler, Recording
from blt_core.compare import explain
from blt_core.compiling import PassCompiler, compile_passes
from blt_core.decoding.engine import Request
from blt_core.model import Model
from blt_core.nn import (
    Compiled,
    CompiledPass,
    Compiler,
    Program,
    Transformer,
    stack_weights,
)
from blt_core.pipeline import Pipeline
from blt_core.storage.user_cache import make_private, open_to_others
from blt_core.types import Sampling
from blt_plugins.drafting.diffusion import DiffusionDrafter, DiffusionParams
from blt_plugins.sampling.diffusion import BlockDiffusion, BlockDiffusionParams
from blt_plugins.unmasking.rules import AllParams, FillAll
from tests.engine import models, strategies
from tests.engine.drafters import Recorded
from tests.engine.runs import ar, ar_alone, counts, run, self_drafter, speculative
from tests.engine.seen import saw
from tests.tiny import CONFIG, write_checkpoint


def compiling(model: Model, how: Compiler) -> AbstractContextManager[None]:
    """All passes of a model that can be compiled are, by ``how``."""
    return compiling_stack(model.module_dict(), how)


@contextmanager
def compiling_stack(module: torch.nn.Module, how: Compiler) -> Iterator[None]:
    """All passes of a module that can be compiled are, by ``how``."""
    parts = [part for part in module.modules() if hasattr(part, "compiles")]
    with pytest.MonkeyPatch.context() as patch:
        for part in parts:
            patch.setattr(part, "compiles", how)
            own = part._compiled
            patch.setattr(part, "_compiled", CompiledPass(own._name, own._function))
        yield


def as_written(program: Program) -> Compiled:
    """The function itself, its calls counted."""

    def called(tensors: list[torch.Tensor]) -> Any:
        positions = tensors[0]
        saw("a pass of one row as it is compiled", positions.shape == (1, 1))
        saw("a pass of a draft as it is compiled", len(positions) == 1 < positions.shape[1])
        saw("a pass of a batch as it is compiled", len(positions) > 1)
        if program.name == "decoder-blocks":
            saw("a pass of a block as it is compiled", len(positions) == 1)
            saw("a pass of blocks of a batch as it is compiled", len(positions) > 1)
        for tensor, like, axes in zip(tensors, *program.example, strict=True):
            assert tensor.dtype is like.dtype
            fixed = [at for at in range(tensor.dim()) if at not in axes]
            assert [tensor.shape[at] for at in fixed] == [like.shape[at] for at in fixed]
            assert all(tensor.shape[at] > 1 for at in axes)
        return program.function(*tensors)

    return called


class Recorder:
    """Records functions as a device does that reads and writes addresses: by the tensors given."""

    def __init__(self) -> None:
        self.recordings, self.replays = 0, 0

    def __call__(self, run: Callable[[], Sequence[torch.Tensor]]) -> Recording:
        results = [result.clone() for result in run()]
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            for result, new in zip(results, run(), strict=True):
                result.copy_(new)

        return Recording(results, replay)


def same_as_ar(
    index: int,
    batch: list[Request],
    drafter: Any,
    sampling: Sampling,
    how: Compiler = as_written,
) -> None:
    """With compiled passes, rows have the bytes and the passes that ``ar`` gives them without."""
    model = models.model(index)
    with compiling(model, how):
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


@strategies.examples(60)
@given(st.data(), strategies.model_indices)
def test_what_is_captured_gives_the_bytes_of_ar(data, index):
    sampling = data.draw(st.sampled_from([Sampling(), Sampling(0.8)]))
    batch = data.draw(strategies.batches(index, sampling=sampling))
    drafter = data.draw(strategies.drafters(index, batch, sampling))
    recorder = Recorder()
    same_as_ar(index, batch, drafter, sampling, CapturingCompiler(as_written, recorder))
    saw("a pass that was captured", recorder.replays > 0)


@pytest.mark.parametrize("window", [5, None])
def test_a_text_has_one_graph_for_each_size_of_its_lanes(window):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 16, "layers": 1, "heads": 2, "hidden": 24, "window": window}
    stack = Transformer(**sizes, rope_theta=1e4).double()
    recorder = Recorder()
    with (
        compiling_stack(stack, CapturingCompiler(as_written, recorder)),
        torch.inference_mode(),
    ):
        for x in torch.randn(2, 1, 160, 16, dtype=torch.float64):
            recorder.recordings, recorder.replays = 0, 0
            wanted = stack(x, (160,), None)
            torch.testing.assert_close(stack_in_turns(stack, x, 1), wanted, rtol=0, atol=1e-12)
            # Lanes of 16, 32, … 256 rows; nine rows are read at once, and one by one from there.
            lanes = 1 if window else 5
            assert (recorder.recordings, recorder.replays) == (lanes, 151 - lanes)


def test_results_of_a_captured_pass_stay_as_they_are():
    stack = Transformer(dim=16, layers=1, heads=2, hidden=24, rope_theta=1e4)
    x, cache = torch.randn(1, 12, 16), stack.new_cache(1)
    with compiling_stack(stack, CapturingCompiler(as_written, Recorder())), torch.inference_mode():
        found = [stack(x[:, at : at + 1], (1,), cache) for at in range(12)]
        torch.testing.assert_close(torch.cat(found, 1), stack(x, (12,), None))


def test_where_nothing_can_be_captured_one_warning_is_given_and_passes_run(capsys):
    def refusing(_: Callable[[], Sequence[torch.Tensor]]) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing")

    stack = Transformer(dim=16, layers=1, heads=2, hidden=24, rope_theta=1e4)
    x = torch.randn(1, 30, 16)
    with compiling_stack(stack, CapturingCompiler(as_written, refusing)), torch.inference_mode():
        torch.testing.assert_close(stack_in_turns(stack, x, 1), stack(x, (30,), None))
    assert capsys.readouterr().err.count("cannot be captured") == 1


def test_passes_are_captured_on_cuda_alone(monkeypatch, own_cache):
    monkeypatch.setattr(compiling_module, "_missing", lambda _: None)
    for device, kind in (("cpu", PassCompiler), ("cuda", CapturingCompiler)):
        stack = Transformer(dim=16, layers=1, heads=2, hidden=24, rope_theta=1e4)
        assert compile_passes(stack, torch.device(device))
        assert type(stack.compiles) is kind


@pytest.mark.parametrize("index", range(6))
def test_rows_that_go_on_together_are_compiled_as_one_pass(index):
    batch = [Request(b"a b c d e f", 20, seed=1), Request(b"the other text", 20, seed=2)]
    same_as_ar(index, batch, self_drafter(4), Sampling(1.0))


@strategies.examples(60)
@given(st.data(), strategies.denoising_indices)
def test_compiled_blocks_are_filled_as_others_are(data, index):
    """Nothing verifies what ``blt-d`` fills in, and of drafts only what is right."""
    model, batch = models.model(index), data.draw(strategies.batches(index))
    params = BlockDiffusionParams(
        block_bytes=data.draw(st.integers(1, 9)),
        unmasking=data.draw(strategies.rules()),
        closure=data.draw(st.sampled_from(["forced", "none"])),
    )
    drafter = data.draw(strategies.diffusion_drafters())
    wanted, given = Recorded(drafter), Recorded(drafter)
    for recorded in (wanted, given):
        with compiling(model, as_written) if recorded is given else nullcontext():
            done = run(model, BlockDiffusion(params, models.CONTEXT), batch)
            recorded.drafts.append([[*each.ids, counts(each.passes)] for each in done])
            run(model, speculative(recorded), batch)
    assert given.drafts == wanted.drafts


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch warns of itself
def test_lengths_are_open_in_what_is_compiled():
    """Whatever fixes one refuses to be exported: the length of a draft, or of a batch."""
    made: list[str] = []

    def as_graph(program: Program) -> Compiled:
        if program.name in made:
            return as_written(program)
        with torch.inference_mode(mode=False):
            graph = compiling_module.exported(program).module()
        made.append(program.name)
        return lambda tensors: graph(*tensors)

    index = models.DENOISING[0]
    model, batch = models.model(index), [Request(b"a b c d e f", 5), Request(b"the other", 5)]
    params = DiffusionParams(block_bytes=4, unmasking=FillAll(AllParams(), models.CONTEXT))
    drafters = self_drafter(4), DiffusionDrafter(params, models.CONTEXT)
    for drafter in drafters:
        wanted = run(model, speculative(drafter), batch)
        with compiling(model, as_graph):
            given = run(model, speculative(drafter), batch)
        assert [each.ids for each in given] == [each.ids for each in wanted]
    assert set(made) == {"layers", "decoder", "decoder-blocks"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("first", [9, 60])
def test_what_is_compiled_with_a_full_ring_serves_one_that_is_not_and_the_reverse(first):
    torch.manual_seed(0)
    stack = Transformer(dim=16, layers=1, heads=2, hidden=24, window=5, rope_theta=1e4).double()
    x = torch.randn(1, 70, 16, dtype=torch.float64)
    graphs: list[Any] = []

    def as_graph(program: Program) -> Compiled:
        with torch.inference_mode(mode=False):
            graphs.append(compiling_module.exported(program).module())
        return lambda tensors: graphs[-1](*tensors)

    with compiling_stack(stack, as_graph), torch.inference_mode():
        for start in (first, 69 - first):
            cache = stack.new_cache(1)
            stack(x[:, :start], (start,), cache)
            given = stack(x[:, start : start + 1], (1,), cache)
            torch.testing.assert_close(given, stack(x[:, : start + 1], (start + 1,), None)[:, -1:])
    assert len(graphs) == 1


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
    with compiling_stack(stack, lambda program: made.append(program) or as_written(program)):
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

    def failing(program: Program) -> Compiled:
        tries.append(1)
        if len(tries) == 1:
            raise KeyboardInterrupt
        return as_written(program)

    with compiling_stack(stack, failing):
        with pytest.raises(KeyboardInterrupt):
            a_pass(stack)
        given = a_pass(stack)
    torch.testing.assert_close(given, a_pass(stack))


def test_a_module_that_has_compiled_passes_is_pickled_without_them():
    stack = Transformer(dim=16, layers=1, heads=2, hidden=24, rope_theta=1e4)
    with compiling_stack(stack, as_written):
        wanted = a_pass(stack)
        assert stack._compiled._compiled
        again = pickle.loads(pickle.dumps(stack))
        assert not again._compiled._compiled
        torch.testing.assert_close(a_pass(again), wanted)


@pytest.mark.parametrize(
    ("count", "lengths"), [(1, [1]), (8, [8]), (9, [8, 1]), (14, [7, 7]), (25, [5] * 5)]
)
def test_deep_stacks_are_called_in_runs_of_equal_length_where_that_goes(count, lengths):
    cut = stack_weights(list(range(count)), None)
    assert [len(weights.value.layers) for _, weights in cut] == lengths
    assert [at for _, weights in cut for at in weights.value.layers] == list(range(count))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is kept in the folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)


NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


def stack_in_turns(stack: Transformer, x: torch.Tensor, rows: int) -> torch.Tensor:
    """All of x (1, r, D) by passes of some rows each, after nine at once."""
    cache = stack.new_cache(1)
    given = [stack(x[:, :9], (9,), cache)]
    for at in range(9, x.shape[1], rows):
        cache.settle([at])
        given.append(stack(x[:, at : at + rows], (len(x[0, at : at + rows]),), cache))
    return torch.cat(given, 1)


@NO_COMPILER
@pytest.mark.parametrize("window", [5, None])
def test_a_compiled_stack_goes_on_over_turns_of_its_ring_and_growing_lanes_and_is_kept(
    window, tmp_path, capsys
):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 16, "layers": 1, "heads": 2, "hidden": 24, "window": window}
    stack = Transformer(**sizes, rope_theta=1e4).double()
    x = torch.randn(1, 160, 16, dtype=torch.float64)
    folder = tmp_path / "blt-core" / "compiled"
    make_private(folder)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        wanted = stack(x, (160,), None)
        for time in range(2):  # the second is as in another process: nothing is compiled
            with compiling_stack(stack, PassCompiler(folder, cpu)):
                given = stack_in_turns(stack, x, 1)
                assert len(stack._compiled._compiled) == 1
            torch.testing.assert_close(given, wanted, rtol=0, atol=1e-12)
            assert capsys.readouterr().err.count("a pass is compiled") == (time == 0)
    (package,) = folder.glob("*.pt2")
    package.chmod(0o666)
    assert compiling_module.load(package, cpu) is None
    assert "others may write to it" in capsys.readouterr().err
    package.write_bytes(package.read_bytes()[:1000])
    package.chmod(0o600)
    assert compiling_module.load(package, cpu) is None
    assert "cannot be loaded" in capsys.readouterr().err


@NO_COMPILER
@pytest.mark.nightly(reason="a whole model is compiled: some minutes")
def test_a_compiled_model_gives_the_same_bytes_and_is_compiled_once(tmp_path, own_cache, capsys):
    decoder = {**CONFIG["decoder"], "denoises": True}
    checkpoint = str(write_checkpoint(tmp_path / "model", decoder=decoder))
    tables = {
        "schema": 1,
        "sampler": {"use": "blt-s", "draft_bytes": 4},
        "run": {"checkpoint": checkpoint, "dtype": "float64", "max_new_bytes": 120},
    }
    plain = Pipeline.from_config(tables)
    fast = Pipeline.from_config({**tables, "run": {**tables["run"], "compile": True}})
    prompts = [b"a prompt", b"one that is longer than the windows of its model are, by far"]
    samplers = ("blt-s draft_bytes=4", "ar", "blt-d block_bytes=4", "blt-dv")
    for sampler in samplers:
        fast.with_sampler(sampler).generate(prompts[0], max_new_bytes=20)
    fast.generate(prompts, max_new_bytes=20)
    assert "a pass is compiled" in capsys.readouterr().err
    # Turns of rings, lanes that grow, other prompts and drafts: nothing is compiled for them.
    for prompt in prompts:
        for sampler in samplers:
            made, wanted = (
                each.with_sampler(sampler).generate(prompt, max_new_bytes=200)
                for each in (fast, plain)
            )
            assert (made.ids, made.passes) == (wanted.ids, wanted.passes)
    made, wanted = (each.generate(prompts, max_new_bytes=60) for each in (fast, plain))
    assert [each.ids for each in made] == [each.ids for each in wanted]
    assert "a pass is compiled" not in capsys.readouterr().err


@NO_COMPILER
@pytest.mark.nightly(reason="a whole model is compiled, twice: some minutes")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_fewer_digits_compiled_passes_part_from_others_at_near_ties_alone(
    dtype, tmp_path, own_cache
):
    checkpoint = str(write_checkpoint(tmp_path / "model"))
    run = {"checkpoint": checkpoint, "dtype": dtype, "max_new_bytes": 200}
    plain = Pipeline.from_config({"schema": 1, "run": run})
    fast = Pipeline.from_config({"schema": 1, "run": {**run, "compile": True}})
    for prompt in (b"a prompt", b"another one, which is longer", b"", b"0123456789" * 8):
        made, wanted = (each.generate(prompt).ids for each in (fast, plain))
        if made != wanted:
            difference = explain(plain.model, prompt, wanted, made)
            assert difference.near_tie, difference


def test_without_a_compiler_one_warning_is_given_and_nothing_is_compiled(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    stack = Transformer(dim=16, layers=1, heads=2, hidden=24, rope_theta=1e4)
    assert not compile_passes(stack, torch.device("cpu"))
    assert stack.compiles is None
    assert capsys.readouterr().err.count("no C++ compiler (no-such-compiler)") == 1


def test_where_the_cache_cannot_be_written_programs_are_kept_for_the_process(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("CXX", "true")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    stack = Transformer(dim=16, layers=1, heads=2, hidden=24, rope_theta=1e4)
    assert compile_passes(stack, torch.device("cpu"))
    assert "cannot be kept" in capsys.readouterr().err
    folder = stack.compiles.folder
    package = folder / "layers.pt2"
    package.touch(0o600)
    assert open_to_others(package) is None


def test_a_model_whose_parts_cannot_compile_is_warned_of(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "true")
    assert not compile_passes(torch.nn.Linear(2, 2), torch.device("cpu"))
    assert "no part of this model can compile" in capsys.readouterr().err
