"""Tensors are read through maps of their own, and parts take them over without a copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from blt_core.errors import CheckpointError
from blt_core.loading import NoRandomWeights
from blt_core.storage.safetensors import StoredTensors
from blt_core.storage.tensors import adopt_tensors, load_tensors, unshared

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(5, dtype=torch.int64),
    "half": torch.arange(7).bfloat16(),
    "flags": torch.tensor([True, False, True]),
    "none": torch.empty(0, 4),
    "number": torch.tensor(2.5, dtype=torch.float64),
    "complex": torch.tensor([1 + 2j, 3j]),
    "unsigned": torch.tensor([1, 65535], dtype=torch.uint16),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def keep(_name, tensor):
    return tensor


def test_all_kinds_of_tensors_are_read(path):
    stored = StoredTensors(path)
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert stored.shape(name) == tuple(tensor.shape)
        assert torch.equal(stored[name], tensor)
        assert stored[name].dtype == tensor.dtype
    with pytest.raises(KeyError):
        stored["gone"]


def test_writing_to_a_tensor_leaves_the_file_alone(path):
    before = path.read_bytes()
    StoredTensors(path)["a"].add_(1)
    assert path.read_bytes() == before
    assert torch.equal(StoredTensors(path)["a"], TENSORS["a"])


def test_tensors_are_those_of_the_file_that_was_opened(path):
    stored = StoredTensors(path)
    other = path.with_name("other")
    save_file({"a": torch.zeros(9)}, other)
    other.rename(path)
    assert torch.equal(stored["a"], TENSORS["a"])
    path.unlink()
    assert torch.equal(stored["b"], TENSORS["b"])


def test_a_tensor_that_is_read_twice_is_the_same_memory(path):
    stored = StoredTensors(path)
    assert stored["a"].data_ptr() == stored["a"].data_ptr()


def test_what_is_released_is_read_again(tmp_path):
    path, tensor = tmp_path / "big.safetensors", torch.arange(30_000)
    save_file({"big": tensor, "small": torch.ones(3)}, path)
    stored = StoredTensors(path)
    stored["big"].zero_()
    stored.release("big")
    # What was written is gone with its pages, but for those that hold other tensors too.
    assert torch.equal(stored["big"][1000:-1000], tensor[1000:-1000])
    assert torch.equal(stored["small"], torch.ones(3))


def test_a_tensor_of_two_files_is_an_error(path, tmp_path):
    save_file({"b": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=r"y\.safetensors: b is in .*x\.safetensors too"):
        StoredTensors(path, tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("F99", [2], r"truncated or no safetensors file \(.*F99"),
        ("F4", [4], "w: dtype .*float4.* is not supported"),
    ],
)
def test_a_dtype_that_is_not_known_is_named(tmp_path, dtype, shape, message):
    path = tmp_path / "z.safetensors"
    header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, 2]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointError, match=message):
        StoredTensors(path)["w"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux tells the open files")
def test_a_file_is_open_once_however_many_tensors_are_kept(tmp_path):
    path = tmp_path / "many.safetensors"
    save_file({str(index): torch.ones(2000) for index in range(100)}, path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    stored = StoredTensors(path)
    kept = [stored[name] for name in stored]
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
    stored.release("50")
    assert all(bool((tensor == 1).all()) for tensor in kept)


class Part(nn.Module):
    """Parameters, one of them shared, a stored buffer and a computed one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(requires_grad=False)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_parts_take_over_what_is_stored(path):
    with NoRandomWeights():
        modules = nn.ModuleDict({"part": Part()})
    weight, bias = torch.rand(3, 3), torch.rand(3)
    tensors = {
        "part.first.weight": weight,
        "part.first.bias": bias,
        "part.second.weight": weight,
        "part.second.bias": bias + 1,
        "part.count": torch.tensor([4, 5]),
    }
    adopt_tensors(modules, tensors, "x", keep)
    part = modules["part"]
    assert part.first.weight.data_ptr() == weight.data_ptr()
    assert part.second.weight is part.first.weight
    assert not part.first.bias.requires_grad
    assert part.second.bias.requires_grad
    assert part.count.tolist() == [4, 5]
    assert part.table.tolist() == [0, 1, 2, 3]


def test_parts_that_are_made_to_be_filled_draw_nothing():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with NoRandomWeights():
        part = Part()
        nn.init.trunc_normal_(part.first.weight)
        nn.Embedding(4, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert part.table.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("load", [adopt_tensors, load_tensors])
def test_tensors_that_a_model_ties_must_be_the_same_in_what_is_loaded(load):
    modules = nn.ModuleDict({"part": Part()})
    tensors = {name: tensor.clone() for name, tensor in modules.state_dict().items()}
    arguments = (modules, tensors, "some/folder", *([keep] if load is adopt_tensors else []))
    load(*arguments)
    assert modules["part"].second.weight is modules["part"].first.weight
    tensors["part.second.weight"] += 1
    with pytest.raises(CheckpointError) as caught:
        load(*arguments)
    assert (
        "part.second.weight: differs from part.first.weight, to which this model ties it"
    ) in str(caught.value)


def test_what_shares_memory_is_stored_under_every_name(tmp_path):
    part = Part()
    tensors = unshared({**part.state_dict(), "corner": part.first.weight[:2].detach()})
    save_file(tensors, tmp_path / "tied.safetensors")
    stored = StoredTensors(tmp_path / "tied.safetensors")
    assert stored.keys() == {*part.state_dict(), "corner"}
    assert torch.equal(stored["first.weight"], stored["second.weight"])
    assert torch.equal(stored["corner"], part.first.weight[:2])
