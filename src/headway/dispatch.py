"""Which provider runs a problem: ``choose`` returns the winner, ``explain`` the whole table.

Both walk the same candidates in the same order. ``backend=`` (or HEADWAY_BACKEND) pins one provider: it
runs, or UnsupportedError says why not. ``ver=`` (or HEADWAY_FLASH_ATTN_VERSION) names the interface
generation; Headway's own kernels cover both, so it narrows nothing among them.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import torch

from headway import providers
from headway.errors import InvalidInputError, UnsupportedError
from headway.problem import Problem
from headway.providers.base import Provider

BACKEND_VARIABLE = "HEADWAY_BACKEND"
VERSION_VARIABLE = "HEADWAY_FLASH_ATTN_VERSION"

#: Providers that run only when asked for by name.
PINNED_ONLY = frozenset({"reference"})


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
        name, source = os.environ.get(BACKEND_VARIABLE) or "auto", BACKEND_VARIABLE
    if name == "auto":
        return None, source
    if name not in providers.NAMES:
        raise InvalidInputError(source, repr(name), "auto, " + ", ".join(providers.NAMES))
    return name, source


def requested_version(problem: Problem) -> int | None:
    """The interface generation asked for by argument or environment."""
    if problem.ver is not None:
        return problem.ver
    value = os.environ.get(VERSION_VARIABLE)
    if not value:
        return None
    if value not in ("3", "4"):
        raise InvalidInputError(VERSION_VARIABLE, repr(value), "3 or 4")
    return int(value)


def choose(problem: Problem) -> Provider:
    """The provider that runs the problem, or UnsupportedError with what each one said."""
    requested_version(problem)
    pinned, source = pinned_backend(problem)
    if pinned is not None:
        provider = providers.get(pinned)
        reasons = provider.reasons_against(problem)
        if reasons:
            raise UnsupportedError(
                f"{source}={pinned} cannot run this call",
                {pinned: reasons},
                _others(problem, pinned),
            )
        return provider
    refusals: dict[str, list[str]] = {}
    for name in providers.NAMES:
        if name in PINNED_ONLY:
            continue
        reasons = providers.get(name).reasons_against(problem)
        if not reasons:
            return providers.get(name)
        refusals[name] = reasons
    raise UnsupportedError("no provider can run this call", refusals, _others(problem, None))


def planner(device: torch.device) -> Provider | None:
    """The fastest provider of a device that makes plans of its own, if there is one."""
    for name in providers.NAMES:
        provider = providers.get(name)
        plans = type(provider).plan is not Provider.plan
        if plans and name not in PINNED_ONLY and provider.unavailable(device) is None:
            return provider
    return None


def _others(problem: Problem, pinned: str | None) -> list[str]:
    free = dataclasses.replace(problem, backend="auto")
    return [
        name
        for name in providers.NAMES
        if name != pinned and not providers.get(name).reasons_against(free)
    ]


def explain(problem: Problem) -> Explanation:
    """What each provider says of the problem, which one runs it, and why that one."""
    pinned, source = pinned_backend(problem)
    rows = []
    for name in providers.NAMES:
        reasons = tuple(providers.get(name).reasons_against(problem))
        rows.append(Row(name, reasons, "only when named" if name in PINNED_ONLY else ""))
    if pinned is not None:
        ran = next(row for row in rows if row.provider == pinned)
        chosen = None if ran.reasons else pinned
        return Explanation(tuple(rows), chosen, f"pinned by {source}={pinned}")
    able = [row.provider for row in rows if not row.reasons and row.provider not in PINNED_ONLY]
    if not able:
        return Explanation(tuple(rows), None, "no provider can run this call")
    version = requested_version(problem)
    why = "first in order of speed that can run it"
    if version is not None:
        why += f"; version {version} of the interface is covered by Headway's own kernels"
    return Explanation(tuple(rows), able[0], why)
