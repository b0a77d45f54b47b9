"""Makes the pages of the site that follow from the code, and the nav: a hook of mkdocs.

Components and kinds are told by :mod:`blt_core.cli.manual`, as ``blt docs`` tells them; commands by
what typer knows of them; the API by docstrings. Nothing is written into ``docs/``.
"""

from __future__ import annotations

import importlib
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocstrings_handlers.python._internal import rendering

import blt_core.protocols
import blt_core.types
from blt_core.cli.manual import component_text, list_text
from blt_core.plugins.commands import find_commands
from blt_core.plugins.loading import Plugins, load_plugins

ROOT = Path(__file__).resolve().parents[2]

#: What the reference of the API tells of: the modules that plugins and programs import, each with
#: the modules below it. tests/docs holds it to the list in tests/core/test_layers.py.
MODULES = (
    *("component", "hookspecs", "protocols", "caches", "types", "errors", "faults", "files"),
    *("log", "nn", "model"),
    *("decoding.drafting", "decoding.denoising", "decoding.following", "storage"),
    *("tables.place", "tables.inline", "plugins.loading", "wiring", "loading"),
    *("pipeline", "batch_inference", "execution", "pricing", "published", "cli"),
    *("evaluation", "testing", "compare", "requests", "scoring", "decoding.engine"),
)
#: Pages that are files elsewhere in the repository.
ELSEWHERE = {
    "benchmarks/README.md": "benchmarks.md",
    "plugins/blt_plugins/demo/python/README.md": "cards/python.md",
    "plugins/blt_plugins/demo/translate/README.md": "cards/translate.md",
}
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the made pages, and read the nav of ``mkdocs.yml`` with them."""
    for uri, text in made_pages():
        files.append(File.generated(config, uri, content=text))
    names = sorted(f.src_uri for f in files.documentation_pages())
    named = {each for each in _leaves(config.nav) if not each.endswith("/*")}
    config.nav = [item for each in config.nav for item in _expanded(each, names, named)]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to other files of the repository to their pages; name a kind's components."""
    uri = page.file.src_uri
    markdown = _relinked(markdown, uri)
    if match := re.fullmatch(r"kinds/(\w+)\.md", uri):
        markdown = _with_protocol_links(_with_component_links(markdown, match[1]))
    return markdown


# -- pages -----------------------------------------------------------------------------------------


def made_pages() -> Iterator[tuple[str, str]]:
    """The address below ``docs/``, and the Markdown, of each page that is made."""
    loaded = load_plugins()
    yield from _of_components(loaded)
    yield "kinds/index.md", _kinds(loaded)
    for name, command in find_commands(loaded.manifest).items():
        yield f"reference/commands/{name}.md", _command(f"blt {name}", command)
    yield "reference/api/index.md", _names()
    for module in api_modules():
        yield f"reference/api/{module}.md", _module(module)
    yield "reference/configs.md", _configs()
    for path, uri in ELSEWHERE.items():
        yield uri, (ROOT / path).read_text(encoding="utf-8")


def _of_components(loaded: Plugins) -> Iterator[tuple[str, str]]:
    row = re.compile(r"^\| `(\w+)` \| `([\w.-]+)` \|", re.MULTILINE)
    text = list_text(loaded)
    yield (
        "components/index.md",
        row.sub(r"| [`\1`](../kinds/\1.md) | [`\2`](\1/\2.md) |", text).replace(
            "# Components\n",
            "# Components\n\nAll that a config can name. In a terminal: `blt docs KIND NAME`.\n",
            1,
        ),
    )
    for kind, name in row.findall(text):
        yield f"components/{kind}/{name}.md", component_text(loaded, kind, name)


def _kinds(loaded: Plugins) -> str:
    lines = ["# Kinds", "", "A kind is a contract; a component fulfils it. Each page tells what is"]
    lines += ["promised, a heading a contract: `blt plugins test KIND NAME` tries them.", ""]
    lines += ["| kind | what it is | protocol |", "|---|---|---|"]
    for name, kind in loaded.manifest.kinds.items():
        lines.append(f"| [`{name}`]({name}.md) | {kind.summary} | `{kind.protocol}` |")
    return "\n".join((*lines, ""))


def _command(path: str, command: Any) -> str:
    lines = [f"# `{path}`", "", command.help or "", ""]
    for title, found in (
        ("Arguments", [p for p in command.params if p.param_type_name == "argument"]),
        ("Options", [p for p in command.params if p.param_type_name == "option"]),
    ):
        if found:
            lines += [f"## {title}", "", "| | | default |", "|---|---|---|"]
            lines += [_parameter(each) for each in found]
            lines.append("")
    for name, below in getattr(command, "commands", {}).items():
        lines += ["", _command(f"{path} {name}", below).replace("# ", "## ", 1)]
    return "\n".join(lines)


def _parameter(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = f"`{parameter.metavar or parameter.name.upper()}`"
    else:
        name = ", ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))
    plain = isinstance(parameter.default, (str, int, float))
    default = f"`{parameter.default}`" if plain and parameter.default is not False else ""
    said = (parameter.help or "").replace("|", "\\|")
    return f"| {name} | {said} | {'required' if parameter.required else default} |".replace(
        " | ]", " \\| ]"
    )


def api_modules() -> list[str]:
    """The modules of the reference, below ``blt_core``."""
    found = []
    for module in MODULES:
        path = ROOT / "blt_core" / module.replace(".", "/")
        if path.is_dir():
            below = sorted(p for p in path.rglob("*.py") if not p.name.startswith("_"))
            found += [module, *(_dotted(p) for p in below)]
        else:
            found.append(module)
    return found


def _dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "blt_core").with_suffix("").parts)


def _module(module: str) -> str:
    # A package's own page tells what its own file says; its modules have pages.
    package = (ROOT / "blt_core" / module.replace(".", "/")).is_dir()
    options = "    options: { members: [], show_submodules: false }\n" if package else ""
    return f"# `blt_core.{module}` {{#blt_core.{module}}}\n\n::: blt_core.{module}\n{options}"


def _names() -> str:
    lines = ["# API", "", "Names that `import blt_core` gives; each is imported when it is used."]
    lines += ["", "| name | module |", "|---|---|"]
    for name in blt_core.__all__:
        thing = getattr(blt_core, name)
        module = getattr(thing, "__module__", None) or ""
        if not module.startswith("blt_core."):
            module = f"blt_core.{blt_core._MODULE_OF[name]}"  # noqa: SLF001 -- where it is from
        if module.removeprefix("blt_core.") not in api_modules():
            raise LookupError(f"{name}: {module} is not in the reference")
        lines.append(f"| [`{name}`][{module}.{name}] | `{module}` |")
    return "\n".join((*lines, ""))


def _configs() -> str:
    lines = ["# Shipped configs", "", "`blt generate NAME` and `blt train NAME` take these names."]
    for path in sorted((ROOT / "configs").glob("*.toml")):
        lines += ["", f"## {path.stem}", "", "```toml", path.read_text("utf-8").rstrip(), "```"]
    return "\n".join((*lines, ""))


# -- links -----------------------------------------------------------------------------------------


def _relinked(markdown: str, uri: str) -> str:
    """Links as the site has them; a page that is a file elsewhere has links from there."""
    source = next((path for path, page in ELSEWHERE.items() if page == uri), f"docs/{uri}")

    def lead(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        page, anchor = _page_of(path, anchor)
        if page is None:
            return text
        return f"[{text}]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{anchor})"

    pieces = re.split(r"(^```.*?^```\s*$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(p if p.startswith("```") else _LINK.sub(lead, p) for p in pieces)


def _page_of(path: str, anchor: str) -> tuple[str | None, str]:
    """The page, and the anchor there, of a file of the repository; None for one that has none."""
    if path in ELSEWHERE:
        return ELSEWHERE[path], anchor
    if path.startswith("docs/"):
        return path.removeprefix("docs/"), anchor
    if path.startswith("configs/"):
        return "reference/configs.md", f"#{Path(path).stem}"
    if path.startswith("blt_core/") and path.endswith(".py"):
        return f"reference/api/{_dotted(ROOT / path)}.md", anchor
    return None, ""


def _with_component_links(markdown: str, kind: str) -> str:
    """The line of a kind's page that names its components, each name a link."""
    line = re.compile(r"^Try one: .*?\((.*?) are here\)", re.MULTILINE)

    def linked(match: re.Match[str]) -> str:
        names = re.sub(r"`([\w.-]+)`", rf"[`\1`](../components/{kind}/\1.md)", match[1])
        return match[0].replace(match[1], names)

    return line.sub(linked, markdown)


def _with_protocol_links(markdown: str) -> str:
    """A kind's page with links from its protocol, and from what that is handed and gives."""
    told = re.search(r"Protocol: `(\w[\w.]*):(\w+)`\.", markdown)
    if told is None:
        return markdown
    home = vars(importlib.import_module(told[1]))
    protocol = home[told[2]]
    signatures = [
        annotation
        for name, member in vars(protocol).items()
        if not name.startswith("_") and callable(member)
        for annotation in map(str, member.__annotations__.values())
    ]
    shared = {**home, **vars(blt_core.protocols), **vars(blt_core.types)}
    names = dict.fromkeys(re.findall(r"\b[A-Z]\w+", " ".join(signatures)))
    classes = {
        name: found
        for name in names
        if isinstance(found := shared.get(name), type) and found.__module__.startswith("blt_core")
    }
    links = f"Protocol: {_to_api(f'{told[1]}:{told[2]}', protocol)}."
    if classes:
        links += f" It deals in {', '.join(_to_api(*each) for each in classes.items())}."
    return markdown.replace(told[0], links)


def _to_api(shown: str, target: type) -> str:
    """A link to a class in the reference of the API."""
    return f"[`{shown}`][{target.__module__}.{target.__qualname__}]"


# -- nav -------------------------------------------------------------------------------------------


def _leaves(items: Iterable[Any]) -> Iterator[str]:
    for item in items:
        if isinstance(item, dict):
            for below in item.values():
                yield from _leaves(below if isinstance(below, list) else [below])
        else:
            yield item


def _expanded(item: Any, names: list[str], named: set[str]) -> list[Any]:
    """An item of the nav, ``folder/*`` written out; nothing for a tutorial that is not there."""
    if isinstance(item, dict):
        [(title, below)] = item.items()
        if isinstance(below, str) and not below.endswith("/*"):
            return [item]
        parts = below if isinstance(below, list) else [below]
        found = [each for part in parts for each in _expanded(part, names, named)]
        return [{title: found}] if found else []
    if not item.endswith("/*"):
        missing = item.startswith("tutorials/") and item not in names
        return [] if missing else [item]
    folder = item.removesuffix("*")
    return _tree([n for n in names if n.startswith(folder) and n not in named], folder)


def _tree(names: list[str], folder: str) -> list[Any]:
    pages: list[Any] = [n for n in names if "/" not in n.removeprefix(folder)]
    pages.sort(key=lambda n: (not n.endswith("/index.md"), n))
    if folder in ("components/", "kinds/", "hooks/", "reference/commands/", "reference/api/"):
        pages = [n if n.endswith("/index.md") else {_title(n, folder): n} for n in pages]
    below = dict.fromkeys(
        n.removeprefix(folder).split("/")[0] for n in names if n not in _flat(pages)
    )
    for name in below:
        inside = [n for n in names if n.startswith(f"{folder}{name}/")]
        pages.append({name: [{Path(n).name.removesuffix(".md"): n} for n in inside]})
    return pages


def _flat(pages: list[Any]) -> set[str]:
    return {next(iter(p.values())) if isinstance(p, dict) else p for p in pages}


def _title(uri: str, folder: str) -> str:
    return uri.removeprefix(folder).removesuffix(".md")


def on_pre_build(**_: Any) -> None:
    """The docstrings' extension is imported by its path, from wherever the build is started."""
    os.chdir(ROOT)
    importlib.invalidate_caches()


# -- signatures ------------------------------------------------------------------------------------


def format_signature(code: str, width: int) -> str:
    """A signature that is longer than a line, a parameter a line.

    In the place of a formatter that mkdocstrings would start a process of for each of them.
    """
    begin, end = code.find("("), code.rfind(")")
    if len(code) <= width or begin < 0 or end < begin:
        return code
    parts, depth = [""], 0
    for character in code[begin + 1 : end]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    lines = [f"    {part.strip()}," for part in parts if part.strip()]
    return "\n".join((code[: begin + 1], *lines, code[end:]))


rendering._get_formatter = lambda: format_signature  # noqa: SLF001 -- it has no setting for one
