"""Is what a run stores the model that it trains? Checked before it begins, and once it has written.

Axes: b batch rows, r byte rows, V ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import attrs
import torch
from torch import Tensor, nn

from blt_core.errors import CheckpointError, PluginError, RunError
from blt_core.loading import new_model, stored_model
from blt_core.model import Model
from blt_core.plugins.loading import Plugins
from blt_core.protocols import CheckpointFormat
from blt_core.storage.unlisted import unlisted
from blt_core.types import Rows
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import Node, Plan, resolve
from blt_plugins.training.setup.scorer import trainable_scorer

#: What is read to compare outputs.
_TEXT = b"def main(argv):\n    return 1"
#: How far outputs of the same weights may part, by their size: devices round differently.
_CLOSE: Mapping[torch.dtype, float] = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 0.1
_FIX = (
    "fix: keep layers in attributes of an nn.Module or in nn.ModuleList and nn.ModuleDict, "
    "tensors in nn.Parameter or register_buffer"
)


def check_rebuilds(plan: Plan, model: Model) -> None:
    """Raise PluginError for what a model uses and no checkpoint of it would hold.

    That is weights that no ``state_dict`` lists, and tensors beside it that come out otherwise when
    the model is built again from the same weights.
    """
    found = unlisted(model)
    if found.weights:
        names = [f"{path} ({type(value).__name__})" for path, value in found.weights.items()]
        raise PluginError(
            f"{_owners(plan, found.weights)}: no state_dict lists {', '.join(names)}: it would be "
            "used in training, and missing from every checkpoint",
            (_FIX,),
        )
    if not found.computed:
        return
    with _own_draws():
        again = new_model(plan, model.module_dict().state_dict(), plan.run.seed)
    if changed := _changed(found.computed, unlisted(again).computed):
        raise PluginError(
            f"{_owners(plan, changed)}: {', '.join(changed)} differs whenever the model is built, "
            "and no checkpoint holds it: every load would give other outputs",
            ("fix: register_buffer with persistent=True, or compute it without random numbers",),
        )


def outputs_of(model: Model, flags_br: Tensor | None = None) -> Outputs:
    """What a model, or a scorer alone, gives for a short text; nothing is trained or dropped out.

    flags_br: the patches to use; default: the model's own.
    """
    text = model.scheme.encode(_TEXT[: max(model.context_bytes - 1, 1)])
    ids_br = torch.tensor([[model.scheme.bos, *text]], device=model.device)
    rows = Rows(ids_br, (ids_br.shape[1],))
    found: dict[str, Tensor] = {}
    with torch.no_grad(), _evaluating(model.module_dict()):
        own_br = model.patcher.flags(rows, None)
        scorer = trainable_scorer(model)
        found["the byte scorer's logits"] = (
            scorer.part.logits(rows, None) if scorer is not None else own_br.float()
        )
        flags_br = own_br if flags_br is None else flags_br.to(own_br.device)
        if "decoder" in model.module_dict():
            clean = model.forward(rows, flags_br).clean
            if clean is not None:
                found["the logits"] = clean.logits
    return Outputs({name: value.cpu() for name, value in found.items()}, flags_br.cpu())


@attrs.frozen(eq=False)
class Outputs:
    """values: logits (1, r, V) by name, on the CPU. flags_br: the patches that they came from."""

    values: Mapping[str, Tensor]
    flags_br: Tensor


def check_written(folder: Path, reader: CheckpointFormat, tensors: Mapping[str, Tensor]) -> None:
    """Raise RunError unless ``folder`` holds ``tensors``, bit for bit."""
    _, stored = reader.read(str(folder))
    wrong = [
        name for name in tensors if name not in stored or not _same(stored[name], tensors[name])
    ]
    if wrong:
        raise RunError(
            f"{folder}: {', '.join(wrong)} cannot be read as it was written\n"
            "  fix: look at the disk, and write to another one with --out"
        )


def check_reloads(
    folder: Path,
    reader: CheckpointFormat,
    plugins: Plugins,
    whole: Mapping[str, Tensor],
    model: Model,
    outputs: Outputs,
) -> None:
    """Raise RunError unless the tables in ``folder`` rebuild ``model`` from its weights.

    whole: the weights as they were trained; those in the folder are the same, rounded. outputs: of
    ``model``. The rebuilt model is on the CPU, and shares the memory of ``whole``.
    """
    tables, _ = reader.read(str(folder))
    plan = resolve(Config.from_mapping(tables), plugins)
    dtype = next((p.dtype for p in _main_part(model).parameters()), torch.float32)
    cpu = torch.device("cpu")
    try:
        with _own_draws():
            again = stored_model(plan, whole, cpu, dtype).to(cpu, dtype)
    except CheckpointError as error:
        raise RunError(f"{folder}: cannot be loaded: {error}") from error
    again.module_dict().requires_grad_(requires_grad=False)
    theirs = outputs_of(again, outputs.flags_br).values
    wrong = [name for name, own in outputs.values.items() if not _close(own, theirs[name], dtype)]
    if not wrong:
        return
    changed = _changed(unlisted(model).computed, unlisted(again).computed)
    because = f": it does not hold {', '.join(changed)}" if changed else ""
    raise RunError(
        f"{folder}: {' and '.join(wrong)} of the model that was written are not those of the one "
        f"that is trained{because}\n  {_FIX}; what training changes must be listed by state_dict"
    )


def _main_part(model: Model) -> nn.Module:
    """The part whose dtype is that of the model."""
    modules = model.module_dict()
    found: nn.Module = modules["decoder"] if "decoder" in modules else modules  # noqa: SIM401
    return found


def _same(stored: Tensor, given: Tensor) -> bool:
    """Whether two tensors have the same bits: NaN is NaN here."""
    if stored.dtype != given.dtype or stored.shape != given.shape:
        return False
    raw = [each.contiguous().flatten().view(torch.uint8) for each in (stored, given.cpu())]
    return torch.equal(*raw)


def _close(own: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether outputs are those of the same weights; not to be told where they are no numbers."""
    if not bool(own.isfinite().all()):
        return True
    scale = max(float(own.abs().max()), 1.0)
    return bool((own.double() - other.double()).abs().max() <= _CLOSE.get(dtype, _COARSE) * scale)


def _changed(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that are there twice and differ."""
    return [
        name
        for name, tensor in own.items()
        if name in other and not _same(tensor.detach().cpu(), other[name].detach().cpu())
    ]


def _owners(plan: Plan, paths: Mapping[str, object] | list[str]) -> str:
    """The components that paths lead into, with their distributions."""
    nodes = [node for root in plan.nodes.values() for node in root.walk()]
    found = {_deepest(nodes, path).entry.label: None for path in paths}
    return " and ".join(found)


def _deepest(nodes: list[Node], path: str) -> Node:
    above = [
        node
        for node in nodes
        if path == node.path or path.startswith((f"{node.path}.", f"{node.path}["))
    ]
    return max(above, key=lambda node: len(node.path))


@contextmanager
def _own_draws() -> Iterator[None]:
    """Random numbers of the block are its own, and no others than those of a new process."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.seed()
        yield


@contextmanager
def _evaluating(modules: nn.Module) -> Iterator[None]:
    """Modules within are in evaluation mode, and then in the mode that each was in."""
    training = [module for module in modules.modules() if module.training]
    modules.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
