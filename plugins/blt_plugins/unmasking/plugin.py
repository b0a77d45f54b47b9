"""Hooks of the unmasking rules' plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.unmasking.composed import ANY_OF, AT_MOST, LEFT_TO_RIGHT
from blt_plugins.unmasking.rules import ALL, CONFIDENCE, ENTROPY_BOUND


@hookimpl
def blt_components() -> list[Component]:
    """The unmasking rules."""
    return [ALL, CONFIDENCE, ENTROPY_BOUND, AT_MOST, LEFT_TO_RIGHT, ANY_OF]
