"""From a configuration to a training job: defaults, options, checks, and the built parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from blt_core.checkpoint import load_tensors
from blt_core.component import BuildContext
from blt_core.config import MODEL_KINDS, Config, RunSettings
from blt_core.errors import ConfigError, PluginError
from blt_core.model import Model
from blt_core.pipeline import find_device, read_checkpoint
from blt_core.plugins import Plugins
from blt_core.wiring import Plan, build_node, merge_checkpoint, resolve, resolve_component
from blt_plugins.training.loop import Job
from blt_plugins.training.settings import TrainSettings

#: What a training config without a table of these kinds uses.
DEFAULTS = {"objective": {"use": "ar"}, "training_backend": {"use": "torch"}}
NEEDS = ("train", "model", *MODEL_KINDS, "corpus")


def make_job(
    config: Config, plugins: Plugins, *, out: Path | None = None, corpus: Path | None = None
) -> Job:
    """The job of a config; ``corpus`` replaces its folder, ``out`` its [train] out.

    A patcher without a threshold is given one by calibration. Raises ConfigError with all
    problems of the config, DataError for a corpus that is not there.
    """
    if corpus is not None:
        config = with_corpus(config, corpus)
    plan, start = plan_training(config, plugins)
    settings = train_settings(plan)
    folder = out or Path(settings.out or f"runs/{Path(plan.place.source).stem}")
    described = plan.describe()
    node = resolve_component("checkpoint_format", {"use": "folder"}, plugins)
    return Job(
        corpus=plan.build("corpus"),
        model=new_model(plan, settings.seed, start),
        objective=plan.build("objective"),
        backend=plan.build("training_backend"),
        format=build_node(node, BuildContext(plan.model.scheme), plugins.registry),
        settings=settings,
        tables={
            "run": {"dtype": plan.run.dtype, "checkpoint": plan.run.checkpoint},
            **{k: described[k] for k in ("model", *MODEL_KINDS, *DEFAULTS)},
        },
        calibrates=start.calibrates,
        out=folder,
    )


@attrs.frozen(eq=False)
class Start:
    """What training starts from.

    tensors: of a checkpoint, None for random weights. calibrates: whether the patcher's threshold
    (0 in the plan) is yet to be found.
    """

    tensors: Mapping[str, Tensor] | None
    calibrates: bool


def plan_training(config: Config, plugins: Plugins) -> tuple[Plan, Start]:
    """Check a training config whole, its checkpoint's tables included; nothing is built.

    Raises ConfigError with all problems, CheckpointError for a checkpoint that cannot be read.
    """
    for kind, table in DEFAULTS.items():
        if kind not in config.tables:
            config = config.with_table(kind, table)
    tensors = None
    if config.checkpoint is not None:
        tables, tensors = read_checkpoint(config.checkpoint, plugins)
        config = merge_checkpoint(config, tables, plugins, training=True)
    start = Start(tensors, calibrates=_lacks_threshold(config, plugins))
    if start.calibrates:
        config = config.with_table("patcher", {**config.tables["patcher"], "threshold": 0.0})
    plan = resolve(config, plugins, needs=NEEDS)
    _check(plan, config, start)
    return plan, start


def training_tables(config: Config, plugins: Plugins) -> dict[str, Any]:
    """The tables of a training config with every key; they train the same.

    What training finds itself is left out: a threshold yet to be calibrated, and the training of a
    scorer that comes from a checkpoint.
    """
    plan, start = plan_training(config, plugins)
    tables = plan.describe()
    if start.calibrates:
        del tables["patcher"]["threshold"]
    if start.tensors is not None:
        del tables["train"]["scorer"]
    return tables


def train_settings(plan: Plan) -> TrainSettings:
    """``[train]``; a scorer that comes from a checkpoint is not trained."""
    settings: TrainSettings = plan.settings["train"]
    if plan.run.checkpoint is None:
        return settings
    return attrs.evolve(settings, scorer=attrs.evolve(settings.scorer, steps=0))


def with_corpus(config: Config, folder: Path) -> Config:
    """The config with another corpus folder, held-out files included."""
    table = config.tables.get("corpus")
    kept: Mapping[str, Any] = table if isinstance(table, Mapping) else {"use": "folder"}
    tables = {k: v for k, v in kept.items() if k != "valid_path"}
    return config.with_table("corpus", {**tables, "path": str(folder)})


def new_model(plan: Plan, seed: int, start: Start) -> Model:
    """The model to train, on the run's device: random weights depend on ``seed`` alone.

    Raises CheckpointError for tensors that do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {kind: plan.build(kind) for kind in MODEL_KINDS}
    model = Model(
        **parts,
        scheme=plan.model.scheme,
        context_bytes=plan.model.context_bytes,
        settings=plan.describe_model(),
    )
    if start.tensors is not None:
        load_tensors(model.modules(), start.tensors, str(plan.run.checkpoint))
    return model.to(find_device(plan), getattr(torch, plan.run.dtype))


def _lacks_threshold(config: Config, plugins: Plugins) -> bool:
    """Whether the patcher takes a threshold, and the config gives none."""
    table = config.tables.get("patcher")
    if not isinstance(table, Mapping) or "threshold" in table:
        return False
    try:
        params = plugins.registry.lookup("patcher", str(table.get("use"))).record.params
    except PluginError:
        return False  # resolve says what is wrong
    return any(field.name == "threshold" for field in attrs.fields(params))


def _check(plan: Plan, config: Config, start: Start) -> None:
    """Raise ConfigError with what only training finds fault with."""
    table = config.tables["train"]
    settings: TrainSettings = plan.settings["train"]
    context, limit = settings.context_bytes, plan.model.context_bytes
    target = settings.scorer.target_patch_bytes
    longest = getattr(plan.node("patcher").params, "max_patch_bytes", None)
    found = {
        ("train", "scorer"): start.tensors is not None
        and "scorer" in table
        and "the scorer comes from the checkpoint and is not trained again; remove this table",
        ("run", "dtype"): plan.run.dtype == "bfloat16"
        and "training runs in float32; train.save_dtype is what models are written in",
        ("run", "seed"): plan.run.seed not in (RunSettings().seed, settings.seed)
        and f"training draws from train.seed, which is {settings.seed}; remove this key",
        ("train", "context_bytes"): context is not None
        and context > limit
        and f"{context} is more than the model serves (model.context_bytes = {limit})",
        ("train", "scorer", "target_patch_bytes"): start.calibrates
        and longest is not None
        and target > longest
        and f"{target} is more than the longest patch (patcher.max_patch_bytes = {longest})",
    }
    problems = [plan.place.child(*path).problem(text) for path, text in found.items() if text]
    if problems:
        raise ConfigError(problems)
