"""Float8 MLA prefill of the Hopper kernels, against float64 on the numbers that were stored."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from headway import mla, persistent, providers, quant

DEVICE = torch.device("cuda")


def _absent() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU"
    return providers.get("hopper").unavailable(DEVICE)


pytestmark = pytest.mark.skipif(_absent() is not None, reason=str(_absent()))

#: Weights are rounded to float8, scores are sums of a tensor core.
OUT, LSE = 3e-2, 1e-2


@dataclasses.dataclass(frozen=True)
class Batch:
    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 4
    causal: bool = True
    scale: float = 1.5  # of queries and keys
    mean: float = 0.0  # of the values

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def draw(rows: int, heads: int, width: int, scale: float = 1.0) -> Tensor:
            made = torch.randn(rows, heads, width, generator=generator, device=DEVICE)
            return (made * scale).bfloat16()

        q = draw(sum(self.q_lens), self.heads, 192, self.scale)
        k = draw(sum(self.k_lens), self.kv_heads, 192, self.scale)
        return q, k, draw(sum(self.k_lens), self.kv_heads, 128) + self.mean

    def starts(self) -> tuple[Tensor, Tensor]:
        return _starts(self.q_lens), _starts(self.k_lens)

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out (total_q, Hq, 128) and lse (Hq, total_q) in float64."""
        group = self.heads // self.kv_heads
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        outs, lses = [], []
        q_ends, k_ends = (torch.tensor(n).cumsum(0).tolist() for n in (self.q_lens, self.k_lens))
        for n, m, q_end, k_end in zip(self.q_lens, self.k_lens, q_ends, k_ends, strict=True):
            mine = q[q_end - n : q_end].double().transpose(0, 1)
            scores = mine @ k[k_end - m : k_end].permute(1, 2, 0) * 192**-0.5
            if self.causal:
                position = torch.arange(m - n, m, device=DEVICE)
                hidden = torch.arange(m, device=DEVICE) > position[:, None]
                scores = scores.masked_fill(hidden, -math.inf)
            lse = scores.logsumexp(-1)
            weights = (scores - lse.clamp(min=-1e30)[..., None]).exp()
            outs.append((weights @ v[k_end - m : k_end].transpose(0, 1)).transpose(0, 1))
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses, 1)


def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def prefill(*tensors: Tensor, backend: str | None = "hopper") -> Tensor:
    out = mla.prefill(*tensors, fp8=True, backend=backend)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


BATCHES = {
    "self": Batch((513, 1, 130, 700), (513, 1, 130, 700)),
    "grouped heads behind a prefix": Batch((300, 7), (1300, 4000), kv_heads=2),
    "chunk of a prefix": Batch((300, 70, 129), (1024, 0, 77), causal=False),
    "short sequences": Batch((37,) * 20, (137,) * 20, heads=8, kv_heads=8),
    "no queries": Batch((0, 64), (0, 64)),
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_every_batch_however_it_is_dealt_out(name: str, whole: bool) -> None:
    batch = BATCHES[name]
    q, k, v = batch.tensors()
    cu_q, cu_k = batch.starts()
    group = batch.heads // batch.kv_heads
    plan = persistent.plan_on_device(
        cu_q.numpy(),
        cu_k.numpy(),
        batch.k_lens,
        DEVICE,
        num_heads_k=batch.kv_heads,
        num_cu=23,
        granularity=dataclasses.replace(mla.TILE, qhead=group),
        is_causal=batch.causal,
        whole_tiles=whole,
    )
    scales = [quant.amax_scale(x) for x in (q, k, v)]
    stored = [
        quant.dequantise(*quant.quantise(x, scale=scale))
        for x, scale in zip((q, k, v), scales, strict=True)
    ]
    out = torch.full((len(q), batch.heads, 128), math.nan, dtype=torch.bfloat16, device=DEVICE)
    got, lse = mla.prefill(
        q, k, v, cu_q, cu_k, causal=batch.causal, fp8=True, plan=plan, out=out, return_lse=True,
        backend="hopper", q_scale=scales[0], k_scale=scales[1], v_scale=scales[2],
    )  # fmt: skip
    want, want_lse = batch.exact(*stored)
    seen = want_lse.isfinite()
    assert relative(got, want) < OUT
    assert (lse - want_lse)[seen].abs().max() < LSE
    assert torch.equal(lse[~seen].double(), want_lse[~seen])
    assert not got.transpose(0, 1)[~seen].any()


@pytest.mark.parametrize("backend", ["hopper", "portable"])
def test_long_sums_keep_their_precision(backend: str) -> None:
    """What a tensor core's own sum over 16384 keys loses of values around 1/2 is 11 %."""
    batch = Batch((128,), (16384,), heads=2, kv_heads=2, scale=0.5, mean=0.5)
    q, k, v = stored = [quant.quantise(x) for x in batch.tensors()]
    cu_q, cu_k = batch.starts()
    got = mla.prefill(
        q.values, k.values, v.values, cu_q, cu_k, backend=backend,
        q_scale=q.scale, k_scale=k.scale, v_scale=v.scale,
    )  # fmt: skip
    assert isinstance(got, Tensor)
    assert relative(got, batch.exact(*(quant.dequantise(*x) for x in stored))[0]) < 1e-2


def test_keys_of_others_are_never_seen() -> None:
    """The blocks of a sequence reach into the next one's keys, which are NaN here."""
    batch = Batch((200, 50), (200, 50))
    q, k, v = (x.to(torch.float8_e4m3fn) for x in batch.tensors())
    want = Batch((200,), (200,)).exact(*(x[:200].double() for x in (q, k, v)))[0]
    for x in (k, v):
        x[200:].view(torch.uint8).fill_(0x7F)
    got = prefill(q, k, v, *batch.starts())
    assert relative(got[:200], want) < OUT
    assert got[200:].isnan().all()


def test_hopper_runs_what_it_takes_and_portable_the_rest() -> None:
    batch = Batch((200,), (300,))
    q, k, v = batch.tensors()
    cu = batch.starts()
    chosen = prefill(q, k, v, *cu, backend=None)
    assert torch.equal(chosen, prefill(q, k, v, *cu))
    narrow = q[..., :128], k[..., :128], v, *cu
    assert torch.equal(prefill(*narrow, backend=None), prefill(*narrow, backend="portable"))
