"""From a config and a checkpoint to a model on its device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from blt_core.compiling import compile_passes
from blt_core.component import BuildContext
from blt_core.errors import CheckpointError, ConfigError, Problem
from blt_core.kernels.using import use_kernels
from blt_core.log import logger
from blt_core.model import Model, part_dtype
from blt_core.plugins.loading import Plugins
from blt_core.protocols import MODEL_KINDS, CheckpointFormat
from blt_core.storage.folders import current_folder
from blt_core.storage.tensors import adopt_tensors
from blt_core.wiring.config import Config
from blt_core.wiring.merge import merge_checkpoint
from blt_core.wiring.resolve import Plan, build_node, resolve, resolve_component

#: What a config without a table of these kinds uses.
DEFAULTS = {"sampler": {"use": "ar"}, "cost_model": {"use": "bandwidth"}}


def warn_of_blocks(plan: Plan) -> None:
    """Log a warning for each component whose blocks are longer than the decoder's training had."""
    for node, asked, trained in plan.untrained_blocks():
        logger().warning(
            f"{node.label} asks for blocks of {asked} bytes, and the decoder was trained on blocks "
            f"of at most {trained}: little of what lies beyond is right",
            fix=f"block_bytes = {trained}, or train on with block_bytes = {asked} in [objective]",
        )


def plan_run(config: Config, plugins: Plugins) -> tuple[Plan, Mapping[str, Tensor] | None]:
    """Check a config whole, its checkpoint's tables included; nothing is built.

    Gives the plan, and the checkpoint's tensors (None if the config names no checkpoint).
    """
    for kind, table in DEFAULTS.items():
        if kind not in config.tables:
            config = config.with_table(kind, table)
    tensors = None
    if config.checkpoint is not None:
        tables, tensors = read_checkpoint(config.checkpoint, plugins)
        config = merge_checkpoint(config, tables, plugins)
    return resolve(config, plugins, needs=("model", *MODEL_KINDS)), tensors


def read_checkpoint(location: str, plugins: Plugins) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Config tables and tensors of a checkpoint, by the format that recognises what is there.

    ``NAME:…`` is for the format of that name alone, if there is one. Raises ConfigError if several
    formats recognise the location, CheckpointError if none does.
    """
    able: dict[str, CheckpointFormat] = {}
    silent = []
    for name in _formats_to_ask(location, plugins):
        try:
            node = resolve_component("checkpoint_format", {"use": name}, plugins)
            reader: CheckpointFormat = build_node(node, BuildContext(), plugins.registry)
            if reader.recognises(location):
                able[name] = reader
            else:
                silent.append(f"{name}: {node.entry.record.summary}")
        except Exception as error:  # noqa: BLE001, PERF203 -- it must not stand in the way of others
            silent.append(f"{name} (broken: {error})")
    if not able:
        text = f"{location}: no checkpoint; found {_what_is_at(location)}"
        raise CheckpointError("\n  ".join((text, "installed formats:", *silent)))
    if len(able) > 1:
        text = f"several checkpoint formats recognise this: {', '.join(able)}"
        fix = f'fix: block one in registry.toml, as in blocked = ["checkpoint_format/{max(able)}"]'
        raise ConfigError([Problem(location, text, (fix,))])
    [reader] = able.values()
    return reader.read(location)


def _formats_to_ask(location: str, plugins: Plugins) -> list[str]:
    scheme, colon, _ = location.partition(":")
    # Before all are listed, which imports every format.
    if colon and ("checkpoint_format", scheme) in plugins.manifest.components:
        return [scheme]
    names = plugins.registry.names("checkpoint_format")
    return [scheme] if colon and scheme in names else names


def _what_is_at(location: str) -> str:
    """What is found in the place of a checkpoint, in words."""
    path = current_folder(Path(location))
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir())
        more = ", …" if len(names) > _SHOWN else ""
        return f"a folder with {', '.join(names[:_SHOWN])}{more}" if names else "an empty folder"
    return f"{'a file' if path.exists() else 'nothing'} (looked at {path.absolute()})"


#: Names of a folder that a message shows.
_SHOWN = 8


def build_model(plan: Plan, tensors: Mapping[str, Tensor] | None, *, beside: bool = False) -> Model:
    """The model of a plan, to run, with a checkpoint's tensors or, without, random weights.

    beside: another model, whose choice of kernels may say nothing of the weights of this one.
    Raises as :func:`new_model` and :func:`~blt_core.kernels.using.use_kernels` do.
    """
    model = new_model(plan, tensors, plan.run.seed)
    if tensors is None:
        logger().warning("no checkpoint is named: the weights are random", config=str(plan.place))
    module = model.module_dict().requires_grad_(requires_grad=False).eval()
    if plan.run.compile:
        compile_passes(module, model.device)
    choice = use_kernels(module, plan.run.kernels, beside=beside)
    if choice is None:
        return model
    return attrs.evolve(model, kernels=choice.digest(), kernel_choice=choice.text())


def load_beside(location: str, plan: Plan, plugins: Plugins) -> Model:
    """The model of another checkpoint, to run beside that of ``plan`` on its device, in its dtype.

    Raises as :func:`plan_run` and :func:`build_model` do.
    """
    kept = ("device", "dtype", "scorer_dtype", "kernels", "compile")
    run = {key: value for key in kept if (value := getattr(plan.run, key)) is not None}
    run["checkpoint"] = location
    config = Config.from_mapping({"schema": 1, "run": run})
    return build_model(*plan_run(config, plugins), beside=True)


def new_model(plan: Plan, tensors: Mapping[str, Tensor] | None, seed: int) -> Model:
    """The model of a plan on its device, to train; random weights depend on ``seed`` alone.

    Tensors that are stored in the model's own dtype are not copied. Raises ConfigError for a device
    that is not there, CheckpointError for tensors that do not fit.
    """
    device, dtype = find_device(plan), getattr(torch, plan.run.dtype)
    scorer_dtype = getattr(torch, plan.run.scorer_dtype) if plan.run.scorer_dtype else None
    if tensors is not None:
        model = stored_model(plan, tensors, device, dtype, scorer_dtype)
        return model.to(device, dtype, scorer_dtype)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = _assemble(plan)
    return model.to(device, dtype, scorer_dtype)


def stored_model(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    scorer_dtype: torch.dtype | None = None,
) -> Model:
    """The model of a plan with a checkpoint's tensors, as they are stored unless a dtype is given.

    Raises CheckpointError for tensors that do not fit.
    """

    def cast(name: str, tensor: Tensor) -> Tensor:
        wanted = dtype and part_dtype(name.partition(".")[0], dtype, scorer_dtype)
        return tensor.to(device=device, dtype=wanted if tensor.is_floating_point() else None)

    with NoRandomWeights():
        model = _assemble(plan)
    adopt_tensors(model.module_dict(), tensors, str(plan.run.checkpoint), cast)
    return model


def _assemble(plan: Plan) -> Model:
    parts: dict[str, Any] = {k: plan.build(k) if k in plan.nodes else None for k in MODEL_KINDS}
    return Model(
        **parts,
        scheme=plan.model.scheme,
        context_bytes=plan.model.context_bytes,
        settings=plan.describe_model(),
    )


class NoRandomWeights(TorchFunctionMode):
    """Parts made within draw no weights: memory for them is reserved, and not filled.

    What a part computes beside its parameters (tables of positions, say) is computed as ever.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Give a tensor back as it is where it would be filled at random."""
        if getattr(func, "__name__", "") not in _DRAWING:
            return func(*args, **(kwargs or {}))
        return args[0] if args else (kwargs or {})["tensor"]


#: Functions that fill a tensor at random: methods of tensors, and those of ``torch.nn.init``.
_DRAWING = (
    *("normal_", "trunc_normal_", "kaiming_normal_", "xavier_normal_"),
    *("uniform_", "kaiming_uniform_", "xavier_uniform_", "orthogonal_", "sparse_"),
)


def find_device(plan: Plan) -> torch.device:
    """The device that ``run.device`` names; ConfigError if this machine has none such."""
    place, name = plan.place.child("run", "device"), plan.run.device
    try:
        device = torch.device(name)
        torch.empty(1, device=device, dtype=getattr(torch, plan.run.dtype))
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        hint = f"available: {', '.join(available_devices())}"
        raise ConfigError(
            [Problem(str(place), f"device {name!r} is not available: {reason}", (hint,))]
        ) from error
    if device.type == "meta":
        raise ConfigError([Problem(str(place), "device 'meta' holds no data: nothing can run")])
    return device


def available_devices() -> list[str]:
    """Names of the devices of this machine."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names
