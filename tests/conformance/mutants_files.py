"""What reads, writes, trains, asks and works, with a fault each, and without."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import shutil
import time
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path

import attrs
import numpy as np
import torch
from safetensors.torch import load, save
from torch.nn import functional

from blt_core import Component, hookimpl
from blt_core.errors import CheckpointError, DataError
from blt_core.evaluation.figures import mean
from blt_core.evaluation.protocol import Part, Question
from blt_core.protocols import UNSCORED


@attrs.frozen(kw_only=True)
class Params:
    """fault: what is wrong."""

    fault: str = ""


@attrs.frozen(kw_only=True)
class CorpusParams(Params):
    """path: a file whose second line is the first document."""

    path: str = str(Path(__file__).with_name("document.txt"))


class Format:
    """A folder with two files and a file of their sums."""

    def __init__(self, params, context):
        self.fault = params.fault

    def recognises(self, location):
        if self.fault in ("says-yes", "says-no"):
            return self.fault == "says-yes"
        return bool(location) and (Path(location) / "sums.json").is_file()

    def read(self, location):
        folder, found = Path(location), {}
        try:
            sums = json.loads((folder / "sums.json").read_text())
            for name in ("config.json", "weights"):
                found[name] = (folder / name).read_bytes()
                right = hashlib.sha256(found[name]).hexdigest() == sums[name]
                if self.fault != "trusts" and not right:
                    raise CheckpointError(f"{folder / name}: damaged")
            if self.fault == "trusts":
                names = json.loads(found["config.json"])
                tensors = load(found["weights"])
                return names, tensors
            return json.loads(found["config.json"]), load(found["weights"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: damaged") from error

    def write(self, location, config, tensors):
        if self.fault == "widens":
            tensors = {name: tensors[name].float() for name in tensors}
        if self.fault == "rounds":
            tensors = {name: (tensors[name] * 1000).round() / 1000 for name in tensors}
        target = location if self.fault == "in-place" else location.with_name("new")
        target.mkdir(parents=True, exist_ok=True)
        sums = {}
        text = json.dumps(dict(config), default=list).encode()
        for name, make in (
            ("config.json", lambda: text),
            ("weights", lambda: save({n: tensors[n].contiguous().clone() for n in tensors})),
        ):
            if self.fault == "in-place":
                (target / name).write_bytes(b"")
            data = make()
            (target / name).write_bytes(data)
            sums[name] = hashlib.sha256(data).hexdigest()
        (target / "sums.json").write_text(json.dumps(sums))
        if self.fault in ("weights-first", "config-first"):
            location.mkdir(parents=True, exist_ok=True)
            names = ["weights", "config.json", "sums.json"]
            for name in names if self.fault == "weights-first" else names[::-1]:
                (target / name).replace(location / name)
        elif target != location:
            self.swap(target, location)

    def swap(self, target, location):
        """The new folder in the place of the old one, which comes back if that fails."""
        spare = location.with_name("spare")
        shutil.rmtree(spare, ignore_errors=True)
        if location.exists():
            location.rename(spare)
        try:
            target.rename(location)
        except OSError:
            if spare.exists():
                spare.rename(location)
            raise


class Texts:
    """Some documents in memory."""

    def __init__(self, split, fault, path):
        self.fault = fault
        first = Path(path).read_bytes().splitlines()[1]
        self.held = [first, *(b"%s %d of some" % (split.encode(), i) for i in range(8))]
        if fault == "shuffles":
            random.shuffle(self.held)
        if fault == "set-order":
            self.held = list(set(self.held))
        if fault == "empty":
            self.held[3] = b""
        less = 3 if fault == "small-sizes" else 0
        dtype = np.int32 if fault == "int32" else np.int64
        self.sizes = np.array([len(text) - less for text in self.held], dtype=dtype)
        if fault == "a-list":
            self.sizes = self.sizes.tolist()
        digest = "same" if fault == "one-digest" else f"{split}-1"
        if fault not in ("one-digest", "digest-of-sizes"):
            digest += first.decode()
        self.digest = None if fault == "no-digest" else digest
        self.weights = [(5, 1.0), (3 if fault == "weights-short" else 4, 0.5)]
        self.patching = {"of": "spaces"}
        self.any_order = "mostly" if fault == "mostly" else True

    def __len__(self):
        return len(self.held)

    def __getitem__(self, index):
        text = self.held[index]
        return text.decode() if self.fault == "strings" else text

    def texts(self, numbers):
        if self.fault in ("sorts", "drops-copies"):
            numbers = np.sort(numbers) if self.fault == "sorts" else list(dict.fromkeys(numbers))
        return (self[number] for number in numbers)

    def source(self, index):
        return None if self.fault == "no-source" else f"memory:{index}"

    def opens(self, index):
        size = len(self.held[index]) + (0 if self.fault == "no-eos" else 1)
        return np.ones(size, dtype=bool)


class Corpus:
    def __init__(self, params, context):
        self.fault, self.path = params.fault, params.path

    def documents(self, split):
        return Texts(split, self.fault, self.path)


class Objective:
    """The next byte's cross-entropy."""

    def __init__(self, params, context):
        self.fault, self.calls = params.fault, 0

    def loss(self, model, rows, flags_br, targets_br, rng):
        fault = self.fault
        self.calls += 1
        logits = model.forward(rows, flags_br).clean.logits
        targets = targets_br
        if fault == "copies-inputs":
            targets = torch.where(targets == UNSCORED, targets, rows.ids_br)
        if fault == "scores-padding":
            targets = torch.where(targets == UNSCORED, rows.ids_br, targets)
        reduction = "sum" if fault == "sum" else "mean"
        found = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED, reduction=reduction
        )
        if fault == "mean-of-texts":
            each = functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED, reduction="none"
            ).view(targets.shape)
            found = (each.sum(1) / (targets != UNSCORED).sum(1)).mean()
        if fault == "global-random":
            found = found * (1 + torch.rand(()).item())
        if fault == "counts-calls":
            found = found * (1 + 0.01 * self.calls)
        if fault == "detached":
            found = found.detach()
        if fault == "unreduced":
            found = found[None]
        if fault == "writes":
            targets_br.fill_(UNSCORED)
        figures = {
            "": {"acc": 0.5},
            "named-loss": {"loss": 1.0},
            "nan-figure": {"acc": float("nan")},
            "tensor-figure": {"acc": torch.tensor(1.0)},
            "other-names": {f"acc{self.calls + len(rows.lengths)}": 0.5},
        }.get(fault, {"acc": 0.5})
        if fault == "other-names":
            figures = {f"acc{int(rows.ids_br.sum()) % 1000}": 0.5}
        return found if fault == "bare" else (found, figures)


class Backend:
    """AdamW in one process."""

    def __init__(self, params, context):
        self.fault = params.fault
        self.rank, self.world_size = 0, None if self.fault == "no-world" else 1
        self.module = self.optimizer = self.staged = None

    def start(self, module, groups, *, clip, accumulate):
        if self.fault == "keeps-old" and self.module is not None:
            return module
        self.module, self.clip, self.accumulate = module, clip, accumulate
        decays = [g["weight_decay"] for g in groups]
        if self.fault == "one-decay":
            decays = decays[:1] * len(groups)
        self.optimizer = torch.optim.AdamW(
            [{"params": g["params"], "weight_decay": d} for g, d in zip(groups, decays)], lr=0.0
        )
        module.zero_grad()
        return module

    def backward(self, losses):
        for loss in losses:
            share = 1 if self.fault == "sums" else self.accumulate
            (loss() / share).backward()

    def step(self, learning_rate):
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.fault != "stands-still":
            self.optimizer.step()
        if self.fault != "keeps-gradients":
            self.module.zero_grad()
        return min(float(norm), self.clip) if self.fault == "clipped-norm" else float(norm)

    def mean(self, values):
        return [2 * v for v in values] if self.fault == "doubles" else list(values)

    def whole(self):
        return nullcontext()

    def weights(self):
        state = {n: t.detach().clone() for n, t in self.module.state_dict().items()}
        if self.fault == "loses-weights":
            state.popitem()
        return state

    def save(self, folder):
        torch.save((self.module.state_dict(), self.optimizer.state_dict()), folder / "state")

    def stage(self):
        if self.fault == "stages-nothing":
            return self.write
        optimizer = self.optimizer.state_dict()
        staged = (
            self.weights(),
            optimizer if self.fault == "shares-moments" else deepcopy(optimizer),
        )
        if self.fault == "stages-once":
            staged = self.staged = self.staged or staged
        return lambda folder: self.write(folder, staged)

    def write(self, folder, staged=None):
        self.save(folder) if staged is None else torch.save(staged, folder / "state")
        return [] if self.fault == "hides-files" else [folder / "state"]

    def load(self, folder):
        weights, state = torch.load(folder / "state")
        self.module.load_state_dict(weights)
        if self.fault != "forgets-optimizer":
            self.optimizer.load_state_dict(state)

    def close(self):
        pass


class Task:
    """Whether the answer to a word has a letter of it."""

    def __init__(self, params, context):
        self.fault = params.fault
        self.asks = {"asks-what": "words", "asks-likelihood": "likelihood"}.get(
            params.fault, "text"
        )

    def run(self, model, limit):
        fault = self.fault
        words = [b"word%d" % i for i in range(9)]
        if fault == "global-random":
            random.shuffle(words)
        if fault != "no-limit":
            words = words[: limit or len(words)]
        keys = ["q" if fault == "one-key" else word.decode() for word in words]
        size = model.context_bytes + 1 if fault == "too-long" else 8
        shots = [random.random() if fault == "random-shots" else 0 for _ in words]
        if fault == "hashed-shots":
            shots = [hash(key) for key in keys]
        questions = [Question(k, b"%.6f " % s + w, size) for k, w, s in zip(keys, words, shots)]
        answers = model.generate(questions)
        if fault == "no-parts":
            return []
        scores = [float(a.outputs[0][:1] in w) for a, w in zip(answers, words)]
        if fault == "nan":
            scores[0] = float("nan")
        told = [*keys, "strange"] if fault == "strange-key" else keys
        return [Part("", len(words), {"share": mean(scores)}, tuple(told))]


class Executor:
    """This process; one that gives up has others that die."""

    def __init__(self, params, context):
        self.fault, self.threads = params.fault, 1

    @contextmanager
    def start(self, make):
        if self.fault == "leaves-a-process":
            multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
        before = torch.get_num_threads()
        if self.fault != "own-threads":
            torch.set_num_threads(self.threads)
        yield Hands(self.fault, make)
        if self.fault != "keeps-threads":
            torch.set_num_threads(before)


class Hands:
    """What does the work."""

    def __init__(self, fault, make):
        self.fault, self.make, self.told, self.uses = fault, make, [], 0
        self.work = None if fault == "anew" else make(self.told.append)

    def run(self, tasks, watch=None):
        self.uses += 1
        if self.fault == "once-only" and self.uses > 1:
            return
        tasks = list(tasks) if self.fault == "greedy" else tasks
        for number, task in enumerate(tasks):
            if self.fault == "drops" and number == 2:
                continue
            try:
                work = self.work or self.make(self.told.append)
                result = elsewhere(work, task) if self.fault == "gives-up" else work(task)
            except DataError as error:
                if self.fault == "wraps-errors":
                    raise RuntimeError(str(error)) from error
                if self.fault == "retells-errors":
                    raise DataError(f"task {number} failed: {error}") from error
                if self.fault != "swallows":
                    raise
                result = None
            if watch is not None and self.fault != "silent":
                watch(sum(self.told))
            if self.fault != "tells-again":
                self.told.clear()
            yield number + (self.fault == "from-one"), result
            if self.fault == "twice":
                yield number, result


def elsewhere(work, task):
    context = multiprocessing.get_context("fork")
    results, result = context.Pipe(duplex=False)
    process = context.Process(target=lambda: result.send(work(task)))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("a worker has died")
    return results.recv()


FAULTS = {
    "executor": {
        "gives-up": "dies",
        "drops": "results",
        "twice": "results",
        "from-one": "results",
        "once-only": "again",
        "greedy": "lazy",
        "anew": "once",
        "silent": "told",
        "tells-again": "told",
        "wraps-errors": "errors",
        "retells-errors": "errors",
        "swallows": "errors",
        "own-threads": "threads",
        "keeps-threads": "threads",
        "leaves-a-process": "ends",
    },
    "checkpoint_format": {
        "says-yes": "elsewhere",
        "says-no": "recognises",
        "widens": "round-trip",
        "rounds": "round-trip",
        "in-place": "atomic",
        "weights-first": "atomic",
        "config-first": "atomic",
        "trusts": "damaged",
    },
    "corpus": {
        "empty": "documents",
        "small-sizes": "documents",
        "int32": "documents",
        "a-list": "documents",
        "strings": "documents",
        "no-source": "source",
        "shuffles": "deterministic",
        "set-order": "deterministic",
        "no-digest": "digest",
        "one-digest": "digest",
        "digest-of-sizes": "digest",
        "weights-short": "weights",
        "no-eos": "opens",
        "mostly": "texts",
        "sorts": "texts",
        "drops-copies": "texts",
    },
    "objective": {
        "bare": "loss",
        "detached": "loss",
        "unreduced": "loss",
        "named-loss": "figures",
        "nan-figure": "figures",
        "tensor-figure": "figures",
        "other-names": "figures",
        "global-random": "rng",
        "writes": "arguments",
        "scores-padding": "padding",
        "sum": "mean",
        "mean-of-texts": "mean",
        "counts-calls": "stateless",
        "copies-inputs": "learns",
    },
    "training_backend": {
        "no-world": "starts",
        "stands-still": "learns",
        "clipped-norm": "norm",
        "sums": "accumulate",
        "keeps-gradients": "rate",
        "one-decay": "groups",
        "loses-weights": "weights",
        "doubles": "averages",
        "forgets-optimizer": "resumes",
        "stages-nothing": "stages",
        "shares-moments": "stages",
        "stages-once": "stages",
        "hides-files": "lists",
        "keeps-old": "again",
    },
    "task": {
        "asks-what": "asks",
        "asks-likelihood": "asks",
        "no-parts": "parts",
        "nan": "parts",
        "one-key": "keys",
        "strange-key": "keys",
        "global-random": "deterministic",
        "random-shots": "deterministic",
        "hashed-shots": "deterministic",
        "no-limit": "limit",
        "too-long": "fits",
    },
}


@hookimpl
def blt_components():
    made = {
        "checkpoint_format": Format,
        "corpus": Corpus,
        "objective": Objective,
        "training_backend": Backend,
        "task": Task,
        "executor": Executor,
    }
    return [
        Component(
            kind,
            "broken/it",
            factory,
            CorpusParams if kind == "corpus" else Params,
            f"{kind} with a fault",
        )
        for kind, factory in made.items()
    ]
