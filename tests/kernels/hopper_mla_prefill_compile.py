"""Compiles float8 MLA prefill for Hopper and prints what its machine code is like, as JSON. Needs no GPU.

A program of its own because the tests run Triton's interpreter, which a process chooses once.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import torch

from headway.kernels.compile import stand_in
from headway.kernels.portable.cases import quantised_prefill
from tests.kernels.assembler import Assembled, assembled
from tests.kernels.hopper_forward_compile import inner_loops

#: wgmma of an iteration: 192 / 32 for QK, 128 / 32 for PV.
PRODUCTS = 10


def measure(kernel: Assembled) -> dict[str, Any]:
    loops = []
    for body in inner_loops(kernel.sass(), "QGMMA", PRODUCTS):
        waits = [i for i, line in enumerate(body) if "WARPGROUP.DEPBAR" in line]
        exponentials = [i for i, line in enumerate(body) if "MUFU.EX2" in line]
        names = Counter(
            line.split()[1 if line.startswith("@") else 0].split(".")[0] for line in body
        )
        if names["QGMMA"] > PRODUCTS:
            continue  # a wait for a barrier, out of line, jumps back over more than a loop
        loops.append(
            {
                "instructions": len(body),
                "counts": names,
                "softmax_beside_pv": len(waits) == 2
                and all(waits[0] < i < waits[1] for i in exponentials),
            }
        )
    return {
        "serialised": kernel.serialised,
        "shared_bytes": kernel.shared_bytes,
        "loops": loops,
    }


def stored() -> None:
    """Inputs that are float8 already, and one scale for each."""
    from headway import mla
    from headway.kernels.portable.cases import _int32, _meta, _work

    q, k, v = (
        _meta(n, 16, w, dtype=torch.float8_e4m3fn)
        for n, w in ((3000, 192), (5000, 192), (5000, 128))
    )
    scales = dict.fromkeys(("q_scale", "k_scale", "v_scale"), _meta(1, dtype=torch.float32))
    mla.prefill(q, k, v, _int32(3), _int32(3), plan=_work(16), backend="hopper", **scales)


def measure_all() -> dict[str, Any]:
    found = {}
    for name, launch in (("cast here", lambda: quantised_prefill("hopper")), ("stored", stored)):
        with stand_in("sm90") as launches:
            launch()
        kernel = next(x for x in launches if x.name == "mla_prefill_kernel").kernel
        found[name] = measure(assembled(kernel))
    return found


if __name__ == "__main__":
    print(json.dumps(measure_all()))
