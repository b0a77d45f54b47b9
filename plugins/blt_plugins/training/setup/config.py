"""From a configuration to a training job: defaults, options, checks, and the built parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blt_core.component import trained_keys
from blt_core.errors import ConfigError, PluginError, Problem
from blt_core.files import expand_home
from blt_core.loading import new_model, read_checkpoint
from blt_core.model import Model
from blt_core.plugins.loading import Plugins
from blt_core.protocols import MODEL_KINDS, BackgroundSaver
from blt_core.storage.tensors import load_tensors
from blt_core.wiring.config import Config, RunSettings
from blt_core.wiring.merge import merge_checkpoint
from blt_core.wiring.resolve import Plan, resolve
from blt_plugins.training.setup.blocks import BLOCKS, block_sizes
from blt_plugins.training.setup.scorer import round_parameters, trainable_scorer
from blt_plugins.training.setup.settings import ScorerSettings, TrainSettings

#: What a training config without a table of these kinds uses.
DEFAULTS = {"objective": {"use": "ar"}, "training_backend": {"use": "torch"}}
NEEDS = ("train", "model", *MODEL_KINDS, "corpus")
#: The first version of safetensors that writes a file while other threads run.
WRITES_BESIDE = (0, 8)
#: What a byte scorer needs that is trained alone.
SCORER_NEEDS = ("train", "model", "patcher", "corpus")


def load_model(training: TrainingPlan) -> Model:
    """The model that a plan starts from, with the scorer of whichever checkpoint gives one.

    A scorer that this run does not train is rounded to what is stored, so that its patches are
    those of later use from the start. Raises CheckpointError for tensors that do not fit.
    """
    settings = training.settings
    model = new_model(training.plan, training.tensors, settings.seed)
    if training.scorer is not None and isinstance(model.patcher, nn.Module):
        patcher = nn.ModuleDict({"patcher": model.patcher})
        load_tensors(patcher, training.scorer, str(settings.scorer.checkpoint))
    scorer = trainable_scorer(model)
    if scorer is not None and not settings.scorer.steps:
        round_parameters(scorer.module, getattr(torch, settings.save_dtype))
    return model


def check_trains(training: TrainingPlan, model: Model) -> None:
    """Raise ConfigError unless a run has steps of a scorer or of a model."""
    settings = training.settings
    if not settings.steps and (not settings.scorer.steps or trainable_scorer(model) is None):
        text = "there is nothing to train: no scorer takes steps, and there is no model"
        hint = f"give train.steps, and the tables {_tables_of_a_model()}"
        raise ConfigError([training.plan.place.child("train", "scorer").problem(text, hint)])


def check_passes(plan: Plan, settings: TrainSettings, *processes: int) -> None:
    """Raise ConfigError unless the passes of a step can be shared out evenly.

    processes: one number, or several in each of which the run is to be possible. The error gives
    keys and values that fit: as many more passes as it takes, of the size that they have now.
    """
    passes, multiple = settings.accumulate, math.lcm(*processes)
    uneven = next((count for count in processes if passes % count), None)
    if uneven is None:
        return
    fits = -(-passes // multiple) * multiple
    steps: dict[str, TrainSettings | ScorerSettings] = {}
    if settings.steps:
        steps["train.batch_bytes"] = settings
    if settings.scorer.steps:
        steps["train.scorer.batch_bytes"] = settings.scorer
    sizes = [f"{key} = {max(of.batch_bytes // passes, 1) * fits}" for key, of in steps.items()]
    text = f"{passes} passes cannot be dealt out to {uneven} processes"
    several = f" (for {', '.join(map(str, processes))} processes)" if len(processes) > 1 else ""
    hint = f"set it to {fits}{several} and, for passes as large as now, {' and '.join(sizes)}"
    raise ConfigError([plan.place.child("train", "accumulate").problem(text, hint)])


def check_saves(plan: Plan, settings: TrainSettings, backend: object) -> None:
    """Raise ConfigError if states are to be written in the background, and the backend cannot."""
    if settings.async_states and not isinstance(backend, BackgroundSaver):
        name = plan.node("training_backend").label
        text = f"{name} cannot copy its state to write it while training goes on"
        hint = "remove this key, or set training_backend.use = 'torch'"
        raise ConfigError([plan.place.child("train", "async_states").problem(text, hint)])
    version = metadata.version("safetensors")
    if settings.async_states and tuple(map(int, version.split(".")[:2])) < WRITES_BESIDE:
        text = f"safetensors {version} lets nothing else run while it writes a file"
        hint = "remove this key, or pip install 'safetensors>=0.8'"
        raise ConfigError([plan.place.child("train", "async_states").problem(text, hint)])


@attrs.frozen(eq=False)
class TrainingPlan:
    """A training config that has passed every check, ready to build.

    settings: ``[train]``; a scorer that comes from a checkpoint is not trained. tensors: to start
    from, None for random weights. calibrates: whether the patcher's threshold (0 in the plan) is
    yet to be found. scorer: the patcher's tensors, where it was trained alone.
    """

    plan: Plan
    settings: TrainSettings
    tensors: Mapping[str, Tensor] | None
    scorer: Mapping[str, Tensor] | None
    calibrates: bool

    def describe(self) -> dict[str, Any]:
        """The tables with every key; they train the same.

        What training finds itself is left out: a threshold yet to be calibrated, and the training
        of a scorer that comes from a checkpoint.
        """
        tables = self.plan.describe()
        if self.calibrates:
            del tables["patcher"]["threshold"]
        elif self.tensors is not None:
            del tables["train"]["scorer"]
        return tables


def plan_training(config: Config, plugins: Plugins) -> TrainingPlan:
    """Check a training config whole, its checkpoint's tables included; nothing is built.

    Raises ConfigError with all problems, CheckpointError for a checkpoint that cannot be read.
    """
    for kind, table in DEFAULTS.items():
        if kind not in config.tables:
            config = config.with_table(kind, table)
    stored: Mapping[str, Any] = {}
    tensors = None
    if config.checkpoint is not None:
        stored, tensors = read_checkpoint(config.checkpoint, plugins)
        config = merge_checkpoint(config, stored, plugins, training=True)
    config, scorer = _with_scorer(config, plugins)
    alone = _trains_scorer_alone(config)
    calibrates = _lacks_threshold(config, plugins)
    if calibrates:
        config = config.with_table("patcher", {**config.tables["patcher"], "threshold": 0.0})
    plan = resolve(config, plugins, needs=SCORER_NEEDS if alone else NEEDS)
    settings: TrainSettings = plan.settings["train"]
    own_scorer = config.tables["train"].get("scorer", {})
    if tensors is not None or scorer is not None:
        settings = attrs.evolve(settings, scorer=attrs.evolve(settings.scorer, steps=0))
    training = TrainingPlan(plan, settings, tensors, scorer, calibrates)
    problems = [*_problems(training, own_scorer), *_without_steps(training, alone=alone)]
    problems += [] if alone else _untrained(plan, stored)
    if problems:
        raise ConfigError(problems)
    return training


def _with_scorer(config: Config, plugins: Plugins) -> tuple[Config, Mapping[str, Tensor] | None]:
    """The config with the patcher of ``train.scorer.checkpoint``, and its tensors; None if unset.

    A patcher table may repeat what that patcher has, and override what any run may.
    """
    location = scorer_checkpoint(config)
    if location is None:
        return config, None
    if config.checkpoint is not None:
        text = "the scorer comes from run.checkpoint; remove this key"
        place = config.tables.place.child("train", "scorer", "checkpoint")
        raise ConfigError([place.problem(text)])
    stored, tensors = read_checkpoint(location, plugins)
    config = merge_checkpoint(config, stored, plugins, kinds=("patcher",))
    return config, {k: tensors[k] for k in tensors if k.startswith("patcher.")}


def scorer_checkpoint(config: Config) -> str | None:
    """``train.scorer.checkpoint``, if a config has it."""
    train = config.tables.get("train")
    own = train.get("scorer") if isinstance(train, Mapping) else None
    location = own.get("checkpoint") if isinstance(own, Mapping) else None
    return expand_home(location) if isinstance(location, str) and location else None


def _trains_scorer_alone(config: Config) -> bool:
    """Whether a config has a patcher, and no other part of a model."""
    return (
        config.checkpoint is None
        and "patcher" in config.tables
        and not any(kind in config.tables for kind in MODEL_KINDS if kind != "patcher")
    )


def _without_steps(training: TrainingPlan, *, alone: bool) -> list[Problem]:
    """Steps of a model without parts, or parts without steps."""
    steps, place = training.settings.steps, training.plan.place.child("train", "steps")
    if alone and steps:
        names = _tables_of_a_model()
        text = f"a scorer is trained alone without this key; a model needs the tables {names}"
        return [place.problem(text)]
    if not alone and not steps:
        return [place.problem("missing; this is how many steps the model is trained")]
    return []


def _tables_of_a_model() -> str:
    return " ".join(f"[{kind}]" for kind in MODEL_KINDS if kind != "patcher")


def with_corpus(config: Config, folder: Path) -> Config:
    """The config with another corpus folder, held-out files included."""
    if "corpus" not in config.tables:
        config = config.with_table("corpus", {"use": "folder"})
    given, called = {"path": str(folder)}, {"path": "--corpus"}
    return config.with_options("corpus", given, called, without=("valid_path",))


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


def _problems(training: TrainingPlan, own_scorer: Mapping[str, Any]) -> list[Problem]:
    """What only training finds fault with. own_scorer: ``[train.scorer]`` as it is written."""
    plan, settings = training.plan, training.settings
    context, limit = settings.context_bytes, plan.model.context_bytes
    target = settings.scorer.target_patch_bytes
    longest = getattr(plan.node("patcher").params, "max_patch_bytes", None)
    continues = training.tensors is not None
    found = {
        ("train", "scorer"): continues
        and not training.calibrates
        and own_scorer
        and "the scorer and its threshold come from the checkpoint; remove this table",
        ("train", "scorer", "steps"): continues
        and training.calibrates
        and own_scorer.get("steps")
        and "the scorer comes from the checkpoint and is not trained again; remove this key",
        ("run", "dtype"): plan.run.dtype == "bfloat16"
        and "training runs in float32; train.save_dtype is what models are written in",
        ("run", "scorer_dtype"): plan.run.scorer_dtype is not None
        and "training runs in float32; remove this key, which is of runs of the model",
        ("run", "seed"): plan.run.seed not in (RunSettings().seed, settings.seed)
        and f"training draws from train.seed, which is {settings.seed}; remove this key",
        ("train", "context_bytes"): context is not None
        and context > limit
        and f"{context} is more than the model serves (model.context_bytes = {limit})",
        ("train", "scorer", "target_patch_bytes"): training.calibrates
        and longest is not None
        and target > longest
        and f"{target} is more than the longest patch (patcher.max_patch_bytes = {longest})",
    }
    return [plan.place.child(*path).problem(text) for path, text in found.items() if text]


def _untrained(plan: Plan, stored: Mapping[str, Any]) -> Iterator[Problem]:
    """Abilities that the config claims, and that neither its objective nor what came before gives.

    stored: the tables of the checkpoint that training starts from.
    """
    objective = plan.node("objective")
    for kind in MODEL_KINDS:
        node = plan.node(kind)
        for key in sorted(trained_keys(type(node.params))):
            claimed, had = getattr(node.params, key), stored.get(kind, {}).get(key, False)
            if key == BLOCKS:
                sizes = block_sizes(getattr(objective.params, BLOCKS, None))
                untrained = set(claimed or ()) - {*(had or ()), *sizes}
            else:
                given = f"{kind}.{key}" in objective.component.requires
                untrained = claimed and not had and not given
            if untrained:
                text = f"the objective {objective.name!r} does not train this"
                yield plan.place.child(kind, key).problem(text)
