"""What the arguments of a call decide besides the tensors themselves, remembered.

Checks, normalised arguments and the choice of a provider depend on shapes, strides, dtypes and plain
values. A call that repeats those of an earlier one, as every layer of every step does, gets that call's
Problem with its own tensors in it, and its provider. Where values of tensors are checked too (on a CPU, or
inside ``debug_checks``) nothing is remembered, nor where a Problem holds tensors that are not the caller's.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from headway.plan import Plan
from headway.problem import Problem, values_visible
from headway.providers.base import Provider

#: Environment variables that take part in a call.
_VARIABLES = ("HEADWAY_BACKEND", "HEADWAY_FLASH_ATTN_VERSION")

_TENSORS = frozenset({Tensor, Parameter})
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class _Recipe:
    """How to make an object like one that was made before, from other arguments."""

    kind: type
    values: dict[str, Any]
    arguments: tuple[tuple[str, str], ...]  # (field, name of the argument that belongs there)
    parts: tuple[tuple[str, _Recipe], ...]  # fields that are objects with tensors in them

    def make(self, arguments: dict[str, Any]) -> Any:
        made: Any = object.__new__(self.kind)
        values = made.__dict__
        values.update(self.values)
        for field, name in self.arguments:
            values[field] = arguments[name]
        for field, part in self.parts:
            values[field] = part.make(arguments)
        return made


@dataclass(frozen=True)
class Call:
    """A remembered call: its Problem but for the tensors, and the provider that runs it."""

    recipe: _Recipe
    provider: Provider

    def problem(self, arguments: dict[str, Any]) -> Problem:
        """The Problem of a call with the same signature."""
        made: Problem = self.recipe.make(arguments)
        return made


_CALLS: dict[Hashable, Call] = {}
_MOST_CALLS = 4096


def signature(function: str, arguments: dict[str, Any], k: Tensor, v: Tensor) -> Hashable | None:
    """All that the arguments decide; None for a call that is not to be remembered.

    Of the addresses of keys and values it holds what a choice may depend on, their alignment and
    whether they are one (see :func:`headway.providers.base.kind_of`).
    """
    if not isinstance(k, Tensor) or not isinstance(v, Tensor) or values_visible(k.device):
        return None
    k_at, v_at = k.data_ptr(), v.data_ptr()
    environ = os.environ
    key = (
        function,
        (k_at | v_at) & 15,
        k_at == v_at,
        *[environ.get(name) for name in _VARIABLES],
        *[
            x if x is None
            else (x.dtype, x.shape, x.stride(), x.device) if x.__class__ in _TENSORS
            else x.key.geometry if x.__class__ is Plan
            else tuple(x) if x.__class__ is list
            else x
            for x in arguments.values()
        ],
    )  # fmt: skip
    try:
        hash(key)
    except TypeError:
        return None
    return key


def recall(key: Hashable | None) -> Call | None:
    """The call remembered under a signature."""
    return None if key is None else _CALLS.get(key)


def remember(
    key: Hashable | None, arguments: dict[str, Any], problem: Problem, provider: Provider
) -> None:
    """Keep what a call decided, if its Problem can be made anew from another call's arguments."""
    if key is None or not all(map(_is_simple, arguments.values())):
        return
    given = [(name, x) for name, x in arguments.items() if isinstance(x, Tensor | Plan)]
    names = {id(x): name for name, x in given}
    recipe = _recipe(problem, names) if len(names) == len(given) else None
    if recipe is None:
        return
    if len(_CALLS) >= _MOST_CALLS:
        _CALLS.clear()
    _CALLS[key] = Call(recipe, provider)


def forget() -> None:
    """Look at every call anew."""
    _CALLS.clear()


def _is_simple(x: object) -> bool:
    """Whether equal signatures mean equal calls: no callables, no containers of tensors."""
    if isinstance(x, tuple | list):
        return all(isinstance(one, _PLAIN) for one in x)
    return x.__class__ in _TENSORS or isinstance(x, (Plan, *_PLAIN))


def _recipe(made: Any, names: dict[int, str]) -> _Recipe | None:
    """None where a tensor of it is none of the arguments."""
    values, arguments, parts = {}, [], []
    for field in fields(made):
        x = getattr(made, field.name)
        if isinstance(x, Tensor | Plan):
            if id(x) not in names:
                return None
            arguments.append((field.name, names[id(x)]))
        elif is_dataclass(x):
            part = _recipe(x, names)
            if part is None:
                return None
            if part.arguments or part.parts:
                parts.append((field.name, part))
            else:
                values[field.name] = x
        else:
            values[field.name] = x
    return _Recipe(type(made), values, tuple(arguments), tuple(parts))
