"""Compiling for Hopper, with what NVIDIA's assembler says of a kernel while Triton runs it."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Assembled:
    """A compiled kernel, and the assembler's log of it."""

    kernel: Any
    log: str

    @property
    def shared_bytes(self) -> int:
        return self.kernel.metadata.shared

    @property
    def serialised(self) -> list[str]:
        """The warnings that wgmma is serialised."""
        return sorted(set(re.findall(r"C75\d\d", self.log)))

    @property
    def spilled_bytes(self) -> int:
        return sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", self.log))

    def sass(self) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            return _said(TOOLS / "cuobjdump", "--dump-sass", file.name)


def compile_for_hopper(source: Any, **options: Any) -> Assembled:
    """Compile Triton's or Gluon's source of a kernel for sm90."""
    said = io.StringIO()
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return assembled(kernel, said.getvalue())


def assembled(kernel: Any, log: str = "") -> Assembled:
    """A kernel with its log; one that comes from Triton's cache has none, and is assembled once more."""
    if "ptxas info" in log:
        return Assembled(kernel, log)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(kernel.asm["ptx"])
        log = _said(get_ptxas(90).path, "-v", "--gpu-name=sm_90a", ptx, "-o", cubin)
    return Assembled(kernel, log)


def _said(*command: str | Path) -> str:
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return run.stdout + run.stderr
