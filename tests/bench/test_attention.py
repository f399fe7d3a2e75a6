"""The cells of the attention benchmark, and its participants on small ones of every kind."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.bench import attention, cases, overhead, participants, report
from headway.bench.cases import DECODE, DECODE_FLOAT8, PREFILL, SUITES, Case
from headway.errors import InvalidInputError, UnsupportedError
from tests.stand_ins import installed

CPU = torch.device("cpu")


@pytest.mark.parametrize("suite", SUITES)
def test_names_are_names(suite: str) -> None:
    assert len({case.name for case in SUITES[suite]}) == len(SUITES[suite])


def test_dense_prefill_cells_have_equal_tokens_and_widths() -> None:
    dense = [case for case in PREFILL if len(case.name.split()) == 3 and case.is_uniform]
    assert len(dense) == 4 * 3 * 2
    assert {sum(case.seqlens_q) for case in dense} == {16384}
    assert {case.heads_q * case.head_dim_v for case in dense} == {2048}


def test_flops_and_bytes() -> None:
    by_name = {case.name: case for case in (*PREFILL, *DECODE, *DECODE_FLOAT8)}
    full, causal = by_name["d128 4k full"], by_name["d128 4k causal"]
    assert full.flops == 4 * 4 * 16 * 4096**2 * 128
    assert causal.flops == full.flops / 2
    window = by_name["d128 16k window 1024"]
    assert window.flops == 4 * 16 * 16384 * 1024 * 128
    chunk = by_name["d128 512 tokens over 32k cached, 32/8, pages of 16"]
    assert chunk.flops == 4 * 32 * (512 * 32768 + 512**2 / 2) * 128
    assert by_name["B1 128k 32/8 d128"].kv_bytes == 512 << 20
    assert by_name["B1 128k 32/8 d128 float8"].kv_bytes == 256 << 20
    assert by_name["MLA B128 4k 16 heads"].kv_bytes == 128 * 4096 * 576 * 2


def test_drawn_lengths_are_the_same_on_every_machine_and_add_up() -> None:
    lengths = cases.long_tailed(32768, 16384)
    assert lengths == cases.long_tailed(32768, 16384)
    assert (sum(lengths), max(lengths)) == (32768, 16384)
    (ragged,) = (case for case in PREFILL if not case.is_uniform)
    assert ragged.seqlens_q == lengths


# --- participants ---------------------------------------------------------------------------------------


def small(case: Case, *lengths: int) -> Case:
    """The same kind of case with lengths that a CPU works off."""
    if case.kind == "prefill" and not case.page_size:
        return replace(case, seqlens_q=lengths, seqlens_k=lengths)
    tokens = min(case.seqlens_q[0], 5)
    return replace(case, seqlens_q=(tokens,) * len(lengths), seqlens_k=lengths)


def find(name: str) -> Case:
    return next(case for suite in SUITES.values() for case in suite if case.name == name)


KINDS = {
    "dense": small(find("d128 1k full"), 50, 50),
    "causal": small(find("d192/128 4k causal"), 50, 50),
    "grouped": small(find("d64 gqa 1x8192 64/8 causal"), 40),
    "ragged": small(next(case for case in PREFILL if not case.is_uniform), 30, 7, 55),
    "window": replace(small(find("d128 16k window 1024"), 70), window_left=20),
    "chunk": small(find("d128 512 tokens over 32k cached, 32/8, pages of 16"), 70),
    "decode": small(find("B16 4k 32/8 d128"), 40, 40),
    "long-tailed": small(DECODE[9], 300, 20, 1),
    "verify": small(find("B32 4k 32/8 d128, 4 tokens"), 40, 40),
    "window decode": replace(small(DECODE[12], 60, 60), window_left=20),
    "page 1": small(find("B16 4k 32/8 d128 page 1"), 20, 20),
    "float8": small(find("B16 4k 32/8 d128 float8"), 40, 40),
    "latent": small(find("MLA B128 4k 16 heads"), 40, 40),
}


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_looked_at(kind: str) -> None:
    inputs = participants.make_inputs(KINDS[kind], CPU)
    assert 1 <= len(inputs.sets) <= participants.MOST_SETS
    out = participants.planned_call(inputs, "reference")(0)
    assert participants.error_over_bound(inputs, out) < 1
    wrong = out.clone()
    wrong[..., 0] += 0.2
    assert participants.error_over_bound(inputs, wrong) > 1


#: Which peers take part in which case, others say why not.
TAKE_PART = {
    "fa3": set(KINDS) - {"window", "window decode", "float8"},
    "vllm": {kind for kind, case in KINDS.items() if case.page_size} - {"float8"},
    "fa4": set(KINDS) - {"float8", "latent"},
    "cudnn": {"dense", "causal", "grouped"},
}


def complete_fa3(monkeypatch: pytest.MonkeyPatch) -> None:
    """What providers do not call, and the benchmark does."""
    import fa3_fwd_interface as fa3

    def flash_attn_func(q: Any, k: Any, v: Any, causal: bool) -> Any:
        return fa3.flash_attn_with_kvcache(q, k, v, causal=causal)

    monkeypatch.setattr(fa3, "flash_attn_func", flash_attn_func, raising=False)
    monkeypatch.setattr(fa3, "get_scheduler_metadata", lambda *a, **k: None, raising=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peer", ["fa3", "vllm", "fa4", "cudnn"])
def test_peers_compute_the_same(peer: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins with the signatures of the packages; cuDNN's place is taken by torch's own kernel."""
    from torch.nn.attention import SDPBackend

    monkeypatch.setattr(SDPBackend, "CUDNN_ATTENTION", SDPBackend.MATH)
    inputs = participants.make_inputs(KINDS[kind], CPU)
    with installed("sm90", "fa3_fwd", "fa4", "vllm"):
        complete_fa3(monkeypatch)
        if kind not in TAKE_PART[peer]:
            with pytest.raises(UnsupportedError):
                participants.PEERS[peer].make(inputs)
            return
        out = participants.PEERS[peer].make(inputs)(0)
    out = out[0] if isinstance(out, tuple) else out
    assert participants.error_over_bound(inputs, out, participants.PEERS[peer].packed) < 1


def test_peers_that_are_asked_for_must_be_there() -> None:
    with pytest.raises(InvalidInputError, match="of fa3, vllm, fa4"):
        participants.requested_peers("fa5")
    participants.installed.cache_clear()
    with pytest.raises(InvalidInputError, match="installed packages"):
        participants.requested_peers("fa3")
    assert "cudnn" in participants.requested_peers("all")


# --- rows -------------------------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    made = []
    for name, ms in (("hopper", 0.5), ("portable", 2.0), ("fa3", 1.0), ("fa4", 1.25)):
        one = attention.Participant(name, times_ms=[ms, 9.0, 0.0], eager_ms=[ms, 2 * ms, 0.0])
        made.append(attention.row_of(DECODE[1], one))
    broken = attention.Participant("flashinfer", error="no")
    return [*made, attention.row_of(DECODE[1], broken)]


def test_ratios_are_to_the_best_peer() -> None:
    made = rows()
    attention.add_ratios(made, ["fa3", "fa4", "flashinfer"])
    ratios = {row["runner"]: row.get("of_best_peer") for row in made}
    expected = {"hopper": 2.0, "portable": 0.5, "fa3": 1.0, "fa4": 0.8, "flashinfer": None}
    assert ratios == expected
    assert made[0]["best_peer"] == "fa3"
    assert made[0]["of_best_peer_eager"] == 2.0
    assert attention.summary(made, "hopper").endswith("behind in none")
    assert "behind in 1: B1 8k 32/8 d128 0.500" in attention.summary(made, "portable")
    assert math.isclose(made[0]["tbps"], (32 << 20) / 0.5e-3 * 1e-12)


def test_a_participant_that_fails_drops_out_with_its_error() -> None:
    one = attention.Participant("x")

    def fails(_: attention.Participant) -> None:
        raise ValueError("odd")

    one.attempt(fails)
    one.attempt(lambda _: pytest.fail("ran on"))
    assert attention.row_of(DECODE[0], one)["error"] == "ValueError: odd"


def test_bars_of_two_panels(tmp_path: Path) -> None:
    made = rows()
    path = tmp_path / "picture.png"
    panels = [report.Panel([r for r in made if "tbps" in r], "tbps", "TB/s")] * 2
    report.bars(panels, label="case", by="runner", path=path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_views_of_inputs_are_made_once() -> None:
    """Host times of calls are not to be those of views."""
    inputs = participants.make_inputs(small(overhead.CASES[2], 20, 30), CPU)
    assert inputs.q_rows is inputs.q_rows
    for i in range(len(inputs.sets)):
        for mine, again in zip(inputs.pages(i, 16), inputs.pages(i, 16), strict=True):
            assert mine is again


def test_forms_of_a_call() -> None:
    decode = participants.make_inputs(small(overhead.CASES[2], 20, 30), CPU)
    assert list(overhead.forms(decode, "portable")) == [
        "portable",
        "portable, planned",
        "portable, new step",
    ]
    prefill = participants.make_inputs(small(overhead.CASES[4], 9), CPU)
    assert list(overhead.forms(prefill, "portable")) == ["portable"]
    with pytest.raises(InvalidInputError, match="one that makes plans"):
        overhead.stepping_call(decode, "reference")
