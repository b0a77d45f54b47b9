"""The front door for programs: a configuration in, a model that generates out.

>>> pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": "demo:python"}})
>>> pipeline.generate("def fibonacci(n):").text  # doctest: +SKIP
"""

from __future__ import annotations

import base64
import codecs
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import attrs

from blt_core.component import BuildContext
from blt_core.decoding.engine import Progress, Request, Step, StopReason, check_requests, decode
from blt_core.errors import RequestError
from blt_core.kernels.using import FIXED, setting_elsewhere
from blt_core.likelihood import Likelihood
from blt_core.loading import build_model, load_beside, plan_run, warn_of_blocks
from blt_core.model import Model
from blt_core.plugins.loading import Plugins, load_plugins
from blt_core.pricing import price
from blt_core.protocols import CostModel, Sampler
from blt_core.requests import RequestSettings, TextLike, read_requests, shows_settings, to_texts
from blt_core.scoring import Score, score
from blt_core.tables.inline import parse_inline
from blt_core.types import Cost, Parameters, Passes, RoundCounts
from blt_core.wiring.config import Config, RunSettings, load_config
from blt_core.wiring.resolve import Plan, resolve

if TYPE_CHECKING:
    from typing_extensions import Unpack


@attrs.frozen
class Generation:
    """What one prompt gave. Times are wall-clock seconds, shared with the rest of its batch.

    seed: with it this prompt alone gives this output. output: the new bytes; ids: theirs, and
    special ids that show as no byte. rounds: sampler rounds after the one that read the prompt.
    drafted: ids that were drafted, in full; accepted: those of them that are in the output. counts:
    the rounds by how much they drafted and accepted. passes: what this prompt cost as if it ran
    alone; ``cost`` prices them. prefill_seconds: until the first output; seconds: after it, to the
    end of this output; bytes_per_second: the output after the first by ``seconds``. stop_reason:
    "length", "eos" or "stop"; None while it goes on. likelihoods: of each of ``ids``, and ``eos``
    of the EOS that ended them, if one did; None unless logprobs were asked for. kernels: the digest
    of the model's choice of kernels; None for the fixed rule.
    """

    prompt: bytes
    seed: int
    output: bytes
    ids: tuple[int, ...]
    passes: Passes
    rounds: int
    drafted: int
    accepted: int
    counts: RoundCounts
    cost: Cost
    prefill_seconds: float
    seconds: float
    bytes_per_second: float
    stop_reason: StopReason | None
    likelihoods: tuple[Likelihood, ...] | None = None
    eos: Likelihood | None = None
    kernels: str | None = None

    @property
    def text(self) -> str:
        """The new bytes as UTF-8, with U+FFFD for what is none."""
        return self.output.decode("utf-8", errors="replace")

    def to_dict(self) -> dict[str, Any]:
        """The record that ``blt generate --json`` prints, of values that JSON can spell.

        docs/cli.md says what its fields mean; they are stable.
        """
        return {
            "text": self.text,
            "bytes_base64": base64.b64encode(self.output).decode("ascii"),
            "ids": [int(token) for token in self.ids],
            "seed": self.seed,
            "n_dec": self.passes.decoder,
            "n_enc": self.passes.encoder,
            "n_draft": self.passes.draft,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            **told_rounds(self.counts, self.passes, len(self.ids)),
            "cost": float(self.cost.total),
            "cost_unit": self.cost.unit,
            "gigabytes": None if self.cost.gigabytes is None else float(self.cost.gigabytes),
            "prefill_seconds": self.prefill_seconds,
            "seconds": self.seconds,
            "bytes_per_second": self.bytes_per_second,
            "stop_reason": self.stop_reason,
            **self._told(),
        }

    def _told(self) -> dict[str, Any]:
        """The choice of kernels, if there is one, and log-probabilities, if they are asked for."""
        told: dict[str, Any] = {} if self.kernels is None else {"kernels": self.kernels}
        if self.likelihoods is None:
            return told
        eos = self.eos
        return told | {
            "logprobs": [each.logprob for each in self.likelihoods],
            "top_logprobs": [[list(pair) for pair in each.top] for each in self.likelihoods],
            "eos_logprob": eos.logprob if eos is not None else None,
        }


def told_rounds(counts: RoundCounts, passes: Passes, size: int) -> dict[str, Any]:
    """How drafts went, as records have it. size: ids of the output."""
    return {
        "accepted_rounds": list(counts.accepted),
        "accepted_by_place": list(counts.by_place),
        "bytes_per_round": counts.bytes_per_round,
        "bytes_per_pass": size / passes.decoder if passes.decoder else None,
    }


@attrs.frozen
class Run:
    """What observers are told of a run: who generates, and for which requests."""

    pipeline: Pipeline
    requests: tuple[Request, ...]


class Pipeline:
    """A model with a sampler and a cost model. Make one by ``from_toml`` or ``from_config``.

    A program may assign ``sampler`` and ``cost_model`` objects of its own. config: what it was made
    from, by which another process makes its equal; None if it was made from parts.
    """

    def __init__(
        self, plan: Plan, plugins: Plugins, model: Model, config: Config | None = None
    ) -> None:
        self.plan, self.plugins, self.model, self.config = plan, plugins, model, config
        context = self._context()
        self.sampler: Sampler = plan.build("sampler", context)
        self.cost_model: CostModel = plan.build("cost_model", context)
        self._built: dict[str, object] = {"sampler": self.sampler, "cost_model": self.cost_model}
        self._look_over()

    def _context(self) -> BuildContext:
        """What samplers and cost models are built with."""
        load = partial(load_beside, plan=self.plan, plugins=self.plugins)
        device, dtype = str(self.model.device), self.settings.dtype
        return BuildContext(
            self.model.scheme,
            load,
            device=device,
            dtype=dtype,
            variant=self.model.variant,
            parameters=self.parameter_counts,
            abilities=self.plan.abilities,
        )

    def _look_over(self) -> None:
        """Find before any work what a cost model may not say; warn of blocks that are too long."""
        warn_of_blocks(self.plan)
        self.price(Passes())

    def __repr__(self) -> str:
        counts = attrs.astuple(self.parameter_counts)
        return (
            f"Pipeline(model={self.settings.checkpoint or str(self.plan.place)!r}, "
            f"sampler={self._name('sampler')!r}, cost_model={self._name('cost_model')!r}, "
            f"parameters={sum(counts):_})"
        )

    @classmethod
    def from_toml(cls, path: str | Path) -> Pipeline:
        """The pipeline of a config file.

        A relative checkpoint path counts from the working directory. Raises ConfigError with all
        problems of the file, or CheckpointError.
        """
        return cls.load(load_config(path))

    @classmethod
    def from_config(cls, tables: Mapping[str, Any]) -> Pipeline:
        """The pipeline of a config in memory, a mapping as TOML would give it."""
        return cls.load(Config.from_mapping(tables))

    @classmethod
    def load(cls, config: Config, plugins: Plugins | None = None) -> Pipeline:
        """The pipeline of a config, built with ``plugins`` (default: those installed)."""
        plugins = plugins or load_plugins()
        plan, tensors = plan_run(config, plugins)
        model = build_model(plan, tensors)
        return cls(plan, plugins, model, config)

    def with_sampler(self, sampler: str | Mapping[str, Any]) -> Pipeline:
        """The same with another sampler: ``"blt-s draft_bytes=8"``, or a config table.

        Raises ConfigError with all problems of the table.
        """
        return self._with("sampler", sampler)

    def plan_with_sampler(self, sampler: str | Mapping[str, Any]) -> Plan:
        """What ``with_sampler`` would build; ConfigError with all problems of the table."""
        return self._plan_with("sampler", sampler)

    def with_cost_model(self, cost_model: str | Mapping[str, Any]) -> Pipeline:
        """The same with another cost model: ``"bandwidth bytes_per_parameter=1"``, or a table.

        Raises ConfigError with all problems of the table.
        """
        return self._with("cost_model", cost_model)

    def _with(self, kind: str, spec: str | Mapping[str, Any]) -> Pipeline:
        """A copy with one component replaced; all else, what was assigned too, is shared."""
        plan = self._plan_with(kind, spec)
        built = plan.build(kind, self._context())
        other = copy.copy(self)
        vars(other).update({"plan": plan, kind: built, "_built": {**self._built, kind: built}})
        if self.config is not None:
            other.config = self.config.with_table(kind, plan.node(kind).describe())
        other._look_over()  # noqa: SLF001 -- a pipeline too
        return other

    def _plan_with(self, kind: str, spec: str | Mapping[str, Any]) -> Plan:
        table = parse_inline(spec, kind) if isinstance(spec, str) else spec
        config = Config.from_mapping(self.plan.describe()).with_table(kind, table)
        node = resolve(config, self.plugins).node(kind)
        # The other nodes know what the config calls them; what they describe is expanded.
        return attrs.evolve(self.plan, nodes={**self.plan.nodes, kind: node})

    @property
    def settings(self) -> RunSettings:
        """The ``[run]`` table: defaults of a request."""
        return self.plan.run

    @overload
    def generate(  # type: ignore[overload-overlap]  # a string is a sequence of strings
        self, prompts: TextLike, **request: Unpack[RequestSettings]
    ) -> Generation: ...
    @overload
    def generate(
        self, prompts: Sequence[TextLike], **request: Unpack[RequestSettings]
    ) -> list[Generation]: ...
    @shows_settings
    def generate(
        self, prompts: TextLike | Sequence[TextLike], **request: Unpack[RequestSettings]
    ) -> Generation | list[Generation]:
        """Continue one prompt, or several as one batch; a list for several, and with ``samples``.

        request: max_new_bytes, temperature, top_k, top_p, seed, samples, logprobs, stop; what is
        not given comes from ``[run]``. With several samples those of a prompt follow one another. A
        stop string ends the output, and is kept, where it is in the output: one that begins in the
        prompt does not count. Raises RequestError, before any work, for what cannot be served.
        """
        progress: Sequence[Progress] = ()
        for step in self.steps(prompts, **request):
            progress = step.progress
        results = [self.generation(record) for record in progress]
        one = isinstance(prompts, TextLike) and request.get("samples") is None
        return results[0] if one else results

    @shows_settings
    def stream(self, prompt: TextLike, **request: Unpack[RequestSettings]) -> Iterator[bytes]:
        """The new bytes of one prompt as they are committed; requests as for ``generate``.

        Raises RequestError for several samples.
        """
        steps = self.steps([prompt], **request)
        if len(self.requests([prompt], **request)) > 1:
            raise RequestError(
                "samples: one text at a time can be streamed\n"
                "  fix: leave samples out, or take generate or steps"
            )
        return (step.new[0] for step in steps if step.new[0])

    @shows_settings
    def stream_text(self, prompt: TextLike, **request: Unpack[RequestSettings]) -> Iterator[str]:
        """As ``stream``, in strings of whole UTF-8 characters (U+FFFD for what is none)."""
        return _characters(self.stream(prompt, **request))

    @shows_settings
    def steps(
        self, prompts: TextLike | Sequence[TextLike], **request: Unpack[RequestSettings]
    ) -> Iterator[Step]:
        """Yield every sampler round of a batch, with each prompt's progress after it."""
        requests, sampling = read_requests(prompts, request, self.settings)
        rounds = decode(self.model, self.sampler, requests, sampling)
        return self._observed(Run(self, requests), rounds)

    @shows_settings
    def requests(
        self, prompts: TextLike | Sequence[TextLike], **request: Unpack[RequestSettings]
    ) -> tuple[Request, ...]:
        """What ``generate`` serves: a request for each sample of each prompt, with its seed."""
        return read_requests(prompts, request, self.settings)[0]

    @shows_settings
    def check(
        self, prompts: TextLike | Sequence[TextLike], **request: Unpack[RequestSettings]
    ) -> None:
        """Raise RequestError if a batch could not be served; computes nothing."""
        requests, sampling = read_requests(prompts, request, self.settings)
        check_requests(self.model, self.sampler, requests, sampling)

    def _observed(self, run: Run, rounds: Iterator[Step]) -> Iterator[Step]:
        notify, results = self.plugins.notify, None
        notify("blt_run_start", run=run)
        try:
            step = None
            for step in rounds:
                notify("blt_run_step", run=run, step=step)
                yield step
            results = [self.generation(record) for record in step.progress] if step else []
        finally:
            notify("blt_run_end", run=run, result=results)

    def generation(self, record: Progress) -> Generation:
        """What a prompt gave, so far: its progress with the cost of its passes."""
        return Generation(
            prompt=record.request.prompt,
            seed=record.request.seed,
            output=record.output,
            ids=record.ids,
            passes=record.passes,
            rounds=record.rounds,
            drafted=record.drafted,
            accepted=record.accepted,
            counts=record.counts,
            cost=self.price(record.passes),
            prefill_seconds=record.prefill_seconds,
            seconds=record.seconds,
            bytes_per_second=record.bytes_per_second,
            stop_reason=record.stop_reason,
            likelihoods=record.likelihoods,
            eos=record.eos,
            kernels=self.model.kernels,
        )

    @overload
    def score(  # type: ignore[overload-overlap]  # a string is a sequence of strings
        self, texts: TextLike, *, prompts: TextLike | Sequence[TextLike] = b"", top: int = 0
    ) -> Score: ...
    @overload
    def score(
        self,
        texts: Sequence[TextLike],
        *,
        prompts: TextLike | Sequence[TextLike] = b"",
        top: int = 0,
    ) -> list[Score]: ...
    def score(
        self,
        texts: TextLike | Sequence[TextLike],
        *,
        prompts: TextLike | Sequence[TextLike] = b"",
        top: int = 0,
    ) -> Score | list[Score]:
        """How likely texts are: the log-probability of each byte, and of EOS after them, in nats.

        prompts: what each text continues, which is read and not scored; one for all, or one for
        each. top: how many of the likeliest ids to tell of each place. Texts longer than the
        model's context are read in windows, as held-out scores are.
        """
        given, before = to_texts(texts, "text"), to_texts(prompts, "prompt")
        if isinstance(prompts, TextLike):
            before = before * len(given)
        if len(before) != len(given):
            raise RequestError(
                f"prompts: {len(before)} for {len(given)} texts; give one or as many"
            )
        if type(top) is not int or top < 0:
            raise RequestError(f"top: expected a whole number, 0 or more, got {top!r}")
        scores = score(self.model, list(zip(before, given, strict=True)), top=top)
        return scores[0] if isinstance(texts, TextLike) else scores

    def price(self, passes: Passes, parameters: Parameters | None = None) -> Cost:
        """What passes cost, for these parameter counts (default: the model's own).

        Raises ComponentError, which names the cost model, for what is no finite Cost.
        """
        return price(self.cost_model, passes, parameters or self.parameter_counts)

    def config_for_workers(self) -> Config:
        """The config by which other processes make its equal; RequestError if none can."""
        assigned = [kind for kind, built in self._built.items() if getattr(self, kind) is not built]
        if self.config is None or assigned:
            what = f"its {' and '.join(assigned)}" if assigned else "it"
            raise RequestError(
                "executor: workers make the pipeline anew from its config, and a program made "
                f"{what}\n  fix: name in the config what it is made of, or leave the executor out"
            )
        # Others may have other threads, or be other machines: what those would measure may differ.
        own = self.model.kernel_choice
        kernels = FIXED if own is None else setting_elsewhere(self.settings.kernels, own)
        return self.config.with_run(kernels=kernels)

    @property
    def sampler_name(self) -> str:
        """The name of the sampler as the config says it: that of the preset, where it is one."""
        return self._name("sampler")

    def _name(self, kind: str) -> str:
        """What the config calls a component; its class, where a program assigned its own."""
        own = getattr(self, kind)
        if own is not self._built[kind]:
            return type(own).__name__
        node = self.plan.node(kind)
        return node.presets[0] if node.presets else node.name

    @property
    def parameter_counts(self) -> Parameters:
        """Parameter counts of the model's parts."""
        return self.model.parameter_counts()


def _characters(pieces: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest
