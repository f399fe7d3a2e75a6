"""What a call's shapes, dtypes and options decided before, so that it is decided once.

Checks, normalised arguments and the choice of a provider depend on shapes, strides, dtypes and plain
values. A call that repeats those of an earlier one, as every layer of every step does, gets that call's
Problem with its own tensors in it, and what its provider made ready for such calls. Where values of tensors
are checked too (on a CPU, or inside ``debug_checks``) nothing is remembered, nor where a Problem holds
tensors that are not the caller's, or numbers that were read from tensors.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from headway import environ
from headway.plan import Plan
from headway.problem import Problem, debug_context, values_visible
from headway.providers.base import Runner

_TENSORS = frozenset({Tensor, Parameter})
_PLAIN = (type(None), Real, str)


@dataclass(frozen=True)
class _Recipe:
    """How to make an object like one that was made before, from other arguments."""

    kind: type
    values: dict[str, Any]  # of all fields; None where another value belongs
    arguments: tuple[tuple[str, str], ...]  # (field, name of the argument that belongs there)
    parts: tuple[tuple[str, _Recipe], ...]  # fields that are objects with tensors in them

    def make(self, arguments: dict[str, Any]) -> Any:
        values = self.values.copy()
        for field, name in self.arguments:
            values[field] = arguments[name]
        for field, part in self.parts:
            values[field] = part.make(arguments)
        made: Any = object.__new__(self.kind)
        object.__setattr__(made, "__dict__", values)
        return made


class Call:
    """A remembered call: ``make`` makes its Problem with tensors of other arguments, ``run`` runs it."""

    def __init__(self, form: _Form, make: Callable[[dict[str, Any]], Problem], run: Runner) -> None:
        self.fits = form.fits
        self.requires_grad = form.requires_grad
        self.make = make
        self.run = run

    def seen_as(self, form: _Form) -> Call:
        return Call(form, self.make, self.run)


class _Form:
    """The signature of one call, as a thing to compare others with: that is faster than hashing theirs."""

    def __init__(self, arguments: dict[str, Any], k: str, v: str) -> None:
        tensors = [name for name, x in arguments.items() if isinstance(x, Tensor)]
        plans = [name for name, x in arguments.items() if isinstance(x, Plan)]
        rest = (name for name in arguments if name not in (*tensors, *plans))
        self._k, self._v = k, v
        self._tensors = operator.itemgetter(*tensors)
        self._alike = _guard(self._tensors(arguments))
        self.requires_grad = any(arguments[name].requires_grad for name in tensors)
        self._rest = operator.itemgetter(*rest)
        self._values = self._rest(arguments)
        self._plan = plans[0] if plans else None
        self._geometry = arguments[plans[0]].key.geometry if plans else None
        self._around = self._circumstances(arguments)

    def fits(self, arguments: dict[str, Any]) -> bool:
        """Whether these arguments have the same signature."""
        if not self._alike(*self._tensors(arguments)) or self._rest(arguments) != self._values:
            return False
        if self._plan is not None:
            plan = arguments[self._plan]
            if plan.__class__ is not Plan or plan.key.geometry != self._geometry:
                return False
        return self._circumstances(arguments) == self._around

    def _circumstances(self, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """What counts besides the arguments' own forms; see :meth:`Memory._signature`."""
        k_at, v_at = arguments[self._k].data_ptr(), arguments[self._v].data_ptr()
        return (k_at | v_at) & 15, k_at == v_at, environ.raw()


def _guard(examples: tuple[Tensor, ...]) -> Callable[..., bool]:
    """Whether as many tensors are of the same classes, dtypes, devices, shapes and strides, and require
    gradients or not."""
    shapes, strides = [t.shape for t in examples], [t.stride() for t in examples]
    compiled = _compiled_guards()
    if compiled is not None:
        return compiled(examples, shapes, strides)
    forms = [
        (t.__class__, t.dtype, t.device, t.shape, t.stride(), t.requires_grad) for t in examples
    ]

    def alike(*tensors: Any) -> bool:
        for t, (kind, dtype, device, shape, stride, grad) in zip(tensors, forms, strict=True):
            if t.__class__ is not kind or t.shape != shape or t.stride() != stride:
                return False
            if t.dtype != dtype or t.device != device or t.requires_grad != grad:
                return False
        return True

    return alike


def _torch_guard(
    examples: Sequence[Tensor], shapes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]
) -> Callable[..., bool]:
    """torch.compile's own guard of tensors."""
    guards: Any = torch._C._dynamo.guards.TensorGuards
    sizes, steps = [*map(list, shapes)], [*map(list, strides)]
    made = guards(*examples, dynamic_dims_sizes=sizes, dynamic_dims_strides=steps)
    check: Callable[..., bool] = made.check
    return check


@functools.cache
def _compiled_guards() -> Callable[..., Callable[..., bool]] | None:
    """:func:`_torch_guard`, if it does what this module takes it for: it may change with torch."""
    example = torch.empty(2, 3, 4, dtype=torch.float32, device="cpu")
    like = torch.ones_like(example)
    others = (
        example.new_empty(2, 3, 5),
        example.new_empty(2, 4, 3).transpose(1, 2),
        example.new_empty(2, 3, 4, dtype=torch.int32),
        example.new_empty(2, 3, 4, device="meta"),
        torch.empty(2, 3, 4, dtype=torch.float32, device="cpu", requires_grad=True),
        None,
    )
    try:
        check = _torch_guard((like, like), [like.shape] * 2, [like.stride()] * 2)
        works = check(like, example) and not any(check(example, other) for other in others)
    except Exception:
        return None
    return _torch_guard if works else None


_CALLS: dict[Hashable, Call] = {}
_MOST_CALLS = 4096

#: Calls that others are compared with before they are hashed: those of a step's layers, if these differ.
_MOST_RECENT = 4


class Memory:
    """The calls of a function, remembered by all that their arguments decide.

    ``k`` and ``v`` name the parameters that hold keys and values.
    """

    def __init__(self, function: Callable[..., Any], k: str, v: str) -> None:
        kinds = {n: kind for n, kind in function.__annotations__.items() if n != "return"}
        tensors = [n for n, kind in kinds.items() if "Sequence" not in kind and "Tensor" in kind]
        tensors += [n for n, kind in kinds.items() if "Plan" in kind]
        self._name = function.__name__
        self._k, self._v = k, v
        self._tensors = operator.itemgetter(*tensors)
        self._options = operator.itemgetter(*(n for n in kinds if n not in tensors))
        _MEMORIES.append(self)
        self.recent: tuple[Call, ...] = ()

    def fitting(self, arguments: dict[str, Any]) -> Call | None:
        """One of the last calls, where a call has its signature."""
        if not debug_context.get():
            try:
                for call in self.recent:
                    if call.fits(arguments):
                        return call
            except (TypeError, ValueError, RuntimeError):  # not to be compared with a number
                pass
        return None

    def recall(self, arguments: dict[str, Any]) -> tuple[Hashable | None, Call | None]:
        """The signature of a call, None where none is remembered, and the call known by it."""
        return (None, None) if debug_context.get() else self._look_up(arguments)

    def _look_up(self, arguments: dict[str, Any]) -> tuple[Hashable | None, Call | None]:
        key = self._signature(arguments)
        try:
            found = _CALLS.get(key)
        except TypeError:  # unhashable
            if not any(x.__class__ is list for x in arguments.values()):
                return None, None
            given = {n: tuple(x) if x.__class__ is list else x for n, x in arguments.items()}
            return self._look_up(given)
        if found is not None:
            if any(
                call is found for call in self.recent
            ):  # torch looks at its tensors otherwise now
                found = _CALLS[key] = found.seen_as(_Form(arguments, self._k, self._v))
            others = [call for call in self.recent if call.run is not found.run]
            self.recent = (found, *others[: _MOST_RECENT - 1])
        return key, found

    def _signature(self, arguments: dict[str, Any]) -> tuple[Any, ...] | None:
        """Of the addresses of keys and values it holds what a choice may depend on, their alignment and
        whether they are one (see :func:`headway.providers.base.kind_of`)."""
        k, v = arguments[self._k], arguments[self._v]
        if k.__class__ not in _TENSORS or v.__class__ not in _TENSORS or values_visible(k.device):
            return None
        k_at, v_at = k.data_ptr(), v.data_ptr()
        return (
            self._name,
            (k_at | v_at) & 15,
            k_at == v_at,
            environ.raw(),
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
            forget()
        arguments = {n: tuple(x) if x.__class__ is list else x for n, x in arguments.items()}
        _CALLS[key] = Call(_Form(arguments, self._k, self._v), recipe.make, run)

    def _is_repeatable(self, arguments: dict[str, Any]) -> bool:
        """Whether equal signatures mean equal calls: no callables, no tensors that stand for numbers."""
        options = (x if isinstance(x, tuple | list) else (x,) for x in self._options(arguments))
        return all(isinstance(x, _PLAIN) for option in options for x in option) and all(
            x.__class__ in _TENSORS or isinstance(x, int | Plan | None)
            for x in self._tensors(arguments)
        )


_MEMORIES: list[Memory] = []


def forget() -> None:
    """Look at every call anew."""
    _CALLS.clear()
    for memory in _MEMORIES:
        memory.recent = ()


def _recipe(made: Any, names: dict[int, str]) -> _Recipe | None:
    """None where a tensor of it is none of the arguments."""
    values: dict[str, Any] = {}
    arguments, parts = [], []
    for field in fields(made):
        x = getattr(made, field.name)
        values[field.name] = None
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
