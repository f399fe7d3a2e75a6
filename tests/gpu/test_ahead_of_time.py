"""After ``headway compile`` the engine's first steps on the GPU compile no kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from headway import devices
from headway.kernels.compile import TARGETS
from tests.engine.test_rehearsal import HOPPER, MORE, SERVED, Served, save_config

HERE = devices.of(torch.device("cuda")).kind
#: What Triton builds on the host, for the Python that runs there, when a kernel is first started.
BUILT_THERE = ("__triton_launcher", "cuda_utils")
#: One by default, and short sequences: compiling takes all the time.
EXHAUSTIVE = bool(os.environ.get("HEADWAY_TEST_EXHAUSTIVE"))
ALL = {name: one for name, one in (SERVED | MORE).items() if one.target == HERE}
if not EXHAUSTIVE:
    ALL = {name: ALL[name] for name in ("dense",) if name in ALL}
SIZES = {"max_running_requests": 20} | ({} if EXHAUSTIVE else {"max_model_len": 128})
if HERE not in TARGETS:
    pytest.skip(f"nothing is compiled ahead of time for {HERE}", allow_module_level=True)


def run(cache: Path, *words: str) -> str:
    """The output of a process whose kernels are kept in a cache of its own."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings of the engine as they are given on the command line."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    return words


def kernels(cache: Path) -> set[Path]:
    """The files of compiled kernels in a cache."""
    files = {path for path in cache.rglob("*") if path.is_file()}
    return {path for path in files if not path.name.startswith(BUILT_THERE)}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ALL)
def test_the_first_steps_compile_no_kernel(name: str, tmp_path: Path) -> None:
    served: Served = ALL[name]
    model = str(save_config(served.model, tmp_path))
    cache = tmp_path / "cache"
    sizes = SIZES | served.settings
    words = ("--model", model, "--target", HERE, "--jobs", "4", *flags(sizes))
    run(cache, "headway", "compile", *words)
    before = kernels(cache)
    settings = {"model": model, "load_format": "dummy", "kv_cache_tokens": 20000, "device": "cuda"}
    output = run(cache, "tests.gpu.served_run", json.dumps(settings | sizes))
    seen = json.loads(output.splitlines()[-1])
    assert set(seen["hits"]) >= (served.kernels if EXHAUSTIVE else served.kernels & HOPPER)
    assert seen["misses"] == []
    assert kernels(cache) == before
