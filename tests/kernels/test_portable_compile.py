"""Every portable kernel compiles for every target without a device, on NVIDIA without spilling."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from headway.kernels import compile as aot

pytest.importorskip("triton")

from headway.kernels.portable.cases import CASES

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
    if target.startswith("sm"):
        spilled = [f"{r.label}: {r.kernel}: {r.spill_bytes} B" for r in reports if r.spill_bytes]
        assert not spilled, "\n".join(spilled)


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
