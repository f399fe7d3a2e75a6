"""The Hopper decode kernel on the device: functions of the caller, and what its plans decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import headway
from headway.kernels.hopper import decode, decode_plan
from headway.providers import hopper
from tests.calls import Call
from tests.gpu.captured import captured
from tests.gpu.test_hopper import must_run, normal, pytestmark  # noqa: F401
from tests.kernels.portable_device import DEVICE

LENGTHS = (1000, 9, 8, 2300)


def paged(heads: tuple[int, int], d: int, sq: int, **more: Any) -> Call:
    table = torch.arange(4 * 160, dtype=torch.int32).view(4, 160).flip(1)
    kwargs: dict[str, Any] = {
        "q": normal(4, sq, heads[0], d),
        "k_cache": normal(640, 16, heads[1], d, seed=1),
        "v_cache": normal(640, 16, heads[1], d, seed=2),
        "page_table": table,
        "cache_seqlens": torch.tensor(LENGTHS, dtype=torch.int32),
    }
    return Call("kvcache", kwargs | more, f"{heads} {d} {sq}")


def latent(heads: int, sq: int, **more: Any) -> Call:
    call = paged((heads, 1), 576, sq, **more)
    call.kwargs["v_cache"] = call.kwargs["k_cache"][..., :512]
    return call


def tree(b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: Any) -> Any:
    """Tokens before the draft, and of the draft those on the path to this one."""
    draft, token = kv_idx - aux[1][b], q_idx - aux[1][b]
    return (draft < 0) | aux[0][token.clamp(0, 7), draft.clamp(0, 7)]


def bias(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, aux: Any) -> Any:
    return score + aux[2][h] * ((q_idx - kv_idx) % 5)


def aux_of(heads: int, sq: int) -> list[torch.Tensor]:
    paths = torch.rand(8, 8, generator=torch.Generator().manual_seed(4)) < 0.5
    starts = torch.tensor(LENGTHS, dtype=torch.int32) - sq
    return [paths | torch.eye(8, dtype=torch.bool), starts, torch.linspace(-1, 1, heads)]


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("float8", [False, True])
def test_functions_of_the_caller(d: int, float8: bool) -> None:
    call = paged((16, 4), d, 8, mask_mod=tree, score_mod=bias, aux_tensors=aux_of(16, 8))
    if float8:
        for name in ("k_cache", "v_cache"):
            call.kwargs[name] = call.kwargs[name].to(torch.float8_e4m3fn)
            call.kwargs[f"{name[0]}_descale"] = torch.rand(4, 4) + 0.5
    must_run(call, with_lse=not float8)


@pytest.mark.parametrize(("heads", "sq"), [(16, 1), (16, 4), (128, 2)])
def test_functions_over_latent_caches(heads: int, sq: int) -> None:
    aux = aux_of(heads, sq)
    must_run(latent(heads, sq, mask_mod=tree, score_mod=bias, aux_tensors=aux))


FLOAT8 = torch.float8_e4m3fn


def float8_latent(
    heads: int,
    sq: int,
    page_size: int | None,
    whole: bool,
    q_dtype: torch.dtype = torch.bfloat16,
    given: tuple[int, ...] = LENGTHS,
    **more: Any,
) -> Call:
    """Absorbed MLA over float8 latents, NaN in all rows that no sequence owns; descales vary."""
    batch_size, capacity = len(given), max(given) + 4
    lengths = torch.tensor(given, dtype=torch.int32)
    lengths[1] = 0
    if page_size is None:
        cache = normal(batch_size, capacity, 1, 576).to(FLOAT8)
        table = None
        owned = torch.arange(capacity) < lengths[:, None]
    else:
        per = -(-capacity // page_size)
        cache = normal(batch_size * per, page_size, 1, 576).to(FLOAT8)
        order = torch.randperm(batch_size * per, generator=torch.Generator().manual_seed(7))
        table = order.to(torch.int32).view(batch_size, per)
        rows = torch.arange(per * page_size).view(1, per, page_size) < lengths[:, None, None]
        owned = torch.zeros(batch_size * per, page_size, dtype=torch.bool)
        owned[table.long()] = rows
    cache.view(torch.uint8)[~owned] = 0x7F
    q = normal(batch_size, sq, heads, 576, seed=1).to(q_dtype)
    kwargs: dict[str, Any] = {"q": q, "k_cache": cache, "v_cache": cache[..., :512]}
    if not whole:
        kwargs = {"q": q[..., 512:], "qv": q[..., :512]}
        kwargs |= {"k_cache": cache[..., 512:], "v_cache": cache[..., :512]}
    for name in "qkv" if q_dtype == FLOAT8 else "kv":
        kwargs[f"{name}_descale"] = torch.rand(batch_size, 1) + 0.5
    kwargs |= {"page_table": table, "cache_seqlens": lengths, "causal": True}
    return Call("kvcache", kwargs | more, f"float8 latents {heads} {sq} {page_size} {whole}")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("heads", "sq", "page_size"),
    [
        (1, 1, 64),
        (16, 1, 1),
        (16, 1, 64),
        (4, 4, None),
        (16, 2, 16),
        (64, 1, None),
        (71, 3, 64),
        (128, 2, 1),
    ],
)
def test_float8_latents(heads: int, sq: int, page_size: int | None, whole: bool) -> None:
    must_run(float8_latent(heads, sq, page_size, whole))


def test_functions_over_float8_latents() -> None:
    aux = aux_of(16, 1)
    must_run(float8_latent(16, 1, 64, True, mask_mod=tree, score_mod=bias, aux_tensors=aux))


@pytest.mark.parametrize("heads", [8, 64])
@pytest.mark.parametrize("q_dtype", [torch.float16, FLOAT8])
def test_queries_beside_float8_latents(heads: int, q_dtype: torch.dtype) -> None:
    must_run(float8_latent(heads, 1, 64, True, q_dtype))


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize(
    "more",
    [{"window_size": (70, 0)}, {"softcap": 5.0}, {"sinks": True}, {"causal": False}],
    ids=str,
)
def test_options_over_float8_latents(heads: int, more: dict[str, Any]) -> None:
    if "sinks" in more:
        more = {"sinks": torch.linspace(-3, 3, heads)}
    must_run(float8_latent(heads, 1, 16, True, **more))


@pytest.mark.parametrize("heads", [16, 64])
def test_many_sequences_of_float8_latents(heads: int) -> None:
    """More than there are workers: units end inside their shares, and parts are merged by the last."""
    must_run(float8_latent(heads, 1, 64, True, given=(100, 9, 8, 230) * 100))


RAGGED = (8191, 1, 0, 63, 64, 65, 127, 128, 129, 3000)


def latents(
    heads: int, sq: int, page_size: int | None, given: tuple[int, ...] = RAGGED, **more: Any
) -> Call:
    """Absorbed MLA over whole rows of latents, NaN in all that no sequence owns."""
    batch_size, lengths = len(given), torch.tensor(given, dtype=torch.int32)
    per = -(-max(given) // (page_size or 1))
    table = None
    if page_size is None:
        cache = normal(batch_size, per, 1, 576)
        cache[torch.arange(per) >= lengths[:, None]] = float("nan")
    else:
        order = torch.randperm(batch_size * per, generator=torch.Generator().manual_seed(7))
        table = order.to(torch.int32).view(batch_size, per)
        rows = normal(batch_size, per * page_size, 1, 576)
        rows[torch.arange(per * page_size) >= lengths[:, None]] = float("nan")
        cache = torch.empty(batch_size * per, page_size, 1, 576, dtype=rows.dtype)
        cache[order] = rows.view(batch_size * per, page_size, 1, 576)
    kwargs: dict[str, Any] = {"q": normal(batch_size, sq, heads, 576, seed=1), "k_cache": cache}
    kwargs |= {"v_cache": cache[..., :512], "page_table": table, "cache_seqlens": lengths}
    return Call("kvcache", {"causal": True} | kwargs | more, f"latents {heads} {sq} {page_size}")


@pytest.mark.parametrize(
    ("heads", "sq", "page_size"),
    [
        (64, 1, 64),
        (71, 1, 128),
        (71, 2, 64),
        (128, 1, 64),
        (128, 2, 16),
        (128, 1, None),
        (24, 3, 8),
    ],
)
def test_latents_of_many_rows(heads: int, sq: int, page_size: int | None) -> None:
    must_run(latents(heads, sq, page_size))


@pytest.mark.parametrize(
    "more",
    [{"window_size": (300, 0)}, {"softcap": 5.0}, {"sinks": True}, {"causal": False}],
    ids=str,
)
def test_options_over_latents_of_many_rows(more: dict[str, Any]) -> None:
    if "sinks" in more:
        more = {"sinks": torch.linspace(-3, 3, 128)}
    must_run(latents(128, 1, 64, **more))


def test_many_sequences_of_latents_of_many_rows() -> None:
    """More than there are workers: units end inside their shares, and parts are merged by the last."""
    must_run(latents(128, 1, 64, given=(1000, 9, 128, 2300, 0) * 20))


@pytest.mark.parametrize("heads", [16, 128])
def test_few_latent_sequences_are_combined(heads: int) -> None:
    must_run(latent(heads, 1, causal=True))


@pytest.mark.parametrize(
    ("batch_size", "heads", "keys", "share"),
    [
        (1, 8, 131072, 64),  # 128 parts of 8 x 1024 blocks
        (128, 1, 8192, 64),  # each unit a worker's
        (64, 8, 4096, 128),  # four units a worker
        (1, 8, 8192, 4),
        (3, 8, 4096, 6),  # 32 blocks in parts of 6: even ones would be a third more
    ],
)
def test_equal_lengths_are_cut_evenly(batch_size: int, heads: int, keys: int, share: int) -> None:
    """On a device of 132 multiprocessors, of which each has one worker."""
    if torch.cuda.get_device_properties(DEVICE).multi_processor_count != 132:
        pytest.skip("numbers are those of 132 multiprocessors")
    plan = decode.make_plan(
        batch_size=batch_size,
        num_kv_heads=heads,
        group=4,
        max_seqlen_q=1,
        head_dim=128,
        head_dim_v=128,
        device=torch.device(DEVICE),
    )
    lengths = torch.full((batch_size,), keys, dtype=torch.int32, device=DEVICE)
    decode_plan.plan_decode(plan, seqlens_k=lengths, capacity=keys, rows_q=1)
    assert plan.workers == 132
    assert plan.share.item() == share


@pytest.mark.parametrize("apart", [0, 13])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"cache_leftpad": True}], ids=str)
def test_windows_of_many_sequences(apart: int, options: dict[str, Any]) -> None:
    """16 blocks each, one worker's whole; or 16 and 17, cut wherever a share ends."""
    lengths = torch.tensor([1408 - apart * i for i in range(16)], dtype=torch.int32)
    if "cache_leftpad" in options:
        options = {"cache_leftpad": torch.arange(16, dtype=torch.int32)}
    kwargs: dict[str, Any] = {
        "q": normal(16, 1, 32, 128),
        "k_cache": normal(16 * 88, 16, 8, 128, seed=1),
        "v_cache": normal(16 * 88, 16, 8, 128, seed=2),
        "page_table": torch.arange(16 * 88, dtype=torch.int32).view(16, 88).flip(1),
        "cache_seqlens": lengths,
        "window_size": (1023, 0),
    }
    must_run(Call("kvcache", kwargs | options, f"windows {apart}"))


@pytest.mark.parametrize("page_size", [5, 16, 64])
@pytest.mark.parametrize(("heads", "sq"), [((64, 8), 1), ((16, 2), 1), ((8, 8), 2), ((6, 2), 1)])
@pytest.mark.parametrize("options", ["", "window", "softcap", "sinks", "float8 queries"])
def test_short_float8_rows_of_two_heads_are_read_as_one(
    page_size: int, heads: tuple[int, int], sq: int, options: str
) -> None:
    """Descales of every head's own; NaN in all rows that no sequence owns."""
    lengths = torch.tensor([1000, 1, 0, 2300, 64], dtype=torch.int32)
    per = -(-2300 // page_size)
    table = torch.randperm(5 * per, generator=torch.Generator().manual_seed(3)).view(5, per)
    kwargs: dict[str, Any] = {
        "q": normal(5, sq, heads[0], 64),
        "page_table": table.to(torch.int32),
        "cache_seqlens": lengths,
        "causal": True,
    }
    rows = torch.arange(per * page_size).view(1, per, page_size) < lengths[:, None, None]
    for seed, name in enumerate(("k", "v"), 1):
        cache = normal(5 * per, page_size, heads[1], 64, seed=seed).to(FLOAT8)
        owned = torch.zeros(5 * per, page_size, dtype=torch.bool)
        owned[table] = rows
        cache.view(torch.uint8)[~owned] = 0x7F
        kwargs |= {f"{name}_cache": cache, f"{name}_descale": torch.rand(5, heads[1]) + 0.5}
    if options == "window":
        kwargs["window_size"] = (200, 0)
    elif options == "softcap":
        kwargs["softcap"] = 5.0
    elif options == "sinks":
        kwargs["sinks"] = torch.linspace(-3, 3, heads[0])
    elif options == "float8 queries":
        kwargs |= {"q": kwargs["q"].to(FLOAT8), "q_descale": torch.rand(5, heads[1]) + 0.5}
    call = Call("kvcache", kwargs, f"two heads as one {page_size} {heads}")
    assert hopper._Lengths(call.copy(DEVICE).problem()).abreast
    must_run(call, with_lse=options == "")
    if options == "":  # heads before rows: each is read alone
        for name in ("k_cache", "v_cache"):
            kwargs[name] = kwargs[name].transpose(1, 2).contiguous().transpose(1, 2)
        must_run(Call("kvcache", kwargs, "heads before rows"), with_lse=True)


def float8_caches(
    lengths: list[int], page_size: int, heads: tuple[int, int], sq: int, d: int = 128
) -> dict[str, Any]:
    """Arguments of a step: descales of every head's own, NaN in all rows that no sequence owns."""
    batch_size, per = len(lengths), -(-max(lengths) // page_size)
    order = torch.randperm(batch_size * per, generator=torch.Generator().manual_seed(3))
    table, ends = order.view(batch_size, per), torch.tensor(lengths, dtype=torch.int32)
    rows = torch.arange(per * page_size).view(1, per, page_size) < ends[:, None, None]
    kwargs: dict[str, Any] = {
        "q": normal(batch_size, sq, heads[0], d),
        "page_table": table.to(torch.int32),
        "cache_seqlens": ends,
        "causal": True,
    }
    for seed, name in enumerate(("k", "v"), 1):
        cache = normal(batch_size * per, page_size, heads[1], d, seed=seed).to(FLOAT8)
        owned = torch.zeros(batch_size * per, page_size, dtype=torch.bool)
        owned[table] = rows
        cache.view(torch.uint8)[~owned] = 0x7F
        descale = torch.rand(batch_size, heads[1]) + 0.5
        kwargs |= {f"{name}_cache": cache, f"{name}_descale": descale}
    return kwargs


def padded_rows(cache: Tensor) -> Tensor:
    """The same pages, whose rows lie one head further apart than they are long."""
    pages, rows, heads, d = cache.shape
    wide = torch.zeros(pages, rows, heads + 1, d, dtype=cache.dtype)
    wide.view(torch.uint8).fill_(0x7F)
    wide[:, :, :heads] = cache
    return wide[:, :, :heads]


#: Of 64 sequences: none, ends of pages and of blocks, one key before and after them, and one that is cut.
MANY = [390, 0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 320, *range(3, 258, 5)]


@pytest.mark.parametrize(
    ("page_size", "heads", "sq", "options"),
    [
        (16, (64, 8), 1, ""),
        (64, (16, 8), 2, ""),
        (8, (8, 8), 1, ""),
        (48, (32, 8), 2, "window"),
        (16, (64, 8), 1, "left padding"),
        (64, (64, 8), 1, "softcap"),
        (16, (16, 8), 4, "sinks"),
        (16, (32, 8), 1, "float8 queries"),
        (16, (32, 8), 1, "padded rows"),
        (64, (64, 8), 1, "padded rows"),
        (16, (64, 8), 1, "one long"),
    ],
)
def test_float8_rows_of_two_heads_of_many_sequences_are_read_as_one(
    page_size: int, heads: tuple[int, int], sq: int, options: str
) -> None:
    lengths = [2300, *MANY[:63]] if options == "one long" else MANY
    kwargs = float8_caches(lengths, page_size, heads, sq)
    if options == "window":
        kwargs["window_size"] = (100, 0)
    elif options == "left padding":
        kwargs["cache_leftpad"] = kwargs["cache_seqlens"] // 3
    elif options == "softcap":
        kwargs["softcap"] = 5.0
    elif options == "sinks":
        kwargs["sinks"] = torch.linspace(-3, 3, heads[0])
    elif options == "float8 queries":
        kwargs |= {"q": kwargs["q"].to(FLOAT8), "q_descale": torch.rand(len(MANY), heads[1]) + 0.5}
    elif options == "padded rows":
        kwargs |= {name: padded_rows(kwargs[name]) for name in ("k_cache", "v_cache")}
    call = Call("kvcache", kwargs, f"two heads of 128 as one {page_size} {heads} {options}")
    on_device = call.copy(DEVICE)
    assert on_device.kwargs["k_cache"].stride() == kwargs["k_cache"].stride()
    assert hopper._Lengths(on_device.problem()).abreast
    must_run(call, with_lse=options == "")


@pytest.mark.parametrize("heads", [(27, 9), (8, 1), (64, 8)])
def test_float8_caches_of_many_sequences_whose_heads_are_read_alone(heads: tuple[int, int]) -> None:
    """No twos; or the heads of a row do not lie behind one another."""
    kwargs = float8_caches(MANY, 16, heads, 1)
    if heads[1] == 8:
        for name in ("k_cache", "v_cache"):
            kwargs[name] = kwargs[name].transpose(1, 2).contiguous().transpose(1, 2)
    must_run(Call("kvcache", kwargs, f"alone {heads}"), with_lse=True)


def test_functions_of_the_caller_where_two_heads_are_read_as_one() -> None:
    kwargs = float8_caches(MANY, 16, (16, 8), 1)
    aux = [torch.eye(8, dtype=torch.bool), kwargs["cache_seqlens"] - 1, torch.linspace(-1, 1, 16)]
    call = Call("kvcache", kwargs | {"score_mod": bias, "aux_tensors": aux}, "bias of two heads")
    must_run(call)


def test_a_captured_step_of_two_heads_as_one() -> None:
    """One plan for all replays, whose lengths change between them; calls without a plan agree."""
    kwargs: dict[str, Any] = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in float8_caches(MANY, 16, (32, 8), 1).items()
    }
    lengths, table = kwargs["cache_seqlens"], kwargs["page_table"]
    plan = headway.get_scheduler_metadata(
        batch_size=len(MANY),
        max_seqlen_q=1,
        max_seqlen_k=table.shape[1] * 16,
        num_heads_q=32,
        num_heads_kv=8,
        headdim=128,
        cache_seqlens=lengths,
        qkv_dtype=FLOAT8,
        page_size=16,
        causal=True,
    )

    def call(plan: Any = None) -> Tensor:
        kwargs["scheduler_metadata"] = plan
        out = headway.flash_attn_with_kvcache(**kwargs, backend="hopper")
        assert isinstance(out, Tensor)
        return out

    graph, out = captured(lambda: call(plan))
    for turn in (0, 1, 7):
        lengths.copy_(lengths.roll(turn))
        table.copy_(table.roll(turn, 0))
        out.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(out, call(), rtol=0, atol=0)


#: Lengths before the step: none, ends of pages and blocks, one key before and after them.
OLD = (0, 1, 15, 16, 17, 63, 64, 127, 128, 300, 1000, 2047)


def appending(page_size: int, sq: int, float8: bool, rotary: bool | None, **more: Any) -> Call:
    """A step that appends; rows that hold no key yet are NaN, and pages that none needs do not exist."""
    width = -(-2080 // max(page_size, 1))
    rows = (len(OLD) * width, page_size) if page_size else (len(OLD), 2080)
    kwargs: dict[str, Any] = {
        "q": normal(len(OLD), sq, 16, 128),
        "k": normal(len(OLD), sq, 4, 128, seed=1),
        "v": normal(len(OLD), sq, 4, 128, seed=2),
        "k_cache": normal(*rows, 4, 128, seed=3),
        "v_cache": normal(*rows, 4, 128, seed=4),
        "cache_seqlens": torch.tensor(OLD, dtype=torch.int32),
        "causal": True,
    }
    table = torch.arange(rows[0], dtype=torch.int32).flip(0).view(len(OLD), -1)
    for b, old in enumerate(OLD):
        for name in ("k_cache", "v_cache"):
            of_sequence = kwargs[name][table[b].long()] if page_size else kwargs[name][b]
            of_sequence = of_sequence.flatten(0, -3)
            of_sequence[old:] = float("nan")
            if page_size:
                kwargs[name][table[b].long()] = of_sequence.unflatten(0, (-1, page_size))
        if page_size:
            table[b, -(-(old + sq) // page_size) :] = 2147480000
    if page_size:
        kwargs["page_table"] = table
    if float8:
        for name in ("k_cache", "v_cache"):
            kwargs[name] = kwargs[name].to(torch.float8_e4m3fn)
            kwargs[f"{name[0]}_descale"] = torch.rand(len(OLD), 4) + 0.5
    if rotary is not None:
        angle = torch.rand(2080, 64, generator=torch.Generator().manual_seed(6)) * 6
        kwargs |= {"rotary_cos": angle.cos().bfloat16(), "rotary_sin": angle.sin().bfloat16()}
        kwargs["rotary_interleaved"] = rotary
    return Call("kvcache", kwargs | more, f"append {page_size} {sq} {float8} {rotary}")


@pytest.mark.parametrize("sq", [1, 3])
@pytest.mark.parametrize("page_size", [0, 1, 16, 64])
@pytest.mark.parametrize("rotary", [None, False, True])
@pytest.mark.parametrize("float8", [False, True])
def test_appending_in_one_launch_is_appending_first(
    page_size: int, sq: int, rotary: bool | None, float8: bool
) -> None:
    """Bit for bit, whole caches included, and in every run."""
    call = appending(page_size, sq, float8, rotary)
    first = call.copy(DEVICE)
    want = (*hopper.PROVIDER._run_any(first.problem()), *caches_of(first))
    for _ in range(3):
        one = call.copy(DEVICE)
        problem = one.problem()
        assert hopper._is_fused(problem)
        got = (*hopper.PROVIDER.runner(problem)(problem), *caches_of(one))
        torch.cuda.synchronize()
        for x, y in zip(got, want, strict=True):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                torch.testing.assert_close(x.float(), y.float(), atol=0, rtol=0, equal_nan=True)
    must_run(call, with_lse=not float8)


def caches_of(call: Call) -> tuple[Tensor, Tensor]:
    return call.kwargs["k_cache"], call.kwargs["v_cache"]


@pytest.mark.parametrize("window", [(1, 0), (100, 0)])
@pytest.mark.parametrize("heads", [(16, 4), (71, 1)])
def test_new_tokens_that_no_query_sees_are_written(
    window: tuple[int, int], heads: tuple[int, int]
) -> None:
    call = appending(16, 4, False, True, window_size=window)
    call.kwargs["q"] = normal(len(OLD), 1, heads[0], 128)
    for name in ("k", "v", "k_cache", "v_cache"):
        call.kwargs[name] = call.kwargs[name][..., : heads[1], :].contiguous()
    assert hopper._is_fused(call.copy(DEVICE).problem())
    must_run(call)


def test_a_captured_step_appends_where_the_lengths_say() -> None:
    """Replays of one graph go on where the last one ended, as calls do."""
    graphed, called = (appending(16, 1, False, False).copy(DEVICE).kwargs for _ in range(2))
    table = torch.arange(len(OLD) * 130, dtype=torch.int32, device=DEVICE).flip(0)
    graphed["page_table"] = called["page_table"] = table.view(len(OLD), -1)

    def step(of: dict[str, Any]) -> Tensor:
        out = headway.flash_attn_with_kvcache(**of, backend="hopper")
        assert isinstance(out, Tensor)
        of["cache_seqlens"].add_(1)
        return out

    graph, out = captured(lambda: step(graphed))
    step(called)  # as the call before the capture
    for _ in range(20):
        want = step(called)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, want)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(graphed[name], called[name], atol=0, rtol=0, equal_nan=True)
