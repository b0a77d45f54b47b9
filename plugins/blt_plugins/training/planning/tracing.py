"""Memory of a training pass without its data: the real parts run on tensors that hold none.

Parameters are torch's *fake tensors*, which know shape, dtype and storage, and nothing else. What
a pass decides from ids, flags and positions it decides from real tensors, which are small: an
operation on these alone runs for real, one that meets a fake tensor gives fake ones.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

_HALF_BYTES = 2
_ATEN = torch.ops.aten
#: Torch's own counter leaves out attention as CPUs run it, which takes what it takes elsewhere.
_FORMULAS = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,  # noqa: SLF001 -- its name
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,  # noqa: SLF001
}
#: Told now and then how many operations have run.
Told = Callable[[int], None]
#: Seconds from one time to the next.
BEAT = 10.0
_READ = torch.ops.aten._local_scalar_dense.default  # noqa: SLF001 -- its public name is item()


@attrs.frozen
class Moment:
    """Live bytes at one moment of a pass, of gradients of parameters and of all else it made."""

    activations: int
    gradients: int


class LiveBytes(TorchDispatchMode):
    """Counts the storages that the operations within it make, for as long as they live.

    Storages that were there before are not counted, so parameters are not. ``gradient`` tells a
    storage apart, as one of a parameter's gradient. ``moments``: those
    that no other exceeds in both numbers. ``flops``: of all products, 2 for a multiplication and an
    addition, by the bytes of a number of theirs. A fake scalar is read as 0. ``told`` hears every
    ``BEAT`` seconds how many operations have run.
    """

    def __init__(self, fakes: FakeTensorMode, told: Told) -> None:
        super().__init__()
        self._told, self._operations, self._beat = told, 0, time.monotonic() + BEAT
        self.moments: list[Moment] = []
        self.flops: Counter[int] = Counter()
        self._fakes = fakes
        self._sizes: dict[int, tuple[int, bool]] = {}
        self._now = {False: 0, True: 0}

    def keep(self, tensors: Iterable[Tensor]) -> None:
        """These were there before."""
        for tensor in tensors:
            self._enter(tensor.untyped_storage(), 0)

    def gradient(self, tensor: Tensor) -> None:
        """From now on ``tensor`` is a gradient."""
        key = id(tensor.untyped_storage())
        size, already = self._sizes.get(key, (0, True))
        if not already:
            self._sizes[key] = (size, True)
            self._now[False] -= size
            self._now[True] += size
            self._note()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation, for real or not, and count what it made."""
        self._operations += 1
        if time.monotonic() >= self._beat:
            self._told(self._operations)
            self._beat += BEAT
        keys = kwargs or {}
        if _any_fake(args) or _any_fake(keys.values()):
            if func is _READ:
                return 0.0
            given = [self._fake(arg) for arg in args]
            keys = {name: self._fake(arg) for name, arg in keys.items()}
            with self._fakes:
                result = func(*given, **keys)
        else:
            result = func(*args, **keys)
        self._count(result)
        if (count := _FORMULAS.get(func._overloadpacket)) is not None:  # type: ignore[attr-defined]  # noqa: SLF001 -- as torch's own counter finds it
            size = next(each.element_size() for each in _tensors(result))
            self.flops[size] += count(*args, **(kwargs or {}), out_val=result)
        return result

    def _fake(self, given: Any) -> Any:
        """An argument without data: a tensor, or those of a list."""
        if isinstance(given, (list, tuple)):
            return type(given)(self._fake(each) for each in given)
        if not isinstance(given, Tensor) or isinstance(given, FakeTensor):
            return given
        fake = self._fakes.from_tensor(given)
        self._enter(fake.untyped_storage(), 0)  # the real one is counted
        return fake

    def _count(self, result: object) -> None:
        grew = False
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            grew |= self._enter(storage, storage.nbytes())
        if grew:
            self._note()

    def _enter(self, storage: torch.UntypedStorage, size: int) -> bool:
        """Count a storage until it dies; whether it is new."""
        key = id(storage)
        if key in self._sizes:
            return False
        self._sizes[key] = (size, False)
        self._now[False] += size
        weakref.finalize(storage, self._leave, key).atexit = False
        return True

    def _leave(self, key: int) -> None:
        size, gradient = self._sizes.pop(key)
        self._now[gradient] -= size

    def _note(self) -> None:
        now = Moment(self._now[False], self._now[True])

        def below(one: Moment, other: Moment) -> bool:
            return one.activations <= other.activations and one.gradients <= other.gradients

        if not any(below(now, moment) for moment in self.moments):
            self.moments = [m for m in self.moments if not below(m, now)] + [now]


def _tensors(result: object) -> Iterator[Tensor]:
    """What an operation has made: a tensor, or those of a list with other things."""
    for leaf in result if isinstance(result, (list, tuple)) else (result,):
        if isinstance(leaf, Tensor):
            yield leaf


def _any_fake(arguments: Iterable[Any]) -> bool:
    """Whether one of the arguments of an operation is a fake tensor, or a list with one."""
    return any(
        isinstance(each, FakeTensor) or (isinstance(each, (list, tuple)) and _any_fake(each))
        for each in arguments
    )


@attrs.frozen
class Traced:
    """What one pass holds at its moments, and the floating-point operations of its products.

    half_flops: of those in half precision.
    """

    moments: Sequence[Moment]
    flops: int
    half_flops: int


def _silent(_operations: int) -> None:
    pass


def trace_pass(
    loss: Callable[[], Tensor], module: nn.Module, fakes: FakeTensorMode, told: Told = _silent
) -> Traced:
    """One pass, forward and backward, from no gradients on, beside ``module``."""
    live = _beside(module, fakes, told)
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: live.gradient(_grad(p)))
        for p in module.parameters()
        if p.requires_grad
    ]
    try:
        with live:
            loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Traced(live.moments, live.flops.total(), live.flops[_HALF_BYTES])


def trace_score(
    score: Callable[[], object], module: nn.Module, fakes: FakeTensorMode, told: Told = _silent
) -> int:
    """The most live bytes of a call without gradients, beside those of ``module``."""
    live = _beside(module, fakes, told)
    with live, torch.no_grad():
        score()
    return max((moment.activations for moment in live.moments), default=0)


def _beside(module: nn.Module, fakes: FakeTensorMode, told: Told) -> LiveBytes:
    """Counts all but what ``module`` consists of."""
    live = LiveBytes(fakes, told)
    live.keep([*module.parameters(), *module.buffers()])
    return live


def _grad(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a parameter whose gradient was just accumulated has none")
    return parameter.grad
