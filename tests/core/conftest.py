"""Fake plugins of the core's tests: small components of several kinds, all in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import pytest

from blt_core.component import Component, Preset, at_least, nested, overridable
from blt_core.errors import ConfigError
from blt_core.hookspecs import hookimpl
from blt_core.plugins.loading import Plugins, load_plugins
from blt_core.plugins.registry_file import Manifest, load_manifest


class Part:
    def __init__(self, params: Any, context: Any) -> None:
        self.params, self.context = params, context

    def new_cache(self, batch): ...


class FakeGlobalModel(Part):
    def forward(self, embeddings, cache): ...


class FakeDecoder(Part):
    denoises = False
    reads_byte_states = False

    def forward(self, clean, blocks, latents, cache): ...


class FakePatcher(Part):
    def flags(self, rows, cache): ...


class FakeScorer(Part):
    def logits(self, rows, cache): ...


class FakeSampler(Part):
    def check(self, sampling): ...
    def round(self, ops, sampling, draws): ...


class FakeDrafter(Part):
    def draft(self, ops, limit, sampling, draws): ...


class FakeVerification(Part):
    def check(self, sampling): ...
    def accept(self, draft, logits_brV, positions, active, sampling, draws): ...


class FakeUnmasking(Part):
    def select(self, probs_bBV, masked_bB, starts, draws): ...


@attrs.frozen
class NoKeys:
    pass


@attrs.frozen
class GlobalParams:
    latent_dim: int = attrs.field(validator=at_least(1))


@attrs.frozen
class DecoderParams:
    latent_dim: int
    dim: int = 8
    trained_on_blocks: bool = False
    window: int | None = overridable(default=None, validator=at_least(1))


@attrs.frozen
class ScorerParams:
    dim: int = 4
    window: int | None = overridable(default=None)


@attrs.frozen
class PatcherParams:
    max_patch_bytes: int = overridable(default=8)
    byte_scorer: Any = nested("byte_scorer", default="tiny")


@attrs.frozen
class SpeculativeParams:
    drafter: Any = nested("drafter")
    verification: Any = nested("verification", default="greedy")


@attrs.frozen
class BlockParams:
    block_bytes: int = attrs.field(default=8, validator=at_least(2))
    unmasking: Any = nested("unmasking", default="all")


@attrs.frozen
class BltDvParams:
    block_bytes: int = 8
    unmasking: Any = nested("unmasking", default="all")
    verification: Any = nested("verification", default="greedy")


@attrs.frozen
class GammaParams:
    gamma: float = attrs.field(default=1.5, validator=at_least(0.0))


def _decoder_abilities(params: DecoderParams) -> frozenset[str]:
    return frozenset({"denoises"} if params.trained_on_blocks else ())


def _blt_dv(params: BltDvParams) -> dict[str, Any]:
    block = {"block_bytes": params.block_bytes, "unmasking": params.unmasking}
    return {
        "use": "speculative",
        "drafter": {"use": "diffusion", **block},
        "verification": params.verification,
    }


DENOISES = frozenset({"decoder.denoises"})
LATENT = {"latent_dim": "latent_dim"}


def component(kind: str, name: str, factory: Any, params: type = NoKeys, **more: Any) -> Component:
    return Component(kind, name, factory, params, "a fake", **more)


COMPONENTS = (
    component("patcher", "entropy", FakePatcher, PatcherParams),
    component("byte_scorer", "tiny", FakeScorer, ScorerParams),
    component("global_model", "transformer", FakeGlobalModel, GlobalParams, dims=LATENT),
    component(
        "decoder",
        "local",
        FakeDecoder,
        DecoderParams,
        dims=LATENT,
        provides=_decoder_abilities,
    ),
    component("sampler", "ar", FakeSampler),
    component("sampler", "speculative", FakeSampler, SpeculativeParams),
    component("drafter", "self", FakeDrafter),
    component("drafter", "diffusion", FakeDrafter, BlockParams, requires=DENOISES),
    component("verification", "greedy", FakeVerification),
    component("unmasking", "all", FakeUnmasking),
    component("unmasking", "entropy-bound", FakeUnmasking, GammaParams),
    Preset("sampler", "blt-dv", BltDvParams, _blt_dv, "a fake preset"),
)


def make_plugin(*records: Component | Preset, settings: dict[str, type] | None = None) -> object:
    """An object with the hooks of a plugin module."""

    class Plugin:
        @hookimpl
        def blt_components(self):
            return records

        @hookimpl
        def blt_settings(self):
            return settings or {}

    return Plugin()


@pytest.fixture
def install(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Install distributions, besides which there are none: their entry points by group and name.

    ``sources``: modules. ``info``: files of its .dist-info, by name; None leaves one out.
    """
    site, real = tmp_path / "site", metadata.distributions
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(metadata, "distributions", lambda: real(path=[str(site)]))

    def install(
        name: str,
        points: dict[str, dict[str, str]],
        sources: dict[str, str] | None = None,
        info: dict[str, str | bytes | None] | None = None,
        folder: Path = site,
    ) -> Path:
        home = folder / f"{name}-1.0.dist-info"
        home.mkdir(parents=True)
        lines = [
            f"[{g}]\n" + "".join(f"{n} = {v}\n" for n, v in p.items()) for g, p in points.items()
        ]
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
            "entry_points.txt": "\n".join(lines),
            **(info or {}),
        }
        for file, text in files.items():
            if text is not None:
                (home / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        for module, source in (sources or {}).items():
            (folder / f"{module}.py").write_text(source)
        return home

    yield install
    for module in [
        name for name, m in sys.modules.items() if str(site) in str(getattr(m, "__file__", ""))
    ]:
        del sys.modules[module]


@pytest.fixture(scope="session")
def shipped() -> Path:
    """The registry.toml of this repository."""
    return Path(__file__).parents[2] / "registry.toml"


@pytest.fixture(scope="session")
def manifest(shipped: Path) -> Manifest:
    """The shipped policy, whatever files the machine of the tests has."""
    return load_manifest([shipped])


@pytest.fixture(scope="session")
def load(manifest: Manifest) -> Callable[..., Plugins]:
    """Plugins of records only: ``load(record, …)``, or ``load(extra=[…])`` for whole plugins."""

    def load(*records: Component | Preset, extra: Any = (), policy: Manifest = manifest) -> Plugins:
        given = [("blt-core", "fake", make_plugin(*records))] if records else []
        return load_plugins(policy, extra=[*given, *extra], installed=False)

    return load


@pytest.fixture(scope="session")
def plugins(load: Callable[..., Plugins]) -> Plugins:
    """The fake components above."""
    loaded = load(*COMPONENTS)
    assert not loaded.broken
    return loaded


@pytest.fixture(scope="session")
def problems() -> Callable[..., list[str]]:
    """The problems, one text each, of a call that must raise ConfigError."""

    def problems(call: Callable[..., object], *arguments: Any, **more: Any) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            call(*arguments, **more)
        return [str(problem) for problem in caught.value.problems]

    return problems


@pytest.fixture(scope="session")
def fakes() -> Any:
    """This module, for tests that need its classes."""
    import sys

    return sys.modules[__name__]
