from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest

from blt_core import hookspecs
from blt_core.component import Kind
from blt_core.errors import PluginError
from blt_core.plugins import registry_file
from blt_core.plugins.entry_points import canonical
from blt_core.plugins.loading import load_plugins
from blt_core.plugins.registry_file import Supplier, load_manifest, manifest_files


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "registry.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_every_shipped_kind_has_a_protocol_that_can_be_imported(manifest) -> None:
    for kind in manifest.kinds.values():
        assert kind.load_protocol().__module__.startswith("blt_core.protocols.")


def test_nested_kinds_are_no_roots(manifest) -> None:
    assert {"patcher", "decoder", "sampler", "cost_model"} <= set(manifest.roots)
    assert not {"byte_scorer", "drafter", "verification", "unmasking"} & set(manifest.roots)


def test_later_files_override_entry_by_entry_and_blocks_add_up(shipped, write) -> None:
    user = write(
        """schema = 1
        blocked = ["acme-evil"]
        [components.sampler]
        "acme/tree" = { distribution = "acme-old" }
        "acme/bush" = { distribution = "acme" }
        [prefer.sampler]
        ar = "acme"
        """,
        "user.toml",
    )
    project = write(
        """schema = 1
        blocked = []
        [components.sampler]
        "acme/tree" = { distribution = "acme", install = "pip install acme[tree]" }
        """
    )
    manifest = load_manifest([shipped, user, project])
    assert manifest.components["sampler", "acme/tree"].command == "pip install acme[tree]"
    assert manifest.components["sampler", "acme/bush"].command == "pip install acme"
    assert manifest.components["sampler", "ar"].distribution == "blt-core"
    assert manifest.prefer["sampler", "ar"] == "acme"
    assert manifest.blocks_distribution("Acme_Evil") == str(user)
    assert manifest.index.suppliers_of("sampler", "ar") == {Supplier("blt-core", "sampling")}


@pytest.mark.parametrize("table", ["kinds", "settings"])
def test_only_the_shipped_file_has_code_imported(shipped, write, problems, table) -> None:
    """Entering a folder with a registry.toml must not run what that folder says."""
    file = write(f'schema = 1\n[{table}.sampler]\nprotocol = "antigravity:fly"\nsummary = ""\n')
    [problem] = problems(load_manifest, [shipped, file])
    assert problem == (
        f"{file}: {table}: not a table of this file: a file cannot have code imported; "
        f"{table} are declared by installed plugins, in the hook blt_{table}\n"
        "  registry.toml takes: schema, components, prefer, blocked"
    )
    assert "antigravity" not in sys.modules


def test_only_the_shipped_file_says_which_plugin_supplies_a_component(
    shipped, write, problems
) -> None:
    file = write('schema = 1\n[components.sampler.ar]\ndistribution = "x"\nplugin = "y"\n')
    [problem] = problems(load_manifest, [shipped, file])
    assert problem.startswith(f"{file}: components.sampler.ar.plugin: unknown key.")


def test_another_checkouts_file_is_no_projects_file(tmp_path, monkeypatch, shipped) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    (tmp_path / "blt_core").mkdir()
    (tmp_path / "blt_core" / "__init__.py").touch()
    (tmp_path / "registry.toml").write_text(shipped.read_text())
    monkeypatch.chdir(tmp_path)
    assert len(manifest_files()) == 1


def test_the_users_file_comes_before_the_projects(tmp_path, monkeypatch, shipped) -> None:
    home, project = tmp_path / "home", tmp_path / "project"
    (home / "blt").mkdir(parents=True)
    project.mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    monkeypatch.chdir(project)
    assert len(manifest_files()) == 1
    (home / "blt" / "registry.toml").touch()
    (project / "registry.toml").write_text("schema = 1\n")
    user, own = manifest_files()[1:]
    assert (user.parent.parent, own.resolve().parent) == (home, project)
    monkeypatch.chdir(shipped.parent)
    assert len(manifest_files()) == 2, "the shipped file is not the project's as well"


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("schema = 1\n", True),
        ("# ours\nblocked = []\n  schema=2\n[x]\n", True),
        ("schema = 1\nblocked = [\n", True),
        ("", False),
        ("[[registry]]\nname = 'x'\n", False),
        ("[database]\nschema = 'public'\n", False),
        ("{% schema = 1 %}\n", False),
    ],
)
def test_a_file_of_another_program_is_no_projects_file(tmp_path, monkeypatch, text, ours) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "registry.toml").write_text(text)
    assert len(manifest_files()) == 1 + ours


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('schema = 1\nblocked = ["acme"]\n'.encode("utf-8-sig"), None),
        (b'"schema" = 1\nblocked = ["acme"]\n', None),
        ("schema = 1\n".encode("utf-16"), "UTF-16 text, not UTF-8; save it as UTF-8"),
        ("schema = 1\n".encode("utf-16-be"), "UTF-16 or UTF-32 text, not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git-LFS pointer, not the file"),
    ],
)
def test_a_projects_file_in_any_encoding_is_obeyed_or_refused(
    tmp_path, monkeypatch, problems, data, message
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "registry.toml").write_bytes(data)
    if message is None:
        assert load_manifest().blocks_distribution("acme") == "registry.toml"
    else:
        (found,) = problems(load_manifest)
        assert found.startswith(f"registry.toml: {message}")


def test_a_folder_of_that_name_is_no_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "registry.toml").mkdir()
    assert len(manifest_files()) == 1


def test_an_account_without_a_home_has_no_users_file(tmp_path, monkeypatch) -> None:
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.chdir(tmp_path)
    assert len(manifest_files()) == 1


def test_a_users_file_that_cannot_be_looked_at(tmp_path, monkeypatch, problems) -> None:
    def stat(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(registry_file, "resource", Path)
    assert problems(manifest_files) == [
        f"{tmp_path}/blt/registry.toml: cannot be read: Permission denied"
    ]


def test_a_distribution_has_a_name(shipped, write, problems) -> None:
    file = write('schema = 1\n[components.sampler]\ntree = { distribution = "" }\n')
    assert problems(load_manifest, [shipped, file]) == [
        f"{file}: components.sampler.tree.distribution: expected a text that is not empty, got ''"
    ]


def test_all_problems_of_all_files_are_reported(shipped, write, problems) -> None:
    first = write(
        """schema = 1
        blockd = []
        [components.sampler.ar]
        distribution = 3
        """,
        "first.toml",
    )
    second = write("schema = 2\n", "second.toml")
    unknown, *others = problems(load_manifest, [shipped, first, second])
    assert unknown == (
        f"{first}: blockd: unknown key. Did you mean 'blocked'?\n"
        "  registry.toml takes: schema, components, prefer, blocked"
    )
    assert others == [
        f"{first}: components.sampler.ar.distribution: expected str, got int 3",
        f"{second}: schema: expected one of 1, got 2",
    ]


def test_kinds_that_a_file_names_exist(shipped, write, problems) -> None:
    file = write('schema = 1\n[prefer.samplr]\nar = "acme"\n')
    [problem] = problems(load_plugins, load_manifest([shipped, file]), installed=False)
    assert problem.startswith(
        f"{file}: prefer.samplr: no kind named 'samplr'. Did you mean 'sampler'?\n"
        "  kinds: patcher, byte_scorer"
    )


def test_the_shipped_files_kinds_are_checked(write, problems) -> None:
    file = write('schema = 1\n[kinds.pet]\nprotocol = "acme.pets"\n')
    first, second = problems(load_manifest, [file])
    assert first.startswith(f"{file}: kinds.pet.protocol: expected an import path such as")
    assert second == f"{file}: kinds.pet.summary: missing; this table needs it: str"


def test_a_protocol_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(PluginError, match=r"'no_such_package:Pet' cannot be imported"):
        Kind("no_such_package:Pet", "a pet").load_protocol()
    with pytest.raises(PluginError, match=r"'blt_core.protocols:Pet' cannot be imported"):
        Kind("blt_core.protocols:Pet", "a pet").load_protocol()


def test_distribution_names_are_compared_as_indexes_do() -> None:
    assert canonical("Blt_Acme") == canonical("blt-acme") == canonical("BLT.-acme")


def test_the_index_says_what_the_plugins_of_this_distribution_supply(manifest) -> None:
    loaded = load_plugins(manifest).loaded
    # What declares a kind is imported for that, so the index need not know it.
    own = [p for p in loaded if p.origin.distribution == "blt-core" and not p.kinds]
    supplied: dict[str, list] = {p.origin.entry_point: [] for p in own}
    tables = {}
    for plugin in own:
        name = plugin.origin.entry_point
        supplied[name] = sorted((record.kind, record.name) for record in plugin.components)
        tables |= {table: Supplier("blt-core", name) for table in plugin.settings}
    said: dict[str, list] = {name: [] for name in supplied}
    for key, supplier in sorted(manifest.index.components.items()):
        said[supplier.plugin].append(key)
    assert said == supplied
    assert manifest.index.tables == tables


def test_plugins_of_the_index_have_no_hook_that_needs_them_imported(manifest) -> None:
    for plugin in load_plugins(manifest).loaded:
        hooks = {n for n in vars(hookspecs) if n.startswith("blt_") and hasattr(plugin.plugin, n)}
        if plugin.origin.distribution == "blt-core" and not plugin.kinds:
            assert hooks <= {"blt_components", "blt_settings", "blt_check"}
            # blt_check is asked where a config has a table of the plugin.
            assert "blt_check" not in hooks or plugin.settings
