"""The persistent prefill kernels against the reference executor, on a GPU or interpreted."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from headway import UnsupportedError, mla, persistent, quant, reference
from headway.kernels.portable import operands
from headway.kernels.portable import quantise as quantise_kernels
from headway.kernels.portable.mla_prefill import PrefillTile, Scales, mla_prefill, mla_reduce
from headway.persistent import DeviceWork, Granularity
from tests.kernels.portable_device import DEVICE, INTERPRETED, requires_device

pytestmark = [
    requires_device,
    pytest.mark.filterwarnings(
        "ignore:divide by zero:RuntimeWarning"
    ),  # the interpreter, empty rows
]

FLOAT8 = torch.float8_e4m3fn
TILE = PrefillTile(16, 16, 4, 1)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch: lengths, heads, and how it is cut and dealt out."""

    q_lens: tuple[int, ...] = (40, 0, 7, 90)
    k_lens: tuple[int, ...] = (56, 0, 7, 123)
    heads: int = 2
    kv_heads: int = 2
    d: int = 24
    dv: int = 16
    causal: bool = True
    num_cu: int = 14
    qlen: int = 32
    kvlen: int = 16
    page_size: int = 1

    def pages(self) -> list[int]:
        return [-(-n // self.page_size) for n in self.k_lens]

    def work(self) -> DeviceWork:
        group = self.heads // self.kv_heads
        return persistent.plan_on_device(
            _indptr(self.q_lens),
            _indptr(self.pages()),
            self.k_lens,
            torch.device(DEVICE),
            num_heads_k=self.kv_heads,
            num_cu=self.num_cu,
            granularity=Granularity(group, self.qlen, self.kvlen),
            block_size=self.page_size,
            is_causal=self.causal,
        )


def _indptr(lengths: object) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


CASES = {
    "ragged": Case(),
    "one_unit": Case(num_cu=1),
    "no_splits": Case(kv_heads=2, num_cu=2),
    "many_units": Case(num_cu=60),
    "not_causal": Case(causal=False),
    "prefix_chunk": Case(causal=False, q_lens=(9, 20), k_lens=(64, 0)),
    "grouped_heads": Case(heads=6, kv_heads=2),
    "pages": Case(page_size=4, kvlen=16),
    "pages_not_causal": Case(page_size=8, kvlen=16, causal=False),
    "equal_widths": Case(d=16, dv=16),
    "padded_widths": Case(d=40, dv=24),
    "tall_tiles": Case(qlen=48),
}


def expected(
    case: Case, q: Tensor, k: Tensor, v: Tensor, pages: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """By the reference executor, in float64, partial buffers full of NaN."""
    group = case.heads // case.kv_heads
    qo, kv = _indptr(case.q_lens), _indptr(case.pages())
    work = persistent.plan(
        qo,
        kv,
        case.k_lens,
        num_heads_k=case.kv_heads,
        num_cu=case.num_cu,
        granularity=Granularity(group, case.qlen, case.kvlen),
        block_size=case.page_size,
        is_causal=case.causal,
    )
    rows = max(work.partial_rows, 1)
    partial_out = torch.full((rows, case.heads, case.dv), math.nan).double()
    partial_lse = torch.full((rows, case.heads), math.nan).double()
    out = torch.full((qo[-1], case.heads, case.dv), math.nan).double()
    lse = torch.full((qo[-1], case.heads), math.nan).double()
    persistent.execute(
        work,
        q.cpu(),
        k.cpu(),
        v.cpu(),
        qo_indptr=qo,
        kv_indptr=kv,
        context_lens=case.k_lens,
        kv_page_indices=pages.cpu(),
        softmax_scale=scale,
        is_causal=case.causal,
        out=out,
        lse=lse,
        partial_out=partial_out,
        partial_lse=partial_lse,
    )
    persistent.reduce(work, partial_out, partial_lse, out, lse)
    return out, lse


def assert_near(got: Tensor, want: Tensor, relative: float) -> None:
    """Largest error against the largest value, infinities equal."""
    got = got.double().cpu()
    finite = want.isfinite()
    assert torch.equal(got[~finite], want[~finite])
    if finite.any():
        assert (got[finite] - want[finite]).abs().max() <= relative * max(
            1.0, float(want[finite].abs().max())
        )


@pytest.mark.parametrize("name", CASES)
def test_work_list_in_bfloat16(name: str) -> None:
    case = CASES[name]
    work = case.work()
    num_pages = sum(case.pages())
    q = draw(sum(case.q_lens), case.heads, case.d, seed=1)
    k = draw(num_pages + 1, case.page_size, case.kv_heads, case.d, seed=2)
    v = draw(num_pages + 1, case.page_size, case.kv_heads, case.dv, seed=3)
    pages = torch.arange(num_pages, dtype=torch.int32, device=DEVICE)
    paged = case.page_size > 1
    if paged:  # pages in any order; the rest of each last page is NaN
        pages = torch.randperm(num_pages + 1)[:num_pages].to(torch.int32).to(DEVICE)
        for length, end in zip(case.k_lens, _indptr(case.pages())[1:], strict=True):
            if length % case.page_size:
                v[pages[end - 1].long(), length % case.page_size :] = math.nan
                k[pages[end - 1].long(), length % case.page_size :] = math.nan
    out = torch.full((len(q), case.heads, case.dv), math.nan, dtype=torch.bfloat16, device=DEVICE)
    lse = torch.full((case.heads, len(q)), math.nan, device=DEVICE).T
    mla_prefill(
        work,
        q,
        k if paged else k[:, 0],
        v if paged else v[:, 0],
        out,
        lse,
        softmax_scale=0.2,
        kv_page_indices=pages if paged else None,
        tile=TILE,
    )
    want, want_lse = expected(case, q, k.nan_to_num(), v.nan_to_num(), pages, 0.2)
    assert_near(out, want, 1e-2)
    assert_near(lse, want_lse, 1e-4)


@pytest.mark.parametrize("per", ["tensor", "head"])
@pytest.mark.parametrize("name", ["ragged", "not_causal", "prefix_chunk", "many_units"])
def test_work_list_in_float8(name: str, per: quant.Per) -> None:
    """Quantised on the device, values transposed and padded; against the numbers that were stored."""
    case = CASES[name]
    work = case.work()
    q = draw(sum(case.q_lens), case.heads, case.d, seed=1, scale=3.0)
    k = draw(sum(case.k_lens), case.kv_heads, case.d, seed=2)
    v = draw(sum(case.k_lens), case.kv_heads, case.dv, seed=3, scale=0.1)
    q8, k8, v8 = (quant.quantise(x, FLOAT8, per) for x in (q, k, v))
    values = torch.empty(case.kv_heads, case.dv, work.padded_keys, dtype=FLOAT8, device=DEVICE)
    values.view(torch.uint8).fill_(0x7F)  # NaN
    quantise_kernels.transpose_values(
        v, v8.scale, values, work.kv_indptr, work.value_indptr, work.max_seqlen_k, case.kvlen
    )
    out = torch.full((len(q), case.heads, case.dv), math.nan, dtype=torch.bfloat16, device=DEVICE)
    lse = torch.full((len(q), case.heads), math.nan, device=DEVICE)
    mla_prefill(
        work,
        q8.values,
        k8.values,
        values,
        out,
        lse,
        softmax_scale=0.2,
        scales=Scales(q8.scale, k8.scale, v8.scale),
        v_transposed=True,
        tile=TILE,
    )
    stored = [quant.dequantise(x.values, x.scale) for x in (q8, k8, v8)]
    pages = torch.arange(sum(case.k_lens), dtype=torch.int32)
    want, want_lse = expected(case, stored[0], stored[1][:, None], stored[2][:, None], pages, 0.2)
    # On a GPU the weights are rounded to float8 as well: half a unit of 2^-3 at most.
    assert_near(out, want, 1e-2 if INTERPRETED else 6e-2)
    assert_near(lse, want_lse, 1e-3)


def test_transposed_values() -> None:
    work = CASES["ragged"].work()
    v = draw(sum(CASES["ragged"].k_lens), 2, 24, seed=1)
    scale = quant.amax_scale(v, per="head")
    values = torch.empty(2, 24, work.padded_keys, dtype=FLOAT8, device=DEVICE)
    values.view(torch.uint8).fill_(0x7F)
    quantise_kernels.transpose_values(
        v, scale, values, work.kv_indptr, work.value_indptr, work.max_seqlen_k, 16
    )
    stored = quant.quantise(v, FLOAT8, scale=scale).values
    first, starts = _indptr(CASES["ragged"].k_lens), work.value_indptr.tolist()
    for b, length in enumerate(CASES["ragged"].k_lens):
        own = values[:, :, starts[b] : starts[b + 1]].float()
        own = own.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).flatten(-4)  # keys in order again
        want = stored[first[b] : first[b] + length].float().permute(1, 2, 0)
        assert torch.equal(own[..., :length], want)
        assert not own[..., length:].any()


def test_quantisation_kernels_equal_torch() -> None:
    x = draw(70, 3, 24, seed=5, scale=30.0)
    x[4, 1, 3], x[5, 2, 0], x[6, 0, 0] = math.inf, math.nan, 1e30
    want = torch.where(x.float().abs() < math.inf, x.float().abs(), 0).amax((0, 2))
    per_head, whole = torch.zeros(len(want), device=DEVICE), torch.zeros(1, device=DEVICE)
    quantise_kernels.amax(x, per_head)
    quantise_kernels.amax(x, whole)
    assert torch.equal(per_head, want)
    assert torch.equal(whole[0], want.max())
    scale = torch.tensor([0.05, 0.3, 1e-3], device=DEVICE)
    out = torch.empty(x.shape, dtype=FLOAT8, device=DEVICE)
    quantise_kernels.quantise(x, scale, out)
    torch.testing.assert_close(
        out.float().cpu(),
        (x.float().cpu() / scale.cpu()[:, None]).clamp(-448, 448).to(FLOAT8).float(),
        equal_nan=True,
        rtol=1 / 8,  # x * (1 / scale) may round the other way
        atol=2**-9,
    )


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_formats_that_kernels_do_not_know(dtype: torch.dtype, monkeypatch: Any) -> None:
    """Quantised in torch; as inputs of prefill they are refused, not read as another format."""
    known = operands.knows_float8(dtype, operands.device_of(torch.device(DEVICE)))
    x = draw(70, 3, 24, seed=5, scale=30.0)
    want = quant.quantise(x.cpu(), dtype).values.float()
    monkeypatch.setattr(quant, "_on_kernels", lambda rows: True)
    got = quant.quantise(x, dtype).values.cpu().float()
    torch.testing.assert_close(got, want, rtol=1 / 4, atol=1e-4)
    if not known:
        work, out = Case().work(), draw(137, 2, 16, seed=1)
        q, k, v = (draw(186, 2, n, seed=2).to(dtype) for n in (24, 24, 16))
        with pytest.raises(UnsupportedError, match="takes float8_e4m3fn"):
            mla_prefill(work, q[:137], k, v, out, None, softmax_scale=0.2)


def test_reduce_takes_every_mark_of_an_empty_part_and_reads_no_unwritten_row() -> None:
    case = Case(q_lens=(5,), k_lens=(64,), heads=1, kv_heads=1, num_cu=4, causal=False)
    work = case.work()
    assert (work.num_groups, work.partial_rows) == (1, 4 * case.qlen)
    partial_out = torch.full((work.partial_rows, 1, 16), math.nan, device=DEVICE)
    partial_lse = torch.full((work.partial_rows, 1), math.nan, device=DEVICE)
    parts = draw(4, 5, 16, seed=1, dtype=torch.float32)
    lses = draw(4, 5, seed=2, dtype=torch.float32)
    lses[0, 0], lses[1, 0], lses[2, 0], lses[3, 1] = math.nan, math.inf, -math.inf, -math.inf
    lses[:, 2] = math.inf  # nobody saw a key
    for row, out, lse in zip(work.reduce_partial_map.tolist(), parts, lses, strict=True):
        partial_out[row : row + 5, 0] = torch.where(lse.isfinite()[:, None], out, math.nan)
        partial_lse[row : row + 5, 0] = lse
    out = torch.full((5, 1, 16), 7.0, device=DEVICE)
    lse = torch.full((5, 1), 7.0, device=DEVICE)
    mla_reduce(work, partial_out, partial_lse, out, lse)
    want, want_lse = reference.combine(parts.cpu(), lses.cpu())
    torch.testing.assert_close(out[:, 0].cpu(), want.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[:, 0].cpu(), want_lse.float(), rtol=1e-5, atol=1e-6)
    assert out[2].eq(0).all()
    assert lse[2] == -math.inf


@pytest.mark.parametrize(("stored", "heads"), [(False, 2), (True, 4)])
def test_public_float8_prefill_on_kernels(stored: bool, heads: int) -> None:
    """All of ``prefill`` but its checks, and the CPU's own path for the same call."""
    q_lens, k_lens = (70, 3), (150, 131)
    q, k = draw(73, heads, 24, seed=1), draw(281, 2, 24, seed=2)
    v = draw(281, 2, 16, seed=3)
    cu_q, cu_k = (torch.tensor(_indptr(n), dtype=torch.int32) for n in (q_lens, k_lens))
    plan = mla.plan_prefill(
        cu_q, cu_k, num_heads_k=2, num_heads_q=heads, device=torch.device(DEVICE), num_cu=6
    )
    scales: list[Tensor | None] = [None, None, None]
    inputs = (q, k, v)
    if stored:
        (q8, s0), (k8, s1), (v8, s2) = (quant.quantise(x) for x in inputs)
        inputs, scales = (q8, k8, v8), [s0, s1, s2]
    out = torch.empty(73, heads, 16, dtype=torch.bfloat16, device=DEVICE)
    lse = torch.empty(heads, 73, device=DEVICE)
    rope = None
    if not stored:  # keys in two pieces
        inputs, rope = (q, k[..., :16], v), k[..., 16:]
    given = scales[0], scales[1], scales[2]
    mla._float8_on_kernels(plan, inputs, rope, given, 0.2, out, lse, None)
    want, want_lse = mla.prefill(
        *(x.cpu() for x in (q, k, v)), cu_q, cu_k, softmax_scale=0.2, fp8=True, return_lse=True
    )
    assert_near(out, want.double(), 1e-2 if INTERPRETED else 6e-2)
    assert_near(lse, want_lse.double(), 1e-3)
