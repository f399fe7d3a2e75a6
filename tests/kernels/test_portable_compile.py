"""Every portable kernel compiles for every target without a device, on NVIDIA without spilling."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headway.kernels import compile as aot

pytest.importorskip("triton")

from headway.kernels.portable.cases import CASES

#: Bytes of shared memory a program may have.
SHARED = {
    "sm80": 163 << 10,
    "sm90": 227 << 10,
    "sm100": 227 << 10,
    "sm120": 99 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
    "gfx1100": 64 << 10,
}

#: Tiles that spill some bytes and are still the fastest measured (benchmarks/results/h200).
SPILLS = {
    ("sm90", label)
    for label in (
        "prefill 112",
        "prefill 128",
        "prefill 128 float16",
        "prefill 128 window",
        "prefill 128 chunk softcap",
        "prefill 128 full",
        "mla 128 heads",
        "mla qv",
    )
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles nothing"),
]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_case_compiles(target: str) -> None:
    found = aot.compile_cases(((case, target) for case in CASES), processes=2)
    reports = [report for several in found for report in several]
    assert reports
    failed = [f"{r.label}: {r.kernel}: {r.error[:300]}" for r in reports if r.error]
    assert not failed, "\n".join(failed)
    heavy = [f"{r.label}: {r.shared_bytes} B" for r in reports if r.shared_bytes > SHARED[target]]
    assert not heavy, "\n".join(heavy)
    if target.startswith("sm"):
        spilled = {(target, r.label): r.spill_bytes for r in reports if r.spill_bytes}
        assert set(spilled) <= SPILLS, spilled


def test_a_launch_is_recorded_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_TARGET", "sm90")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    decode = next(case for case in CASES if case.label == "decode 128")
    with aot.record_launches() as launches:
        decode.launch()
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["schedule_kernel", "attention_kernel", "combine_kernel"]
    combine = launches[-1]
    compiled = aot.compile_launch(combine, "sm90")
    registers, spilled = aot.resources(compiled)
    assert 0 < registers <= 255
    assert spilled == 0
