"""``blt convert``: a checkpoint from one format to another, or to another dtype."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blt_core.cli import inputs
from blt_core.cli.streams import output, output_json
from blt_core.component import BuildContext
from blt_core.errors import ConfigError, DataError
from blt_core.files import names_in
from blt_core.plugins.loading import Plugins, load_plugins
from blt_core.tables.inline import parse_inline
from blt_core.wiring.resolve import build_node, resolve_component

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from blt_core.protocols import CheckpointFormat


def convert(
    source: Annotated[
        str, typer.Argument(help="A checkpoint of any format, or a config that names one.")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    *,
    to: Annotated[
        str, typer.Option("--to", help="The format: blt plugins checkpoint_format.")
    ] = "folder",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float64; else as it is.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint of that format.")
    ] = False,
    as_json: inputs.JsonOption = False,
) -> None:
    """Store a checkpoint in another format; what a config sets (a threshold, say) with it."""
    import torch

    from blt_core.loading import plan_run, stored_model
    from blt_core.storage.tensors import model_config, model_tensors

    plugins = load_plugins()
    writer = _writer(to, plugins)
    if not force and target.exists() and not (target.is_dir() and not names_in(target)):
        name = to.split()[0]
        raise DataError(f"{target}: exists already; --force replaces a {name!r} checkpoint")
    config = inputs.find_source(source).with_run(dtype=dtype)
    plan, stored = plan_run(config, plugins)
    if stored is None:
        text = "missing; only a stored model can be converted"
        raise ConfigError([plan.place.child("run", "checkpoint").problem(text)])
    model = stored_model(plan, stored)
    tensors = model_tensors(model)
    if dtype:
        tensors = {name: _cast(name, t, getattr(torch, dtype)) for name, t in tensors.items()}
    writer.write(target, model_config(model), tensors)
    # A tied weight has several names and is one.
    state = model.module_dict().state_dict(keep_vars=True)
    parameters = sum({id(t): t.numel() for t in state.values()}.values())
    size = sum(tensor.nbytes for tensor in tensors.values())
    if as_json:
        record = {"model": str(target), "parameters": parameters, "bytes": size}
        output_json(record)
    else:
        output(f"{target}: {parameters:,} parameters, {size / 1e9:.3g} GB")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as a model of that dtype runs it: a patcher keeps what it was calibrated with."""
    from blt_core.model import part_dtype

    kind = name.partition(".")[0]
    return tensor.to(part_dtype(kind, dtype)) if tensor.is_floating_point() else tensor


def _writer(spec: str, plugins: Plugins) -> CheckpointFormat:
    node = resolve_component("checkpoint_format", parse_inline(spec, "to"), plugins)
    writer: CheckpointFormat = build_node(node, BuildContext(), plugins.registry)
    return writer
