"""The public prefill: float8 by argument and by environment, scales, plans, refusals."""

import re
from pathlib import Path

import pytest
import torch

import headway
from headway import mla, quant
from headway.errors import InvalidInputError

Q_LENS, K_LENS = (40, 3), (40, 77)
CU_Q, CU_K = (torch.tensor([0, a, a + b], dtype=torch.int32) for a, b in (Q_LENS, K_LENS))


def inputs(seed=0, dtype=torch.bfloat16, heads=4, kv_heads=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((43, heads, 192), (117, kv_heads, 192), (117, kv_heads, 128))
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def reference(q, k, v, causal=True):
    return headway.flash_attn_varlen_func(
        q.float(), k.float(), v.float(), CU_Q, CU_K, causal=causal, return_lse=True
    )


def error(got, want):
    """Root mean square of the error, relative to that of the values."""
    return float((got.float() - want.float()).norm() / want.float().norm())


#: What rounding q, k and v to three bits of mantissa may leave: each is off by 2^-4 / sqrt(3), 3.6 %, at
#: the lower end of a binade (rms); q's and k's pass through scores of unit variance, v's adds to them.
FLOAT8_ERROR = (3 * 0.036**2) ** 0.5


@pytest.mark.parametrize("causal", [True, False])
def test_without_float8_it_is_varlen_attention(causal):
    q, k, v = inputs()
    out, lse = mla.prefill(q, k, v, CU_Q, CU_K, causal=causal, return_lse=True)
    want, want_lse = reference(q, k, v, causal)
    assert out.shape == (43, 4, 128)
    assert lse.shape == (4, 43)
    assert error(out, want) < 1e-2
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_float8_is_near(causal, heads):
    q, k, v = inputs(heads=heads[0], kv_heads=heads[1])
    out, lse = mla.prefill(q, k, v, CU_Q, CU_K, causal=causal, fp8=True, return_lse=True)
    want, want_lse = reference(q, k, v, causal)
    assert out.dtype == torch.bfloat16
    assert 1e-2 < error(out, want) < FLOAT8_ERROR
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=6e-2)


def test_scales_of_the_data_hold_values_that_a_cast_would_lose():
    q, k, v = inputs()
    v = v * 1e4
    assert v.to(torch.float8_e4m3fn).float().isnan().any() or v.abs().max() > 448
    out = mla.prefill(q, k, v, CU_Q, CU_K, fp8=True)
    assert error(out, reference(q, k, v)[0]) < FLOAT8_ERROR


@pytest.mark.parametrize("per", ["tensor", "head"])
def test_stored_float8_with_scales_equals_quantising_here(per):
    q, k, v = inputs()
    scales = [quant.amax_scale(x, per=per) for x in (q, k, v)]
    stored = [quant.quantise(x, scale=s).values for x, s in zip((q, k, v), scales, strict=True)]
    named = dict(zip(("q_scale", "k_scale", "v_scale"), scales, strict=True))
    out = mla.prefill(*stored, CU_Q, CU_K, **named)
    assert torch.equal(out, mla.prefill(q, k, v, CU_Q, CU_K, fp8=True, **named))
    assert error(out, reference(q, k, v)[0]) < FLOAT8_ERROR


@pytest.mark.parametrize("fp8", [False, True])
def test_keys_may_come_without_the_part_that_all_heads_share(fp8):
    q, k, v = inputs()
    rope = torch.randn(117, 1, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    whole = torch.cat((k[..., :128], rope.expand(-1, 4, -1)), dim=-1)
    out = mla.prefill(q, k[..., :128], v, CU_Q, CU_K, k_rope=rope, fp8=fp8)
    assert torch.equal(out, mla.prefill(q, whole, v, CU_Q, CU_K, fp8=fp8))


def test_environment_switches_float8_on(monkeypatch):
    q, k, v = inputs()
    float8 = mla.prefill(q, k, v, CU_Q, CU_K, fp8=True)
    plain = mla.prefill(q, k, v, CU_Q, CU_K, fp8=False)
    assert not torch.equal(float8, plain)
    for switch, want in (("1", float8), ("on", float8), ("0", plain)):
        monkeypatch.setenv("HEADWAY_FP8_PREFILL", switch)
        assert torch.equal(mla.prefill(q, k, v, CU_Q, CU_K), want)
    monkeypatch.setenv("HEADWAY_FP8_PREFILL", "1")
    assert torch.equal(mla.prefill(q, k, v, CU_Q, CU_K, fp8=False), plain)
    monkeypatch.setenv("HEADWAY_FP8_PREFILL", "maybe")
    with pytest.raises(InvalidInputError, match="HEADWAY_FP8_PREFILL"):
        mla.prefill(q, k, v, CU_Q, CU_K)


def test_plan_of_the_step_serves_every_layer_and_out_is_filled():
    plan = mla.plan_prefill(CU_Q, CU_K, num_heads_k=4)
    for layer in range(2):
        q, k, v = inputs(seed=layer)
        out = torch.empty(43, 4, 128)
        given = mla.prefill(q, k, v, CU_Q, CU_K, fp8=True, plan=plan, out=out)
        assert given is out
        assert torch.equal(out.bfloat16(), mla.prefill(q, k, v, CU_Q, CU_K, fp8=True))


def test_a_plan_of_other_lengths_is_refused_where_lengths_can_be_seen():
    """Its work list would cut sequences where the others end."""
    q, k, v = inputs()
    other = CU_Q.clone()
    other[1] += 1
    plan = mla.plan_prefill(other, CU_K, num_heads_k=4, causal=False)
    with pytest.raises(InvalidInputError, match="which the plan was made from"):
        mla.prefill(q, k, v, CU_Q, CU_K, causal=False, fp8=True, plan=plan)


@pytest.mark.parametrize("changes", [{"num_heads_k": 0}, {"num_heads_q": 6}, {"num_cu": 0}])
def test_sizes_of_a_plan_are_checked(changes):
    with pytest.raises(InvalidInputError) as caught:
        mla.plan_prefill(CU_Q, CU_K, **{"num_heads_k": 4, "device": "cpu"} | changes)
    assert caught.value.argument in ("num_heads_k", "num_cu")


@pytest.mark.parametrize("backend", ["hopper", "portable"])
def test_a_kernel_for_gpus_that_is_named_does_not_run_on_a_cpu(backend):
    q, k, v = inputs()
    with pytest.raises(headway.UnsupportedError, match=f"backend={backend} cannot"):
        mla.prefill(q, k, v, CU_Q, CU_K, fp8=True, backend=backend)


def test_gradients_are_refused():
    q, k, v = inputs()
    for fp8 in (True, False):
        out = mla.prefill(q.requires_grad_(), k, v, CU_Q, CU_K, fp8=fp8)
        with pytest.raises(headway.UnsupportedError, match="no gradients"):
            out.sum().backward()
        with pytest.raises(InvalidInputError, match="no_grad"):
            mla.prefill(q, k, v, CU_Q, CU_K, fp8=fp8, out=out.detach())


def test_chunks_of_a_prefix_merge_to_the_whole():
    """New tokens causal, a cached chunk without a mask, merged by their LSE."""
    q, k, v = inputs(dtype=torch.float32)
    cu_new = CU_Q
    tail = torch.cat([torch.arange(0, 40), torch.arange(40 + 74, 117)])
    head = torch.arange(40, 114)
    cu_head = torch.tensor([0, 0, 74], dtype=torch.int32)
    new = mla.prefill(q, k[tail], v[tail], CU_Q, cu_new, fp8=True, return_lse=True)
    old = mla.prefill(q, k[head], v[head], CU_Q, cu_head, fp8=True, causal=False, return_lse=True)
    out, _ = headway.merge_states([new[0], old[0]], [new[1], old[1]])
    assert error(out, reference(q, k, v)[0]) < FLOAT8_ERROR


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": mla.plan_prefill(CU_Q, CU_K, num_heads_k=2)}, "plan_prefill for 4 and 4,"),
        (
            {"plan": mla.plan_prefill(CU_Q, CU_K, num_heads_k=4, causal=False)},
            "plan_prefill for 4 and 4, causal=True",
        ),
        ({"plan": mla.plan_prefill(CU_Q, CU_Q, num_heads_k=4)}, "43 query tokens and 43 keys"),
        ({"k": torch.zeros(117, 4, 128, dtype=torch.bfloat16)}, "one width"),
        ({"v": torch.zeros(117, 4, 128)}, "one dtype"),
        ({"k_rope": torch.zeros(117, 1, 64, dtype=torch.bfloat16)}, "k_rope "),
        ({"q": torch.zeros(43, 4, 192).to(torch.float8_e4m3fn), "fp8": False}, "float8 inputs"),
        ({"fp8": False, "q_scale": torch.ones(1)}, "scales without float8"),
        ({"softmax_scale": -0.1}, "positive number"),
        ({"backend": "fa3"}, '"hopper" or "portable"'),
        ({"cu_seqlens_q": CU_K, "cu_seqlens_k": CU_Q}, "77 query tokens and 3 keys"),
        ({"cu_seqlens_q": CU_Q.tolist()}, "int32 tensor"),
        ({"plan": "of the day"}, "what plan_prefill returned"),
        ({"q_scale": 2.0}, "^q_scale: got float"),
        ({"v_scale": torch.ones(3)}, "^v_scale: got 3 elements"),
        ({"out": torch.empty(43, 4, 64)}, "^out: .*128"),
        ({"out": torch.empty(43, 4, 128, dtype=torch.int32)}, "^out: got torch.int32"),
        ({"out": torch.empty(43, 128, 4).transpose(1, 2)}, "^out: .*stride 1"),
    ],
)
def test_refusals(changes, said):
    q, k, v = inputs()
    call = {"q": q, "k": k, "v": v, "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "fp8": True}
    with pytest.raises(InvalidInputError, match=said):
        mla.prefill(**(call | changes))


def test_code_of_the_documentation_runs():
    text = (Path(__file__).parents[1] / "docs" / "mla.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    namespace = {}
    exec(compile(code, "docs/mla.md", "exec"), namespace)
    assert namespace["out"].shape == (300, 16, 128)
    assert namespace["out"].isfinite().all()
    assert namespace["buffers"][1][-1] > 0
