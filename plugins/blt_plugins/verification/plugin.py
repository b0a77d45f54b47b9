"""Hooks of the verifications' plugin."""

from blt_core.component import Component
from blt_core.hookspecs import hookimpl
from blt_plugins.verification.greedy import GREEDY
from blt_plugins.verification.replay import REPLAY
from blt_plugins.verification.sampled import BLOCK, REJECTION


@hookimpl
def blt_components() -> list[Component]:
    """The verifications."""
    return [REPLAY, GREEDY, REJECTION, BLOCK]
