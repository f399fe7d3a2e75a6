"""The device-side planner, plans under other lengths, and the merge of partial results."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import headway
from headway import providers, reference
from headway.plan import MAX_SPLITS, Plan, PlanKey, Schedule
from tests.kernels.portable_device import DEVICE, requires_device
from tests.kernels.test_portable_attention import LENGTHS, long_decode

pytestmark = requires_device


def _key(batch_size: int, max_seqlen_k: int, page_size: int | None = None) -> PlanKey:
    return PlanKey(
        device=torch.device(DEVICE) if DEVICE == "cpu" else torch.device("cuda", 0),
        batch_size=batch_size,
        max_seqlen_q=1,
        max_seqlen_k=max_seqlen_k,
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=64,
        head_dim_v=64,
        page_size=page_size,
        causal=True,
        window_left=None,
        window_right=0,
        attention_chunk=0,
    )


def _plan(lengths: list[int], max_seqlen_k: int, num_splits: int = 0) -> Plan:
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    provider = providers.get("portable")
    return provider.plan(_key(len(lengths), max_seqlen_k), seqlens, num_splits=num_splits)


def _schedule(plan: Plan) -> Schedule:
    assert plan.schedule is not None
    return plan.schedule


@pytest.mark.parametrize(
    "lengths",
    [[1], [0, 0], [100_000], [5000, 1, 0, 300], [64] * 33, list(range(0, 40_000, 997))],
    ids=lambda lengths: f"{len(lengths)} of {max(lengths)}",
)
def test_every_piece_is_on_the_work_list_once(lengths: list[int]) -> None:
    plan = _plan(lengths, 131_072)
    splits, start = plan.num_splits.tolist(), _schedule(plan).split_start.tolist()
    work = _schedule(plan).work.tolist()
    assert all(1 <= n <= MAX_SPLITS for n in splits)
    total = start.pop()
    assert total == sum(splits)
    for b, (first, n) in enumerate(zip(start, splits, strict=True)):
        assert work[first : first + n] == [b] * n
    assert work[total:] == [-1] * (len(work) - total)


def test_short_pieces_are_last_on_the_work_list() -> None:
    lengths = [40, 60_000, 3_000, 300, 131_072, 1, 9_000, 20_000]
    plan = _plan(lengths, 131_072)
    work = [b for b in _schedule(plan).work.tolist() if b >= 0]
    piece = [n / pieces for n, pieces in zip(lengths, plan.num_splits.tolist(), strict=True)]
    listed = [piece[b] for b in work]
    assert listed != [piece[b] for b in sorted(work)]
    share = max(piece)
    for longer, shorter in itertools.pairwise(listed):
        assert shorter < longer + share / 4


def test_longer_sequences_are_cut_into_more_pieces() -> None:
    splits = _plan([200, 60_000, 4_000, 60_000], 131_072).num_splits.tolist()
    assert splits[0] == 1
    assert splits[1] == splits[3] > splits[2]


def test_num_splits_bounds_the_pieces() -> None:
    assert max(_plan([60_000, 10], 131_072, num_splits=3).num_splits.tolist()) == 3


@pytest.mark.parametrize("planned_for", [(1, 1, 1, 1), (300, 0, 7, 780), (780, 780, 780, 780)])
def test_a_plan_of_other_lengths_changes_nothing(planned_for: tuple[int, ...]) -> None:
    call = long_decode(LENGTHS, 16).copy(DEVICE)
    want = call.run("reference").out
    capacity = call.kwargs["page_table"].shape[1] * 16
    seqlens = torch.tensor(planned_for, dtype=torch.int32, device=DEVICE)
    plan = providers.get("portable").plan(_key(4, capacity, 16), seqlens)
    out = headway.flash_attn_with_kvcache(
        **call.kwargs, scheduler_metadata=plan, backend="portable"
    )
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out.cpu(), want, atol=2e-2, rtol=2e-2)


def test_a_plan_takes_over_another_in_place() -> None:
    mine, other = _plan([60_000, 10, 0], 131_072), _plan([5, 60_000, 30_000], 131_072)
    buffers = _schedule(mine).work.data_ptr()
    mine.copy_(other)
    assert _schedule(mine).work.data_ptr() == buffers
    assert torch.equal(_schedule(mine).work, _schedule(other).work)
    assert torch.equal(mine.num_splits, other.num_splits)


@pytest.mark.parametrize("count", [1, 2, 33, 130])
@pytest.mark.parametrize("dv", [64, 80])
def test_merge_equals_the_reference(count: int, dv: int) -> None:
    generator = torch.Generator().manual_seed(count)
    out = torch.randn(count, 3, 5, dv, generator=generator)
    lse = 20 * torch.randn(count, 3, 5, generator=generator)
    lse[0, 0] = float("-inf")
    lse[count // 2, 1, 2:] = float("inf")
    lse[-1, 2, :2] = float("nan")
    lse[:, 1, 0] = float("-inf")
    out[~lse.isfinite()] = float("nan")  # what parts that saw nothing hold must not matter
    from headway.kernels.portable.combine import combine

    got, got_lse = combine(out.to(DEVICE), lse.to(DEVICE), torch.float32)
    want, want_lse = reference.combine(out, lse)
    # float32: each weight exp(lse - max) carries the rounding of its lse, and the sum that of its terms.
    largest = lse.masked_fill(~lse.isfinite(), 0).abs().max()
    atol = float(torch.finfo(torch.float32).eps * (largest + count) * want.abs().max())
    torch.testing.assert_close(got.cpu().double(), want, atol=atol, rtol=0)
    torch.testing.assert_close(got_lse.cpu().double(), want_lse, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("shape", [(2, 5, 6), (7, 3)], ids=["dense", "ragged"])
def test_states_merge_like_the_reference(count: int, shape: tuple[int, ...]) -> None:
    """Results as attention returns them: LSEs with heads first, empty rows among them."""
    from headway.kernels.portable.combine import merge_states

    *batch, seqlen, heads = shape
    generator = torch.Generator().manual_seed(count)
    outs = [torch.randn(*shape, 80, generator=generator).bfloat16() for _ in range(count)]
    lses = [5 * torch.randn(*batch, heads, seqlen, generator=generator) for _ in range(count)]
    lses[0][..., 0, :] = float("-inf")
    lses[-1][..., 1, 2] = float("nan")
    outs[0].transpose(-3, -2)[..., 0, :, :] = float("nan")
    got, got_lse = merge_states([x.to(DEVICE) for x in outs], [x.to(DEVICE) for x in lses])
    want, want_lse = reference.merge_states(outs, lses)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.cpu(), want)
    torch.testing.assert_close(got_lse.cpu(), want_lse, atol=1e-5, rtol=1e-6)


def test_states_of_different_shapes_are_refused() -> None:
    from headway.kernels.portable.combine import merge_states

    out, lse = torch.zeros(7, 3, 64, device=DEVICE), torch.zeros(7, 3, device=DEVICE)
    with pytest.raises(headway.InvalidInputError, match=r"\(3, 7\)"):
        merge_states([out, out], [lse, lse])


@pytest.mark.parametrize(("batch_size", "rows"), [(2, 0), (0, 1), (0, 0)])
def test_a_step_of_nothing_has_a_plan(batch_size: int, rows: int) -> None:
    lengths = torch.full((batch_size,), 9, dtype=torch.int32, device=DEVICE)
    plan = headway.get_scheduler_metadata(batch_size, rows, 64, 4, 2, 64, lengths)
    assert plan.num_splits.shape == (batch_size,)
    q = torch.zeros(batch_size, rows, 4, 64, dtype=torch.bfloat16, device=DEVICE)
    cache = torch.zeros(batch_size, 64, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    out = headway.flash_attn_with_kvcache(
        q, cache, cache, cache_seqlens=lengths, scheduler_metadata=plan, backend="portable"
    )
    assert out.shape == q.shape
