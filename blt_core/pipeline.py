"""The front door for programs: a configuration in, a model that generates out.

>>> pipeline = Pipeline.from_config({"schema": 1, "run": {"checkpoint": "demo:python"}})
>>> pipeline.generate("def fibonacci(n):").text  # doctest: +SKIP
"""

from __future__ import annotations

import base64
import codecs
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import attrs
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from blt_core.component import BuildContext
from blt_core.decoding.engine import Progress, Request, Step, StopReason, check_requests, decode
from blt_core.errors import CheckpointError, ConfigError, Problem
from blt_core.faults import broken, naming
from blt_core.log import logger
from blt_core.model import Model, part_dtype
from blt_core.plugins.loading import Plugins, load_plugins
from blt_core.protocols import CheckpointFormat, CostModel, Sampler
from blt_core.requests import RequestSettings, TextLike, read_requests, shows_settings
from blt_core.storage.tensors import adopt_tensors, current_folder
from blt_core.tables.inline import parse_inline
from blt_core.types import Cost, Parameters, Passes
from blt_core.wiring.config import MODEL_KINDS, Config, RunSettings, load_config
from blt_core.wiring.resolve import Plan, build_node, merge_checkpoint, resolve, resolve_component

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: What a config without a table of these kinds uses.
DEFAULTS = {"sampler": {"use": "ar"}, "cost_model": {"use": "bandwidth"}}


@attrs.frozen
class Generation:
    """What one prompt gave. Times are wall-clock seconds, shared with the rest of its batch.

    output: the new bytes; ids: theirs, and special ids that show as no byte. rounds: sampler rounds
    after the one that read the prompt. drafted: ids that were drafted, in full; accepted: those of
    them that are in the output. passes: what this prompt cost as if it ran alone; ``cost`` prices
    them. prefill_seconds: until the first output; seconds: after it, to the end of this
    output; bytes_per_second: the output after the first by ``seconds``. stop_reason: "length",
    "eos" or "stop"; None while it goes on.
    """

    prompt: bytes
    output: bytes
    ids: tuple[int, ...]
    passes: Passes
    rounds: int
    drafted: int
    accepted: int
    cost: Cost
    prefill_seconds: float
    seconds: float
    bytes_per_second: float
    stop_reason: StopReason | None

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
            "n_dec": self.passes.decoder,
            "n_enc": self.passes.encoder,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "gigabytes": float(self.cost.gigabytes),
            "prefill_seconds": self.prefill_seconds,
            "seconds": self.seconds,
            "bytes_per_second": self.bytes_per_second,
            "stop_reason": self.stop_reason,
        }


@attrs.frozen
class Run:
    """What observers are told of a run: who generates, and for which requests."""

    pipeline: Pipeline
    requests: tuple[Request, ...]


class Pipeline:
    """A model with a sampler and a cost model. Make one by ``from_toml`` or ``from_config``.

    A program may assign ``sampler`` and ``cost_model`` objects of its own.
    """

    def __init__(self, plan: Plan, plugins: Plugins, model: Model) -> None:
        context = BuildContext(model.scheme)
        self.plan, self.plugins, self.model = plan, plugins, model
        self.sampler: Sampler = plan.build("sampler", context)
        self.cost_model: CostModel = plan.build("cost_model", context)
        self._built: dict[str, object] = {"sampler": self.sampler, "cost_model": self.cost_model}
        self._look_over()

    def _look_over(self) -> None:
        """Find before any work what a cost model may not say; warn of blocks that are too long."""
        warn_of_blocks(self.plan)
        self.price(Passes())

    def __repr__(self) -> str:
        counts = attrs.astuple(self.parameters)
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
        return cls(plan, plugins, model)

    def with_sampler(self, sampler: str | Mapping[str, Any]) -> Pipeline:
        """The same with another sampler: ``"blt-s draft_bytes=8"``, or a config table.

        Raises ConfigError with all problems of the table.
        """
        return self._with("sampler", sampler)

    def with_cost_model(self, cost_model: str | Mapping[str, Any]) -> Pipeline:
        """The same with another cost model: ``"bandwidth bytes_per_parameter=1"``, or a table.

        Raises ConfigError with all problems of the table.
        """
        return self._with("cost_model", cost_model)

    def _with(self, kind: str, spec: str | Mapping[str, Any]) -> Pipeline:
        """A copy with one component replaced; all else, what was assigned too, is shared."""
        table = parse_inline(spec, kind) if isinstance(spec, str) else spec
        config = Config.from_mapping(self.plan.describe()).with_table(kind, table)
        node = resolve(config, self.plugins).node(kind)
        # The other nodes know what the config calls them; what they describe is expanded.
        plan = attrs.evolve(self.plan, nodes={**self.plan.nodes, kind: node})
        built = plan.build(kind, BuildContext(self.model.scheme))
        other = copy.copy(self)
        vars(other).update({"plan": plan, kind: built, "_built": {**self._built, kind: built}})
        other._look_over()  # noqa: SLF001 -- a pipeline too
        return other

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
        """Continue one prompt, or several as one batch.

        request: max_new_bytes, temperature, top_k, top_p, seed, stop; what is not given comes from
        ``[run]``. A stop string ends the output, and is kept, where it is in the output: one that
        begins in the prompt does not count. Raises RequestError, before any work, for what cannot
        be served.
        """
        progress: Sequence[Progress] = ()
        for step in self.steps(prompts, **request):
            progress = step.progress
        results = [self.generation(record) for record in progress]
        return results[0] if isinstance(prompts, TextLike) else results

    @shows_settings
    def stream(self, prompt: TextLike, **request: Unpack[RequestSettings]) -> Iterator[bytes]:
        """The new bytes of one prompt as they are committed; requests as for ``generate``."""
        steps = self.steps([prompt], **request)
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
            output=record.output,
            ids=record.ids,
            passes=record.passes,
            rounds=record.rounds,
            drafted=record.drafted,
            accepted=record.accepted,
            cost=self.price(record.passes),
            prefill_seconds=record.prefill_seconds,
            seconds=record.seconds,
            bytes_per_second=record.bytes_per_second,
            stop_reason=record.stop_reason,
        )

    def price(self, passes: Passes, parameters: Parameters | None = None) -> Cost:
        """What passes cost, for these parameter counts (default: the model's own).

        Raises ComponentError, which names the cost model, for what is no finite Cost.
        """
        with naming():
            cost = self.cost_model.cost(passes, parameters or self.parameters)
        if not isinstance(cost, Cost):
            raise broken(self.cost_model, f"gave {cost!r}; expected a Cost")
        figures: dict[str, Any] = {"gigabytes": cost.gigabytes, **cost.lines, **cost.apart}
        for name, figure in figures.items():
            if not isinstance(figure, Real) or not 0 <= float(figure) < math.inf:
                text = f"gave {name} = {figure!r}; expected a finite number, 0 or more"
                raise broken(self.cost_model, text)
        return cost

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
    def parameters(self) -> Parameters:
        """Parameter counts of the model's parts."""
        return self.model.parameters()


def _characters(pieces: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        if text := decoder.decode(piece):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


def warn_of_blocks(plan: Plan) -> None:
    """Log a warning for each component whose blocks are longer than the decoder's training had."""
    for node, asked, trained in plan.untrained_blocks():
        logger().warning(
            f"{node.label} asks for blocks of {asked} bytes, and the decoder was trained on blocks "
            f"of at most {trained}: little of what lies beyond is right",
            fix=f"block_bytes = {trained}, or train on with block_bytes = {asked} in [objective]",
        )


def plan_run(config: Config, plugins: Plugins) -> tuple[Plan, Mapping[str, Tensor] | None]:
    """Check a config whole, its checkpoint's tables included; nothing is built.

    Gives the plan, and the checkpoint's tensors (None if the config names no checkpoint).
    """
    for kind, table in DEFAULTS.items():
        if kind not in config.tables:
            config = config.with_table(kind, table)
    tensors = None
    if config.checkpoint is not None:
        tables, tensors = read_checkpoint(config.checkpoint, plugins)
        config = merge_checkpoint(config, tables, plugins)
    return resolve(config, plugins, needs=("model", *MODEL_KINDS)), tensors


def read_checkpoint(location: str, plugins: Plugins) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Config tables and tensors of a checkpoint, by the format that recognises what is there.

    ``NAME:…`` is for the format of that name alone, if there is one. Raises ConfigError if several
    formats recognise the location, CheckpointError if none does.
    """
    able: dict[str, CheckpointFormat] = {}
    silent = []
    for name in _formats_to_ask(location, plugins):
        try:
            node = resolve_component("checkpoint_format", {"use": name}, plugins)
            reader: CheckpointFormat = build_node(node, BuildContext(), plugins.registry)
            if reader.recognises(location):
                able[name] = reader
            else:
                silent.append(f"{name}: {node.entry.record.summary}")
        except Exception as error:  # noqa: BLE001, PERF203 -- it must not stand in the way of others
            silent.append(f"{name} (broken: {error})")
    if not able:
        text = f"{location}: no checkpoint; found {_what_is_at(location)}"
        raise CheckpointError("\n  ".join((text, "installed formats:", *silent)))
    if len(able) > 1:
        text = f"several checkpoint formats recognise this: {', '.join(able)}"
        fix = f'fix: block one in registry.toml, as in blocked = ["checkpoint_format/{max(able)}"]'
        raise ConfigError([Problem(location, text, (fix,))])
    [reader] = able.values()
    return reader.read(location)


def _formats_to_ask(location: str, plugins: Plugins) -> list[str]:
    scheme, colon, _ = location.partition(":")
    # Before all are listed, which imports every format.
    if colon and ("checkpoint_format", scheme) in plugins.manifest.components:
        return [scheme]
    names = plugins.registry.names("checkpoint_format")
    return [scheme] if colon and scheme in names else names


def _what_is_at(location: str) -> str:
    """What is found in the place of a checkpoint, in words."""
    path = current_folder(Path(location))
    if path.is_dir():
        names = sorted(each.name for each in path.iterdir())
        more = ", …" if len(names) > _SHOWN else ""
        return f"a folder with {', '.join(names[:_SHOWN])}{more}" if names else "an empty folder"
    return f"{'a file' if path.exists() else 'nothing'} (looked at {path.absolute()})"


#: Names of a folder that a message shows.
_SHOWN = 8


def build_model(plan: Plan, tensors: Mapping[str, Tensor] | None) -> Model:
    """The model of a plan, to run, with a checkpoint's tensors or, without, random weights.

    Raises as :func:`new_model` does.
    """
    model = new_model(plan, tensors, plan.run.seed)
    if tensors is None:
        logger().warning("no checkpoint is named: the weights are random", config=str(plan.place))
    model.modules().requires_grad_(requires_grad=False).eval()
    return model


def new_model(plan: Plan, tensors: Mapping[str, Tensor] | None, seed: int) -> Model:
    """The model of a plan on its device, to train; random weights depend on ``seed`` alone.

    Tensors that are stored in the model's own dtype are not copied. Raises ConfigError for a device
    that is not there, CheckpointError for tensors that do not fit.
    """
    device, dtype = find_device(plan), getattr(torch, plan.run.dtype)
    if tensors is not None:
        return stored_model(plan, tensors, device, dtype).to(device, dtype)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = _assemble(plan)
    return model.to(device, dtype)


def stored_model(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Model:
    """The model of a plan with a checkpoint's tensors, as they are stored unless a dtype is given.

    Raises CheckpointError for tensors that do not fit.
    """

    def cast(name: str, tensor: Tensor) -> Tensor:
        wanted = dtype and part_dtype(name.partition(".")[0], dtype)
        return tensor.to(device=device, dtype=wanted if tensor.is_floating_point() else None)

    with NoRandomWeights():
        model = _assemble(plan)
    adopt_tensors(model.modules(), tensors, str(plan.run.checkpoint), cast)
    return model


def _assemble(plan: Plan) -> Model:
    parts: dict[str, Any] = {k: plan.build(k) if k in plan.nodes else None for k in MODEL_KINDS}
    return Model(
        **parts,
        scheme=plan.model.scheme,
        context_bytes=plan.model.context_bytes,
        settings=plan.describe_model(),
    )


class NoRandomWeights(TorchFunctionMode):
    """Parts made within draw no weights: memory for them is reserved, and not filled.

    What a part computes beside its parameters (tables of positions, say) is computed as ever.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Give a tensor back as it is where it would be filled at random."""
        if getattr(func, "__name__", "") not in _DRAWING:
            return func(*args, **(kwargs or {}))
        return args[0] if args else (kwargs or {})["tensor"]


#: Functions that fill a tensor at random: methods of tensors, and those of ``torch.nn.init``.
_DRAWING = (
    *("normal_", "trunc_normal_", "kaiming_normal_", "xavier_normal_"),
    *("uniform_", "kaiming_uniform_", "xavier_uniform_", "orthogonal_", "sparse_"),
)


def find_device(plan: Plan) -> torch.device:
    """The device that ``run.device`` names; ConfigError if this machine has none such."""
    place, name = plan.place.child("run", "device"), plan.run.device
    try:
        device = torch.device(name)
        torch.empty(1, device=device, dtype=getattr(torch, plan.run.dtype))
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        hint = f"available: {', '.join(available_devices())}"
        raise ConfigError(
            [Problem(str(place), f"device {name!r} is not available: {reason}", (hint,))]
        ) from error
    if device.type == "meta":
        raise ConfigError([Problem(str(place), "device 'meta' holds no data: nothing can run")])
    return device


def available_devices() -> list[str]:
    """Names of the devices of this machine."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names
