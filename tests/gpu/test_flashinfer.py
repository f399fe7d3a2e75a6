"""FlashInfer under CUDA graphs: planned on the host before each replay, where the package is installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headway import providers
from headway.engine.graphs import CudaRecorder
from headway.serving.flash import FlashAttentionBackend
from tests.providers import replays

DEVICE = torch.device("cuda")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _needs_the_package() -> None:
    absent = providers.get("flashinfer").unavailable(DEVICE)
    if absent is not None:
        pytest.skip(absent)


def backend_for(new: int) -> FlashAttentionBackend:
    backend = FlashAttentionBackend("flashinfer")
    backend.init_cuda_graph_state(replays.limits(new, DEVICE))
    return backend


@pytest.mark.timeout(300)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("new", [1, 4])
@torch.inference_mode()
def test_replays_follow_lengths_and_pages(new: int, known: bool) -> None:
    limits = replays.limits(new, DEVICE)
    step = replays.Recorded(backend_for(new), CudaRecorder(DEVICE), 4, limits, head_dim=128)
    for before in replays.STEPS * 2:
        step.assert_replays(before, known=known)


@pytest.mark.timeout(300)
@torch.inference_mode()
def test_graphs_of_several_sizes_take_turns() -> None:
    backend, record, limits = backend_for(1), CudaRecorder(DEVICE), replays.limits(1, DEVICE)
    steps = {n: replays.Recorded(backend, record, n, limits, head_dim=128) for n in (4, 2, 1)}
    for before in ((33, 7), (120,), (5, 0, 44, 16), (9,), (1, 150), (160, 2, 80, 31)):
        steps[len(before)].assert_replays(before)


@pytest.mark.timeout(300)
@torch.inference_mode()
def test_planning_does_not_overtake_the_device() -> None:
    """A step is planned while the device is busy with what came before; each reads its own plan."""
    limits = replays.limits(1, DEVICE)
    step = replays.Recorded(backend_for(1), CudaRecorder(DEVICE), 4, limits, head_dim=128)
    caches = [t.clone() for pair in step.caches for t in pair]

    def outputs(cycles: int) -> list[Tensor]:
        for cache, was in zip((t for pair in step.caches for t in pair), caches, strict=True):
            cache.copy_(was)
        torch.manual_seed(7)  # of the pages
        outs = []
        for before in replays.STEPS:
            torch.cuda._sleep(cycles)
            if cycles == 0:
                torch.cuda.synchronize()
            outs.append(step.replay(replays.batch(before, 1, DEVICE, known=True)).clone())
        torch.cuda.synchronize()
        return outs

    for quiet, busy in zip(outputs(0), outputs(20_000_000), strict=True):
        assert torch.equal(quiet, busy)
