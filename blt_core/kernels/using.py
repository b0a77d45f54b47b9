"""Giving the weights of a model the kernels of a choice."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from blt_core.errors import DataError
from blt_core.kernels.candidates import KERNELS, is_chosen_for, packs, prepare
from blt_core.kernels.choice import (
    Choice,
    Times,
    name_of,
    parse_choice,
    read_choice,
    stored_at,
)
from blt_core.kernels.machine import Machine, machine
from blt_core.kernels.measuring import measure, spread
from blt_core.kernels.native import native_hash
from blt_core.log import logger
from blt_core.nn.linear import Linear
from blt_core.storage.user_cache import alone_with, make_private

FIXED, MEASURED = "fixed", "measured"
#: Seconds that measuring may take when a model is loaded.
BUDGET = 1.0
#: Bytes of the weights of one shape for which measuring at load tries kernels that copy.
COPIED = 32 << 20
#: What this process measured and could not store, by machine (with its threads) and native kernel.
_unstored: dict[tuple[Machine, str | None], Choice] = {}


def use_kernels(model: nn.Module, setting: str, *, beside: bool = False) -> Choice | None:
    """Give the weights of ``model`` their kernels; the choice for them, None for ``fixed``.

    setting: ``fixed``; ``measured``, for which what this machine has not measured yet is measured
    now, for a second at most, and stored; a file with a choice, beyond which the fixed rule serves;
    or the text of one, or results that were begun with one, beyond which measured kernels do.
    beside: the model runs beside another, which they are of, and a file says no more than these.
    Raises DataError for what is none of these, or chooses what is not there: oneDNN's kernel, or
    the native one, which may not be built, or be another.
    """
    weights = weights_of(model)
    if setting == FIXED or not weights:
        return None
    choice = _choice(setting, weights, beside=beside)
    for name, own in weights.items():
        names = choice.names.get(name, {})
        for weight in own:
            weight.kernels = prepare(weight, names)  # type: ignore[attr-defined]
    return choice


def _choice(setting: str, weights: dict[str, list[Tensor]], *, beside: bool) -> Choice:
    """The choice of a setting for these weights, all of them."""
    if setting == MEASURED:
        return measured_choice(weights).of(weights)
    is_text = setting.startswith("{")
    place = "[run] kernels" if is_text else setting
    found, is_whole = (parse_choice(setting), True) if is_text else read_choice(Path(setting))
    choice = _usable(place, found.of(weights), weights)
    if not (is_whole or beside):
        if not choice.names:
            raise DataError(
                f"{setting}: chooses nothing for the weights of this model\n"
                "  fix: blt bench-kernels with this model, in the dtype of its runs"
            )
        return choice.filled(weights)
    lacking = choice.lacking(weights)
    return choice.joined(measured_choice(lacking).of(lacking)) if lacking else choice


def setting_elsewhere(setting: str, own: str) -> str:
    """The setting by which another process, or machine, has kernels as this one has them.

    setting: of this process. own: the text of the choice that its model has. What was chosen for
    models beside it is told, too.
    """
    choice = parse_choice(own)
    if setting.startswith("{"):
        choice = choice.joined(parse_choice(setting))
    elif setting != MEASURED:
        with contextlib.suppress(DataError):  # it was there when the model was loaded
            choice = choice.joined(read_choice(Path(setting))[0])
    kept = _kept_here()
    with contextlib.suppress(OSError, RuntimeError):  # where nothing can be stored
        kept = _stored(stored_at()).joined(kept)
    return choice.joined(kept).text()


def weights_of(model: nn.Module) -> dict[str, list[Tensor]]:
    """The weights that kernels are chosen for, by name; the most bytes first."""
    found: dict[str, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, Linear) and is_chosen_for(module.weight):
            own = found.setdefault(name_of(module.weight), [])
            if all(each is not module.weight for each in own):
                own.append(module.weight)
    return dict(sorted(found.items(), key=lambda each: -sum(w.nbytes for w in each[1])))


def copied_bytes(weights: list[Tensor], kernels: set[str]) -> int:
    """Bytes of the copies that these kernels make of the weights."""
    return sum(KERNELS[name].copies for name in kernels) * sum(w.nbytes for w in weights)


def measured_choice(weights: dict[str, list[Tensor]]) -> Choice:
    """The stored choice of this machine, with what it lacks for ``weights`` measured and added."""
    try:
        path = stored_at()
        found = _stored(path)
        if not found.lacking(weights):
            return found
        make_private(path.parent)
    except (OSError, RuntimeError) as error:  # another user's folder; a user without a home
        return _completed(Choice({}), weights, error)
    with alone_with(path, "measures kernels"):
        return _completed(_stored(path), weights, path)


def _kept_here() -> Choice:
    return _unstored.get((machine(), native_hash()), Choice({}))


def _completed(found: Choice, weights: dict[str, list[Tensor]], path: Path | Exception) -> Choice:
    """``found`` with what it lacks; stored at ``path``, or kept here for the error that is one."""
    found = found.joined(_kept_here())
    lacking = found.lacking(weights)
    if not lacking:
        return found
    began = time.perf_counter()
    some = spread(lacking, cut=True)
    large = {name for name, own in lacking.items() if sum(w.nbytes for w in own) > COPIED}
    left = BUDGET - (time.perf_counter() - began)
    times = measure(some, budget=left, without_copies=large)
    # What there was no time for is by fixed rule from now on: later runs give the same bytes.
    found = found.changed_by(times).filled(lacking)
    try:
        if isinstance(path, Exception):
            raise path
        found.write(path)
    except (OSError, RuntimeError) as error:
        logger().warning("the choice of kernels cannot be stored", error=str(error))
        _unstored[machine(), native_hash()] = found
    return found


def remeasured(
    weights: dict[str, list[Tensor]], watch: Callable[[int, int], None]
) -> tuple[Choice, Times, Path]:
    """Measure all again and store it; the choice, what was measured, and where it is stored.

    Raises OSError where it cannot be stored.
    """
    path = stored_at()
    make_private(path.parent)
    times = measure(spread(weights), watch=watch)
    with alone_with(path, "measures kernels"):
        choice = _stored(path).changed_by(times)
        choice.write(path)
    return choice, times, path


def _stored(path: Path) -> Choice:
    """The choice that is stored for this machine; an empty one where none is, or a broken one."""
    if not path.exists():
        return Choice({})
    try:
        return read_choice(path)[0]
    except DataError as error:
        logger().warning("the stored choice of kernels is measured again", error=str(error))
        return Choice({})


def _usable(place: str, choice: Choice, weights: dict[str, list[Tensor]]) -> Choice:
    """The choice; DataError if it needs a kernel that is not there."""
    packed = [name for name, each in choice.names.items() if "onednn" in each.values()]
    if not all(packs(weights[name][0]) for name in packed):
        raise DataError(
            f"{place}: chooses oneDNN's kernel for {packed[0]}, which this machine has not\n"
            "  fix: blt bench-kernels, or BLT_KERNELS=fixed for all machines"
        )
    if choice.uses("native") and (choice.native is None or choice.native != native_hash()):
        there = "is not built here" if native_hash() is None else "is another here"
        raise DataError(
            f"{place}: chooses the native kernel {choice.native}, which {there}\n"
            "  fix: blt bench-kernels --build with the same blt-core, or choose again"
        )
    return choice
