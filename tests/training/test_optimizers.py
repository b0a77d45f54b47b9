"""Muon beside AdamW: who takes what, what is remembered, and exact going on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blt_core.errors import BltError
from blt_plugins.training.loop import Trainer
from blt_plugins.training.optimizers import make_optimizers, optimizer_bytes, split
from blt_plugins.training.schedule import parameter_groups

OUTPUTS = 7


def module() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "table": nn.Embedding(5, 4),
            "up": nn.Linear(4, 6, bias=False),
            "norm": nn.RMSNorm(4),
            "head": nn.Linear(4, OUTPUTS, bias=False),
        }
    )


def parameters(groups):
    return {id(p) for group in groups for p in group["params"]}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_takes_matrices_between_layers_and_adamw_the_rest(decay):
    own = module()
    muon, adamw = split(parameter_groups(own, decay), "muon", outputs=OUTPUTS)
    assert parameters(muon) == {id(own["up"].weight)}
    assert parameters(adamw) == {id(own[name].weight) for name in ("table", "norm", "head")}
    assert {group["weight_decay"] for group in muon} == {decay}
    nothing, everything = split(parameter_groups(own, decay), "adamw", outputs=OUTPUTS)
    assert not nothing
    assert parameters(everything) == {id(p) for p in own.parameters()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_optimizers_remember_is_planned(name):
    own = module()
    optimizers = make_optimizers(parameter_groups(own, 0.1), name, outputs=OUTPUTS, fused=True)
    for parameter in own.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    kept = sum(
        value.numel() * value.element_size()
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if value.dim()  # AdamW counts its steps in a scalar
    )
    assert optimizer_bytes(own, name, outputs=OUTPUTS) == kept


def test_a_step_of_muon_moves_a_matrix_alike_in_all_directions():
    own = module()
    muon, _ = make_optimizers(parameter_groups(own, 0.0), "muon", outputs=OUTPUTS, fused=True)
    before, weight = own["up"].weight.detach().clone(), own["up"].weight
    weight.grad = torch.randn(6, 1) @ torch.randn(1, 4) + 0.3 * torch.randn(6, 4)
    assert torch.linalg.svdvals(weight.grad)[0] > 3 * torch.linalg.svdvals(weight.grad)[1]
    muon.param_groups[0]["lr"] = 0.01
    muon.step()
    moved = torch.linalg.svdvals(weight.detach() - before) / (0.01 * 0.2 * 6**0.5)
    assert moved.min() > 0.5
    assert moved.max() < 1.5


def test_a_run_with_muon_goes_on_bit_for_bit(new_job, silent, tables):
    tables["training_backend"] = {"use": "torch", "optimizer": "muon"}
    whole = silent()
    Trainer(new_job("whole"), whole).run()

    def vanish(phase, step):
        if (phase, step) == ("model", 8):
            raise MemoryError

    with pytest.raises(MemoryError):
        Trainer(new_job("part"), silent(vanish)).run()
    rest = silent()
    Trainer(new_job("part"), rest).run()
    assert min(step for phase, step in rest.losses if phase == "model") == 6
    assert all(whole.losses[place] == loss for place, loss in rest.losses.items())
    adamw = silent()
    del tables["training_backend"]
    Trainer(new_job("adamw"), adamw).run()
    assert adamw.losses["model", 12] != whole.losses["model", 12]


def test_a_state_of_another_optimizer_is_refused(new_job, silent, tables):
    def vanish(phase, step):
        if (phase, step) == ("model", 8):
            raise MemoryError

    with pytest.raises(MemoryError):
        Trainer(new_job(), silent(vanish)).run()
    tables["training_backend"] = {"use": "torch", "optimizer": "muon"}
    with pytest.raises(BltError, match=r"state of optimizer 'adamw', not of 'muon'"):
        Trainer(new_job(), silent()).run()


def test_muon_needs_whole_matrices(new_job, tables):
    tables["training_backend"] = {"use": "torch", "optimizer": "muon", "strategy": "fsdp"}
    with pytest.raises(BltError, match="muon needs whole matrices"):
        new_job()
