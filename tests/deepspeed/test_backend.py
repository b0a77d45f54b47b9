"""What training with DeepSpeed does, in one process and in two, by its results.

The programs run once, one after the other, and read each other's states: see program.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.forks import Forks

FOLDER = Path(__file__).parent
NEAR = {"rtol": 0.0, "atol": 1e-6}
pytestmark = pytest.mark.slow


def neighbour(name: str) -> Any:
    """A module that lies beside this file, by whose own name processes are started too."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


launch, program = neighbour("launch"), neighbour("program")


class Outcomes:
    """The result of each program, and the folder in which they worked."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.folder, self.work = folder, folder / "work"
        self._forks = forks
        for case, world in (("alone", 1), ("pair", 2), ("after", 1)):
            self.run(case, world)

    def run(self, case: str, world: int) -> dict[str, Any]:
        launch.run_program(self._forks, case, self.folder / f"{case}.pt", self.work, world)
        return self.of(case)

    def of(self, case: str) -> dict[str, Any]:
        return torch.load(self.folder / f"{case}.pt")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Outcomes:
    return Outcomes(tmp_path_factory.mktemp("deepspeed"), forks)


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """Loss, norm and weights of each step of a plain torch loop."""
    return list(program.reference())


def figures(plain: list[Any], first: int = 0) -> torch.Tensor:
    return torch.tensor([[loss, norm] for loss, norm, _ in plain[first:]])


def assert_same_weights(found: dict[str, Any], wanted: dict[str, Any], **tolerance: float) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


@pytest.mark.parametrize(
    ("case", "stage"), [("alone", 1), ("alone", 3), *(("pair", stage) for stage in range(4))]
)
class TestFloat32:
    """Every stage and number of processes trains as torch does on all the passes in one process."""

    @pytest.fixture
    def trained(self, outcomes, case, stage):
        return outcomes.of(case)["float32"][f"{stage}"]

    def test_losses_and_norms_are_those_of_a_plain_loop_though_scored_and_saved_between(
        self, trained, plain
    ):
        torch.testing.assert_close(torch.tensor(trained["figures"]), figures(plain), **NEAR)

    def test_weights_are_those_of_a_plain_loop(self, trained, plain):
        assert_same_weights(trained["middle"], plain[program.MIDDLE - 1][2], **NEAR)
        assert_same_weights(trained["weights"], plain[-1][2], **NEAR)

    def test_a_part_called_itself_uses_the_weights_in_full(self, trained):
        module = program.new_module()
        module.load_state_dict(trained["middle"])
        logits = module.part.logits(program.batch(50, 0)).detach()
        torch.testing.assert_close(trained["logits"], logits, **NEAR)

    def test_a_run_goes_on_bit_for_bit_in_as_many_processes(self, trained):
        assert trained["resumed"] == trained["figures"][program.MIDDLE :]

    def test_a_former_module_is_left_whole(self, trained):
        assert_same_weights(trained["left"], trained["weights"], rtol=0.0, atol=0.0)
        assert trained["left_logits"].shape == trained["logits"].shape


# DeepSpeed before 0.19.8 has torch import its compiler with this module.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("case", "sort", "folder", "stage"),
    [("pair", "float32", "two", stage) for stage in (1, 2, 3)]
    + [("alone", "bfloat16", "half", stage) for stage in (1, 2, 3)],
)
def test_weights_are_what_deepspeed_consolidates_from_its_files(
    outcomes, case, sort, folder, stage
):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    trained = outcomes.of(case)[sort][f"{stage}"]
    for when, key in (("middle", "middle"), ("end", "weights")):
        saved = outcomes.work / folder / f"{stage}" / when
        wanted = get_fp32_state_dict_from_zero_checkpoint(str(saved), tag=".")
        found = trained[key]
        # At stages 1 and 2 it leaves out what is not trained.
        assert set(found) - set(wanted) <= {"part.fixed"}
        assert set(wanted) <= set(found)
        for name, tensor in wanted.items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], tensor.float()), name


@pytest.mark.parametrize(
    ("case", "stage"), [*(("alone", stage) for stage in (1, 2, 3)), ("pair", 3)]
)
def test_bfloat16_trains_near_float32_and_goes_on_bit_for_bit(outcomes, plain, case, stage):
    trained = outcomes.of(case)["bfloat16"][f"{stage}"]
    found = torch.tensor(trained["figures"])
    torch.testing.assert_close(found, figures(plain), rtol=0.05, atol=0.05)
    assert trained["resumed"] == trained["figures"][program.MIDDLE :]
    assert not torch.equal(found, figures(plain))


@pytest.mark.parametrize(
    ("case", "key", "stage"),
    [("alone", "optimizer away", 2), ("alone", "all away", 3), ("pair", "all away", 3)],
)
def test_what_is_kept_on_the_cpu_trains_as_any(outcomes, plain, case, key, stage):
    trained = outcomes.of(case)[key][f"{stage}"]
    torch.testing.assert_close(torch.tensor(trained["figures"]), figures(plain), **NEAR)


@pytest.mark.parametrize(
    ("case", "key", "pair"),
    [("pair", "from one", pair) for pair in ("1-1", "3-3")]
    + [("after", "from two", pair) for pair in ("0-0", "3-3", "1-2", "2-1")],
)
def test_a_state_goes_on_in_other_processes_and_stages_and_can_be_saved_there(
    outcomes, plain, case, key, pair
):
    gone_on = outcomes.of(case)[key][pair]
    found = torch.tensor(gone_on["figures"])
    torch.testing.assert_close(found, figures(plain, program.MIDDLE), **NEAR)
    assert_same_weights(gone_on["weights"], plain[-1][2], **NEAR)


STATES = (
    "test_a_state_goes_on_in_other_processes_and_stages_and_can_be_saved_there: the same in one "
    "process and two, of float32 weights"
)


@pytest.mark.nightly(reason=STATES)
def test_states_of_two_processes_go_on_in_four(outcomes, plain):
    for pair, gone_on in outcomes.run("four", 4).items():
        found = torch.tensor(gone_on["figures"])
        wanted = figures(plain, program.MIDDLE)
        torch.testing.assert_close(found, wanted, msg=lambda m, p=pair: f"{p}: {m}", **NEAR)
        assert_same_weights(gone_on["weights"], plain[-1][2], **NEAR)


@pytest.mark.nightly(reason=STATES)
def test_states_of_bfloat16_weights_and_of_an_optimizer_on_the_cpu_go_on_in_two(outcomes, plain):
    found = outcomes.run("more", 2)
    assert set(found["half"]) == {"1-1", "1-2", "2-1", "3-3"}
    for pair, gone_on in found["half"].items():
        whole = outcomes.of("alone")["bfloat16"][pair[0]]
        # The weights are the same; later steps add gradients up in another order, and round.
        first, *_ = gone_on["figures"][0]
        assert first == pytest.approx(whole["figures"][program.MIDDLE][0], rel=0, abs=1e-6), pair
        rest = torch.tensor(gone_on["figures"])
        torch.testing.assert_close(rest, figures(plain, program.MIDDLE), rtol=0.05, atol=0.05)
        assert_same_weights(gone_on["weights"], whole["weights"], rtol=0.0, atol=0.01)
    for gone_on in found["away"].values():
        rest = torch.tensor(gone_on["figures"])
        torch.testing.assert_close(rest, figures(plain, program.MIDDLE), **NEAR)
        assert_same_weights(gone_on["weights"], plain[-1][2], **NEAR)


def test_no_trace_of_a_conversion_stays_in_a_state(outcomes):
    assert not list(outcomes.work.rglob(".universal"))
    assert not list(outcomes.work.rglob("latest_universal"))


def test_a_state_that_lost_its_files_is_a_checkpoint_error(outcomes):
    message = outcomes.of("after")["bad"]
    assert message.startswith("CheckpointError: ")
    assert "DeepSpeed cannot convert this state" in message


def test_nothing_is_compiled(outcomes, extensions):
    assert list(extensions.iterdir()) == []
