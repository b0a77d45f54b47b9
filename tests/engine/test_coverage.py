"""The properties are worth something only if behaviour varied: demanded situations were seen."""

from __future__ import annotations

import pytest

from tests.engine.seen import DEMANDED, SEEN


def test_every_demanded_situation_was_seen(whole_folder_runs):
    if not whole_folder_runs:
        pytest.skip("only a run of the whole folder sees everything")
    missing = [situation for situation in DEMANDED if not SEEN[situation]]
    assert not missing, f"no test met: {', '.join(missing)}"
