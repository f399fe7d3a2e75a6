"""Recording what a score_mod or mask_mod computes.

The callable runs once on :class:`Traced` values that stand for the score and the indices. Every
operation on them becomes a :class:`Node`; every tensor it looks into becomes an entry of
``Trace.tensors``. Torch code that touches no traced value (shapes, constants, a precomputed table) just
runs. ``headway.kernels.mods`` turns the recorded nodes into the text of a kernel function.

Arithmetic is float32, int32 and bool, with int64 where an int64 tensor or ``.long()`` brings it in.
"""

from __future__ import annotations

import linecache
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from headway.errors import InvalidInputError, UnsupportedError

BOOL, INT32, INT64, FLOAT32 = "int1", "int32", "int64", "float32"
_RANK = {BOOL: 0, INT32: 1, INT64: 2, FLOAT32: 3}
_INT32_MAX = 2**31 - 1

#: What a value varies with, hence its shape: nothing or b, also h, also positions, also the score.
CONSTANT, HEAD, POSITION, SCORE = range(4)
_EXTENTS = {"score": SCORE, "b": CONSTANT, "h": HEAD, "q_idx": POSITION, "kv_idx": POSITION}

_DTYPES: dict[torch.dtype, str] = {
    torch.bool: BOOL,
    torch.uint8: INT32,
    torch.int8: INT32,
    torch.int16: INT32,
    torch.int32: INT32,
    torch.int64: INT64,
    torch.float16: FLOAT32,
    torch.bfloat16: FLOAT32,
    torch.float32: FLOAT32,
    torch.float64: FLOAT32,
}
#: What ``.to(dtype)`` may ask for inside a mod: the dtype to compute in, and the one to round to first.
_CASTS: dict[torch.dtype, tuple[str, str | None]] = {
    torch.bool: (BOOL, None),
    torch.int32: (INT32, None),
    torch.int64: (INT64, None),
    torch.float32: (FLOAT32, None),
    torch.float16: (FLOAT32, "float16"),
    torch.bfloat16: (FLOAT32, "bfloat16"),
}

#: What the callables are called with, before ``aux``.
SCORE_INPUTS = ("score", "b", "h", "q_idx", "kv_idx")
MASK_INPUTS = SCORE_INPUTS[1:]

Number: TypeAlias = "bool | int | float"
Operand: TypeAlias = "Node | Number"


@dataclass(frozen=True, eq=False)
class Node:
    """One recorded operation. Equal operations of a trace are one node, so identity is equality."""

    op: str
    args: tuple[Any, ...]
    dtype: str
    nonneg: bool = False  # an integer known to be >= 0
    extent: int = CONSTANT  # the widest of the inputs it depends on


class Trace:
    """The nodes and tensors of one run of one callable. ``argument`` names it in errors."""

    def __init__(self, argument: str, aux_tensors: Sequence[Tensor], device: torch.device) -> None:
        self.argument = argument
        self.device = device
        self.aux_tensors = tuple(aux_tensors)
        self.tensors: list[Tensor] = []
        #: No torch code ran on real tensors, so the nodes depend on the callable alone.
        self.only_traced = True
        self._nodes: dict[tuple[Any, ...], Node] = {}

    def run(self, fn: Callable[..., Any], inputs: Sequence[str]) -> Operand:
        """Call ``fn`` on traced inputs; what it returned, as a node or a number."""
        values = [Traced(self, self._input(name)) for name in inputs]
        aux = (self.aux_tensors,) if self.aux_tensors else ()
        with _Recorder(self):
            result = fn(*values, *aux)
        if isinstance(result, Traced | Tensor | bool | int | float):
            return self.operand(result)
        wanted = "a number, or a value computed from the arguments"
        raise InvalidInputError(self.argument, f"a callable that returns {type(result)}", wanted)

    def _input(self, name: str) -> Node:
        # A query may sit before the first key when there are more queries than keys.
        nonneg = name in ("b", "h", "kv_idx")
        dtype = FLOAT32 if name == "score" else INT32
        return self.node("input", (name,), dtype, nonneg, _EXTENTS[name])

    def node(
        self,
        op: str,
        args: tuple[Any, ...],
        dtype: str,
        nonneg: bool = False,
        extent: int = CONSTANT,
    ) -> Node:
        key = (op, dtype, *((type(a), repr(a)) if not isinstance(a, Node) else a for a in args))
        if key not in self._nodes:
            extent = max([extent, *(a.extent for a in args if isinstance(a, Node))])
            self._nodes[key] = Node(op, args, dtype, nonneg, extent)
        return self._nodes[key]

    def operand(self, value: object) -> Operand:
        """A value met in an expression: a traced one, a number, or a tensor without dimensions."""
        if isinstance(value, Traced):
            return value.node
        if isinstance(value, Node):
            return value
        if isinstance(value, Tensor):
            return self._scalar(value)
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, bool | int | float):
            return value
        if isinstance(value, Lookup):
            what, instead = (
                f"a tensor with {value.missing} dimensions not indexed",
                "all its indices",
            )
        else:
            what, instead = f"an operand of type {type(value).__name__}", "a number"
        return self.fail(what, instead)

    def _scalar(self, tensor: Tensor) -> Operand:
        if tensor.dim() > 0:
            shape = tuple(tensor.shape)
            self.fail(
                f"a whole tensor of shape {shape} in an expression",
                "one element of it, like tensor[kv_idx]",
            )
        if tensor.device.type == "cpu" and self.device.type != "cpu":
            return tensor.item()
        return self.load(tensor, ())

    def load(self, tensor: Tensor, indices: tuple[Operand, ...]) -> Node:
        """The element at ``indices``, one per dimension; negative ones count from the end."""
        if tensor.dtype not in _DTYPES:
            self.fail(f"a tensor of {tensor.dtype}", "bool, int32, int64 or float32")
        if tensor.device != self.device:
            raise InvalidInputError(
                self.argument, f"a tensor on {tensor.device} inside it", f"tensors on {self.device}"
            )
        for dim, index in enumerate(indices):
            size = tensor.shape[dim]
            if isinstance(index, Node):
                if index.dtype not in (INT32, INT64):
                    self.fail("an index that is not an integer", ".int() or torch.where")
            elif not -size <= index < size:
                bounds = f"an index in [{-size}, {size})"
                raise InvalidInputError(self.argument, f"index {index} of dimension {dim}", bounds)
        return self.node(
            "load", (self._slot(tensor), is_wide(tensor), *indices), _DTYPES[tensor.dtype]
        )

    def _slot(self, tensor: Tensor) -> int:
        for slot, known in enumerate(self.tensors):
            if known is tensor:
                return slot
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def fail(self, what: str, instead: str) -> NoReturn:
        """Refuse an operation, naming the line of the user's code that asked for it."""
        raise UnsupportedError(
            f"{self.argument}: {what} cannot be part of a kernel; use {instead}.{_user_line()}"
        )


def check_mods(
    score_mod: Callable[..., Any] | None,
    mask_mod: Callable[..., Any] | None,
    aux_tensors: Sequence[Tensor],
    device: torch.device,
) -> None:
    """Raise what keeps the callables of a call (None: there is none) out of a kernel.

    Raises:
        UnsupportedError: a callable does what no kernel can.
        InvalidInputError: it uses a tensor on another device, or returns what is no score.
    """
    if score_mod is not None:
        Trace("score_mod", aux_tensors, device).run(score_mod, SCORE_INPUTS)
    if mask_mod is not None:
        Trace("mask_mod", aux_tensors, device).run(mask_mod, MASK_INPUTS)


def is_wide(tensor: Tensor) -> bool:
    """Whether element offsets need 64 bits."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return sum((size - 1) * stride for size, stride in pairs) > _INT32_MAX


_OWN_CODE = (os.path.abspath(__file__), os.path.dirname(os.path.abspath(torch.__file__)) + os.sep)


def _user_line() -> str:
    """Where the callable being traced is right now: file, line and text."""
    frame = sys._getframe(1)
    while frame is not None and os.path.abspath(frame.f_code.co_filename).startswith(_OWN_CODE):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return ""
    name, line = frame.f_code.co_filename, frame.f_lineno
    return f'\n  File "{name}", line {line}\n    {linecache.getline(name, line).strip()}'


class _Recorder(TorchFunctionMode):
    """While active, torch functions over traced values are recorded and all others run."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, Traced | Lookup) for value in _leaves(args, kwargs)):
            return record(self.trace, _name(func), args, kwargs)
        self.trace.only_traced = False
        return func(*args, **kwargs)


def _leaves(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func)).strip("_")


def record(trace: Trace, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Record the operation torch calls ``name``."""
    rule = RULES.get(name)
    if rule is None:
        trace.fail(f"torch's {name}", _INSTEAD.get(name, "the operations listed in docs/mods.md"))
    try:
        result = rule(trace, *args, **kwargs)
    except TypeError as error:
        trace.fail(f"{name} with these arguments ({error})", "its plain form")
    return Traced(trace, result) if isinstance(result, Node) else result


_INSTEAD = {
    "setitem": "torch.where(condition, new, old) in place of assignment to elements",
    "sum": "a formula of one score: a mod sees single scores, never a row of them",
    "shape": "the shapes of aux_tensors: a mod sees single scores",
    "size": "the shapes of aux_tensors: a mod sees single scores",
    "item": "the traced value itself: it has no number while the kernel is being written",
    "pow": "a constant exponent, or torch.exp2(y * torch.log2(x))",
}
_NO_TRUTH = (
    "torch.where(condition, a, b) in place of if; &, | and ~ in place of and, or, not and chained "
    "comparisons; torch.minimum and torch.maximum in place of min and max"
)


class Traced:
    """Stands for a value inside a kernel. Behaves like a tensor as far as kernels can follow."""

    __slots__ = ("_trace", "node")
    __array_ufunc__ = None  # NumPy scalars leave arithmetic with this class to this class
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, trace: Trace, node: Node) -> None:
        self._trace = trace
        self.node = node

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Makes torch accept these values as tensors; the active recorder is asked first."""
        traced = next(v for v in _leaves(args, kwargs or {}) if isinstance(v, Traced | Lookup))
        return record(traced._trace, _name(func), args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "device":
            return self._trace.device
        if name == "dtype":
            return {BOOL: torch.bool, INT32: torch.int32, INT64: torch.int64}.get(
                self.node.dtype, torch.float32
            )
        if name not in RULES:
            self._trace.fail(
                f"torch's {name}", _INSTEAD.get(name, "the operations listed in docs/mods.md")
            )
        return lambda *args, **kwargs: record(self._trace, name, (self, *args), kwargs)

    def __bool__(self) -> bool:
        self._trace.fail("a Python decision on a traced value", _NO_TRUTH)

    def __int__(self) -> int:
        self._trace.fail("int() of a traced value", ".int()")

    def __float__(self) -> float:
        self._trace.fail(
            "float() or a math function of a traced value", ".float() and torch.exp, .."
        )

    def __index__(self) -> int:
        self._trace.fail(
            "indexing a list, range or array by a traced value",
            "a tensor for it, and pass it as aux_tensors",
        )

    def __iter__(self) -> Iterator[Any]:
        self._trace.fail("iteration over a traced value", "a Python range of known length")

    def __setitem__(self, index: object, value: object) -> None:
        self._trace.fail("assignment to elements", _INSTEAD["setitem"])


def _binary_method(name: str) -> Callable[[Traced, Any], Any]:
    return lambda self, other: record(self._trace, name, (self, other), {})


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor")
for _method in (*_ARITHMETIC, "pow", "lshift", "rshift"):
    setattr(Traced, f"__{_method}__", _binary_method(_method))
    setattr(Traced, f"__r{_method}__", _binary_method(f"r{_method}"))
for _method in ("lt", "le", "gt", "ge", "eq", "ne", "getitem"):
    setattr(Traced, f"__{_method}__", _binary_method(_method))
for _method in ("neg", "pos", "abs", "invert"):
    setattr(Traced, f"__{_method}__", lambda self, _n=_method: record(self._trace, _n, (self,), {}))


class Lookup:
    """A tensor with traced indices for its first dimensions, waiting for the others."""

    __slots__ = ("_trace", "indices", "tensor")
    __array_ufunc__ = None

    def __init__(self, trace: Trace, tensor: Tensor, indices: tuple[Operand, ...]) -> None:
        self._trace = trace
        self.tensor = tensor
        self.indices = indices

    __torch_function__ = Traced.__torch_function__

    @property
    def missing(self) -> int:
        return self.tensor.dim() - len(self.indices)

    @property
    def shape(self) -> torch.Size:
        self._trace.only_traced = False
        return self.tensor.shape[len(self.indices) :]

    def __getitem__(self, index: object) -> Any:
        return record(self._trace, "getitem", (self, index), {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._trace.operand(self)  # explains that dimensions are missing


for _method in _ARITHMETIC:
    for _side in ("", "r"):
        setattr(Lookup, f"__{_side}{_method}__", lambda self, other: self._trace.operand(self))
for _method in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Lookup, f"__{_method}__", lambda self, other: self._trace.operand(self))


# --- dtypes ---------------------------------------------------------------------------------------------


def dtype_of(x: Operand) -> str:
    if isinstance(x, Node):
        return x.dtype
    if isinstance(x, bool):
        return BOOL
    if isinstance(x, float):
        return FLOAT32
    return INT32 if -_INT32_MAX <= x <= _INT32_MAX else INT64


def promoted(*operands: Operand) -> str:
    return max((dtype_of(x) for x in operands), key=_RANK.__getitem__)


def cast(trace: Trace, x: Operand, dtype: str) -> Operand:
    if dtype_of(x) == dtype:
        return x
    if not isinstance(x, Node):
        return {BOOL: bool, FLOAT32: float}.get(dtype, int)(x)
    if dtype == BOOL:
        zero = 0.0 if x.dtype == FLOAT32 else 0
        return trace.node("ne", (x, zero), BOOL)
    return trace.node("cast", (x,), dtype, nonneg=x.nonneg or x.dtype == BOOL)


def _float(trace: Trace, value: object) -> Operand:
    return cast(trace, trace.operand(value), FLOAT32)


def _is_nonneg(x: Operand) -> bool:
    return x.nonneg or x.dtype == BOOL if isinstance(x, Node) else x >= 0


# --- rules: how each torch operation becomes nodes ------------------------------------------------------

Rule: TypeAlias = Callable[..., Any]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def _pair(trace: Trace, a: object, b: object) -> tuple[Operand, Operand, str]:
    x, y = trace.operand(a), trace.operand(b)
    dtype = promoted(x, y)
    return cast(trace, x, dtype), cast(trace, y, dtype), dtype


def _arithmetic(op: str, keeps_sign: bool) -> Rule:
    def rule(trace: Trace, input: object, other: object) -> Node:
        x, y = trace.operand(input), trace.operand(other)
        if op == "sub" and BOOL in (dtype_of(x), dtype_of(y)):
            trace.fail("- of booleans", "~, ^ or .int()")
        if dtype_of(x) == dtype_of(y) == BOOL:
            return _of_booleans(trace, op, x, y)
        dtype = promoted(x, y)
        nonneg = keeps_sign and dtype != FLOAT32 and _is_nonneg(x) and _is_nonneg(y)
        return trace.node(op, (cast(trace, x, dtype), cast(trace, y, dtype)), dtype, nonneg)

    return rule


def _of_booleans(trace: Trace, op: str, x: Operand, y: Operand) -> Node:
    """In torch the sum of booleans is "or" and their product "and"."""
    return trace.node("or" if op == "add" else "and", (x, y), BOOL)


def _comparison(op: str) -> Rule:
    def rule(trace: Trace, input: object, other: object) -> Node:
        x, y, dtype = _pair(trace, input, other)
        if dtype == BOOL:  # False < True, as integers
            x, y = cast(trace, x, INT32), cast(trace, y, INT32)
        return trace.node(op, (x, y), BOOL)

    return rule


def _bitwise(op: str, word: str) -> Rule:
    def rule(trace: Trace, input: object, other: object) -> Node:
        x, y, dtype = _pair(trace, input, other)
        if dtype == FLOAT32:
            trace.fail(f"{word} of floating-point values", "a comparison first, or .int()")
        return trace.node(op, (x, y), dtype, dtype != BOOL and _is_nonneg(x) and _is_nonneg(y))

    return rule


def _logical(op: str) -> Rule:
    def rule(trace: Trace, input: object, other: object) -> Node:
        x, y = (cast(trace, trace.operand(v), BOOL) for v in (input, other))
        return trace.node(op, (x, y), BOOL)

    return rule


def _swapped(rule: Rule) -> Rule:
    return lambda trace, input, other: rule(trace, other, input)


def _register_operators() -> None:
    RULES["add"] = RULES["radd"] = _arithmetic("add", keeps_sign=True)
    RULES["mul"] = RULES["rmul"] = RULES["multiply"] = _arithmetic("mul", keeps_sign=True)
    RULES["sub"] = RULES["subtract"] = _arithmetic("sub", keeps_sign=False)
    RULES["rsub"] = _swapped(RULES["sub"])
    for op in ("lt", "le", "gt", "ge", "eq", "ne"):
        RULES[op] = _comparison(op)
    names = {"less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge"}
    for name, op in {**names, "not_equal": "ne"}.items():
        RULES[name] = RULES[op]
    for op, symbol in (("and", "&"), ("or", "|"), ("xor", "^")):
        RULES[op] = RULES[f"r{op}"] = RULES[f"bitwise_{op}"] = _bitwise(op, symbol)
        RULES[f"logical_{op}"] = _logical(op)
    for op, name in (("lshift", "bitwise_left_shift"), ("rshift", "bitwise_right_shift")):
        RULES[op] = RULES[name] = _bitwise(op, name)
        RULES[f"r{op}"] = _swapped(RULES[op])


_register_operators()


def _unary(op: str) -> Rule:
    return lambda trace, input: trace.node(op, (_float(trace, input),), FLOAT32)


for _op in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "erf"):
    RULES[_op] = RULES[f"special_{_op}"] = _unary(_op)


def _rounding(op: str) -> Rule:
    def rule(trace: Trace, input: object) -> Operand:
        x = trace.operand(input)
        return trace.node(op, (x,), FLOAT32) if dtype_of(x) == FLOAT32 else x

    return rule


for _op in ("floor", "ceil"):
    RULES[_op] = _rounding(_op)


@_rule("neg", "negative")
def _neg(trace: Trace, input: object) -> Operand:
    x = trace.operand(input)
    if dtype_of(x) == BOOL:
        trace.fail("minus of a boolean", "~")
    return trace.node("neg", (x,), dtype_of(x))


@_rule("pos", "positive", "clone", "contiguous", "detach")
def _same(trace: Trace, input: object) -> Operand:
    return trace.operand(input)


@_rule("abs", "absolute")
def _abs(trace: Trace, input: object) -> Operand:
    x = trace.operand(input)
    return (
        x
        if _is_nonneg(x) and dtype_of(x) != FLOAT32
        else trace.node("abs", (x,), dtype_of(x), True)
    )


@_rule("invert", "bitwise_not")
def _invert(trace: Trace, input: object) -> Operand:
    x = trace.operand(input)
    if dtype_of(x) == FLOAT32:
        trace.fail("~ of a floating-point value", "~ of a comparison")
    return trace.node("invert", (x,), dtype_of(x))


@_rule("logical_not")
def _logical_not(trace: Trace, input: object) -> Operand:
    return trace.node("invert", (cast(trace, trace.operand(input), BOOL),), BOOL)


@_rule("truediv", "div", "divide", "true_divide")
def _divide(trace: Trace, input: object, other: object, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return _floor_divide(trace, input, other)
    if rounding_mode is not None:
        trace.fail(f"div with rounding_mode={rounding_mode!r}", "//")
    return trace.node("div", (_float(trace, input), _float(trace, other)), FLOAT32)


@_rule("floordiv", "floor_divide")
def _floor_divide(trace: Trace, input: object, other: object) -> Operand:
    x, y, dtype = _pair(trace, input, other)
    if dtype == FLOAT32:
        return trace.node("floor", (trace.node("div", (x, y), FLOAT32),), FLOAT32)
    if _is_nonneg(x) and _is_nonneg(y):
        return trace.node("idiv", (x, y), dtype, True)
    if isinstance(y, int) and y > 0 and y & (y - 1) == 0:
        return trace.node("rshift", (x, y.bit_length() - 1), dtype)
    exact = trace.node("sub", (x, _remainder(trace, input, other)), dtype)
    return trace.node("idiv", (exact, y), dtype)


@_rule("mod", "remainder")
def _remainder(trace: Trace, input: object, other: object) -> Operand:
    """Python's and torch's %, with the sign of the divisor; a kernel's integer % truncates."""
    x, y, dtype = _pair(trace, input, other)
    if dtype == FLOAT32:
        whole = trace.node("mul", (_floor_divide(trace, input, other), y), FLOAT32)
        return trace.node("sub", (x, whole), FLOAT32)
    if isinstance(y, int) and y > 0 and y & (y - 1) == 0:
        return trace.node("and", (x, y - 1), dtype, True)
    rest = trace.node("irem", (x, y), dtype, _is_nonneg(x) and _is_nonneg(y))
    if rest.nonneg:
        return rest
    opposite = trace.node("xor", (rest, y), dtype)  # negative where the signs differ
    differ = trace.node("lt", (opposite, 0), BOOL)
    wrong = trace.node("and", (trace.node("ne", (rest, 0), BOOL), differ), BOOL)
    fixed = trace.node("add", (rest, y), dtype)
    return trace.node("where", (wrong, fixed, rest), dtype, isinstance(y, int) and y > 0)


@_rule("pow")
def _power(trace: Trace, input: object, exponent: object) -> Operand:
    x, y = trace.operand(input), trace.operand(exponent)
    # In torch an integer, 0 for exponents below 0.
    if isinstance(x, int) and dtype_of(y) != FLOAT32:
        trace.fail("an integer ** an integer", "2.0 ** x for a fraction, 1 << x for an integer")
    if not isinstance(x, Node) and x > 0:  # a constant base
        y = cast(trace, y, FLOAT32)
        scaled = y if x == 2 else trace.node("mul", (y, math.log2(x)), FLOAT32)
        return trace.node("exp2", (scaled,), FLOAT32)
    if y == 0.5:
        return trace.node("sqrt", (cast(trace, x, FLOAT32),), FLOAT32)
    if isinstance(y, Node) or y != int(y) or not 0 < y <= 16:
        trace.fail("** with this exponent", _INSTEAD["pow"])
    base = cast(trace, x, FLOAT32) if isinstance(y, float) else x
    result = base
    for bit in bin(int(y))[3:]:
        result = _square(trace, result)
        result = RULES["mul"](trace, result, base) if bit == "1" else result
    return result


RULES["rpow"] = _swapped(_power)
RULES["rtruediv"] = _swapped(_divide)
RULES["rfloordiv"] = _swapped(_floor_divide)
RULES["rmod"] = _swapped(_remainder)


@_rule("square")
def _square(trace: Trace, input: object) -> Operand:
    return RULES["mul"](trace, input, input)


@_rule("reciprocal")
def _reciprocal(trace: Trace, input: object) -> Operand:
    return _divide(trace, 1.0, input)


@_rule("sigmoid", "special_expit")
def _sigmoid(trace: Trace, input: object) -> Operand:
    grown = trace.node("exp", (trace.node("neg", (_float(trace, input),), FLOAT32),), FLOAT32)
    return trace.node("div", (1.0, trace.node("add", (grown, 1.0), FLOAT32)), FLOAT32)


@_rule("tanh")
def _tanh(trace: Trace, input: object) -> Operand:
    """From exp(-2|x|), which cannot overflow; kernels have no tanh of their own on every device."""
    x = _float(trace, input)
    size = trace.node("abs", (x,), FLOAT32)
    small = trace.node("exp", (trace.node("mul", (size, -2.0), FLOAT32),), FLOAT32)
    above = trace.node("sub", (1.0, small), FLOAT32)
    value = trace.node("div", (above, trace.node("add", (small, 1.0), FLOAT32)), FLOAT32)
    negative = trace.node("lt", (x, 0.0), BOOL)
    return trace.node("where", (negative, trace.node("neg", (value,), FLOAT32), value), FLOAT32)


@_rule("where")
def _where(trace: Trace, condition: object, input: object, other: object) -> Operand:
    x, y, dtype = _pair(trace, input, other)
    chosen = cast(trace, trace.operand(condition), BOOL)
    if not isinstance(chosen, Node):
        return x if chosen else y
    return trace.node("where", (chosen, x, y), dtype, _is_nonneg(x) and _is_nonneg(y))


@_rule("masked_fill")
def _masked_fill(trace: Trace, input: object, mask: object, value: object) -> Operand:
    dtype = dtype_of(trace.operand(input))
    return cast(trace, trace.operand(_where(trace, mask, value, input)), dtype)


def _extreme(op: str) -> Rule:
    """min or max of two values, NaN if one is."""

    def rule(trace: Trace, input: object, other: object) -> Operand:
        x, y, dtype = _pair(trace, input, other)
        if dtype == BOOL:
            return trace.node("and" if op == "lt" else "or", (x, y), BOOL)
        sides = (_is_nonneg(x), _is_nonneg(y))
        nonneg = all(sides) if op == "lt" else any(sides)
        if dtype == FLOAT32 and isinstance(x, Node):
            y = trace.node("where", (trace.node("ne", (x, x), BOOL), x, y), FLOAT32)
        takes_x = trace.node(op, (x, y), BOOL)
        return trace.node("where", (takes_x, x, y), dtype, nonneg and dtype != FLOAT32)

    return rule


RULES["minimum"] = RULES["min"] = _extreme("lt")
RULES["maximum"] = RULES["max"] = _extreme("gt")


@_rule("clamp", "clip")
def _clamp(trace: Trace, input: object, min: object = None, max: object = None) -> Operand:
    x = trace.operand(input)
    if min is not None:
        x = RULES["maximum"](trace, x, min)
    return x if max is None else RULES["minimum"](trace, x, max)


@_rule("clamp_min")
def _clamp_min(trace: Trace, input: object, min: object) -> Operand:
    return _clamp(trace, input, min)


@_rule("clamp_max")
def _clamp_max(trace: Trace, input: object, max: object) -> Operand:
    return _clamp(trace, input, None, max)


@_rule("relu")
def _relu(trace: Trace, input: object, inplace: bool = False) -> Operand:
    return _clamp(trace, input, 0)


@_rule("isnan")
def _isnan(trace: Trace, input: object) -> Operand:
    x = _float(trace, input)
    return trace.node("ne", (x, x), BOOL)


@_rule("isinf")
def _isinf(trace: Trace, input: object) -> Operand:
    size = trace.node("abs", (_float(trace, input),), FLOAT32)
    return trace.node("eq", (size, math.inf), BOOL)


@_rule("to", "type")
def _to(
    trace: Trace, input: object, *args: Any, dtype: torch.dtype | None = None, **_: Any
) -> Operand:
    x = trace.operand(input)
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, Tensor | Traced):
            dtype = arg.dtype
    return x if dtype is None else _to_dtype(trace, x, dtype)


def _to_dtype(trace: Trace, x: Operand, dtype: torch.dtype) -> Operand:
    if dtype not in _CASTS:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in _CASTS)
        trace.fail(f"a cast to {dtype}", f"one of {wanted}")
    computed, rounded = _CASTS[dtype]
    value = cast(trace, x, computed)
    return value if rounded is None else trace.node("round", (value, rounded), computed)


def _cast_rule(dtype: torch.dtype) -> Rule:
    return lambda trace, input: _to_dtype(trace, trace.operand(input), dtype)


for _cast_name, _cast_dtype in (
    ("bool", torch.bool),
    ("int", torch.int32),
    ("long", torch.int64),
    ("float", torch.float32),
    ("half", torch.float16),
    ("bfloat16", torch.bfloat16),
    ("double", torch.float64),
):
    RULES[_cast_name] = _cast_rule(_cast_dtype)


def _filled(trace: Trace, input: object, value: Number, dtype: torch.dtype | None) -> Operand:
    chosen = dtype_of(trace.operand(input)) if dtype is None else _DTYPES[dtype]
    return trace.node("const", (cast(trace, value, chosen),), chosen, value >= 0, POSITION)


@_rule("full_like")
def _full_like(
    trace: Trace, input: object, fill_value: Number, *, dtype: torch.dtype | None = None, **_: Any
) -> Operand:
    return _filled(trace, input, fill_value, dtype)


@_rule("zeros_like")
def _zeros_like(
    trace: Trace, input: object, *, dtype: torch.dtype | None = None, **_: Any
) -> Operand:
    return _filled(trace, input, 0, dtype)


@_rule("ones_like")
def _ones_like(
    trace: Trace, input: object, *, dtype: torch.dtype | None = None, **_: Any
) -> Operand:
    return _filled(trace, input, 1, dtype)


@_rule("getitem")
def _getitem(trace: Trace, table: object, index: object) -> Node | Lookup:
    """``tensor[i, j]`` with traced or constant integers; indices may arrive one bracket at a time."""
    if isinstance(table, Traced):
        trace.fail("indexing a traced value", "an index into aux_tensors")
    tensor, before = (table.tensor, table.indices) if isinstance(table, Lookup) else (table, ())
    if not isinstance(tensor, Tensor):
        trace.fail(f"indexing a {type(tensor).__name__}", "a tensor, passed as aux_tensors")
    given = index if isinstance(index, tuple) else (index,)
    for i in given:
        if i is None or i is Ellipsis or isinstance(i, slice | list):
            trace.fail("a slice, list, None or ... as an index", "one integer per dimension")
    indices = (*before, *(trace.operand(i) for i in given))
    if len(indices) > tensor.dim():
        wanted = f"at most {tensor.dim()}, one per dimension"
        raise InvalidInputError(trace.argument, f"{len(indices)} indices of a tensor", wanted)
    if any(dtype_of(i) == BOOL for i in indices):
        trace.fail("a boolean index", "torch.where")
    if len(indices) < tensor.dim():
        if any(i.extent > CONSTANT for i in indices if isinstance(i, Node)):
            # On tensors, the next bracket would index what this one brought, not the next dimension.
            trace.fail("fewer indices than dimensions", "one bracket: tensor[b, h, kv_idx]")
        return Lookup(trace, tensor, indices)
    return trace.load(tensor, indices)
