"""What a part holds beside its ``state_dict`` is found wherever it is held."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import attrs
import pytest
import torch
from torch import nn

from blt_core.model import Model
from blt_core.storage.unlisted import unlisted


@attrs.define(eq=False)
class Slotted:
    held: object


class Plain:
    def __init__(self, held: object) -> None:
        self.held, self.lock, self.log = held, threading.Lock(), logging.getLogger()


class Part(nn.Module):
    """A part with a registered layer, and something in an attribute."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.layers[0].held = held
        self.again = [self.layers[0]]  # also registered
        self.backwards = [self]
        self.register_buffer("stored", torch.ones(1))
        self.register_buffer("angles", torch.ones(1), persistent=False)


def model(part: object) -> Model:
    return Model(None, None, part, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hold", "path"),
    [
        (lambda x: x, ""),
        (lambda x: [0, x], "[1]"),
        (lambda x: {"a": (x,)}, "['a'][0]"),
        (Slotted, ".held"),
        (Plain, ".held"),
        (lambda x: SimpleNamespace(held=[x]), ".held[0]"),
    ],
)
def test_lost_weights_are_found_with_their_path(hold, path):
    part = Part(None)
    place = "global_model.layers.0.held"
    parameter = nn.Parameter(torch.ones(1))
    part.layers[0].__dict__["held"] = hold(parameter)
    assert unlisted(model(part)).weights == {place + path: parameter}
    part.layers[0].__dict__["held"] = hold(nn.Linear(1, 1))
    assert [*unlisted(model(part)).weights] == [place + path]
    trained = torch.ones(1, requires_grad=True)
    part.layers[0].__dict__["held"] = hold(trained)
    assert [*unlisted(model(part)).weights] == [place + path]


def test_what_is_listed_or_holds_no_weights_is_none():
    found = unlisted(model(Part([nn.ReLU(), nn.Dropout(0.1)])))
    assert found.weights == {}
    assert [*found.computed] == ["global_model.angles"]


def test_tensors_that_are_not_trained_are_told_apart():
    found = unlisted(model(Part({"table": torch.ones(3)})))
    assert found.weights == {}
    assert {*found.computed} == {"global_model.angles", "global_model.layers.0.held['table']"}


def test_a_part_that_is_no_module_lists_nothing():
    found = unlisted(model(Plain(nn.Linear(2, 2))))
    assert [*found.weights] == ["global_model.held"]
