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


def prefill(*tensors: Tensor, backend: str | None = "hopper", **scales: Tensor) -> Tensor:
    out = mla.prefill(*tensors, fp8=True, backend=backend, **scales)  # type: ignore[arg-type]
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


def in_float8(x: Tensor, scale: Tensor) -> Tensor:
    """What of x is left in float8, by scales that broadcast to it."""
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def scaled_to(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    largest = x.float().abs().amax(dims, keepdim=True)
    return torch.where(largest > 0, largest / 448, 1.0)


def in_blocks(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Keys or values by a scale for every 128 of a sequence's, and head."""
    blocks = (b for own in x.split(lengths) for b in own.split(128) if len(b))
    return torch.cat([in_float8(b, scaled_to(b, (0, 2))) for b in blocks])


@pytest.mark.parametrize("given", ["", "qkv", "q", "kv"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_every_batch_however_it_is_dealt_out(name: str, whole: bool, given: str) -> None:
    batch = BATCHES[name]
    q, k, v = batch.tensors()
    k[: batch.k_lens[0] // 2] *= 0.3  # scales of blocks differ
    v[: batch.k_lens[0] // 2] *= 30
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
    scales = {name: quant.amax_scale(x) for name, x in zip("qkv", (q, k, v), strict=True)}
    own = {
        "q": lambda: in_float8(q, scaled_to(q, (2,))),
        "k": lambda: in_blocks(k, batch.k_lens),
        "v": lambda: in_blocks(v, batch.k_lens),
    }
    stored = [
        in_float8(x, scales[name]) if name in given else own[name]()
        for name, x in zip("qkv", (q, k, v), strict=True)
    ]
    out = torch.full((len(q), batch.heads, 128), math.nan, dtype=torch.bfloat16, device=DEVICE)
    got, lse = mla.prefill(
        q, k, v, cu_q, cu_k, causal=batch.causal, fp8=True, plan=plan, out=out, return_lse=True,
        backend="hopper", **{f"{name}_scale": scales[name] for name in given},
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


def test_queries_of_either_width_and_any_stride_are_cast_alike() -> None:
    """Rows that TMA cannot read are made float8 before; then one scale holds for all of them."""
    batch = Batch((200, 70), (300, 70))
    q, k, v = batch.tensors()
    cu = batch.starts()
    scale = quant.amax_scale(q)
    want = mla.prefill(q, k, v, *cu, fp8=True, q_scale=scale)
    apart = torch.empty(len(q), 4, 197, dtype=q.dtype, device=DEVICE)[..., :192].copy_(q)
    assert torch.equal(mla.prefill(apart, k, v, *cu, fp8=True, q_scale=scale), want)
    halves = (x.half() for x in (q, k, v))
    got = mla.prefill(*halves, *cu, fp8=True, q_scale=scale)
    assert got.dtype == torch.float16
    assert relative(got, want.double()) < 1e-2


def test_what_cannot_be_read_in_pairs_is_cast_by_a_scale_for_each_tensor() -> None:
    batch = Batch((200, 70), (300, 70))
    q, k, v = batch.tensors()
    cu = batch.starts()
    scales = {f"{n}_scale": quant.amax_scale(x) for n, x in zip("qkv", (q, k, v), strict=True)}
    want = prefill(q, k, v, *cu, **scales)
    odd = torch.empty(len(k), 4, 193, dtype=k.dtype, device=DEVICE)[..., :192].copy_(k)
    assert torch.equal(prefill(q, odd, v, *cu), want)
    wide = prefill(q.float(), k.float(), v.float(), *cu)
    assert wide.dtype == torch.float32
    assert relative(wide, want.double()) < 1e-2


@pytest.mark.parametrize("heads", [1, 4])
def test_keys_in_two_pieces(heads: int) -> None:
    batch = Batch((200, 70), (300, 70))
    q, k, v = batch.tensors()
    rope = k[:, :heads, 128:]
    whole = torch.cat((k[..., :128], rope.expand(-1, 4, -1)), dim=-1)
    cu = batch.starts()
    got = mla.prefill(q, k[..., :128], v, *cu, k_rope=rope, fp8=True)
    assert torch.equal(got, prefill(q, whole, v, *cu))


def test_a_sequence_depends_on_no_other() -> None:
    """Whatever lies beside it in the batch, and in the tiles that reach into its neighbour."""
    lengths = (200, 50)
    q, k, v = Batch(lengths, lengths).tensors()
    alone = prefill(q[:200], k[:200], v[:200], *Batch((200,), (200,)).starts())
    for x in (q, k, v):
        x[200:] = math.nan
    together = prefill(q, k, v, *Batch(lengths, lengths).starts())
    assert torch.equal(together[:200], alone)
    assert together[200:].isnan().all()


def test_what_is_not_finite_stays_where_it_is() -> None:
    """An infinite key or value becomes the largest of the format, by the scale of the finite ones."""
    batch = Batch((128,), (128,), heads=1, kv_heads=1)
    q, k, v = batch.tensors()
    q[5, 0, 3] = math.nan
    v[7, 0, 2], v[9, 0, 4] = math.inf, 0.0
    got = prefill(q, k, v, *batch.starts())
    assert got[5].isnan().all()
    others = torch.arange(128, device=DEVICE) != 5
    assert got[others].isfinite().all()
