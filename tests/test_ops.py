"""The public functions inside torch.compile: one operator each, right results, caches written in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import headway
from headway import InvalidInputError, UnsupportedError, interface, ops

BACKENDS = ("cpu", "reference")


@pytest.fixture(autouse=True)
def forget_compiled_graphs() -> None:
    torch._dynamo.reset()


def compiled(
    function: Callable[..., Any], graphs: list[torch.fx.GraphModule], **options: Any
) -> Any:
    """torch.compile with functionalisation and without code generation; keeps the graphs it is given."""
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return torch.compile(function, backend=backend, fullgraph=True, **options)


def operators(graph: torch.fx.GraphModule) -> list[str]:
    """The Headway operators of a graph, by name."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [name for name in names if name.startswith("headway")]


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lse", [False, True])
def test_dense(backend: str, lse: bool) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out = headway.flash_attn_func(
            q * 2, k, v, causal=True, window_size=(20, None), return_lse=lse, backend=backend
        )
        return (out[0] + 1, out[1]) if lse else out + 1

    tensors = normal(1, 2, 9, 4, 32), normal(2, 2, 30, 2, 32), normal(3, 2, 30, 2, 16)
    graphs: list[torch.fx.GraphModule] = []
    got, want = compiled(call, graphs)(*tensors), call(*tensors)
    torch.testing.assert_close(got, want)
    assert operators(graphs[0]) == ["headway.attention"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_with_the_callers_out(backend: str) -> None:
    """``out`` is written in place and comes back; its rows that belong to no query are left alone."""

    def call(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, used: Tensor, out: Tensor) -> Tensor:
        out.add_(1)
        got = headway.flash_attn_varlen_func(
            q, k, v, cu, cu, 7, 7, seqused_q=used, seqused_k=used, out=out, backend=backend
        )
        assert isinstance(got, Tensor)
        return got * 1

    q, k, v = normal(1, 12, 4, 32), normal(2, 12, 2, 32), normal(3, 12, 2, 32)
    arguments = q, k, v, int32(0, 5, 12), int32(3, 7)
    mine, theirs = (torch.full((12, 4, 32), 6.0, dtype=torch.bfloat16) for _ in range(2))
    got, want = compiled(call, [])(*arguments, mine), call(*arguments, theirs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mine, theirs)
    assert (mine[3:5] == 7).all()


def step(page_size: int | None, rotary: bool) -> dict[str, Any]:
    """A decode step that appends a token to each of two sequences."""
    caches = (6, page_size, 2, 32) if page_size else (2, 40, 2, 32)
    arguments: dict[str, Any] = {
        "q": normal(1, 2, 1, 4, 32),
        "k_cache": normal(2, *caches),
        "v_cache": normal(3, *caches),
        "k": normal(4, 2, 1, 2, 32),
        "v": normal(5, 2, 1, 2, 32),
        "cache_seqlens": int32(5, 17),
    }
    if page_size:
        arguments["page_table"] = int32(4, 1, 3, 0, 5, 2).view(2, 3)
    if rotary:
        angle = torch.rand(64, 8, generator=torch.Generator().manual_seed(6))
        arguments |= {"rotary_cos": angle.cos(), "rotary_sin": angle.sin()}
    return arguments


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("rotary", [False, True])
def test_appended_tokens_reach_the_cache(backend: str, page_size: int | None, rotary: bool) -> None:
    """Two layers in one graph: what the first appends is there for the second, and for the caller."""

    def call(arguments: dict[str, Any]) -> Tensor:
        out = headway.flash_attn_with_kvcache(**arguments, causal=True, backend=backend)
        assert isinstance(out, Tensor)
        read = {n: arguments[n] for n in ("q", "k_cache", "v_cache")}
        read |= {n: arguments[n] for n in ("page_table",) if n in arguments}
        again = headway.flash_attn_with_kvcache(
            **read, cache_seqlens=arguments["cache_seqlens"] + 1, causal=True, backend=backend
        )
        assert isinstance(again, Tensor)
        return torch.cat((out, again, arguments["k_cache"].sum().view(1, 1, 1, 1).expand_as(out)))

    mine, theirs = step(page_size, rotary), step(page_size, rotary)
    graphs: list[torch.fx.GraphModule] = []
    got, want = compiled(call, graphs)(mine), call(theirs)
    torch.testing.assert_close(got, want)
    assert operators(graphs[0]) == ["headway.attention_append", "headway.attention"]
    for name in ("k_cache", "v_cache"):
        assert torch.equal(mine[name], theirs[name])
        assert not torch.equal(mine[name], step(page_size, rotary)[name])


def test_lengths_may_vary_without_compiling_anew() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return headway.flash_attn_func(q, k, v, causal=True, backend="reference")

    run = compiled(call, graphs, dynamic=True)
    counts = []
    for n in (5, 9, 30):
        tensors = normal(n, 2, n, 4, 32), normal(2, 2, n + 3, 2, 32), normal(3, 2, n + 3, 2, 32)
        torch.testing.assert_close(run(*tensors), call(*tensors))
        counts.append(len(graphs))
    assert counts[0] == counts[1] == counts[2]


def test_a_number_for_all_lengths() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return headway.flash_attn_with_kvcache(q, k, v, cache_seqlens=7, backend="cpu")

    tensors = normal(1, 2, 1, 4, 32), normal(2, 2, 9, 2, 32), normal(3, 2, 9, 2, 32)
    torch.testing.assert_close(compiled(call, [])(*tensors), call(*tensors))


def test_a_compiled_backward_pass_says_that_there_is_none() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return headway.flash_attn_func(q * 2, k, v, window_size=None) + 1

    q = normal(1, 2, 9, 4, 32).requires_grad_()
    k, v = normal(2, 2, 30, 2, 32), normal(3, 2, 30, 2, 32)
    run = torch.compile(call, backend="aot_eager", fullgraph=True)
    out = run(q, k, v)
    torch.testing.assert_close(out, call(q, k, v))
    with pytest.raises(UnsupportedError, match="no gradients"):
        out.sum().backward()
    with torch.no_grad():
        assert not run(q, k, v).requires_grad


@pytest.mark.parametrize("trained", ["q", "sinks"])
def test_a_compiled_backward_pass_beside_an_lse_and_of_sinks(trained: str) -> None:
    """The LSE has no gradient, as without a compiler, and sinks alone ask for one."""
    inputs = {"q": normal(1, 2, 9, 4, 32), "sinks": normal(4, 4)}
    inputs[trained].requires_grad_()
    k, v = normal(2, 2, 30, 2, 32), normal(3, 2, 30, 2, 32)

    def call(q: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = headway.flash_attn_func(q, k, v, learnable_sink=sinks, return_lse=True)
        return out, lse

    out, lse = torch.compile(call, backend="aot_eager", fullgraph=True)(**inputs)
    torch.testing.assert_close((out, lse), call(**inputs))
    assert not lse.requires_grad
    with pytest.raises(UnsupportedError, match="no gradients"):
        out.sum().backward()


def test_aux_tensors_that_no_mod_uses_are_refused_in_a_compiled_region_too() -> None:
    def call(q: Tensor) -> Any:
        return headway.flash_attn_func(q, q, q, aux_tensors=[q])

    with pytest.raises(InvalidInputError, match="aux_tensors"):
        torch.compile(call, backend="aot_eager")(normal(1, 1, 3, 2, 32))


def test_mods_break_the_graph_and_stay_right() -> None:
    def call(q: Tensor) -> Any:
        near = headway.flash_attn_func(
            q + 1,
            q,
            q,
            mask_mod=lambda b, h, q_idx, kv_idx: q_idx - kv_idx < 3,
            backend="reference",
        )
        return near * 2

    q = normal(1, 1, 8, 2, 32)
    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(q), call(q))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(call, backend="aot_eager", fullgraph=True)(q)


@pytest.mark.parametrize("by_kernel", [False, True])
def test_merging_inside_a_compiled_region(by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel merges, the graph holds an operator; otherwise it holds the reference."""

    def call(outs: list[Tensor], lses: list[Tensor]) -> Any:
        out, lse = headway.merge_states(outs, lses)
        parts = torch.stack([x.transpose(1, 2) for x in lses])
        return out + 1, lse, headway.flash_attn_combine(torch.stack(outs), parts)

    if by_kernel:
        pytest.importorskip("triton")
    outs = [normal(n, 2, 3, 4, 16, dtype=torch.float32) for n in (1, 2)]
    lses = [normal(n, 2, 4, 3, dtype=torch.float32) for n in (3, 4)]
    want = call(outs, lses)
    monkeypatch.setattr(interface, "_merges_here", lambda part: by_kernel)
    graphs: list[torch.fx.GraphModule] = []
    torch.testing.assert_close(compiled(call, graphs)(outs, lses), want)
    both = ["headway.merge_states", "headway.combine"]
    assert operators(graphs[0]) == (both if by_kernel else [])


# --- the operators themselves -------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    **dict.fromkeys(("window_left", "window_right"), -1),
    **dict.fromkeys(("attention_chunk", "num_splits", "sm_margin"), 0),
    **dict.fromkeys(("deterministic", "only_qv"), False),
    "softmax_scale": None,
    "causal": True,
    "softcap": 0.0,
    "max_seqlen_q": None,
    "max_seqlen_k": None,
    "pack_gqa": None,
    "rotary_interleaved": True,
    "ver": None,
    "backend": "reference",
    "lse": True,
}


def rest(names: tuple[str, ...], **given: Any) -> tuple[Any, ...]:
    """An operator's optional tensors and plain arguments, in order."""
    assert set(PLAIN) == set(ops.PLAIN)
    return (*(given.get(name) for name in names), *(PLAIN[name] for name in ops.PLAIN))


def test_the_operator_is_what_it_declares() -> None:
    q, k, v = normal(1, 2, 3, 4, 32), normal(2, 2, 9, 2, 32), normal(3, 2, 9, 2, 32)
    arguments = ("flash_attn_func", q, k, v, torch.zeros_like(q), *rest(ops.TENSORS))
    torch.library.opcheck(ops.attention, arguments)


def test_the_appending_operator_is_what_it_declares() -> None:
    a = step(16, True)
    tensors = {n: a[n] for n in ("cache_seqlens", "page_table", "rotary_cos", "rotary_sin")}
    first = a["q"], a["k_cache"], a["v_cache"], torch.zeros_like(a["q"]), a["k"], a["v"]
    names = (*ops.TENSORS, *ops.NEW_TENSORS)
    torch.library.opcheck(ops.attention_append, (*first, *rest(names, **tensors)))
