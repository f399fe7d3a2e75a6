"""What cannot run is said before weights are read."""

from __future__ import annotations

from headway import dispatch, environ
from headway.engine import describe
from headway.engine.config import EngineConfig

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
