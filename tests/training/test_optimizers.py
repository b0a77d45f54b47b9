"""Muon beside AdamW: who takes what, what is remembered, and exact going on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blt_core.errors import BltError
from blt_core.nn import Linear, SelfAttention, SwiGLU
from blt_plugins.training.backends.muon import Muon, orthogonal
from blt_plugins.training.backends.optimizers import (
    make_optimizers,
    optimizer_bytes,
    split,
    stacked_rows,
)
from blt_plugins.training.backends.parameters import parameter_groups
from blt_plugins.training.run.trainer import Trainer

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
    groups = parameter_groups(own, 0.1)
    optimizers = make_optimizers(groups, name, outputs=OUTPUTS, fused=True, stacked={})
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
    groups = parameter_groups(own, 0.0)
    muon, _ = make_optimizers(groups, "muon", outputs=OUTPUTS, fused=True, stacked={})
    before, weight = own["up"].weight.detach().clone(), own["up"].weight
    weight.grad = torch.randn(6, 1) @ torch.randn(1, 4) + 0.3 * torch.randn(6, 4)
    assert torch.linalg.svdvals(weight.grad)[0] > 3 * torch.linalg.svdvals(weight.grad)[1]
    muon.param_groups[0]["lr"] = 0.01
    muon.step()
    moved = torch.linalg.svdvals(weight.detach() - before) / (0.01 * 0.2 * 6**0.5)
    assert moved.min() > 0.5
    assert moved.max() < 1.5


def steps_of(weights, gradients, rows=()):
    """Copies of ``weights`` after a step for each tuple of their gradients, and the optimizer.

    rows: of the maps in the first weight.
    """
    own = [nn.Parameter(weight.clone()) for weight in weights]
    muon = Muon([{"params": own, "weight_decay": 0.1}], {own[0]: rows} if rows else {})
    muon.param_groups[0]["lr"] = 0.01
    for each in gradients:
        for parameter, gradient in zip(own, each, strict=True):
            parameter.grad = gradient
        muon.step()
    return own, muon


def test_maps_that_share_a_matrix_move_as_if_each_had_its_own():
    torch.manual_seed(0)
    layer = Linear(4, 6, 2, 2)
    weight, gradients = layer.weight.detach(), torch.randn(3, *layer.weight.shape)
    rows = layer.stacked
    [fused], muon = steps_of([weight], [(each,) for each in gradients], rows)
    apart, _ = steps_of(weight.split(rows), [each.split(rows) for each in gradients])
    assert torch.equal(fused, torch.cat(tuple(apart)))
    # What is stored is that of the whole parameter, whatever its parts are.
    assert {k: v.shape for k, v in muon.state[fused].items()} == {"momentum_buffer": weight.shape}
    [whole], _ = steps_of([weight], [(each,) for each in gradients])
    assert not torch.allclose(fused, whole)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 or later has it")
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (32, 96)])
def test_steps_of_a_whole_matrix_are_those_of_torch(shape):
    torch.manual_seed(0)
    weight, gradients = torch.randn(shape), torch.randn(3, *shape)
    [found], muon = steps_of([weight], [(each,) for each in gradients])
    theirs = nn.Parameter(weight.clone())
    groups = [{"params": [theirs], "weight_decay": 0.1}]
    other = torch.optim.Muon(groups, lr=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        theirs.grad = gradient
        other.step()
    moved = (theirs - weight).abs().max()
    assert (found - theirs).abs().max() < 0.02 * moved  # theirs are computed in bfloat16
    assert torch.equal(muon.state[found]["momentum_buffer"], other.state[theirs]["momentum_buffer"])


def test_orthogonal_keeps_the_dtype_of_a_matrix_on_the_cpu():
    for dtype in (torch.float32, torch.float64):
        assert orthogonal(torch.randn(3, 5, dtype=dtype)).dtype == dtype


def test_layers_say_which_maps_their_matrices_hold():
    attention, mlp = SelfAttention(8, 4, 2), SwiGLU(8, 16)
    assert stacked_rows(nn.ModuleList([attention, mlp])) == {
        attention.qkv.weight: (8, 4, 4),
        mlp.gate_up.weight: (16, 16),
    }


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
