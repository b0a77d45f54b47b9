"""What an objective gives: a loss and figures, checked against what the log can hold."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from blt_core.errors import PluginError
from blt_core.protocols import RESERVED_FIGURES, RESERVED_PREFIXES

#: A loss in nats a byte, and figures to log.
Loss = tuple[Tensor, dict[str, float]]

_CONTRACT = (
    "loss() returns (loss, figures): a tensor of one number, the mean in nats a byte, and a dict "
    "of numbers by name"
)


def checked_loss(found: object, label: str) -> Loss:
    """What an objective gave, its figures as plain floats.

    label: how to name the objective. Raises PluginError for what is no loss with figures, and for
    figures whose names the log has given away.
    """
    if not isinstance(found, tuple) or len(found) != 2:  # noqa: PLR2004 -- a pair
        raise _broken(label, f"its loss is {_show(found)}")
    loss, figures = found
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        raise _broken(label, f"its loss is {_show(loss)}")
    if loss.dim():
        raise _broken(label, f"its loss has the shape {tuple(loss.shape)}: it is not reduced")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise _broken(label, "its loss depends on no parameter that is trained")
    if not isinstance(figures, Mapping) or not all(isinstance(name, str) for name in figures):
        raise _broken(label, f"its figures are {_show(figures)}")
    _check_names(figures, label)
    return loss, {name: _number(name, value, label) for name, value in figures.items()}


def check_same_figures(passes: Iterable[Mapping[str, float]], label: str) -> None:
    """Raise PluginError unless all passes of a step have the same figures, so that they average."""
    names = {tuple(sorted(figures)) for figures in passes}
    if len(names) > 1:
        told = " and ".join(sorted(", ".join(each) for each in names))
        raise PluginError(
            f"{label}: its figures differ between the passes of a step: {told}",
            ("fix: give the same names for every batch",),
        )


def _check_names(figures: Iterable[str], label: str) -> None:
    taken = [
        name for name in figures if name in RESERVED_FIGURES or name.startswith(RESERVED_PREFIXES)
    ]
    if taken:
        reserved = ", ".join((*RESERVED_FIGURES, *(f"{prefix}…" for prefix in RESERVED_PREFIXES)))
        raise PluginError(
            f"{label}: a figure named {', '.join(map(repr, taken))} would stand for the run's own "
            "in the log",
            (f"names of the run's own: {reserved}", "fix: give the figure another name"),
        )


def _number(name: str, value: object, label: str) -> float:
    """A figure as a float: a number, or a tensor or array of one."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.detach())
    if isinstance(value, numbers.Real):
        return float(value)
    raise _broken(label, f"its figure {name!r} is {_show(value)}")


def _broken(label: str, text: str) -> PluginError:
    return PluginError(f"{label}: {text}", (f"expected: {_CONTRACT}",))


def _show(value: object) -> str:
    """A value in a message: what it is, not all that it holds."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, (str, int, float)) or value is None:
        return repr(value)
    return f"a {type(value).__name__}"
