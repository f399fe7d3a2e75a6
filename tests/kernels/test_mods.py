"""score_mod and mask_mod as kernels run them, against the same callables on torch tensors."""

import math
import operator
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import headway
from headway.errors import InvalidInputError, UnsupportedError
from headway.kernels._triton import jit, tl
from headway.kernels.mods import trace_mask_mod, trace_mods, trace_score_mod

DOC = Path(__file__).parents[2] / "docs" / "mods.md"
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@jit
def apply_kernel(
    scores,
    out,
    shown,
    first_position,
    num_heads,
    rows,
    keys: tl.constexpr,
    aux,
    score_mod: tl.constexpr,
    mask_mod: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What attention kernels do with mods: a tile of rows of PACK heads, all blocks of keys."""
    b = tl.program_id(1)
    r = tl.arange(0, BLOCK_M)
    head = tl.program_id(0) * PACK + r % PACK
    row = r // PACK
    if PACK == 1:
        h = tl.program_id(0)
    else:
        h = head[:, None]
    for start in range(0, keys, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (row < rows)[:, None] & (n < keys)[None, :]
        at = ((b * num_heads + head) * rows + row)[:, None] * keys + n[None, :]
        score = tl.load(scores + at, mask=inside, other=0.0)
        q_idx = (row + first_position)[:, None]
        kv_idx = n[None, :]
        if mask_mod is not None:
            visible = inside & mask_mod(b, h, q_idx, kv_idx, aux)
            tl.store(shown + at, visible.to(tl.int8), mask=inside)
        if score_mod is not None:
            score = score_mod(score, b, h, q_idx, kv_idx, aux)
        tl.store(out + at, score, mask=inside)


def run_traced(score_mod, mask_mod, scores, *, first_position=0, aux=(), pack=1):
    """Apply the mods inside a kernel to (B, H, rows, keys) scores: (score, mask)."""
    mods = trace_mods(score_mod, mask_mod, aux, DEVICE)
    batch, heads, rows, keys = scores.shape
    out, shown = torch.full_like(scores, 7.0), torch.zeros_like(scores, dtype=torch.int8)
    block_m = 1 << (rows * pack - 1).bit_length()
    apply_kernel[(heads // pack, batch)](
        scores,
        out,
        shown,
        first_position,
        heads,
        rows,
        keys,
        mods.aux,
        mods.score_mod,
        mods.mask_mod,
        pack,
        block_m,
        16,
    )
    return out, shown.bool()


def run_eager(score_mod, mask_mod, scores, *, first_position=0, aux=()):
    """The same by torch, with indices as the reference gives them."""
    _, heads, rows, keys = scores.shape
    h = torch.arange(heads, device=DEVICE)[:, None, None]
    q_idx = torch.arange(rows, device=DEVICE)[None, :, None] + first_position
    kv_idx = torch.arange(keys, device=DEVICE)[None, None, :]
    rest = (tuple(aux),) if aux else ()
    out, shown = torch.empty_like(scores), torch.zeros_like(scores, dtype=torch.bool)
    for b in range(scores.shape[0]):
        place = torch.tensor(b, device=DEVICE)
        if score_mod is not None:
            out[b] = torch.as_tensor(score_mod(scores[b], place, h, q_idx, kv_idx, *rest))
        else:
            out[b] = scores[b]
        if mask_mod is not None:
            shown[b] = torch.as_tensor(mask_mod(place, h, q_idx, kv_idx, *rest)).bool()
    return out, shown


def random_scores(batch=2, heads=4, rows=5, keys=37, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, rows, keys, generator=generator) * 4).to(DEVICE)


def assert_same(score_mod=None, mask_mod=None, *, exact=False, scores=None, **how):
    scores = random_scores() if scores is None else scores
    eager, eager_shown = run_eager(score_mod, mask_mod, scores, **how)
    for pack in (1, 2):
        traced, shown = run_traced(score_mod, mask_mod, scores, pack=pack, **how)
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 2e-6, "atol": 2e-6}
        torch.testing.assert_close(traced, eager, equal_nan=True, **tolerance)
        assert torch.equal(shown, eager_shown)


# --- the examples of the documentation ------------------------------------------------------------------


@pytest.fixture(scope="module")
def documented_calls():
    """Run the code of docs/mods.md; the calls it makes, as (name, score_mod, mask_mod, aux, q, k)."""
    calls = []

    def recorded(q, k, v, **kwargs):
        mods = [kwargs.get("score_mod"), kwargs.get("mask_mod")]
        aux = tuple(kwargs.get("aux_tensors", ()))
        name = next(mod for mod in mods if mod is not None).__name__
        calls.append(SimpleNamespace(name=name, mods=mods, aux=aux, q=q, k=k, v=v, kwargs=kwargs))
        out = headway.flash_attn_func(q, k, v, **kwargs)
        want = headway.flash_attn_func(q, k, v, backend="reference", **kwargs)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
        return out

    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    code = "\n".join(blocks).replace("from headway import flash_attn_func\n", "")
    exec(compile(code, str(DOC), "exec"), {"flash_attn_func": recorded})
    return {call.name: call for call in calls}


EXAMPLES = ["alibi", "soft_cap", "relative_bias", "same_document", "tree", "prefix_lm", "dilated"]


def test_every_documented_example_is_tested(documented_calls):
    assert sorted(documented_calls) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_documented_example_traced_equals_eager(documented_calls, name):
    call = documented_calls[name]
    rows, keys = call.q.shape[1], call.k.shape[1]
    scores = random_scores(call.q.shape[0], call.q.shape[2], rows, keys)
    aux = tuple(t.to(DEVICE) for t in call.aux)
    assert_same(*call.mods, scores=scores, first_position=keys - rows, aux=aux)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("rows", [None, 1])
def test_documented_example_in_attention(documented_calls, name, rows):
    """The portable kernels, prefill and (with a single row) decode, against the reference."""
    call = documented_calls[name]
    q, k, v = (
        t.to(torch.bfloat16) for t in (call.q[:, -rows:] if rows else call.q, call.k, call.v)
    )
    aux = {"aux_tensors": [t.to(DEVICE) for t in call.aux]} if call.aux else {}
    options = {**call.kwargs, **aux}
    got = headway.flash_attn_func(*(t.to(DEVICE) for t in (q, k, v)), backend="portable", **options)
    wide = (t.float() for t in (q, k, v))
    want = headway.flash_attn_func(*wide, backend="reference", **call.kwargs)
    assert (got.float().cpu() - want).abs().max() <= 2**-7 * want.abs().max()


def test_functions_compile_into_triton_and_gluon_kernels():
    """For NVIDIA and AMD, heads as scalars and as columns; in a process without the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.mods_compile"]
    run = subprocess.run(
        command, env=environment, cwd=DOC.parents[1], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("compiled") == 24


# --- single operations ----------------------------------------------------------------------------------

SCORE_MODS = {
    "add": lambda s, b, h, q, kv: s + h * 2 - b,
    "reflected": lambda s, b, h, q, kv: 1.0 - (3 * q) / (kv + 1) + (7 - kv) - (5.0 / (s * s + 1)),
    "powers": lambda s, b, h, q, kv: (
        s**3 + (kv + 1) ** 0.5 + 2.0 ** (-h) + 3 ** s.clamp(-2, 2) + kv**2
    ),
    "exp": lambda s, b, h, q, kv: torch.exp(s / 8) + torch.exp2(-kv / 4) + s.mul(0.125).exp(),
    "log": lambda s, b, h, q, kv: torch.log(kv + 1) + torch.log2(s.abs() + 1),
    "roots": lambda s, b, h, q, kv: torch.sqrt(kv) + torch.rsqrt(s.abs() + 1) + s.square().sqrt(),
    "sigmoid": lambda s, b, h, q, kv: torch.sigmoid(s) + (s * 50).sigmoid() + torch.relu(s),
    "tanh": lambda s, b, h, q, kv: torch.tanh(s) + (s * 100).tanh() + torch.tanh(s * 1e-3),
    "trigonometry": lambda s, b, h, q, kv: torch.sin(s) * torch.cos(kv) + torch.erf(s),
    "rounding": lambda s, b, h, q, kv: torch.floor(s) + s.ceil() + kv.floor(),
    "extremes": lambda s, b, h, q, kv: (
        torch.minimum(s, kv.float()) + torch.max(s, (q - kv).float())
    ),
    "clamp": lambda s, b, h, q, kv: s.clamp(-1, 1) + torch.clamp(kv - q, min=-3) + s.clamp_max(q),
    "where": lambda s, b, h, q, kv: torch.where(kv > q, -math.inf, torch.where(s > 0, s, 0)),
    "constants": lambda s, b, h, q, kv: (
        torch.where(h == 1, 1.0, 0.0) * math.pi + torch.where(h > 2, 2, 1)
    ),
    "masked_fill": lambda s, b, h, q, kv: s.masked_fill(kv % 3 == 0, float("-inf")),
    "shape_of_bias": lambda s, b, h, q, kv: torch.exp2(-(h + 1) * 2.0),
    "one_number": lambda s, b, h, q, kv: 3,
    "bool_counts": lambda s, b, h, q, kv: (
        s + (kv > q) * 2 + (s > 0) + (h > 1).float() - (b == 0).int()
    ),
    "casts": lambda s, b, h, q, kv: (
        s.int() + s.to(torch.int32) / 2 + s.long() + kv.to(s) + s.bool()
    ),
    "likes": lambda s, b, h, q, kv: (
        torch.zeros_like(s) + torch.full_like(kv, 3) + torch.ones_like(s)
    ),
    "nan": lambda s, b, h, q, kv: torch.where(torch.isnan(s / (kv - kv)), 5.0, s).minimum(
        s / (q - q)
    ),
    "inf": lambda s, b, h, q, kv: torch.where(torch.isinf(s / (kv - kv)), 1.0, 0.0),
    "numpy_scalars": lambda s, b, h, q, kv: np.float32(0.5) * s + np.int64(3),
    "scalar_tensor": lambda s, b, h, q, kv: (
        s * torch.tensor(0.25, device=s.device) + torch.tensor(2)
    ),
    "keyword": lambda s, b, h, q, kv: torch.where(condition=kv > q, input=s, other=-s),
    "in_place_style": lambda s, b, h, q, kv: operator.iadd(s.clone(), kv),
    "rounds_to_bf16": lambda s, b, h, q, kv: (torch.floor(s) + 0.5).bfloat16() + q.half(),
}


@pytest.mark.parametrize("name", SCORE_MODS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, for exp and x / 0
def test_operation_of_scores(name):
    assert_same(SCORE_MODS[name], first_position=6)


MASK_MODS = {
    "comparisons": lambda b, h, q, kv: (kv <= q) & (kv != 3) | (h < b) & (q >= 4) ^ (kv == q),
    "not": lambda b, h, q, kv: ~(kv > q) & torch.logical_not(h),
    "logical": lambda b, h, q, kv: torch.logical_or(
        torch.logical_and(kv, q), torch.logical_xor(h, b)
    ),
    "floor_division": lambda b, h, q, kv: (q - kv) // 5 == (kv - q) // -3,
    "floor_division_by_power": lambda b, h, q, kv: ((q - kv) // 8 + (q - kv) % 8) % 3 == 0,
    "remainder": lambda b, h, q, kv: ((q - kv) % 7 + torch.remainder(kv - q, -7)) % 2 == 1,
    "floor_division_of_floats": lambda b, h, q, kv: (q - kv) // 2.5 + (kv - q) % 4.5 > 1,
    "division": lambda b, h, q, kv: torch.div(q - kv, 4, rounding_mode="floor") < (q - kv) / 4,
    "bits": lambda b, h, q, kv: ((kv ^ q) & 5 | h << 1) >> 1 == ~(-2),
    "bits_of_numbers": lambda b, h, q, kv: (kv & (1 << h)) + (13 >> (kv % 5)) > 1,
    "number": lambda b, h, q, kv: 0,
    "boolean": lambda b, h, q, kv: True,
    "integer": lambda b, h, q, kv: kv - q,
    "score_free_float": lambda b, h, q, kv: (kv - q) * 0.5,
    "bool_arithmetic": lambda b, h, q, kv: (kv > q) + (kv > h) > 1,
    "bool_comparison": lambda b, h, q, kv: (kv > q) < (kv > 2),
}


@pytest.mark.parametrize("name", MASK_MODS)
@pytest.mark.parametrize("first_position", [9, -3])
def test_operation_of_masks(name, first_position):
    """Also with queries that sit before the first key."""
    assert_same(mask_mod=MASK_MODS[name], first_position=first_position)


# --- tensors --------------------------------------------------------------------------------------------


def lookup_one_bracket_at_a_time(s, b, h, q, kv, aux):
    return s + aux[0][b][h, kv % 6]


def lookup_constant_indices(s, b, h, q, kv, aux):
    return s + aux[0][1, h, -1] + aux[0][-1][0, kv % 6] + aux[0][0, 0, 0]


def lookup_negative_indices(s, b, h, q, kv, aux):
    return s + aux[0][b, h, (q - kv) % 6 - 6]


def lookup_by_lookup(s, b, h, q, kv, aux):
    return s + aux[0][b, h, aux[1][kv % 3]]


def lookup_by_shape(s, b, h, q, kv, aux):
    last = aux[0].shape[2] - 1
    return s + sum(aux[0][b, h, min(i, last)] for i in range(3)) + aux[0].size(0)


@pytest.mark.parametrize(
    "mod",
    [
        lookup_one_bracket_at_a_time,
        lookup_constant_indices,
        lookup_negative_indices,
        lookup_by_lookup,
        lookup_by_shape,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.bool])
def test_lookup(mod, dtype):
    table = (torch.arange(48, device=DEVICE).reshape(2, 4, 6) % 5 - 1).to(dtype)
    places = torch.tensor([5, 0, 2], device=DEVICE)
    assert_same(mod, aux=(table, places), exact=True)


def test_lookup_in_a_strided_tensor():
    table = torch.randn(6, 9, device=DEVICE)[::2].t()[1:5]  # (4, 3), both strides unusual
    assert_same(lambda s, b, h, q, kv, aux: s + aux[0][h, kv % 3], aux=(table,), exact=True)


def test_tensor_without_dimensions_is_a_number_of_the_call():
    mod = lambda s, b, h, q, kv, aux: s * aux[0] + aux[0]  # noqa: E731
    for value in (0.5, 2.0):
        assert_same(mod, aux=(torch.tensor(value, device=DEVICE),), exact=True)
    keys = {trace_score_mod(mod, (torch.tensor(v),)).key for v in (0.5, 2.0)}
    assert len(keys) == 1


def test_captured_tensors_work_like_aux_tensors():
    slopes = torch.rand(4, device=DEVICE)
    biases = torch.rand(2, 40, device=DEVICE)
    assert_same(lambda s, b, h, q, kv: s * slopes[h] + biases[b, kv] + slopes[2], exact=True)


def test_captured_tensor_may_be_computed_from_aux():
    assert_same(
        lambda s, b, h, q, kv, aux: s + (aux[0] * 2 + 1)[h],
        aux=(torch.rand(4, device=DEVICE),),
        exact=True,
    )


def test_score_and_mask_mod_share_aux_tensors():
    documents = torch.arange(37, device=DEVICE) // 10
    slopes = torch.rand(4, device=DEVICE)
    assert_same(
        lambda s, b, h, q, kv, aux: s - aux[1][h] * (q - kv),
        lambda b, h, q, kv, aux: aux[0][q] == aux[0][kv],
        first_position=20,
        aux=(documents, slopes),
        exact=True,
    )


def test_indices_outside_the_tensor_read_zero():
    """Rows and columns that pad a tile index anywhere; the loads must stay inside the tensor."""
    guarded = torch.full((300,), math.nan, device=DEVICE)
    table = guarded[100:104]
    table.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    scores = random_scores(1, 2, 3, 20)
    for first in (0, -90):
        mod = lambda s, b, h, q, kv, aux: aux[0][kv + q]  # noqa: E731
        out, _ = run_traced(mod, None, scores, first_position=first, aux=(table,))
        index = torch.arange(3)[:, None] + first + torch.arange(20)[None, :]
        inside = (index >= -4) & (index < 4)
        want = torch.where(inside, table.cpu()[index.clamp(-4, 3)], 0.0)
        assert torch.equal(out.cpu()[0, 0], want)


def test_empty_table_reads_zero():
    out, _ = run_traced(
        lambda s, b, h, q, kv, aux: s + aux[0][kv],
        None,
        scores := random_scores(),
        aux=(torch.empty(0, device=DEVICE),),
    )
    assert torch.equal(out, scores)


# --- random expressions ---------------------------------------------------------------------------------

#: Text with {i}, {f} and {c} for integer, float and condition operands; never of constants alone.
GRAMMAR = {
    "i": [
        "({i} + {i})",
        "({i} - 3)",
        "(2 - {i})",
        "({i} % 31 * ({i} % 17))",
        "({i} // 3)",
        "({i} // 8)",
        "({i} // -5)",
        "({i} % 7)",
        "({i} % -4)",
        "abs({i})",
        "({i} & {i})",
        "({i} | 5)",
        "({i} ^ {i})",
        "({f} * 1.0).int()",
        "torch.where({c}, {i}, -1)",
        "torch.maximum({i}, {i})",
        "{i}.clamp(-4, 9)",
        "aux[1][{i} % 20]",
    ],
    "f": [
        "({f} + {f})",
        "({f} - {i})",
        "({i} * {f})",
        "({f} / 4)",
        "(0.5 * {i})",
        "torch.where({c}, {f}, {i})",
        "torch.where({c}, 1.5, {f})",
        "torch.minimum({f}, {f})",
        "torch.floor({f})",
        "{f}.clamp(min=-4).clamp_max({i})",
        "abs({f})",
        "({c} * {f})",
        "{i}.float()",
        "aux[0][{i} % 2]",
    ],
    "c": [
        "({i} < {i})",
        "({i} == 2)",
        "({f} >= {i})",
        "({f} != {f})",
        "(~{c})",
        "({c} & {c})",
        "({c} ^ {c})",
        "{i}.bool()",
    ],
}
LEAVES = {
    "i": ["b", "h", "q", "kv", "aux[1][kv]", "aux[1][-1 - h]"],
    "f": ["s", "aux[0][h]", "s * aux[0][1]"],
    "c": ["(kv > q)", "(h == 1)"],
}


@st.composite
def expressions(draw, kind="f", depth=4):
    choices = GRAMMAR[kind] + LEAVES[kind] if depth else LEAVES[kind]
    text = draw(st.sampled_from(choices))
    for operand in ("i", "f", "c"):
        while f"{{{operand}}}" in text:
            text = text.replace(f"{{{operand}}}", draw(expressions(operand, max(depth - 1, 0))), 1)
    return text


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(expressions())
def test_random_expression_is_exact(expression):
    """Operations that IEEE and integer arithmetic define exactly, so traced and eager agree bit for bit."""
    scores = torch.arange(2 * 3 * 16, device=DEVICE).reshape(1, 2, 3, 16).float() / 8 - 5
    aux = (
        torch.tensor([0.25, -2.0], device=DEVICE),
        torch.arange(20, device=DEVICE, dtype=torch.int32) - 9,
    )
    namespace = {"torch": torch}
    text = f"def mod(s, b, h, q, kv, aux):\n    return s * 0 + {expression}\n"
    exec(text, namespace)
    assert_same(namespace["mod"], scores=scores, first_position=-1, aux=aux, exact=True)


# --- identity -------------------------------------------------------------------------------------------


def test_equal_content_is_one_function():
    def make(slope):
        return lambda score, b, h, q_idx, kv_idx: score + slope * (q_idx - kv_idx)

    first, again, other = (trace_score_mod(make(slope)) for slope in (0.5, 0.5, 0.25))
    assert first.key == again.key != other.key
    assert first.function() is again.function()
    assert first.function() is not other.function()


def test_changed_closure_is_seen():
    slope = 1.0

    def mod(score, b, h, q_idx, kv_idx):
        return score * slope

    before = trace_score_mod(mod)
    slope = 2.0
    assert trace_score_mod(mod).key != before.key
    slope = 2
    assert "2.0" in trace_score_mod(mod).source


SCALE = 1.0


def _scaled(score):
    return score * SCALE


def test_changed_global_is_seen_through_helpers(monkeypatch):
    mod = lambda score, b, h, q_idx, kv_idx: _scaled(score)  # noqa: E731
    before = trace_score_mod(mod).key
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert trace_score_mod(mod).key != before


def test_changed_shape_is_seen():
    mod = lambda b, h, q_idx, kv_idx, aux: kv_idx < aux[0].shape[0]  # noqa: E731
    sources = {trace_mask_mod(mod, (torch.zeros(n),)).source for n in (3, 4)}
    assert len(sources) == 2


def test_tensors_of_each_call_are_used():
    mod = lambda score, b, h, q_idx, kv_idx, aux: score + aux[1][h]  # noqa: E731
    for seed in range(2):
        aux = (torch.zeros(1), torch.full((4,), float(seed)))
        traced = trace_score_mod(mod, aux)
        assert len(traced.tensors) == 1
        assert traced.tensors[0] is aux[1]


def test_unused_work_is_left_out():
    def mod(score, b, h, q_idx, kv_idx, aux):
        torch.exp(score) + aux[0][h]
        return score

    traced = trace_score_mod(mod, (torch.zeros(4),))
    assert traced.tensors == ()
    assert "exp" not in traced.source


# --- refusals -------------------------------------------------------------------------------------------

REFUSED = {
    "if": (lambda s, b, h, q, kv: s if kv > q else 0.0, "torch.where"),
    "and": (lambda s, b, h, q, kv: s * (kv > q and h > 1), "& "),
    "chained": (lambda s, b, h, q, kv: torch.where(0 < kv < q, s, 0.0), "chained"),
    "min": (lambda s, b, h, q, kv: min(s, kv), "torch.minimum"),
    "math": (lambda s, b, h, q, kv: math.exp(s), "torch.exp"),
    "int": (lambda s, b, h, q, kv: s * int(kv), r"\.int\(\)"),
    "list": (lambda s, b, h, q, kv: s * [1.0, 2.0][h], "aux_tensors"),
    "loop": (lambda s, b, h, q, kv: sum(i for i in kv), "known length"),
    "range": (lambda s, b, h, q, kv: sum(range(h)), "aux_tensors"),
    "sum": (lambda s, b, h, q, kv: s.sum(), "sum.*single scores"),
    "softmax": (lambda s, b, h, q, kv: torch.softmax(s, dim=-1), "softmax"),
    "shape": (lambda s, b, h, q, kv: s * s.shape[0], "shape"),
    "item": (lambda s, b, h, q, kv: s * h.item(), "item"),
    "cumsum": (lambda s, b, h, q, kv: torch.cumsum(s, 0), "cumsum"),
    "double": (lambda s, b, h, q, kv: s.double(), "float64.*float32"),
    "float_bits": (lambda s, b, h, q, kv: s & 1, "& of floating-point"),
    "float_index": (lambda s, b, h, q, kv: torch.arange(9)[s], "not an integer"),
    "bool_index": (lambda s, b, h, q, kv: torch.arange(9)[kv > q], "boolean index"),
    "slice": (lambda s, b, h, q, kv: torch.ones(4, 4)[h, :], "slice"),
    "row": (lambda s, b, h, q, kv: s + torch.ones(4, 4)[b], "1 dimensions not indexed"),
    "brackets": (lambda s, b, h, q, kv: s + torch.ones(4, 4)[h][kv], "one bracket"),
    "whole_tensor": (lambda s, b, h, q, kv: s + torch.ones(4), r"shape \(4,\)"),
    "power": (lambda s, b, h, q, kv: s**kv, "exponent"),
    "exponent": (lambda s, b, h, q, kv: s**-1.5, "exponent"),
    "integer_power": (lambda s, b, h, q, kv: s * 2 ** (-h), r"2\.0 \*\* x for a fraction"),
    "integer_power_of_3": (lambda s, b, h, q, kv: s + kv % 3**h, "1 << x for an integer"),
    "minus_boolean": (lambda s, b, h, q, kv: s * (1 - (kv > q)), "- of booleans"),
    "assignment": (lambda s, b, h, q, kv: operator.setitem(s, kv > q, 0.0), "torch.where"),
    "string": (lambda s, b, h, q, kv: s + "a", "str"),
    "out": (lambda s, b, h, q, kv: torch.add(s, kv, alpha=2), "alpha"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_operation_line_and_replacement(name):
    mod, said = REFUSED[name]
    with pytest.raises(UnsupportedError, match=said) as error:
        trace_score_mod(mod)
    message = str(error.value)
    assert message.startswith("score_mod: ")
    assert f'"{name}": (lambda' in message
    assert "test_mods.py" in message


def test_wrong_number_of_indices():
    with pytest.raises(InvalidInputError, match="at most 1"):
        trace_score_mod(lambda s, b, h, q, kv, aux: s + aux[0][h, kv], (torch.zeros(3),))


def test_constant_index_out_of_bounds():
    with pytest.raises(InvalidInputError, match=r"\[-3, 3\)"):
        trace_score_mod(lambda s, b, h, q, kv, aux: s + aux[0][3, h], (torch.zeros(3, 3),))


def test_wrong_result():
    with pytest.raises(InvalidInputError, match="NoneType"):
        trace_mask_mod(lambda b, h, q, kv: None)


def test_wrong_device():
    with pytest.raises(InvalidInputError, match="tensors on meta"):
        trace_mask_mod(lambda b, h, q, kv: torch.ones(4)[h] > 0, device=torch.device("meta"))
