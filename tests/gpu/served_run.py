"""Prints what the first steps of a service compile that Triton's cache does not hold yet."""

from __future__ import annotations

import json
import sys
from typing import Any

from triton import knobs

from headway.engine.config import EngineConfig
from headway.engine.llm import LLM
from tests.engine.recorded_run import serve

hits: list[str] = []
misses: list[str] = []


def listen(*, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
    if cache_hit:
        hits.append(src.name)
        return
    shown = {"signature": src.signature, "attrs": src.attrs, "constants": src.constants}
    misses.append(f"{src.name}, {metadata['hash']}: {shown}")


if __name__ == "__main__":
    knobs.compilation.listener = listen
    serve(LLM(EngineConfig(**json.loads(sys.argv[1]))))
    print(json.dumps({"hits": sorted(set(hits)), "misses": misses}))
