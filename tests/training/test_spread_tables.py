"""Tables whose rows are spread over processes: sums, gradients and clipping are those of one."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from blt_core.nn import RowTable
from blt_plugins.training.backends.parameters import spreadable_tables

pytestmark = pytest.mark.slow

#: Looks up what ``argv[1]`` (JSON) gives each process, in float64; compares with one process: sums,
#: gradients of a step, their norm, weights after clipped steps, and the table gathered.
PROGRAM = """
import copy, json, sys
import torch
from torch import nn
from blt_core.component import BuildContext
from blt_core.nn import RowTable
from blt_plugins.training.backends.torch import TorchBackend, TorchBackendParams

case = json.loads(sys.argv[1])
rows, width, passes = case["rows"], case["width"], case["passes"]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = RowTable(rows, 4), nn.Linear(4, 3, bias=False)

    def forward(self, numbers):
        return self.head(self.table(numbers)).tanh().pow(2).sum()

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
net = Net()
alone = copy.deepcopy(net)
backend = TorchBackend(TorchBackendParams(strategy="fsdp"), BuildContext())
groups = [{"params": list(net.parameters()), "weight_decay": 0.1, "matrices": False}]
called = backend.start(net, groups, clip=0.01, accumulate=len(passes))
mine = [torch.tensor(each[backend.rank], dtype=torch.long).view(-1, width) for each in passes]
theirs = [torch.tensor(one, dtype=torch.long).view(-1, width) for each in passes for one in each]
same = dict(rtol=1e-12, atol=1e-14)
kept = net.table.weight.to_local()
assert kept.untyped_storage().nbytes() == kept.numel() * 8, "the whole is still there"

optimizer = torch.optim.AdamW(alone.parameters(), lr=0.1, weight_decay=0.1, betas=(0.9, 0.95))
for _ in range(2):
    backend.backward([lambda each=each: called(each) for each in mine])
    found = net.table.weight.grad
    sum(alone(each) for each in theirs).div(len(theirs)).backward()
    wanted = alone.table.weight.grad
    torch.testing.assert_close(found.full_tensor(), wanted, **same)
    norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.01)
    optimizer.step()
    optimizer.zero_grad()
    assert abs(backend.step(0.1) - float(norm)) < 1e-12
torch.testing.assert_close(net.table.weight.full_tensor(), alone.table.weight, **same)
with backend.whole(), torch.no_grad():
    for _ in range(backend.rank):  # no other process is needed
        for each in theirs:
            torch.testing.assert_close(net.table(each), alone.table(each), **same)
print("same")
backend.close()
assert net.table.spread is None
"""


def run(forks, tmp_path, processes, case) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = forks.run(processes, [str(program), json.dumps(case)], {})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same") == processes


@pytest.mark.parametrize(
    ("rows", "passes"),
    [
        # Unequal lengths, a process that reads nothing, rows that one alone touches or many times.
        (10, [[[0, 1, 9, 9], [], [9, 3]], [[5, 5, 5, 5, 5, 5], [0, 7], [8, 8]]]),
        (2, [[[1, 1], [0, 1], [0, 0, 1, 0]]]),  # the last process has no row
        (7, [[[], [], []], [[6, 0], [], []]]),
    ],
)
def test_processes_do_what_one_does(forks, tmp_path, rows, passes):
    run(forks, tmp_path, 3, {"rows": rows, "width": 2, "passes": passes})


numbers = st.lists(st.integers(0, 30), max_size=12)


@pytest.mark.nightly(reason="the cases above, drawn")
@given(passes=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=3))
def test_any_numbers_do(forks, tmp_path_factory, passes):
    drawn = [[list(own) for own in each] for each in passes]
    run(forks, tmp_path_factory.mktemp("drawn"), 2, {"rows": 31, "width": 1, "passes": drawn})


def test_a_table_sums_its_rows():
    table = RowTable(5, 3)
    found = table(torch.tensor([[0, 4], [2, 2]]))
    assert found.equal(torch.stack([table.weight[0] + table.weight[4], 2 * table.weight[2]]))


def test_a_table_whose_weight_is_another_s_too_is_not_spread():
    module = nn.ModuleDict({"one": RowTable(5, 3), "two": RowTable(5, 3), "tied": nn.Linear(3, 5)})
    assert spreadable_tables(module) == [module["one"], module["two"]]
    module["tied"].weight = module["two"].weight
    assert spreadable_tables(module) == [module["one"]]
