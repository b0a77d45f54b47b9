"""Which states can be read into which stages and processes, by what is noted beside them."""

from __future__ import annotations

import pytest

from blt_core.errors import CheckpointError
from blt_plugins.deepspeed.resume import TOPOLOGY, Topology, needs_conversion, read_topology

TWO = {stage: Topology(stage, 2, "float32") for stage in range(4)}
ONE = {stage: Topology(stage, 1, "float32") for stage in range(4)}


def test_a_topology_is_read_as_it_was_written(tmp_path):
    TWO[3].write(tmp_path)
    assert read_topology(tmp_path) == TWO[3]


@pytest.mark.parametrize("stage", range(4))
def test_the_same_stage_and_processes_need_no_conversion(tmp_path, stage):
    assert not needs_conversion(TWO[stage], TWO[stage], tmp_path)


def test_stage_0_is_read_in_any_number_of_processes_as_it_is(tmp_path):
    assert not needs_conversion(TWO[0], ONE[0], tmp_path)


@pytest.mark.parametrize(("saved", "now"), [(1, 1), (2, 2), (3, 3), (1, 2), (2, 1)])
def test_other_processes_and_stages_1_and_2_need_one(tmp_path, saved, now):
    assert needs_conversion(TWO[saved], ONE[now], tmp_path)
    assert needs_conversion(ONE[saved], TWO[now], tmp_path)


@pytest.mark.parametrize(("saved", "now"), [(2, 3), (3, 1), (1, 0), (0, 1)])
def test_other_stages_are_refused_with_what_to_do(tmp_path, saved, now):
    with pytest.raises(CheckpointError) as error:
        needs_conversion(TWO[saved], ONE[now], tmp_path)
    assert f"written with stage {saved}, 2 processes, float32" in str(error.value)
    assert f"set stage = {saved}" in str(error.value)
    assert "[run] checkpoint" in str(error.value)


def test_another_weight_dtype_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="set stage = 1 and weight_dtype = 'bfloat16'"):
        needs_conversion(Topology(1, 1, "bfloat16"), ONE[1], tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no state of the training backend 'deepspeed'"):
        read_topology(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stage": 1'])
def test_a_damaged_note_is_refused(tmp_path, text):
    (tmp_path / TOPOLOGY).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        read_topology(tmp_path)
