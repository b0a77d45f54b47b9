"""The manual's texts in Markdown: a page a kind, and a page a component, made of its record.

The site shows the same texts as ``blt docs``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import tomli_w

from blt_core.cli.describing import check_kind, describe, find_entries, spelt
from blt_core.errors import PluginError, near_match
from blt_core.plugins.loading import Plugins
from blt_core.resources import resource


def kind_text(loaded: Plugins, kind: str) -> str:
    """The page of a kind: what it is and its contracts. PluginError for an unknown kind.

    A kind that a plugin of somebody else declares has no page here: its record is told instead.
    """
    check_kind(loaded, kind)
    page = resource("docs/kinds") / f"{kind}.md"
    if page.is_file():
        return page.read_text(encoding="utf-8")
    declared = loaded.manifest.kinds[kind]
    return (
        f"# Kind `{kind}`\n\n{declared.summary.capitalize()}. Protocol: `{declared.protocol}`.\n\n"
        f"Try one: `blt plugins test {kind} NAME`.\n"
    )


def contract_text(loaded: Plugins, kind: str, contract: str) -> str:
    """What the page of a kind says of one contract; PluginError, with near matches, if nothing."""
    page = kind_text(loaded, kind)
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    if contract not in sections:
        raise PluginError(
            f"no contract {contract!r} of the kind {kind!r}.{near_match(contract, sections)}",
            (f"all of them: blt docs {kind}",),
        )
    return f"# {kind}.{contract}\n{sections[contract]}"


def component_text(loaded: Plugins, kind: str, name: str) -> str:
    """The page of a component, or of all of that name if several distributions supply it.

    Raises PluginError, with near matches, if there is none.
    """
    check_kind(loaded, kind)
    return "\n".join(_page(describe(loaded, entry)) for entry in find_entries(loaded, kind, name))


def list_text(loaded: Plugins) -> str:
    """All components by kind, each with its summary."""
    lines = ["# Components", "", "| kind | name | what it is |", "|---|---|---|"]
    entries = {(e.record.kind, e.record.name): e.record.summary for e in loaded.registry.entries}
    for kind in loaded.manifest.kinds:
        for (of_kind, name), summary in sorted(entries.items()):
            if of_kind == kind:
                lines.append(f"| `{kind}` | `{name}` | {_cell(summary)} |")
    return "\n".join((*lines, ""))


def _page(about: dict[str, Any]) -> str:
    return "\n".join((*_head(about), *_keys(about["keys"]), *_facts(about), ""))


def _head(about: dict[str, Any]) -> Iterable[str]:
    version = f" {about['version']}" if about["version"] else ""
    yield f"# {about['kind']} `{about['name']}`"
    yield ""
    yield f"{about['summary'][:1].upper()}{about['summary'][1:]}."
    yield ""
    yield (
        f"From {about['distribution']}{version}, plugin `{about['entry_point']}`: "
        f"`{about['object']}`."
    )
    if about["status"] != "ok":
        yield f"\nStatus: {about['status']}."
    yield ""


def _keys(keys: list[dict[str, Any]]) -> Iterable[str]:
    yield "## Keys\n"
    if not keys:
        yield "None.\n"
        return
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key in keys:
        wanted = ", ".join(filter(None, (key["type"], key["range"])))
        default = "required" if key["required"] else f"`{spelt(key['default'])}`"
        cells = (f"`{key['name']}`", wanted, default, key["meaning"] or "")
        yield f"| {' | '.join(map(_cell, cells))} |"
    yield ""


def _facts(about: dict[str, Any]) -> Iterable[str]:
    if about["provides"]:
        yield f"Provides, by default: {', '.join(map(_code, about['provides']))}.\n"
    if about["requires"]:
        yield f"Requires: {', '.join(map(_code, about['requires']))}.\n"
    if about["dims"]:
        dims = ", ".join(f"`{dim}` (key `{field}`)" for dim, field in about["dims"].items())
        yield f"Must agree with other parts on: {dims}.\n"
    if about["expands_to"]:
        yield f"## Expands to\n\n```toml\n{tomli_w.dumps(about['expands_to']).strip()}\n```\n"
    yield f"## Example\n\n```toml\n{about['example']}\n```"


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
