"""Every component of this distribution keeps the contracts of its kind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blt_core.plugins.loading import load_plugins
from blt_core.testing import Profile, check_component
from blt_core.testing.kit import profile_of

SCORER = {"use": "transformer", "dim": 16, "layers": 1, "heads": 2, "hidden": 24, "window": 8}
WIDE = {"layers": 1, "heads": 2, "hidden": 24}
LOCAL = {**WIDE, "dim": 16, "window": 8}

#: Tables of the components that need keys, or are tried with several.
TABLES = {
    ("patcher", "entropy"): [{"threshold": 1.0, "max_patch_bytes": 5, "byte_scorer": SCORER}],
    ("patcher", "static"): [{"patch_bytes": 4}],
    ("byte_scorer", "transformer"): [{k: v for k, v in SCORER.items() if k != "use"}],
    ("encoder", "local"): [{**LOCAL, "ngram_sizes": [3], "ngram_rows": 31}],
    ("global_model", "transformer"): [WIDE],
    ("decoder", "local"): [{**LOCAL, "denoises": True}, {**LOCAL, "reads_byte_states": True}],
    ("unmasking", "any-of"): [{"rules": {"a": {"use": "confidence"}, "b": {"use": "all"}}}],
    ("unmasking", "at-most"): [{"rule": {"use": "all"}}],
    ("drafter", "first"): [
        {"drafters": {"a": {"use": "lookup"}, "b": {"use": "self", "draft_bytes": 3}}}
    ],
    ("drafter", "cascade"): [{"drafter": {"use": "diffusion", "block_bytes": 4}}],
    ("objective", "block-diffusion"): [
        {"block_bytes": 4, "inside_share": 0.2, "stale_share": 0.2, "all_masked_share": 0.2}
    ],
    ("training_backend", "torch"): [{}, {"optimizer": "muon"}],
}
#: What ``roofline`` prices with: times of passes, as ``blt calibrate-cost`` keeps them.
TIMES = {
    "format": 1,
    "machine": {"cpu": "c", "threads": 1, "torch": "2", "device": "cpu", "dtype": "float32"},
    "source": "by hand",
    "parameters": {"decoder": 10**6, "encoder": 10**5, "global_model": 10**7, "scorer": 10**5},
    "bandwidth": 1e10,
    "flops": 1e11,
    "parts": {
        part: {"alone": {"points": [[1, 1e-3], [9, 2e-3]]}, "context": 1e-7, "weight_bytes": 4}
        for part in ("decoder", "blocks", "encoder", "global_model", "scorer")
    },
    "rounds": {"points": [[1, 2e-4], [9, 3e-4]]},
    "draft": 1e-4,
}
#: Those that are tried elsewhere: what they read has to be made first.
ELSEWHERE = {
    ("drafter", "model"): "reads a checkpoint: tests/drafting/test_model.py",
    ("checkpoint_format", "huggingface"): "writes other shapes: tests/huggingface",
    ("training_backend", "deepspeed"): "starts a process group: below, in a process of its own",
    ("corpus", "parquet"): "the extra data: tests/training/test_corpora.py",
    ("corpus", "prepared"): "the extra data: tests/training/test_prepare.py",
    ("task", "humaneval"): "runs programs: tests/tasks",
    ("task", "mbpp"): "runs programs: tests/tasks",
    ("task", "lm-eval"): "the extra lm-eval: tests/tasks",
    ("executor", "ray"): "starts a cluster: tests/executors",
}
PLUGINS = load_plugins()
NAMES = [
    (kind, name)
    for kind in PLUGINS.manifest.kinds
    for name in PLUGINS.registry.names(kind)
    if (kind, name) not in ELSEWHERE
]
#: Of a profile's examples: generations take longer than passes.
SHARES = {"sampler": 0.32, "drafter": 0.4}


def _written(path: Path, tables: object) -> str:
    path.write_text(json.dumps(tables), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tables of the components that read files."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts").mkdir()
    for i in range(12):
        (folder / "texts" / f"{i}.txt").write_text(f"document {i} of a few words")
    lines = [json.dumps({"text": f"line {i} of a corpus"}) for i in range(30)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    pairs = [
        json.dumps({"source": f"phrase {i} ici", "target": f"sentence {i} here"}) for i in range(9)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    texts, lines_ = str(folder / "texts"), str(folder / "lines.jsonl")
    parts = {"a": {"use": "folder", "path": texts}, "b": {"use": "jsonl", "path": lines_}}
    return {
        ("corpus", "folder"): [{"path": texts}],
        ("corpus", "jsonl"): [{"path": lines_}],
        ("corpus", "mixture"): [{"parts": parts, "weights": {"a": 1.0, "b": 2.0}}],
        ("task", "held-out"): [{"path": texts}],
        ("task", "translation"): [{"pairs": str(folder / "pairs.jsonl")}],
        ("cost_model", "roofline"): [{"file": _written(folder / "times.json", TIMES)}],
    }


@pytest.fixture(scope="session")
def examples(pytestconfig) -> int:
    """How many each contract is tried on: --blt-profile."""
    return profile_of(pytestconfig.getoption("--blt-profile") or "ci").examples


@pytest.mark.filterwarnings("ignore")  # of other packages
@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_it_keeps_its_contracts(kind, name, data, examples):
    profile = Profile(max(round(examples * SHARES.get(kind, 1.0)), 2))
    for table in {**TABLES, **data}.get((kind, name), [{}]):
        check_component(kind, name, table, profile=profile)


def test_deepspeed_keeps_its_contracts(examples):
    arguments = ("plugins", "test", "training_backend", "deepspeed", "--json")
    arguments += ("--profile", str(examples))
    run = subprocess.run(
        [sys.executable, "-c", "from blt_core.cli import main; main()", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    checks = json.loads(run.stdout)["checks"]
    assert len(checks) > 9
    assert all(each["passed"] for each in checks)


def test_what_is_tried_elsewhere_is_there():
    assert all(name in PLUGINS.registry.names(kind) for kind, name in ELSEWHERE)
