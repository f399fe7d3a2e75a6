"""MLA prefill in float8 by aiter's kernels: on plans of Headway's planner, which are aiter's own."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headway import mla, persistent, quant
from headway.errors import InvalidInputError
from headway.kernels.portable import mla_prefill
from headway.persistent import DeviceWork, Granularity, Staging, WorkList
from headway.providers import aiter
from tests.stand_ins import CALLS, installed

RECORDED = Path(__file__).parents[1] / "data" / "ps_metadata.jsonl.gz"
LISTS = ("work_indptr", "work_info", "reduce_indptr", "reduce_final_map", "reduce_partial_map")


def _recorded() -> list[dict[str, Any]]:
    """Recorded plans of aiter that its float8 prefill kernel takes: the ones that are soonest executed."""
    names = ("qhead_granularity", "qlen_granularity", "kvlen_granularity", "block_size")
    with gzip.open(RECORDED, "rt") as lines:
        plans = [json.loads(line) for line in lines]
    fit = [plan for plan in plans if tuple(plan[n] for n in names) == (1, 256, 128, 1)]
    fit = [plan for plan in fit if plan["num_head_k"] in aiter.PREFILL_HEADS]
    fit = [plan for plan in fit if len(plan["work_info"]) < 200]  # each is executed in plain torch
    fit.sort(key=lambda p: p["num_head_k"] * p["qo_indptr"][-1] * p["kv_indptr"][-1])
    causal = [plan for plan in fit if plan["is_causal"]]
    return causal[:5] + [plan for plan in fit if not plan["is_causal"]][:1]


PLANS = _recorded()


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is not aiter's runs on a CPU; the kernel that merges parts is its definition."""
    monkeypatch.delenv("HEADWAY_FP8_PREFILL", raising=False)
    monkeypatch.setenv("HEADWAY_BACKEND", "cpu")
    monkeypatch.setattr(mla_prefill, "mla_reduce", merge)
    monkeypatch.setattr(mla, "_compute_units", lambda device: 24)
    monkeypatch.setattr(aiter, "_compute_units", lambda device: 24)
    with installed("gfx950", "aiter"):
        yield


def merge(
    work: DeviceWork,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    lists = WorkList(*(getattr(work, name).numpy() for name in LISTS), work.partial_rows)
    persistent.reduce(lists, partial_out, partial_lse, out, lse)


def offsets(*lengths: int) -> torch.Tensor:
    return torch.nn.functional.pad(torch.cumsum(torch.tensor(lengths), 0), (1, 0)).int()


def inputs(total_q: int, total_k: int, heads: int = 8, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((total_q, heads, 192), (total_k, heads, 192), (total_k, heads, 128))
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def expected(tensors: list[torch.Tensor], cu_q: Any, cu_k: Any, **more: Any) -> Any:
    """What the same rounding of the inputs gives without aiter."""
    with installed("cpu"):
        return mla.prefill(*tensors, cu_q, cu_k, fp8=True, **more)


def handed() -> dict[str, Any]:
    return next(a for name, a in CALLS[::-1] if name == "aiter.mla_prefill_ps_asm_fwd")


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), want.float(), atol=2e-2, rtol=2e-2)


# --- the work list ----------------------------------------------------------------------------------------


def test_there_are_plans_of_aiters_own_to_compare_with() -> None:
    assert {plan["num_head_k"] for plan in PLANS} >= {8, 16}
    assert {plan["is_causal"] for plan in PLANS} == {True, False}


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_its_kernels_are_handed_the_list_that_its_own_planner_makes(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And execute it to what attention is; the stand-in leaves NaN in what no item writes."""
    plan = PLANS[number]
    monkeypatch.setattr(mla, "_compute_units", lambda device: plan["num_cu"])
    cu_q, cu_k = (torch.tensor(plan[n], dtype=torch.int32) for n in ("qo_indptr", "kv_indptr"))
    tensors = inputs(plan["qo_indptr"][-1], plan["kv_indptr"][-1], plan["num_head_k"], number)
    out = mla.prefill(*tensors, cu_q, cu_k, causal=plan["is_causal"])
    given = handed()
    assert given["work_indptr"].tolist() == plan["work_indptr"]
    assert given["work_info_set"].tolist() == plan["work_info"]
    reduced = [a for name, a in CALLS if name == "aiter.mla_reduce_v1"]
    assert bool(reduced) == bool(plan["reduce_final_map"])
    for name in LISTS[2:] if reduced else ():
        assert reduced[0][name].tolist() == plan[name]
    assert_close(out, expected(tensors, cu_q, cu_k, causal=plan["is_causal"]))


def test_all_layers_of_a_step_run_one_list() -> None:
    cu_q, cu_k = offsets(300, 1, 70), offsets(400, 40, 70)
    plan = mla.plan_prefill(cu_q, cu_k, num_heads_k=8, with_lse=False)
    assert plan.granularity == aiter.TILE
    for layer in range(2):
        tensors = inputs(371, 510, seed=layer)
        out = mla.prefill(*tensors, cu_q, cu_k, plan=plan)
        assert handed()["work_info_set"] is plan.work_info
        assert_close(out, expected(tensors, cu_q, cu_k))


@pytest.mark.parametrize("causal", [True, False])
def test_with_the_lse_every_tile_goes_through_the_partial_buffers(causal: bool) -> None:
    """aiter's kernel writes an LSE there alone; Headway's merges, also where there is one part."""
    cu_q, cu_k = offsets(300, 1, 0, 5), offsets(400, 40, 3, 5)
    tensors = inputs(306, 448)
    out, lse = mla.prefill(*tensors, cu_q, cu_k, causal=causal, return_lse=True)
    assert (handed()["work_info_set"][:, 1] >= 0).all()
    assert not [name for name, _ in CALLS if name == "aiter.mla_reduce_v1"]
    want, want_lse = expected(tensors, cu_q, cu_k, causal=causal, return_lse=True)
    assert_close(out, want)
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-3)


def test_requests_without_keys_in_a_chunk_see_nothing() -> None:
    cu_q, cu_k = offsets(40, 30), offsets(0, 90)
    tensors = inputs(70, 90)
    out, lse = mla.prefill(*tensors, cu_q, cu_k, causal=False, return_lse=True)
    assert (out[:40] == 0).all()
    assert (lse[:, :40] == float("-inf")).all()
    assert_close(out[40:], expected(tensors, cu_q, cu_k, causal=False)[40:])


def test_a_plan_without_the_lse_runs_on_headways_kernels_where_one_is_asked_for() -> None:
    cu_q, cu_k = offsets(60, 7), offsets(90, 40)
    plan = mla.plan_prefill(cu_q, cu_k, num_heads_k=8, with_lse=False)
    tensors = inputs(67, 130)
    _, lse = mla.prefill(*tensors, cu_q, cu_k, plan=plan, return_lse=True)
    assert CALLS == []
    torch.testing.assert_close(
        lse, expected(tensors, cu_q, cu_k, return_lse=True)[1], atol=1e-3, rtol=1e-3
    )


# --- what goes to its kernels -----------------------------------------------------------------------------


def test_scales_come_from_the_data() -> None:
    """SGLang and vLLM cast with scale 1: what is beyond 448 becomes NaN."""
    cu = offsets(40, 30)
    q, k, v = inputs(70, 70)
    v = v * 1e4
    out = mla.prefill(q, k, v, cu, cu)
    assert out.isfinite().all()
    assert float(handed()["v_scale"]) == pytest.approx(float(v.float().abs().max()) / 448)
    wide = expected([q, k, v], cu, cu)
    assert (out.float() - wide.float()).norm() < 1e-2 * wide.float().norm()


def test_stored_float8_goes_as_it_is() -> None:
    cu = offsets(40, 30)
    stored = [quant.quantise(x) for x in inputs(70, 70)]
    scales = {f"{n}_scale": s.scale for n, s in zip("qkv", stored, strict=True)}
    q, k, v = (s.values for s in stored)
    out = mla.prefill(q, k, v, cu, cu, **scales)
    assert handed()["Q"].data_ptr() == q.data_ptr()
    assert_close(out, mla.prefill(*inputs(70, 70), cu, cu))


@pytest.mark.parametrize(
    ("heads", "change"),
    [
        (24, {}),
        (4, {}),
        (8, {"k_scale": torch.full((8,), 0.01)}),
    ],
    ids=["a head count without a kernel", "few heads", "scales of each head"],
)
def test_other_calls_run_on_headways_kernels(heads: int, change: dict[str, Any]) -> None:
    cu = offsets(40, 30)
    tensors = inputs(70, 70, heads)
    out = mla.prefill(*tensors, cu, cu, fp8=True, **change)
    assert CALLS == []
    assert_close(out, expected(tensors, cu, cu, **change))


def test_out_is_filled_in_any_dtype() -> None:
    cu = offsets(40, 30)
    tensors = inputs(70, 70)
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.full((70, 8, 128), float("nan"), dtype=dtype)
        assert mla.prefill(*tensors, cu, cu, out=out) is out
        assert CALLS
        assert_close(out, expected(tensors, cu, cu))


# --- HEADWAY_FP8_PREFILL ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "package", "switch", "runs"),
    [
        ("gfx950", "aiter", None, True),
        ("gfx950", "aiter", "1", True),
        ("gfx950", "aiter", "0", False),
        ("gfx950", "aiter", "off", False),
        ("gfx942", "aiter", None, False),
        ("sm90", "sgl", None, False),
        ("gfx950", "", None, False),
    ],
)
def test_it_is_on_where_it_is_supported_unless_it_is_switched_off(
    kind: str, package: str, switch: str | None, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if switch is not None:
        monkeypatch.setenv("HEADWAY_FP8_PREFILL", switch)
    cpu = torch.device("cpu")
    with installed(kind, *filter(None, [package])):
        assert mla.multiplies_float8(None, cpu, 8) is runs
        assert mla.multiplies_float8(True, cpu, 8) is True
        assert mla.multiplies_float8(False, cpu, 8) is False


def test_it_is_not_on_for_heads_without_a_kernel() -> None:
    assert not mla.multiplies_float8(None, torch.device("cpu"), 24)


def test_anything_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_FP8_PREFILL", "perhaps")
    with pytest.raises(InvalidInputError, match="HEADWAY_FP8_PREFILL: got 'perhaps'; want 0 or 1"):
        mla.prefill(*inputs(3, 3), offsets(3), offsets(3))


# --- two pinned slots and their events --------------------------------------------------------------------


class Stream:
    """A device that does what it is told later: copies read their slot when the stream runs."""

    def __init__(self) -> None:
        self.done, self.waits = 0, []
        self.asked = 0

    def event(self) -> Any:
        stream = self

        class Event:
            at = 0

            def record(self) -> None:
                stream.asked += 1
                self.at = stream.asked

            def synchronize(self) -> None:
                if self.at > stream.done:
                    stream.waits.append(self.at)
                    stream.done = self.at

        return Event()


def test_a_slot_is_written_again_only_when_its_copy_is_done() -> None:
    stream = Stream()
    staging = Staging(torch.device("cpu"), stream.event)
    for step in range(6):
        (got,) = staging.copied([np.full(100, step)])
        assert got.tolist() == [step] * 100
    # Steps 0 and 1 have a slot each; each later one waits for the copy two steps before, and no other.
    assert stream.waits == [1, 2, 3, 4]


def test_nothing_waits_where_the_device_keeps_up() -> None:
    stream = Stream()
    staging = Staging(torch.device("cpu"), stream.event)
    for _ in range(6):
        staging.copied([np.arange(10)])
        stream.done = stream.asked
    assert stream.waits == []


def test_what_was_copied_stays_when_its_slot_is_written_again() -> None:
    staging = Staging(torch.device("cpu"))
    steps = [staging.copied([np.full((n, 2), n), np.arange(n)]) for n in (3, 300, 7, 5, 1000)]
    for n, (first, second) in zip((3, 300, 7, 5, 1000), steps, strict=True):
        assert torch.equal(first, torch.full((n, 2), n, dtype=torch.int32))
        assert torch.equal(second, torch.arange(n, dtype=torch.int32))


def test_there_are_two_slots_that_grow_and_are_used_by_turns() -> None:
    staging = Staging(torch.device("cpu"))
    seen = []
    for n in (4, 4, 4, 4, 100, 3, 3, 3):
        staging.copied([np.arange(n)])
        seen.append([host.data_ptr() for host, _ in staging._slots])
    assert max(len(slots) for slots in seen) == 2
    assert seen[1] == seen[2] == seen[3]
    assert seen[4][1] == seen[3][1]
    assert seen[5] == seen[6] == seen[7]


def test_steps_of_a_plan_pass_through_its_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider's way: one staging for a plan, a new list when a step begins."""
    import headway
    from headway.plan import Plan
    from tests.calls import Call
    from tests.providers.feature_calls import CALLS as FEATURES

    made = []

    def make(device: torch.device) -> Staging:
        made.append(Staging(device))
        return made[-1]

    monkeypatch.setattr(aiter, "Staging", make)
    call: Call = FEATURES["ragged float8 192/128"]()
    plan = Plan(call.problem().plan_key, torch.ones(4, dtype=torch.int32))
    for _ in range(3):
        plan.new_step()
        for _ in range(2):
            headway.flash_attn_varlen_func(**call.kwargs, scheduler_metadata=plan, backend="aiter")
    assert len(made) == 1
    lists = [a["work_info_set"].data_ptr() for n, a in CALLS if n.endswith("asm_fwd")]
    assert lists[0::2] == lists[1::2], "the layers of a step share a list"


# --- plans with the LSE -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(0, len(PLANS), 3))
def test_a_plan_with_the_lse_is_the_same_with_a_part_for_every_item(number: int) -> None:
    plan = PLANS[number]
    arguments: dict[str, Any] = {
        "num_heads_k": plan["num_head_k"],
        "num_cu": plan["num_cu"],
        "granularity": Granularity(1, 256, 128),
        "is_causal": plan["is_causal"],
    }
    lengths = [plan[n] for n in ("qo_indptr", "kv_indptr", "context_lens")]
    whole = persistent.plan(*lengths, **arguments)
    parts = persistent.plan(*lengths, **arguments, with_lse=True)
    assert np.array_equal(parts.work_indptr, whole.work_indptr)
    others = [0, 2, 3, 4, 5, 6, 7]
    assert np.array_equal(parts.work_info[:, others], whole.work_info[:, others])
    assert (parts.work_info[:, 1] >= 0).all()
    tiles = {tuple(row) for row in whole.work_info[:, 2:4].tolist()}
    assert {tuple(row) for row in parts.reduce_final_map.tolist()} == tiles
    assert parts.partial_rows == 256 * len(parts.reduce_partial_map)


def test_every_list_begins_at_a_multiple_of_16_bytes() -> None:
    """What kernels are compiled for follows from the call, not from the lengths of the lists before."""
    lists = [np.full(n, n) for n in (1, 3, 8, 0, 5)]
    got = Staging(torch.device("cpu")).copied(lists)
    assert [(t.tolist(), t.storage_offset() % 4) for t in got] == [
        ([n] * n, 0) for n in (1, 3, 8, 0, 5)
    ]
