"""From a training config to a job, built."""

from __future__ import annotations

from pathlib import Path

import attrs

from blt_core.component import BuildContext, trained_keys
from blt_core.errors import ConfigError
from blt_core.model import Model
from blt_core.plugins.loading import Plugins
from blt_core.protocols import MODEL_KINDS, Objective, TrainingBackend
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import Plan, build_node, resolve_component
from blt_plugins.training.run.job import BEST, LAST, Job
from blt_plugins.training.run.rebuild import check_rebuilds
from blt_plugins.training.setup.blocks import BLOCKS, block_sizes
from blt_plugins.training.setup.config import (
    TrainingPlan,
    check_passes,
    check_saves,
    check_trains,
    load_model,
    plan_training,
    with_corpus,
)


def make_job(
    config: Config, plugins: Plugins, *, out: Path | None = None, corpus: Path | None = None
) -> Job:
    """The job of a config; ``corpus`` replaces its folder, ``out`` its [train] out.

    A patcher without a threshold is given one by calibration. Raises ConfigError with all
    problems of the config, DataError for a corpus that is not there.
    """
    if corpus is not None:
        config = with_corpus(config, corpus)
    training = plan_training(config, plugins)
    plan, settings = training.plan, training.settings
    folder = out or Path(settings.out or f"runs/{Path(plan.place.source).stem}")
    _check_out(training, folder)
    backend: TrainingBackend = plan.build("training_backend")
    check_passes(plan, settings, backend.world_size)
    check_saves(plan, settings, backend)
    model = load_model(training)
    check_trains(training, model)
    check_rebuilds(plan, model)
    objective: Objective = plan.build("objective")
    described = plan.describe()
    described.get("decoder", {}).pop(BLOCKS, None)  # no step depends on it
    compared = ("model", *MODEL_KINDS, "objective")
    node = resolve_component("checkpoint_format", {"use": "folder"}, plugins)
    return Job(
        corpus=plan.build("corpus"),
        model=noting_blocks(plan, model, objective),
        objective=objective,
        backend=backend,
        format=build_node(node, BuildContext(plan.model.scheme), plugins.registry),
        settings=settings,
        plugins=plugins,
        tables={
            "run": {"dtype": plan.run.dtype, "checkpoint": plan.run.checkpoint},
            **{k: described[k] for k in compared if k in described},
        },
        calibrates=training.calibrates,
        out=folder,
        objective_label=plan.node("objective").entry.label if settings.steps else "",
    )


def noting_blocks(plan: Plan, model: Model, objective: Objective) -> Model:
    """The model with tables that tell which block sizes its decoder is trained on.

    Those of the objective are added to those of earlier training, where the decoder's params have a
    place for them.
    """
    trained = block_sizes(getattr(objective, "block_bytes", None))
    if not trained or "decoder" not in plan.nodes:
        return model
    params = plan.node("decoder").params
    if BLOCKS not in trained_keys(type(params)):
        return model
    sizes = sorted({*(getattr(params, BLOCKS) or ()), *trained})
    decoder = {**model.settings["decoder"], BLOCKS: sizes}
    return attrs.evolve(model, settings={**model.settings, "decoder": decoder})


def _check_out(training: TrainingPlan, folder: Path) -> None:
    """Raise ConfigError if a run would write over what it starts from."""
    place, text = (
        training.plan.place,
        f"training would write over it; write elsewhere than {folder}",
    )
    sources = {
        place.child("run", "checkpoint"): training.plan.run.checkpoint,
        place.child("train", "scorer", "checkpoint"): training.settings.scorer.checkpoint,
    }
    for key, source in sources.items():
        if source and any(_same(folder / name, Path(source)) for name in (BEST, LAST)):
            raise ConfigError([key.problem(text)])


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
