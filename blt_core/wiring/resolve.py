"""From a configuration to built components: resolve names, check everything, then build.

:func:`resolve` finds all problems of a configuration before anything is built; what it gives, a
:class:`Plan`, is a tree of nodes that :meth:`Plan.build` turns into objects, nested ones first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs

from blt_core.component import ABILITIES, MANY, NESTED, Ability, BuildContext, Component, Preset
from blt_core.errors import (
    BltError,
    ComponentError,
    ConfigError,
    PluginError,
    Problem,
    near_match,
)
from blt_core.faults import remember
from blt_core.plugins.loading import Plugins
from blt_core.plugins.registry import Entry, Registry
from blt_core.protocols import MODEL_KINDS
from blt_core.tables.place import Place, Table
from blt_core.tables.structure import (
    Invalid,
    article,
    gather,
    plain,
    read_table,
    read_value,
    reason,
    show,
)
from blt_core.wiring.config import SCHEMA, SETTINGS, Config, ModelSettings, RunSettings


@attrs.frozen
class Node:
    """One component of a plan. Nested fields of ``params`` hold nodes.

    path: where it stands in the plan (``sampler.drafter``). place: where it was written. presets:
    the names that were expanded to get here, the one that the config says first.
    """

    entry: Entry
    component: Component
    params: Any
    path: str
    place: Place = attrs.field(eq=False)
    presets: tuple[str, ...] = attrs.field(default=(), eq=False)

    @property
    def kind(self) -> str:
        """Its kind."""
        return self.component.kind

    @property
    def name(self) -> str:
        """The name of its component, presets expanded."""
        return self.component.name

    @property
    def label(self) -> str:
        """How the user knows it: ``sampler 'blt-s'``, where that is a preset."""
        return self.place.preset or _label(self.kind, self.name)

    @property
    def children(self) -> dict[str, Node]:
        """Nested components by field name, those of a table of them as ``field.name``."""
        found: dict[str, Node] = {}
        for name, held in self.map_children(lambda child: child).items():
            if isinstance(held, Node):
                found[name] = held
            else:
                found |= {f"{name}.{key}": child for key, child in held.items()}
        return found

    def map_children(self, change: Callable[[Node], Any]) -> dict[str, Any]:
        """What ``change`` makes of the nested components, by field; a dict where it has many."""
        changed: dict[str, Any] = {}
        for field in attrs.fields(self.component.params):
            held = getattr(self.params, field.name)
            if isinstance(held, Node):
                changed[field.name] = change(held)
            elif MANY in field.metadata:
                changed[field.name] = {key: change(child) for key, child in held.items()}
        return changed

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def describe(self) -> dict[str, Any]:
        """The table that resolves to this node: every key with its value, presets expanded."""
        below = self.map_children(Node.describe)
        return {"use": self.name, **plain(self.params, skip=below), **below}


@attrs.frozen
class Plan:
    """A configuration that has passed every check, ready to build.

    ``settings``: ``run``, ``model`` and the tables of plugins, as far as the config has them.
    ``nodes``: the component of each top-level table.
    """

    settings: Mapping[str, Any]
    nodes: Mapping[str, Node]
    place: Place = attrs.field(eq=False)
    registry: Registry = attrs.field(eq=False, repr=False)

    @property
    def run(self) -> RunSettings:
        """What to run, on what, and the defaults of a request."""
        run: RunSettings = self.settings["run"]
        return run

    @property
    def model(self) -> ModelSettings:
        """The settings that the model parts share; ConfigError if the config has none."""
        if "model" not in self.settings:
            raise ConfigError([_missing(self.place, "model")])
        model: ModelSettings = self.settings["model"]
        return model

    @property
    def notes(self) -> list[str]:
        """What components say of keys that are served but hardly meant, each with its place."""
        nodes = [below for root in self.nodes.values() for below in root.walk()]
        return [f"{n.place.written}: {text}" for n in nodes for text in n.component.notes(n.params)]

    @property
    def abilities(self) -> frozenset[str]:
        """What the parts of the model can do, as ``"decoder.denoises"``."""
        return _abilities(self.nodes)

    def node(self, kind: str) -> Node:
        """The node of a top-level table; ConfigError if the config has none."""
        if kind not in self.nodes:
            raise ConfigError([_missing(self.place, kind)])
        return self.nodes[kind]

    def build(self, kind: str, context: BuildContext | None = None) -> Any:
        """Build the component of a top-level table, nested ones first.

        Raises ConfigError if a factory refuses its params (by a ValueError or an error of ours),
        ComponentError if it fails otherwise, PluginError if what it makes does not fulfil the
        protocol of its kind.
        """
        node = self.node(kind)
        return build_node(node, context or BuildContext(self.model.scheme), self.registry)

    def untrained_blocks(self) -> Iterator[tuple[Node, int, int]]:
        """Components that ask the decoder for longer blocks than any that it was trained on.

        Each with the size that it asks for and the longest trained one; they run, but guess badly.
        Nothing is said of a decoder that does not tell what it was trained on.
        """
        decoder = self.nodes.get("decoder")
        trained = getattr(decoder.params, "block_bytes", None) if decoder is not None else None
        for node in (below for root in self.nodes.values() for below in root.walk()):
            asked = getattr(node.params, "block_bytes", None)
            needs = "decoder.denoises" in node.component.requires and node.kind != "objective"
            if trained and needs and isinstance(asked, int) and asked > max(trained):
                yield node, asked, max(trained)

    def describe(self) -> dict[str, Any]:
        """The tables of the whole plan, fully expanded: they resolve to the same plan."""
        nodes = {kind: node.describe() for kind, node in self.nodes.items()}
        return {"schema": SCHEMA, **plain(self.settings), **nodes}

    def describe_model(self) -> dict[str, Any]:
        """The tables that a checkpoint stores: those that rebuild the model, and no others."""
        tables = self.describe()
        return {key: tables[key] for key in ("schema", "model", *MODEL_KINDS) if key in tables}


def resolve(config: Config, plugins: Plugins, *, needs: Iterable[str] = ()) -> Plan:
    """Check a configuration and resolve its names; nothing is built.

    ``needs``: top-level tables that the caller cannot do without. Raises ConfigError with all
    problems, in the order of the file.
    """
    tables, place = config.tables, config.tables.place
    found: dict[str, Any] = {"run": RunSettings()}
    written = [(key, replaced) for replaced in config.replaced for key in replaced]
    written += [(key, tables) for key in {"schema": None, **tables}]
    faults: dict[int, list[Problem]] = {}
    # The parts of the model first: presets may depend on what these can do.
    order = sorted(range(len(written)), key=lambda number: written[number][0] not in MODEL_KINDS)
    for number in order:
        key, source = written[number]
        try:
            value = _read_top_level(key, source, plugins, _abilities(found))
        except Invalid as error:
            faults[number] = list(error.problems)
        else:
            found |= {key: value} if source is tables else {}
    found = {key: found[key] for key in ("run", "schema", *tables) if key in found}
    problems = [*config.problems, *(each for number in sorted(faults) for each in faults[number])]
    nodes = {key: value for key, value in found.items() if isinstance(value, Node)}
    needed = [*needs, *(["model"] if nodes.keys() & set(MODEL_KINDS) else [])]
    problems += [_missing(place, key) for key in dict.fromkeys(needed) if key not in tables]
    problems += _disagreements(place, nodes)
    problems += _unmet_requirements(config, nodes)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    settings = {k: v for k, v in found.items() if k not in nodes and k != "schema"}
    return Plan(settings, nodes, place, plugins.registry)


def resolve_component(
    kind: str, table: Mapping[str, Any], plugins: Plugins, *, place: str = "config"
) -> Node:
    """Resolve one table of any kind by itself; ConfigError with all its problems."""
    try:
        return _Resolver(plugins.registry).node(kind, table, Place(place, kind), kind)
    except Invalid as error:
        raise ConfigError(error.problems) from error


def build_node(node: Node, context: BuildContext, registry: Registry) -> Any:
    """Build a node, nested ones first, and check what its factory makes."""
    children = node.map_children(lambda child: build_node(child, context, registry))
    params = attrs.evolve(node.params, **children)
    try:
        instance = node.component.factory(params, attrs.evolve(context, nested=_nested(node)))
    except (BltError, ValueError) as error:  # it refuses its params
        text = f"{node.label} cannot be built: {reason(error)}"
        raise ConfigError([node.place.written.problem(text)]) from error
    except Exception as error:
        text = f"{node.entry.label} cannot be built: {reason(error)}"
        raise ComponentError(str(node.place.written.problem(text))) from error
    registry.check_instance(node.entry, instance)
    remember(instance, node.entry.label)
    return instance


def _nested(node: Node) -> frozenset[str]:
    """What all of the nested components of a kind can do, as ``drafter.stops_early``."""
    can: dict[str, frozenset[str]] = {}
    for child in node.children.values():
        own = child.component.provides(child.params)
        can[child.kind] = can.get(child.kind, own) & own
    return frozenset(f"{kind}.{name}" for kind, names in can.items() for name in names)


# -- names and keys ------------------------------------------------------------------------------


@attrs.frozen
class _Resolver:
    registry: Registry
    #: What the parts of the model can do, for presets that adapt to it.
    abilities: frozenset[str] = frozenset()

    def node(
        self, kind: str, value: Any, place: Place, path: str, presets: tuple[str, ...] = ()
    ) -> Node:
        """The node of one component table; raises Invalid with the problems in and below it."""
        if isinstance(value, str):
            text = f"expected a table, got {show(value)}"
            raise Invalid(place.problem(text, f"write {place.setting('use', value)}"))
        table = _table(value, place)
        entry = self._entry(kind, table)
        own = Table({k: v for k, v in table.items() if k != "use"}, table.place, table.moved)
        record = entry.record
        label, trail = _label(kind, record.name), own.place.trail
        if label in trail:
            text = f"{label} leads back to itself: {' -> '.join((*trail, label))}"
            raise Invalid(own.place.written.problem(text))
        if isinstance(record, Preset):
            return self._expand(record, entry, own, path, presets)

        def read(field: attrs.Attribute[Any], given: Any) -> Any:
            if NESTED not in field.metadata:
                return read_value(field, given)
            below = _place_of_nested(field.name, own, label)
            return self._nested(field, given, below, f"{path}.{field.name}")

        params: Any = read_table(record.params, own, entry.label, read, self._takers(kind))
        return Node(entry, record, params, path, table.place, presets)

    def _nested(self, field: attrs.Attribute[Any], value: Any, place: Place, path: str) -> Any:
        """The node of a nested field, or a dict of nodes where it holds a table of them."""
        kind = field.metadata[NESTED]
        if MANY not in field.metadata:
            return self.node(kind, value, place, path)
        table = _table(value, place)
        return gather(
            table.items(),
            lambda key, item: self.node(kind, item, table.place_of(key), f"{path}.{key}"),
        )

    def _entry(self, kind: str, table: Table) -> Entry:
        use, place = table.get("use"), table.place_of("use")
        words = kind.replace("_", " ")
        if "use" not in table:
            installed = ", ".join(self.registry.names(kind)) or "none"
            raise Invalid(
                place.problem(f"missing; it names the {words}", f"installed: {installed}")
            )
        if not isinstance(use, str):
            raise Invalid(place.problem(f"expected the name of {article(kind)}, got {show(use)}"))
        try:
            return self.registry.lookup(kind, use)
        except PluginError as error:
            raise Invalid(place.problem(error.text, *error.hints)) from error

    def _takers(self, kind: str) -> Callable[[str], str]:
        """Gives what says of a key which components of a kind take it."""

        def told(key: str) -> str:
            names = self.registry.takers(kind, key)
            words, listed = kind.replace("_", " "), ", ".join(map(repr, names))
            return f" It is a key of {words} {listed}." if names else ""

        return told

    def _expand(
        self, preset: Preset, entry: Entry, table: Table, path: str, presets: tuple[str, ...]
    ) -> Node:
        """The node of a preset's expansion; tables of its nested fields go into it as they are."""
        label = _label(preset.kind, preset.name)

        def read(field: attrs.Attribute[Any], given: Any) -> Any:
            if NESTED not in field.metadata:
                return read_value(field, given)
            nested = _table(given, _place_of_nested(field.name, table, label))
            # Only to find its problems now, at the same time as those of the preset's own keys.
            self._nested(field, nested, nested.place, f"{path}.{field.name}")
            return nested

        params: Any = read_table(preset.params, table, entry.label, read, self._takers(preset.kind))
        try:
            # A plugin's promise of a table is checked like a file's.
            known = (self.abilities,) if preset.adapts else ()
            expansion: object = preset.expand(params, *known)
        except Exception as error:
            raise Invalid(table.place.problem(reason(error, entry.label))) from error
        if not isinstance(expansion, Mapping):
            text = f"{entry.label} expands to {show(expansion)}; expected a table"
            raise Invalid(table.place.problem(text))
        place, chain = table.place.expansion(label), (*presets, preset.name)
        return self.node(preset.kind, Table(expansion, place), place, path, chain)


def _label(kind: str, name: str) -> str:
    return f"{kind.replace('_', ' ')} {name!r}"


def _place_of_nested(key: str, table: Table, owner: str) -> Place:
    """Where a nested component was written, or where the default of its owner stands for it."""
    place = table.place_of(key)
    return place if key in table else place.default_of(owner)


def _table(value: Any, place: Place) -> Table:
    if not isinstance(value, Mapping):
        raise Invalid(place.problem(f"expected a table, got {show(value)}"))
    return value if isinstance(value, Table) else Table(value, place)


# -- the whole configuration ---------------------------------------------------------------------


def _abilities(found: Mapping[str, object]) -> frozenset[str]:
    """What the parts of the model can do, as far as they have been read."""
    parts = [node for node in found.values() if isinstance(node, Node) and node.kind in MODEL_KINDS]
    return frozenset(f"{n.kind}.{name}" for n in parts for name in n.component.provides(n.params))


def _read_top_level(key: str, tables: Table, plugins: Plugins, abilities: frozenset[str]) -> object:
    """A node, settings, or the schema's number; raises Invalid with the problems of that key."""
    place, value = tables.place_of(key), tables.get(key)
    if key == "schema":
        return _check_schema(tables)
    if key in SETTINGS:
        return read_table(SETTINGS[key], _table(value, place), f"[{key}]")
    if key in plugins.settings:
        try:
            keys = plugins.settings[key]
        except PluginError as error:
            raise Invalid(place.problem(error.text, *error.hints)) from error
        return read_table(keys, _table(value, place), f"[{key}]")
    if key in plugins.manifest.roots:
        return _Resolver(plugins.registry, abilities).node(key, value, place, key)
    if key in plugins.manifest.kinds:
        text = f"not a top-level table; {article(key)} belongs into the component that uses it"
        raise Invalid(place.problem(text))
    takes = ["schema", *SETTINGS, *plugins.settings, *plugins.manifest.roots]
    hint = f"a config takes: {', '.join(takes)}"
    raise Invalid(place.problem(f"unknown key.{near_match(key, takes)}", hint))


def _check_schema(tables: Table) -> int:
    place, found = tables.place_of("schema"), tables.get("schema")
    if "schema" not in tables:
        raise Invalid(place.problem(f"missing; write schema = {SCHEMA}"))
    if type(found) is not int or found != SCHEMA:
        text = f"expected {SCHEMA}, the one schema that this version reads, got {show(found)}"
        raise Invalid(place.problem(text))
    return found


def _missing(place: Place, key: str) -> Problem:
    hints: tuple[str, ...] = ()
    if key == "model" or key in MODEL_KINDS:
        hints = ("or name a checkpoint, which gives the model: [run] checkpoint = …",)
    return place.child(key).problem(f"missing; this needs a table [{key}]", *hints)


def _disagreements(place: Place, nodes: Mapping[str, Node]) -> list[Problem]:
    """Named dims that components give different values."""
    said: dict[str, list[tuple[Node, str, object]]] = {}
    for node in (below for root in nodes.values() for below in root.walk()):
        for dim, field in node.component.dims.items():
            value = getattr(node.params, field)
            if value is not None:
                said.setdefault(dim, []).append((node, field, value))
    problems = []
    for dim, claims in said.items():
        if len({value for _, _, value in claims}) > 1:
            each = [f"{node.path} says {value} ({node.path}.{f})" for node, f, value in claims]
            text = f"components disagree on {dim}: {', '.join(each)}"
            problems.append(place.problem(text))
    return problems


def _with_siblings(node: Node) -> Iterator[tuple[Node, Mapping[str, Node]]]:
    """A node and all below it, each with the nodes that stand beside it in the same component."""
    yield node, {}
    for child in node.children.values():
        for below, beside in _with_siblings(child):
            yield below, node.children if below is child else beside


def _unmet_requirements(config: Config, nodes: Mapping[str, Node]) -> list[Problem]:
    """Abilities that a component needs of another part that lacks them.

    The part is the one of that kind in the component itself, or else the one beside it (a drafter,
    for a verification), or else the top-level one.
    """
    problems = []
    for node, beside in ((n, b) for root in nodes.values() for n, b in _with_siblings(root)):
        for requirement in sorted(node.component.requires):
            kind, _, name = requirement.partition(".")
            ability = ABILITIES.get(name) or Ability(f"with {name!r}", "does not provide it")
            text = f"{node.label} needs {article(kind)} {ability.need}; "
            inner = [each for each in node.children.values() if each.kind == kind]
            near = inner or [n for n in beside.values() if n.kind == kind and n is not node]
            top = nodes.get(kind)
            # Report a missing table here; a faulty one has been reported already.
            if not near and top is None and kind not in config.tables:
                problems.append(node.place.written.problem(f"{text}there is no table [{kind}]"))
            for part in near or ([top] if top is not None else []):
                if name in part.component.provides(part.params):
                    continue
                stored = config.checkpoint and part.kind in MODEL_KINDS
                origin = "from this checkpoint" if stored else "as configured"
                problems.append(
                    node.place.written.problem(f"{text}{part.name!r} {origin} {ability.lack}")
                )
    return problems
