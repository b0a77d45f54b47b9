"""The conformance kit: what a component of each kind promises, as tests that anyone can run.

>>> from blt_core.testing import check_component
>>> check_component("drafter", "lookup")  # doctest: +SKIP

In pytest, :func:`conformance` makes a test of each contract; on the command line, ``blt plugins
test KIND NAME``. It needs the extra ``testing`` (hypothesis). docs/kinds tells the contracts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blt_core.testing.contracts import (
        PROFILES,
        Broken,
        Contract,
        ContractError,
        Contracts,
        NotPromised,
        Profile,
        Result,
    )
    from blt_core.testing.kit import check_component, contracts_of, try_component
    from blt_core.testing.marking import Trial, conformance

__all__ = [
    "PROFILES",
    "Broken",
    "Contract",
    "ContractError",
    "Contracts",
    "NotPromised",
    "Profile",
    "Result",
    "Trial",
    "check_component",
    "conformance",
    "contracts_of",
    "try_component",
]

_MODULES = {
    "contracts": (
        *("PROFILES", "Broken", "Contract", "ContractError", "Contracts", "NotPromised"),
        *("Profile", "Result"),
    ),
    "kit": ("check_component", "contracts_of", "try_component"),
    "marking": ("Trial", "conformance"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"{__name__}.{_MODULE_OF[name]}"
    try:
        value = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        text = "the conformance kit needs hypothesis: pip install 'blt-core[testing]'"
        raise ModuleNotFoundError(text, name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
