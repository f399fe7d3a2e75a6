"""What a call's shapes, dtypes and options decided before, so that it is decided once.

Checks, normalised arguments and the choice of a provider depend on shapes, strides, dtypes and plain
values. A call that repeats those of an earlier one, as every layer of every step does, gets that call's
Problem with its own tensors in it, and what its provider made ready for such calls. Where values of tensors
are checked too (on a CPU, or inside ``debug_checks``) nothing is remembered, nor where a Problem holds
tensors that are not the caller's, or numbers that were read from tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from headway import environ
from headway.plan import Plan
from headway.problem import Problem, values_visible
from headway.providers.base import Runner

_TENSORS = frozenset({Tensor, Parameter})
_PLAIN = (type(None), Real, str)


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
    """A remembered call: its Problem but for the tensors, and what runs it."""

    recipe: _Recipe
    run: Runner

    def __call__(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Run the call with other arguments of the same signature."""
        problem: Problem = self.recipe.make(arguments)
        return self.run(problem)


_CALLS: dict[Hashable, Call] = {}
_MOST_CALLS = 4096


class Memory:
    """The calls of a function, remembered by all that their arguments decide.

    ``k`` and ``v`` name the parameters that hold keys and values.
    """

    def __init__(self, function: Callable[..., Any], k: str, v: str) -> None:
        kinds = {n: kind for n, kind in function.__annotations__.items() if n != "return"}
        tensors = [n for n, kind in kinds.items() if "Sequence" not in kind and "Tensor" in kind]
        tensors += [n for n, kind in kinds.items() if "Plan" in kind]
        self._name = function.__name__
        self._keys_and_values = operator.itemgetter(k, v)
        self._tensors = operator.itemgetter(*tensors)
        self._options = operator.itemgetter(*(n for n in kinds if n not in tensors))

    def recall(self, arguments: dict[str, Any]) -> tuple[Hashable | None, Call | None]:
        """The signature of a call, None where it is not to be remembered, and the call known by it."""
        key = self._signature(arguments)
        try:
            return key, _CALLS.get(key)
        except TypeError:  # unhashable
            if not any(x.__class__ is list for x in arguments.values()):
                return None, None
        return self.recall(
            {n: tuple(x) if x.__class__ is list else x for n, x in arguments.items()}
        )

    def _signature(self, arguments: dict[str, Any]) -> tuple[Any, ...] | None:
        """Of the addresses of keys and values it holds what a choice may depend on, their alignment and
        whether they are one (see :func:`headway.providers.base.kind_of`)."""
        k, v = self._keys_and_values(arguments)
        if k.__class__ not in _TENSORS or v.__class__ not in _TENSORS or values_visible(k.device):
            return None
        k_at, v_at = k.data_ptr(), v.data_ptr()
        return (
            self._name,
            (k_at | v_at) & 15,
            k_at == v_at,
            environ.BACKEND.raw(),
            environ.VERSION.raw(),
            self._options(arguments),
            *[
                x if x is None
                else (x.dtype, x.shape, x.stride(), x.device) if x.__class__ in _TENSORS
                else x.key.geometry if x.__class__ is Plan
                else x
                for x in self._tensors(arguments)
            ],
        )  # fmt: skip

    def remember(
        self, key: Hashable | None, arguments: dict[str, Any], problem: Problem, run: Runner
    ) -> None:
        """Keep what a call decided, if its Problem can be made anew from another call's arguments."""
        if key is None or not self._is_repeatable(arguments):
            return
        given = {name: x for name, x in arguments.items() if isinstance(x, Tensor | Plan)}
        names = {id(x): name for name, x in given.items()}
        recipe = _recipe(problem, names) if len(names) == len(given) else None
        if recipe is None:
            return
        if len(_CALLS) >= _MOST_CALLS:
            _CALLS.clear()
        _CALLS[key] = Call(recipe, run)

    def _is_repeatable(self, arguments: dict[str, Any]) -> bool:
        """Whether equal signatures mean equal calls: no callables, no tensors that stand for numbers."""
        options = (x if isinstance(x, tuple | list) else (x,) for x in self._options(arguments))
        return all(isinstance(x, _PLAIN) for option in options for x in option) and all(
            x.__class__ in _TENSORS or isinstance(x, int | Plan | None)
            for x in self._tensors(arguments)
        )


def forget() -> None:
    """Look at every call anew."""
    _CALLS.clear()


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
