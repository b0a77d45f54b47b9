"""Contracts as functions: what a component of a kind promises, and how a broken one is told of.

A contract has a name that stays (``patcher.causal``), examples to try it on (a Hypothesis strategy,
or None where there is but one), and a function that raises for an example on which it is broken.
"""

from __future__ import annotations

import builtins
import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from blt_core.errors import contract_page

if TYPE_CHECKING:
    from blt_core.testing.subject import Subject

ProfileName = Literal["dev", "ci", "nightly"]


@attrs.frozen
class Profile:
    """How hard a contract is tried.

    examples: at most so many. shrinks: whether a failing one is made small.
    fixed: whether the same examples are tried in each run, from the same ``seed``.
    """

    examples: int
    shrinks: bool = True
    fixed: bool = True
    seed: int = 0


#: dev: what one waits for while writing. ci: the same in each run. nightly: new ones in each run.
PROFILES: dict[str, Profile] = {
    "dev": Profile(15),
    "ci": Profile(25),
    "nightly": Profile(300, fixed=False),
}


class Broken(AssertionError):  # noqa: N818 -- contracts are broken
    """Raised by a contract's function: what went against it, or against another ``contract``."""

    def __init__(self, text: str, contract: str = "") -> None:
        self.contract = contract
        super().__init__(text)


class NotPromised(Exception):  # noqa: N818 -- no error: the component makes no such promise
    """Raised by a contract's function where the component does not make that promise: why."""


class ContractError(AssertionError):
    """A component breaks a contract.

    contract: its name, as ``patcher.causal``. example: the smallest that shows it, or None where a
    contract has no examples. page: what tells of the contract. The cause is what was raised.
    """

    def __init__(self, component: str, contract: str, text: str, example: object = None) -> None:
        self.component = component
        self.contract = contract
        self.text = text
        self.example = example
        kind, _, name = contract.partition(".")
        self.page = f"{contract_page(kind)}#{name}"
        shown = "" if example is None else f"\n  smallest example: {example!r}"
        super().__init__(f"{component} breaks {contract}: {text}{shown}\n  contract: {self.page}")


Check = Callable[["Subject", Any], None]


@attrs.frozen
class Contract:
    """One promise of a kind.

    name: as ``patcher.causal``. says: the promise in a sentence. check(subject, example): raises if
    it is broken. examples(subject): a strategy, None for a contract that is tried once. share: of
    the profile's examples, for contracts that are slow. idle: what a result notes where no example
    called ``subject.exercised()``, as "it proposed nothing in any example".
    """

    name: str
    says: str
    check: Check
    examples: Callable[[Subject], st.SearchStrategy[Any]] | None = None
    share: float = 1.0
    idle: str = ""


@attrs.frozen
class Result:
    """How one contract went. seconds: it took. example: None if it holds, or has no examples.

    skipped: why it does not apply; empty where it was tried. note: what to know of one that holds,
    as that what it tells of never came up.
    """

    contract: str
    passed: bool
    seconds: float
    error: ContractError | None = None
    skipped: str = ""
    note: str = ""

    def to_dict(self) -> dict[str, object]:
        """The record that ``blt plugins test --json`` prints."""
        error = self.error
        return {
            "contract": self.contract,
            "passed": self.passed,
            "seconds": round(self.seconds, 3),
            "example": None if error is None or error.example is None else repr(error.example),
            "text": None if error is None else error.text,
            "skipped": self.skipped or None,
            "note": self.note or None,
        }


class Contracts(list[Contract]):
    """The contracts of a kind, in the order in which they are tried: the plainest first."""

    def __init__(self, kind: str, contracts: Sequence[Contract] = ()) -> None:
        super().__init__(contracts)
        self.kind = kind

    def add(
        self,
        name: str,
        says: str,
        examples: Callable[[Subject], st.SearchStrategy[Any]] | None = None,
        *,
        share: float = 1.0,
        idle: str = "",
    ) -> Callable[[Check], Check]:
        """Decorate the function of a contract."""

        def added(check: Check) -> Check:
            self.append(Contract(f"{self.kind}.{name}", says, check, examples, share, idle))
            return check

        return added


def try_contract(contract: Contract, subject: Subject, profile: Profile) -> Result:
    """Try one contract. Raises nothing for a component that breaks it: the result tells."""
    began = time.perf_counter()
    skipped, error, came_up = "", None, subject.times_exercised
    with _random_state():
        try:
            _try(contract, subject, profile)
        except NotPromised as reason:
            skipped = str(reason)
        except ContractError as broken:
            error = broken
    tried = error is None and not skipped
    note = contract.idle if tried and subject.times_exercised == came_up else ""
    return Result(contract.name, error is None, time.perf_counter() - began, error, skipped, note)


def _try(contract: Contract, subject: Subject, profile: Profile) -> None:
    """Raise ContractError, or NotPromised, or nothing."""
    if contract.examples is not None:
        _try_examples(contract, subject, contract.examples(subject), profile)
        return
    try:
        contract.check(subject, None)
    except NotPromised:
        raise
    except Exception as error:
        raise _error(contract, subject, error, None) from error


def _try_examples(
    contract: Contract,
    subject: Subject,
    examples: st.SearchStrategy[Any],
    profile: Profile,
) -> None:
    failed: list[tuple[Exception, object]] = []

    def check(example: object) -> None:
        try:
            contract.check(subject, example)
        except NotPromised:
            raise
        except Exception as error:
            failed.append((error, example))
            raise

    test = _options(profile, contract.share)(given(examples)(check))
    if profile.fixed:
        test = seed(profile.seed)(test)
    try:
        test()
    except NotPromised:
        raise
    except (Exception, _Group) as error:
        if not failed:
            raise
        # The smallest one was tried last.
        cause, example = failed[-1]
        if isinstance(error, HypothesisException) and not isinstance(cause, Broken):
            # It failed once and not again: what it does depends on more than what it is given.
            example = f"{example!r} (it does not fail each time)"
        raise _error(contract, subject, cause, example) from cause


def _options(profile: Profile, share: float) -> settings:
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if profile.shrinks else [])]
    return settings(
        max_examples=max(round(profile.examples * share), 2),
        derandomize=False,  # where examples are fixed, a seed says so
        database=None,
        deadline=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


#: What Hypothesis raises several errors in, where Python has it.
_Group: type[BaseException] = getattr(builtins, "BaseExceptionGroup", Exception)


def _error(
    contract: Contract, subject: Subject, cause: Exception, example: object
) -> ContractError:
    """What a failing check means: the contract that its own error names, or the one on trial."""
    own = getattr(cause, "contract", "")
    name = own if own.startswith(f"{contract.name.partition('.')[0]}.") else contract.name
    text = str(cause) if isinstance(cause, Broken) else f"{type(cause).__name__}: {cause}"
    return ContractError(subject.label, name, text.partition("\n  contract:")[0], example)


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """Leave the global random states as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 -- the global one
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def reseed(number: int) -> None:
    """Put all global random states somewhere."""
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 -- the one that careless code uses
    torch.manual_seed(number)


def require(condition: object, text: str) -> None:
    """Raise Broken unless ``condition`` holds."""
    if not condition:
        raise Broken(text)
