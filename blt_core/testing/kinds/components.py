"""What every component promises, whatever its kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from blt_core.component import NESTED, Component
from blt_core.protocols import MODEL_KINDS
from blt_core.testing.contracts import Broken, Contract, NotPromised, require
from blt_core.testing.subject import Subject


@attrs.frozen
class Common:
    """A contract of all kinds."""

    name: str
    says: str
    check: Callable[[Subject, Any], None]

    def of(self, kind: str) -> Contract:
        """The same, as a contract of one kind."""
        return Contract(f"{kind}.{self.name}", self.says, self.check)


def _builds(subject: Subject, _: None) -> None:
    if subject.kind in (*MODEL_KINDS, "byte_scorer"):
        subject.new_model()
    else:
        subject.build()


def _defaults(subject: Subject, _: None) -> None:
    params: Any = subject.record.params
    for field in attrs.fields(params):
        if field.default is attrs.NOTHING or NESTED in field.metadata:
            continue
        value = field.default
        if isinstance(value, attrs.Factory):  # type: ignore[arg-type]
            continue
        if isinstance(value, (list, dict, set)):
            raise Broken(
                f"the default of {field.name} is one {type(value).__name__} that all share; "
                "use attrs.field(factory=…)"
            )
        if field.validator is not None:
            try:
                field.validator(None, field, value)
            except Exception as error:
                text = f"its own validator refuses the default of {field.name}: {error}"
                raise Broken(text) from error
        require(
            _fits(value, field.type),
            f"the default of {field.name} is {value!r}, which is no {field.type}",
        )


#: Annotations of single values, and what they accept.
_SINGLE: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}


def _fits(value: object, annotation: object) -> bool:
    """Whether a value is of a plainly annotated type; others are for the reader of tables."""
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    wanted = _SINGLE.get(str(name))
    if wanted is None:
        return True
    return isinstance(value, wanted) and (name == "bool" or not isinstance(value, bool))


def _described(subject: Subject, _: None) -> None:
    record = subject.record
    require(record.summary.strip(), "its record has no summary, which blt plugins shows")
    if not isinstance(record, Component):
        raise NotPromised("it is a preset")
    from blt_core.wiring.resolve import resolve_component

    if subject.kind in (*MODEL_KINDS, "byte_scorer"):
        plan = subject.plan()
        node = plan.node("patcher" if subject.kind == "byte_scorer" else subject.kind)
        node = node.children["byte_scorer"] if subject.kind == "byte_scorer" else node
    else:
        node = resolve_component(subject.kind, subject.own_table, subject.plugins)
    given = copy.deepcopy(node.describe())
    found = node.component.provides(node.params)
    require(
        isinstance(found, frozenset) and all(isinstance(each, str) for each in found),
        f"provides gave {found!r}; expected a frozenset of strings",
    )
    notes = list(node.component.notes(node.params))
    require(all(isinstance(each, str) for each in notes), f"notes gave {notes!r}")
    require(node.describe() == given, "provides or notes changed its params")


COMMON = (
    Common(
        "builds",
        "Its table resolves, its factory builds it, and what it builds fulfils the protocol.",
        _builds,
    ),
    Common(
        "defaults",
        "Defaults of its keys are of the types that they are annotated with, pass their own "
        "validators, and are shared by no two instances.",
        _defaults,
    ),
    Common(
        "described",
        "Its record has a summary; `provides` and `notes` answer for any keys and change nothing.",
        _described,
    ),
)
