"""``blt new-plugin``: a distribution with a component that works, its tests and its config."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shutil
import string
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import attrs
import typer

from blt_core import __version__
from blt_core.cli.describing import check_kind
from blt_core.cli.streams import output
from blt_core.errors import DataError, PluginError
from blt_core.plugins.loading import Plugins, load_plugins

#: What templates call the component.
PLACEHOLDER = "acme/name"
#: What every distribution has beside the component of its kind.
_FILES = "blt_core.templates.distribution"
_SHOWN_NAME = "a name such as acme-tree: letters, digits and single dashes, a letter first"


@attrs.frozen
class Names:
    """What a distribution, its package and its component are called."""

    distribution: str
    module: str
    component: str


@attrs.frozen
class Template:
    """A component that works, and a config that uses it; each with PLACEHOLDER for its name."""

    component: str
    config: str

    @property
    def command(self) -> str:
        """How to run the config, as its first line says."""
        return self.config.partition("\n")[0].removeprefix("#").strip()


def new_plugin(
    name: Annotated[str, typer.Argument(help="Of the distribution, as acme-tree.")],
    *,
    kind: Annotated[str, typer.Option("--kind", help="Of its component: blt plugins lists them.")],
    into: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="The folder to make. Default: NAME, here."),
    ] = None,
) -> None:
    """Write a distribution with one component: it works, and its tests pass, before you change it.

    The component is called acme/tree if the distribution is acme-tree or blt-acme-tree.
    """
    loaded = load_plugins()
    check_kind(loaded, kind)
    names = names_of(name)
    _refuse_taken(loaded, kind, names)
    template = template_of(loaded, kind)
    target = into if into is not None else Path(names.distribution)
    write(target, files_of(names, kind, template))
    output(
        f"{target}: {kind} {names.component!r}, in src/{names.module}/plugin.py\n"
        f"  cd {target}\n"
        '  pip install -e ".[test]"\n'
        "  pytest\n"
        f"  blt plugins test {kind} {names.component}\n"
        f"  {template.command.replace(PLACEHOLDER, names.component)}"
    )


def names_of(name: str) -> Names:
    """The names that follow from a distribution's. Raises DataError for one that is unfit."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_.][A-Za-z0-9]+)*", name):
        raise DataError(f"{name!r}: expected {_SHOWN_NAME}")
    distribution = re.sub(r"[-_.]", "-", name).lower()
    module = distribution.replace("-", "_")
    if distribution == "blt-core" or module in ("blt_plugins", "pytest_blt"):
        raise DataError(f"{name!r} is blt-core's own; expected {_SHOWN_NAME}")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names:
        raise DataError(f"{name!r}: Python has a module {module!r} already; choose another name")
    return Names(distribution, module, distribution.removeprefix("blt-").replace("-", "/", 1))


def _refuse_taken(loaded: Plugins, kind: str, names: Names) -> None:
    if names.component in loaded.registry.names(kind):
        owner = loaded.registry.lookup(kind, names.component).origin.distribution
        raise PluginError(
            f"there is a {kind} {names.component!r} already ({owner}); choose another name"
        )


def template_of(loaded: Plugins, kind: str) -> Template:
    """The template of a kind. Raises PluginError for one that declares none, or a wrong one."""
    module = loaded.manifest.kinds[kind].template
    if not module:
        raise PluginError(
            f"the kind {kind!r} has no template",
            ('fix, in the plugin that declares it: Kind(…, template="package.module")',),
        )
    try:
        found = importlib.util.find_spec(module)
    except ImportError as error:
        raise PluginError(f"the template of {kind!r}, {module}, is not there: {error}") from error
    if found is None or found.origin is None:
        raise PluginError(f"the template of {kind!r}, {module}, is not there")
    path = Path(found.origin)
    try:
        texts = [each.read_text(encoding="utf-8") for each in (path, path.with_suffix(".toml"))]
    except (OSError, UnicodeDecodeError) as error:
        raise PluginError(f"the template of {kind!r} cannot be read: {error}") from error
    for text, ending in zip(texts, (".py", ".toml"), strict=True):
        if PLACEHOLDER not in text:
            raise PluginError(f"{path.with_suffix(ending)} names no {PLACEHOLDER!r}: no template")
    return Template(*texts)


def files_of(names: Names, kind: str, template: Template) -> dict[str, str]:
    """The text of each file, by its path in the distribution."""
    facts = {
        **attrs.asdict(names),
        "kind": kind,
        "version": __version__,
        "command": template.command.replace(PLACEHOLDER, names.component),
    }
    found = importlib.util.find_spec(_FILES)
    if found is None or found.origin is None:
        raise DataError("the files of new plugins are not there; install blt-core again")
    shared = Path(found.origin).parent

    def filled(name: str) -> str:
        return string.Template((shared / name).read_text(encoding="utf-8")).substitute(facts)

    package = f"src/{names.module}"
    return {
        "pyproject.toml": filled("pyproject.toml.in"),
        "README.md": filled("README.md.in"),
        ".gitignore": filled("gitignore.in"),
        ".github/workflows/test.yml": filled("test.yml.in"),
        f"{package}/__init__.py": filled("init.py.in"),
        f"{package}/py.typed": "",
        f"{package}/plugin.py": template.component.replace(PLACEHOLDER, names.component),
        "example.toml": template.config.replace(PLACEHOLDER, names.component),
        "tests/test_component.py": filled("test_component.py.in"),
    }


def write(target: Path, files: Mapping[str, str]) -> None:
    """Write a folder that is not there yet: whole, or not at all. Raises DataError."""
    if target.exists() or target.is_symlink():
        raise DataError(f"{target}: exists already; choose another --output")
    if not target.parent.is_dir():
        raise DataError(f"{target}: the folder {target.parent} does not exist")
    new: Path | None = None
    try:
        new = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        for name, text in files.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        new.chmod(0o777 & ~_umask())  # mkdtemp's is for nobody else
        new.rename(target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
