"""The component under test, found by its entry point and built from TOML tables as a user's is.

A part is tested in a tiny host model; samplers, drafters and rules run on one too. Its weights are
scaled so that bytes, patches and acceptance vary: with default weights a model repeats one byte,
and then nearly every contract seems to hold.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Mapping
from random import Random
from typing import Any

import attrs
import torch

from blt_core.component import BuildContext, Component, Preset
from blt_core.decoding.engine import Progress, Request, decode
from blt_core.loading import build_model, plan_run
from blt_core.model import Model
from blt_core.plugins.loading import Plugins
from blt_core.protocols import MODEL_KINDS, Sampler
from blt_core.storage.tensors import model_tensors
from blt_core.types import Rows, Sampling
from blt_core.wiring.config import Config
from blt_core.wiring.resolve import Plan, build_node, resolve_component

#: The model that hosts what is tested, as a config. Windows are shorter than the texts.
HOST: dict[str, Any] = {
    "schema": 1,
    "run": {"dtype": "float64"},
    "model": {"context_bytes": 160},
    "patcher": {
        "use": "entropy",
        "threshold": 1.0,
        "max_patch_bytes": 6,
        "byte_scorer": {
            "use": "transformer",
            "dim": 16,
            "layers": 1,
            "heads": 2,
            "hidden": 24,
            "window": 8,
        },
    },
    "encoder": {
        "use": "local",
        "dim": 16,
        "layers": 1,
        "heads": 2,
        "hidden": 24,
        "latent_dim": 16,
        "window": 8,
        "ngram_sizes": [3],
        "ngram_rows": 31,
    },
    "global_model": {"use": "transformer", "latent_dim": 16, "layers": 1, "heads": 2, "hidden": 24},
    "decoder": {
        "use": "local",
        "dim": 16,
        "layers": 1,
        "heads": 2,
        "hidden": 24,
        "latent_dim": 16,
        "window": 8,
        "denoises": True,
    },
}
#: How strongly weights are scaled, and the share of the latents' path in the host's decoder: where
#: it is small, drafts that read an old latent are often right.
SPREAD = 1.5
LATENT_SHARE = 0.1


@attrs.frozen(eq=False, slots=False)
class Subject:
    """A component of a kind, by name, with the keys of its table.

    seed: of the weights of the models that it is tried in.
    """

    kind: str
    name: str
    table: Mapping[str, Any]
    plugins: Plugins
    seed: int = 0
    _counts: Counter[str] = attrs.field(factory=Counter, init=False, repr=False)

    def exercised(self) -> None:
        """Say that what a contract tells of came up; see ``Contract.idle``."""
        self._counts["exercised"] += 1

    @property
    def times_exercised(self) -> int:
        """How often :meth:`exercised` was called."""
        return self._counts["exercised"]

    @property
    def label(self) -> str:
        """How messages name it: ``drafter 'acme/echo' (blt-acme)``."""
        return self.plugins.registry.lookup(self.kind, self.name).label

    @property
    def record(self) -> Component | Preset:
        """What its plugin says of it."""
        return self.plugins.registry.lookup(self.kind, self.name).record

    @property
    def own_table(self) -> dict[str, Any]:
        """The table that a config has for it."""
        return {"use": self.name, **copy.deepcopy(dict(self.table))}

    # -- the component by itself -----------------------------------------------------------------

    def build(self, context: BuildContext | None = None) -> Any:
        """A new instance, built by itself."""
        node = resolve_component(self.kind, self.own_table, self.plugins)
        return build_node(node, context or BuildContext(), self.plugins.registry)

    def can(self, ability: str) -> bool:
        """Whether the component provides an ability, with these keys."""
        node = resolve_component(self.kind, self.own_table, self.plugins)
        return ability in node.component.provides(node.params)

    # -- in a model ------------------------------------------------------------------------------

    def tables(self, **changes: Mapping[str, Any]) -> dict[str, Any]:
        """The host's config, with the component in it if it is a part of models."""
        tables = copy.deepcopy(HOST)
        if self.kind in MODEL_KINDS:
            tables[self.kind] = self._fitted(tables)
        elif self.kind == "byte_scorer":
            tables["patcher"]["byte_scorer"] = self.own_table
        return {**tables, **copy.deepcopy(changes)}

    def _fitted(self, tables: dict[str, Any]) -> dict[str, Any]:
        """The component's table; sizes that must agree follow it, or are the host's."""
        own, record = self.own_table, self.record
        for size, key in record.dims.items() if isinstance(record, Component) else ():
            for kind in MODEL_KINDS:
                if kind != self.kind and size in tables[kind]:
                    own.setdefault(key, tables[kind][size])
                    tables[kind][size] = own[key]
        return own

    def plan(self, **changes: Mapping[str, Any]) -> Plan:
        """The checked config; raises as :func:`plan_run` does."""
        return plan_run(Config.from_mapping(self.tables(**changes)), self.plugins)[0]

    @functools.cached_property
    def model(self) -> Model:
        """The host model, in float64, with weights that make it vary."""
        return self.new_model()

    def new_model(self) -> Model:
        """The same model, built anew."""
        plan = self.plan(run={"dtype": "float64", "seed": self.seed})
        model = _quiet(plan)
        _scale(model, self.seed, latents=self.kind != "decoder")
        _calibrate(model, self.seed)
        return model

    def rebuilt(self) -> Model:
        """The host model as it is after it was stored and loaded."""
        model = self.model
        plan = self.plan(run={"dtype": "float64", "seed": self.seed + 1})
        loaded = build_model(plan, model_tensors(model))
        if hasattr(model.patcher, "threshold"):
            loaded.patcher.threshold = model.patcher.threshold  # type: ignore[attr-defined]
        return loaded

    def built(self, kind: str, table: Mapping[str, Any]) -> Any:
        """A component of ``kind`` beside the model, as a run has it."""
        plan, sizes = self.plan(**{kind: table}), self.model.parameter_counts()
        context = BuildContext(self.model.scheme, parameters=sizes, abilities=plan.abilities)
        return plan.build(kind, context)


def _quiet(plan: Plan) -> Model:
    """A model with random weights; that they are random needs no warning here."""
    from blt_core.loading import new_model

    model = new_model(plan, None, plan.run.seed)
    model.module_dict().requires_grad_(requires_grad=False).eval()
    return model


def _scale(model: Model, seed: int, *, latents: bool) -> None:
    """Weights that keep signals of size 1 and spread logits by several nats."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.module_dict().named_parameters():
        if weight.dim() > 1:
            lookup = name.endswith(("embed.weight", "table.weight", "embedding.weight"))
            spread = 1.0 if lookup else SPREAD * weight.shape[1] ** -0.5
            fresh = torch.empty(weight.shape, dtype=torch.float64)
            weight.copy_(fresh.normal_(0.0, spread, generator=generator))
            if latents and name.startswith("decoder.") and ".latent_attention.out." in name:
                weight.mul_(LATENT_SHARE)


def _calibrate(model: Model, seed: int) -> None:
    """Put a threshold where a third of the bytes of random text open a patch."""
    patcher: Any = model.patcher
    if not (hasattr(patcher, "threshold") and hasattr(patcher, "entropies")):
        return
    rng = Random(seed)
    ids = [model.scheme.bos, *(rng.randrange(256) for _ in range(200))]
    found = patcher.entropies(Rows(torch.tensor([ids]), (len(ids),)))[0]
    patcher.threshold = float(found.quantile(0.66))


@attrs.frozen
class Plain:
    """``ar`` written out: what every lossless sampler must equal."""

    def check(self, sampling: Sampling) -> None:
        """Every sampling is served."""

    def round(self, ops: Any, sampling: Sampling, draws: Any) -> Any:
        """A byte to every unfinished row."""
        from blt_core.types import Round

        fresh, rows = ops.fresh, [int(left > 0) for left in ops.remaining]
        picked = sampling.pick(ops.next_logits(rows)[:, 0], ops.lengths, rows, draws)
        ids = [[token] if on else [] for token, on in zip(picked, rows, strict=True)]
        ops.append(ids)
        return Round(ids, [0] * len(rows), [0] * len(rows), prefill=fresh)


def outputs(
    model: Model,
    sampler: Sampler,
    prompts: list[bytes],
    sampling: Sampling,
    *,
    size: int = 12,
    seeds: list[int] | None = None,
    logprobs: int | None = None,
) -> list[tuple[int, ...]]:
    """The ids that a sampler gives for a batch of prompts, ``size`` bytes each at most."""
    return [record.ids for record in run(model, sampler, prompts, sampling, size=size,
                                         seeds=seeds, logprobs=logprobs)]  # fmt: skip


def run(
    model: Model,
    sampler: Sampler,
    prompts: list[bytes],
    sampling: Sampling,
    *,
    size: int = 12,
    seeds: list[int] | None = None,
    logprobs: int | None = None,
) -> list[Progress]:
    """Each prompt's progress at the end of a run."""
    requests = requests_of(prompts, size=size, seeds=seeds, logprobs=logprobs)
    progress: tuple[Progress, ...] = ()
    for step in decode(model, sampler, requests, sampling):
        progress = step.progress
    return list(progress)


def requests_of(
    prompts: list[bytes],
    *,
    size: int = 12,
    seeds: list[int] | None = None,
    logprobs: int | None = None,
) -> list[Request]:
    """A request for each prompt; later ones ask for fewer bytes, so that rows end apart."""
    seeds = seeds or [0] * len(prompts)
    return [
        Request(prompt, max(size - 2 * index, 1), (), seed, logprobs)
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
