"""What cannot run is said before weights are read."""

from __future__ import annotations

import torch

from headway import devices, dispatch, environ
from headway.engine import describe, loader, parallel
from headway.engine.config import EngineConfig
from headway.errors import InvalidInputError

#: A decode step, and one of a prompt.
STEPS = (describe.Step(), describe.Step(seqlen_q=64))


def insist(config: EngineConfig) -> None:
    """See that the attention backend that is asked for runs the model's layers.

    Raises:
        UnsupportedError: it does not, with its reason and the backends that would.
    """
    if config.attention_backend == "auto" and not environ.BACKEND.get():
        return
    probe, dtype = describe.probe_without_weights(config)
    for kind in describe.kinds(probe):
        for step in STEPS:
            dispatch.choose(describe.problem_of(config, kind.layer, dtype, step))


def launch(config: EngineConfig) -> None:
    """Start the processes that share the model, unless this is one of them: ``parallel.launch``.

    Raises:
        InvalidInputError: there are too few GPUs, or the heads cannot be shared by so many.
    """
    size = config.tensor_parallel_size
    if size == 1 or parallel.launched_rank() is not None:
        return
    if devices.choose(config.device).type == "cuda" and torch.cuda.device_count() < size:
        wanted = f"at most {torch.cuda.device_count()}, the GPUs that torch sees here"
        raise InvalidInputError("tensor_parallel_size", size, wanted)
    loader.check_shares(loader.load_config(config, loader.find(config)), size)
    parallel.launch(size)
