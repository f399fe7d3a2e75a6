"""What the decode launcher hands to the compiled kernel, with the kernel replaced by a recorder."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from headway.errors import InvalidInputError
from headway.kernels.hopper import decode as module
from headway.kernels.hopper.decode_config import tile_for
from headway.kernels.hopper.decode_plan import DecodePlan, empty_plan
from headway.problem import Append, Rotary


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Argument lists of kernels that were started, programs and device first."""
    calls: list[tuple[Any, ...]] = []
    module._kernel_for.cache_clear()

    class Launch:
        is_direct = True

        def tensor_map(self, *key: Any) -> tuple[Any, ...]:
            return ("map", *key[2], *key[3])

        def __call__(self, grid: Any, device_index: Any, args: Any) -> None:
            calls.append((grid, device_index, *args))

    monkeypatch.setattr(module._Kernel, "_compile", lambda *_: Launch())
    return calls


def plan_of(batch_size: int, num_kv_heads: int, rows: int, head_dim: int) -> DecodePlan:
    return empty_plan(
        tile=tile_for(head_dim, head_dim),
        batch_size=batch_size,
        units=num_kv_heads,
        rows=rows,
        head_dim_v=head_dim,
        workers=6,
        device=torch.device("cpu"),
    )


def tensors(page_size: int, head_dim: int = 128) -> tuple[torch.Tensor, ...]:
    q = torch.zeros(3, 1, 8, head_dim, dtype=torch.bfloat16)
    k, v = (torch.zeros(20, page_size, 2, head_dim, dtype=torch.bfloat16) for _ in range(2))
    return q, k, v, torch.empty_like(q)


@pytest.mark.parametrize("page_size", [1, 16])
def test_one_argument_per_parameter(started: list[tuple[Any, ...]], page_size: int) -> None:
    q, k, v, out = tensors(page_size)
    table = torch.zeros(3, 4, dtype=torch.int32)
    plan = plan_of(3, 2, 4, 128)
    module.decode(q, k, v, out, plan, softmax_scale=0.1, page_table=table, window_right=0)
    ((grid, device, *args),) = started
    assert (grid, device) == ((plan.workers, 1, 1), q.device.index)
    expanded = 0 if page_size == 1 else 2 * 8  # a map stands for itself, 4 sizes and 4 strides
    assert len(args) == len(module.decode_kernel.arg_names) + expanded
    addresses = [q.data_ptr(), None, k.data_ptr(), v.data_ptr(), out.data_ptr()]
    assert addresses == args[2 + expanded :][:5]


def test_prepared_calls_start_what_fresh_ones_start(started: list[tuple[Any, ...]]) -> None:
    plan, table = plan_of(3, 2, 4, 128), torch.zeros(3, 4, dtype=torch.int32)
    q, k, v, out = tensors(16)
    prepared = module.prepare(q, k, v, out, plan, None, table, softmax_scale=0.1)
    for _ in range(2):
        q, k, v, out = tensors(16)
        prepared(plan, q, k, v, out, None, table)
        module.decode(q, k, v, out, plan, softmax_scale=0.1, page_table=table)
        again, fresh = started[-2:]
        assert again == fresh
    assert started[0] != started[-1]


def test_alignment_of_small_tensors_is_looked_at_in_every_call(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[Any, ...]]
) -> None:
    compiled: list[bool] = []
    compile_ = module._Kernel._compile

    def counted(self: Any, given: Any, *rest: Any) -> Any:
        compiled.append(given[-1].data_ptr() % 16 == 0)
        return compile_(self, given, *rest)

    monkeypatch.setattr(module._Kernel, "_compile", counted)
    plan, table = plan_of(3, 2, 4, 128), torch.zeros(3, 4, dtype=torch.int32)
    odd = torch.zeros(13, dtype=torch.int32)[1:].view(3, 4)
    q, k, v, out = tensors(16)
    prepared = module.prepare(q, k, v, out, plan, None, table, softmax_scale=0.1)
    for given in (table, odd, table, odd):
        prepared(plan, q, k, v, out, None, given)
        assert given.data_ptr() in started[-1]
    assert compiled == [True, False]


def test_short_rows_of_two_heads_are_handed_over_as_one(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[Any, ...]]
) -> None:
    monkeypatch.setattr(module, "_multiprocessors", lambda _: 132)
    q = torch.zeros(3, 1, 16, 64, dtype=torch.bfloat16)
    k, v = (torch.zeros(20, 64, 4, 64, dtype=torch.float8_e4m3fn) for _ in range(2))
    table, out = torch.zeros(3, 4, dtype=torch.int32), torch.empty_like(q)
    geometry: dict[str, Any] = {
        "batch_size": 3,
        "max_seqlen_q": 1,
        "head_dim": 64,
        "head_dim_v": 64,
        "itemsize": 1,
        "page_size": 64,
        "device": torch.device("cpu"),
    }
    for abreast in (True, False):
        plan = module.make_plan(num_kv_heads=4, group=4, abreast=abreast, **geometry)
        module.decode(q, k, v, out, plan, softmax_scale=0.1, page_table=table)
    as_one, alone = ([*args[1:9]] for _, _, *args in started)
    assert as_one == [20, 2, 64, 128, 64 * 4 * 64, 128, 4 * 64, 1]
    assert alone == [20, 4, 64, 64, 64 * 4 * 64, 64, 4 * 64, 1]
    assert module.lie_abreast(k)
    assert not module.lie_abreast(k.transpose(1, 2).contiguous().transpose(1, 2))
    # An odd number of heads, or more rows than one small tile has, is read head by head.
    for heads, group in ((3, 4), (4, 16)):
        plan = module.make_plan(num_kv_heads=heads, group=group, abreast=True, **geometry)
        assert (plan.units, plan.tile.abreast) == (heads, 1)


@pytest.mark.parametrize(
    ("heads", "page_size", "lie_so", "abreast"),
    [
        (8, 16, True, 2),
        (8, 64, True, 2),
        (8, 128, True, 1),  # boxes as long as blocks
        (8, 5, True, 1),  # rows come one by one
        (8, 16, False, 1),
        (9, 16, True, 1),  # no twos
        (1, 16, True, 1),
        (6, 16, True, 1),  # fewer than 512 in all
    ],
)
def test_rows_of_128_bytes_of_two_heads_are_read_as_one_where_there_are_many(
    monkeypatch: pytest.MonkeyPatch, heads: int, page_size: int, lie_so: bool, abreast: int
) -> None:
    monkeypatch.setattr(module, "_multiprocessors", lambda _: 132)
    plan = module.make_plan(
        batch_size=64,
        num_kv_heads=heads,
        group=4,
        max_seqlen_q=2,
        head_dim=128,
        head_dim_v=128,
        itemsize=1,
        page_size=page_size,
        device=torch.device("cpu"),
        abreast=lie_so,
    )
    assert (plan.units, plan.tile.abreast) == (heads // abreast, abreast)
    assert plan.tile.block_n == 128 // abreast
    assert plan.parts.shape[1:] == (8 * abreast, 128 * abreast)


def new_tokens(number: int, *, pad: int = 0, odd_lengths: bool = False) -> Append:
    k, v = (torch.zeros(3, number, 2, 128 + pad, dtype=torch.bfloat16)[..., :128] for _ in "kv")
    cos, sin = torch.zeros(2, 100, 64, dtype=torch.bfloat16)
    positions = torch.zeros(4, dtype=torch.int32)[1:] if odd_lengths else None
    return Append(k, v, None, Rotary(cos, sin, False, positions))


def test_new_tokens_are_handed_over_as_they_lie(started: list[tuple[Any, ...]]) -> None:
    plan, table = plan_of(3, 2, 4, 128), torch.zeros(3, 4, dtype=torch.int32)
    q, k, v, out = tensors(16)
    first, append = new_tokens(4), new_tokens(4)
    prepared = module.prepare(
        q, k, v, out, plan, None, table, softmax_scale=0.1, append=first, longest_new=4
    )
    prepared(plan, q, k, v, out, None, table, append=append)
    ((_, _, *args),) = started
    given = dict(zip(module.decode_kernel.arg_names, args[:2] + args[18:], strict=True))
    assert (given["k_ptr"], given["stride_k_row"]) == (k.data_ptr(), k.stride(1))
    sources, angles = given["new"]
    strides = (4 * 2 * 128, 2 * 128, 128)
    rotary = append.rotary
    assert rotary is not None
    assert sources == (append.k.data_ptr(), append.v.data_ptr(), None, 4, strides, strides)
    assert angles == (rotary.cos.data_ptr(), rotary.sin.data_ptr(), None, 64, 64)


def test_kernels_are_compiled_for_what_is_special_in_the_numbers_of_new_tokens(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[Any, ...]]
) -> None:
    """One token, strides that 16 divides and addresses that it divides make for code of their own."""
    compiled: list[Any] = []
    compile_ = module._Kernel._compile

    def counted(self: Any, given: Any, plan: Any, numbers: Any) -> Any:
        compiled.append(numbers[-1][0][3])
        return compile_(self, given, plan, numbers)

    monkeypatch.setattr(module._Kernel, "_compile", counted)
    plan, table = plan_of(3, 2, 4, 128), torch.zeros(3, 4, dtype=torch.int32)
    q, k, v, out = tensors(16)
    for append in (
        *(new_tokens(number) for number in (1, 2, 3, 2)),
        *(new_tokens(number, pad=8) for number in (1, 4, 3)),
        *(new_tokens(number, odd_lengths=True) for number in (1, 1)),
    ):
        given: dict[str, Any] = {"softmax_scale": 0.1, "append": append, "longest_new": 4}
        prepared = module.prepare(q, k, v, out, plan, None, table, **given)
        prepared(plan, q, k, v, out, None, table, append=append)
    assert compiled == [1, 2, 1, 4, 1]
    assert len(started) == 9


def test_rows_at_odd_addresses_are_refused(started: list[tuple[Any, ...]]) -> None:
    q, k, v, out = tensors(16)
    plan = plan_of(3, 2, 4, 128)
    table = torch.zeros(3, 4, dtype=torch.int32)
    odd = torch.zeros(3, 1, 8, 132, dtype=torch.bfloat16)[..., :128]
    for name, bad in (("q", (odd, k, v, out)), ("out", (q, k, v, odd))):
        with pytest.raises(InvalidInputError, match=name):
            module.decode(*bad, plan, softmax_scale=0.1, page_table=table)
    assert not started


@pytest.mark.parametrize("page_size", [1, 16])
def test_caches_at_odd_addresses_are_refused(
    monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    q, _, v, out = tensors(page_size)
    odd = torch.zeros(20, page_size, 2, 132, dtype=torch.bfloat16)[..., :128]
    module._kernel_for.cache_clear()
    monkeypatch.setattr(module._Kernel, "_compile", lambda *_: pytest.fail("compiled"))
    table, plan = torch.zeros(3, 4, dtype=torch.int32), plan_of(3, 2, 4, 128)
    with pytest.raises(InvalidInputError, match="multiples of 16 bytes"):
        module.decode(q, odd, v, out, plan, softmax_scale=0.1, page_table=table)


def test_buffers_of_a_plan_are_apart_and_aligned() -> None:
    plan = plan_of(3, 2, 4, 128)
    buffers = [
        plan.spans, plan.works, plan.share, plan.starts, plan.arrivals, plan.parts, plan.part_sums
    ]  # fmt: skip
    assert not plan.arrivals.any()
    spans = sorted((b.data_ptr(), b.data_ptr() + b.numel() * b.element_size()) for b in buffers)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(start % 64 == 0 for start, _ in spans)
