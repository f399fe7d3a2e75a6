"""Ask a running server one question through the openai client, and stream its answer.

script/ask.py --url http://127.0.0.1:8000 [--pid SERVER] "question"
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import urllib.request
from pathlib import Path

import openai

START_UP_LIMIT_S = 300.0


def wait_until_ready(url: str, pid: int | None) -> float:
    """Seconds until /health answers; SystemExit if the server dies or takes too long."""
    start = time.monotonic()
    while time.monotonic() - start < START_UP_LIMIT_S:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return time.monotonic() - start
        except OSError:  # nothing listens yet, or it is not ready: 503
            pass
        if pid is not None and not _alive(pid):
            sys.exit(f"the server (process {pid}) ended before it was ready")
        time.sleep(0.2)
    sys.exit(f"{url} was not ready after {START_UP_LIMIT_S:.0f} s")


def _alive(pid: int) -> bool:
    """Whether the process still runs; one that ended but was not waited for yet does not."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        return "State:\tZ" not in status.read_text()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, help="the server's process: give up if it ends")
    parser.add_argument("--max-tokens", type=int, default=120)
    arguments = parser.parse_args()
    seconds = wait_until_ready(arguments.url, arguments.pid)
    client = openai.OpenAI(base_url=f"{arguments.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    print(f"{model} ready after {seconds:.1f} s\n\n> {arguments.question}\n")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": arguments.question}],
        max_tokens=arguments.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    start = time.monotonic()
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
    elapsed = time.monotonic() - start
    assert usage is not None, "the stream carried no usage"
    rate = usage.completion_tokens / elapsed
    print(f"\n\n{usage.completion_tokens} tokens in {elapsed:.1f} s ({rate:.0f} tok/s)")


if __name__ == "__main__":
    main()
