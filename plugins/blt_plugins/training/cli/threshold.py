"""The threshold of a trained model on given files, and how it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blt_core.cli.inputs import find_source, is_folder
from blt_core.component import BuildContext
from blt_core.errors import CheckpointError, ConfigError, DataError
from blt_core.pipeline import Pipeline
from blt_core.plugins.loading import Plugins
from blt_core.protocols import CheckpointFormat, ThresholdPatcher
from blt_core.storage.texts import read_document
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import build_node, resolve_component
from blt_plugins.training.data.windows import Texts, cut_windows, make_batch, pack
from blt_plugins.training.scores.calibration import Calibration, calibrate

#: Bytes of a batch of entropies; only memory limits it.
BATCH_BYTES = 16384


def calibrate_source(
    source: str, files: Sequence[Path], target: float, plugins: Plugins
) -> Calibration:
    """The calibration of a checkpoint, or of the one that a config names, on some files.

    Raises ConfigError, CheckpointError or DataError for what cannot be read or calibrated.
    """
    pipeline = load_trained(find_source(source), plugins)
    model = pipeline.model
    documents = Texts([text for path in files if (text := read_document(path))])
    if not isinstance(model.patcher, ThresholdPatcher):
        name = pipeline.plan.node("patcher").name
        raise DataError(f"{source}: the patcher {name!r} has no threshold to calibrate")
    windows = cut_windows(documents, model.context_bytes)
    batches = (
        make_batch(documents, group, model.scheme).to(model.device)
        for group in pack(windows, BATCH_BYTES)
    )
    return calibrate(model.patcher, batches, target)


def load_trained(config: Config, plugins: Plugins | None = None) -> Pipeline:
    """The pipeline of a config that names a checkpoint; ConfigError for one that does not."""
    if config.checkpoint is None:
        text = "missing; only a trained model can be measured"
        raise ConfigError([config.tables.place.child("run", "checkpoint").problem(text)])
    return Pipeline.load(config, plugins)


def write_threshold(source: str, threshold: float, plugins: Plugins) -> None:
    """Store the threshold in a checkpoint folder. Raises CheckpointError for any other source."""
    node = resolve_component("checkpoint_format", {"use": "folder"}, plugins)
    folder: CheckpointFormat = build_node(node, BuildContext(), plugins.registry)
    if not (is_folder(source) and folder.recognises(source)):
        raise CheckpointError(
            f"{source}: --write stores into checkpoint folders of this program only\n"
            f"  fix: in your config, [patcher] threshold = {threshold}"
        )
    config, tensors = folder.read(source)
    patcher = {**config["patcher"], "threshold": threshold}
    # The tensors stay those of the old file while it is replaced.
    folder.write(Path(source), {**config, "patcher": patcher}, dict(tensors))
