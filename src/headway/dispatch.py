"""Which provider runs a problem: ``choose`` returns the winner, ``explain`` the whole table.

Both walk the same candidates in the same order (providers/order.py). ``backend=`` (or HEADWAY_BACKEND) pins
one provider: it runs, or UnsupportedError says why. ``ver=`` (or HEADWAY_FLASH_ATTN_VERSION) asks for an
interface generation: its own package runs what it can, Headway's kernels, which cover every generation, the
rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch

from headway import devices, environ, providers, recall
from headway.errors import InvalidInputError, UnsupportedError
from headway.problem import KVLayout, Problem
from headway.providers import base
from headway.providers.base import Provider, kind_of
from headway.providers.order import Work, order_for

#: Choices made so far, by kind of problem and what was asked for. Whoever varies more than this many
#: kinds of calls pays for choosing again.
_CHOSEN: dict[Hashable, Provider] = {}
_MOST_CHOICES = 4096


@dataclass(frozen=True)
class Row:
    """One provider's answer. ``reasons`` is empty where it would run the call."""

    provider: str
    reasons: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Explanation:
    """The table behind a choice; ``str()`` renders it."""

    rows: tuple[Row, ...]
    chosen: str | None
    why: str

    def __str__(self) -> str:
        width = max(len(row.provider) for row in self.rows)
        lines = []
        for row in self.rows:
            mark = "->" if row.provider == self.chosen else "  "
            answer = "no: " + "; ".join(row.reasons) if row.reasons else "yes"
            lines.append(f"{mark} {row.provider:<{width}}  {answer}{row.note and f' ({row.note})'}")
        lines.append(self.why)
        return "\n".join(lines)


def pinned_backend(problem: Problem) -> tuple[str | None, str]:
    """The provider asked for by argument or environment, and where it was named."""
    if problem.backend is not None:
        name, source = problem.backend, "backend"
    else:
        name, source = environ.BACKEND.get() or "auto", environ.BACKEND.name
    if name == "auto":
        return None, source
    if name not in providers.NAMES:
        raise InvalidInputError(source, repr(name), "auto, " + ", ".join(providers.NAMES))
    return name, source


def requested_version(problem: Problem) -> int | None:
    """The interface generation asked for by argument or environment."""
    if problem.ver is not None:
        return problem.ver
    value = environ.VERSION.get()
    if not value:
        return None
    if value not in ("3", "4"):
        raise InvalidInputError(environ.VERSION.name, repr(value), "3 or 4")
    return int(value)


def choose(problem: Problem) -> Provider:
    """The provider that runs the problem, or UnsupportedError with what each one said."""
    backend: object = problem.backend
    if backend is None:
        backend = environ.BACKEND.raw()
    version: object = problem.ver
    if version is None:
        version = environ.VERSION.raw()
    kind = kind_of(problem)
    key = (kind, backend, version)
    found = _CHOSEN.get(key)
    if found is not None:
        return found
    chosen = _choose(problem)
    if kind is not None:
        if len(_CHOSEN) >= _MOST_CHOICES:
            _CHOSEN.clear()
        _CHOSEN[key] = chosen
    return chosen


def forget() -> None:
    """Choose anew from now on, among what is installed by now."""
    _CHOSEN.clear()
    recall.forget()
    base.forget()
    providers.forget()


def _choose(problem: Problem) -> Provider:
    version = requested_version(problem)
    pinned, source = pinned_backend(problem)
    if pinned is not None:
        provider, reasons = _loaded(problem, pinned)
        if reasons:
            raise UnsupportedError(
                f"{source}={pinned} cannot run this call",
                {pinned: reasons},
                _others(problem, pinned),
            )
        return provider
    refusals: dict[str, list[str]] = {}
    second_best = None
    for name in candidates(problem, version):
        provider, reasons = _loaded(problem, name)
        if reasons:
            refusals[name] = reasons
        elif version is None and _wants_finite_tails(provider, problem):
            second_best = second_best or provider
        else:
            return provider
    if second_best is not None:
        return second_best
    raise UnsupportedError("no provider can run this call", refusals, _others(problem, None))


def candidates(problem: Problem, version: int | None) -> Iterator[str]:
    """The providers that may run a problem without being named, in the order in which they are asked.

    With a version, its own packages come first and other packages not at all.
    """
    work: Work = "decode" if problem.is_decode else "prefill"
    order = order_for(devices.of(problem.device).kind, work)
    names = providers.NAMES if order is None else order.providers
    names = tuple(n for n in names if n in providers.NAMES and n not in providers.PINNED_ONLY)
    if version is None:
        yield from names
        return
    found = [name for name in names if providers.get(name).answers_to(version)]
    yield from sorted(found, key=lambda name: not providers.get(name).is_package)


def _loaded(problem: Problem, name: str) -> tuple[Provider, list[str]]:
    """A provider, imported if it would run the problem, and its reasons not to."""
    provider = providers.get(name)
    reasons = provider.reasons_against(problem)
    if not reasons:
        try:
            provider.load()
        except ImportError:
            reasons = provider.reasons_against(problem)
    return provider, reasons


def _wants_finite_tails(provider: Provider, problem: Problem) -> bool:
    """Whether a provider would multiply rows behind a sequence's last key by zero, and there are some.

    That such rows may hold anything, NaN included, is promised to all who name no provider: another one
    is taken before it, if there is one.
    """
    if not provider.is_package:
        return False
    has_tails = problem.kv_layout is not KVLayout.DENSE or problem.seqlens_k is not None
    return has_tails and provider.capabilities(problem.device).needs_finite_tails


#: Said of a provider that keeps all promises but one.
TAILS = "rows behind the last key must be finite there"


def planner(device: torch.device) -> Provider | None:
    """The fastest provider of a device that makes plans of its own, if there is one."""
    order = order_for(devices.of(device).kind, "decode")
    for name in providers.NAMES if order is None else order.providers:
        if name not in providers.NAMES or name in providers.PINNED_ONLY:
            continue
        provider = providers.get(name)
        plans = type(provider).plan is not Provider.plan
        if plans and provider.unavailable(device) is None:
            return provider
    return None


def _others(problem: Problem, pinned: str | None) -> list[str]:
    """The providers that would run the problem if they were named."""
    free = dataclasses.replace(problem, backend="auto", ver=None)
    return [
        name
        for name in providers.NAMES
        if name != pinned and not providers.get(name).reasons_against(free)
    ]


def explain(problem: Problem) -> Explanation:
    """What each provider says of the problem, which one runs it, and why that one."""
    pinned, source = pinned_backend(problem)
    version = requested_version(problem)
    chosen: str | None
    try:
        chosen = _choose(problem).name
    except UnsupportedError:
        chosen = None
    rows = tuple(_row(name, problem, version) for name in providers.NAMES)
    if pinned is not None:
        why = f"pinned by {source}={pinned}"
        if chosen is None:
            why += ", which cannot run this call"
        return Explanation(rows, chosen, why)
    if chosen is None:
        return Explanation(rows, None, "no provider can run this call")
    return Explanation(rows, chosen, _why(problem, version, chosen, rows))


def _row(name: str, problem: Problem, version: int | None) -> Row:
    provider = providers.get(name)
    reasons = tuple(provider.reasons_against(problem))
    if reasons:
        return Row(name, reasons, "only when named" if name in providers.PINNED_ONLY else "")
    notes = [provider.note(problem)]
    if name in providers.PINNED_ONLY:
        notes.append("only when named")
    elif not provider.answers_to(version):
        notes.append(f"not asked: ver={version}")
    elif name not in candidates(problem, version):
        notes.append("only when named")
    if _wants_finite_tails(provider, problem):
        notes.append(TAILS)
    return Row(name, (), "; ".join(note for note in notes if note))


def _why(problem: Problem, version: int | None, chosen: str, rows: tuple[Row, ...]) -> str:
    if version is None:
        return "first in order of speed that can run it"
    if providers.get(chosen).is_package:
        return f"ver={version}: the generation's own package"
    own = [name for name in candidates(problem, version) if providers.get(name).is_package]
    said = {row.provider: row.reasons for row in rows}
    refused = "; ".join(f"{name}: {', '.join(said[name])}" for name in own)
    return f"ver={version} runs on Headway's own kernels, which cover it" + (
        f" ({refused})" if refused else ""
    )


def supported_versions(device: int | str | torch.device | None = None) -> tuple[int, ...]:
    """The interface generations (``ver=``) whose calls run on a device, whoever runs them.

    Args:
        device: a torch device, its name, or an index of an accelerator; None: the current accelerator,
            or the CPU where there is none.

    Returns:
        A tuple of 3 and 4, in order; empty where no provider runs at all.
    """
    where = devices.resolved(device)
    if not devices.is_present(where):
        return ()
    able = [providers.get(name) for name in providers.NAMES if name not in providers.PINNED_ONLY]
    able = [provider for provider in able if provider.unavailable(where) is None]
    return tuple(
        version for version in (3, 4) if any(provider.answers_to(version) for provider in able)
    )


def is_fa3_supported(device: int | str | torch.device | None = None) -> bool:
    """Whether calls with ``ver=3`` run on a device (default: the current accelerator, or the CPU).

    Unlike sgl_kernel's function of this name it answers on every build of torch, and for each device of
    a machine separately. Which provider runs the calls is what :func:`headway.explain` says.
    """
    return 3 in supported_versions(device)
