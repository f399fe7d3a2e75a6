"""Every kernel compiles for every target without a device; on NVIDIA none keeps registers in memory.

The compiler runs in processes of its own, as ``headway compile`` starts them: kernels of this one may be
interpreted.
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")

from headway import cli, precompile
from headway.errors import HeadwayError, InvalidInputError
from headway.kernels.compile import TARGETS, Case, Report
from headway.kernels.portable import tiles

KERNELS = Path(precompile.__file__).parent / "kernels"


def headway_compile(
    folder: Path, cache: Path, *arguments: str, json_name: str = "compiled.json"
) -> subprocess.Popen[str]:
    """``headway compile``, started; its table goes to ``folder``/``json_name``."""
    command = [sys.executable, "-m", "headway", "compile", "--json", str(folder / json_name)]
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        [*command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["results"]


# --- what is compiled by default ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All kernels for all targets, from a cold cache, in two processes."""
    folder = tmp_path_factory.mktemp("compile")
    targets = [word for name in TARGETS for word in ("--target", name)]
    every = ["--every"] if os.environ.get("HEADWAY_TEST_EXHAUSTIVE") else []
    run = headway_compile(folder, folder / "cache", *targets, *every, "--jobs", "2")
    table, errors = run.communicate()
    print(table)
    assert run.returncode == 0, errors[-4000:]
    return results(folder / "compiled.json")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_kernel_there_is_compiles_for_every_target(compiled: list[dict[str, Any]]) -> None:
    for target in TARGETS:
        families = ["portable", "hopper"] if target == "sm90" else ["portable"]
        there_are = {name for family in families for name in kernels_in(KERNELS / family)}
        names = {row["kernel"] for row in compiled if row["target"] == target}
        assert names >= there_are, f"{target}: {sorted(there_are - names)} are not compiled"
        assert not [row for row in compiled if row["target"] == target and "error" in row]


def kernels_in(folder: Path) -> set[str]:
    """The names of the functions that are launched: jit functions called something_kernel."""
    found = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_kernel = isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
            if is_kernel and node.decorator_list:
                found.add(node.name)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_spills_on_nvidia(compiled: list[dict[str, Any]]) -> None:
    # Hopper's own kernels have a test that knows which numbers they may keep in memory, and where.
    rows = [row for row in compiled if TARGETS[row["target"]].is_nvidia]
    spilled = [row for row in rows if row["spill_bytes"] and "hopper" not in row["label"]]
    assert not spilled


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target", TARGETS)
def test_the_default_covers_every_tile(compiled: list[dict[str, Any]], target: str) -> None:
    rows = [row for row in compiled if row["target"] == target]
    used = {row["tile"] for row in rows if row["kernel"] == "attention_kernel"}
    assert used >= tiles_of(target)


def tiles_of(arch: str) -> set[str]:
    """The tiles that some call on this architecture gets, as the table of ``headway compile`` has them."""
    widths = {"forward": (64, 128, 192, 256), "decode": (64, 128, 256), "mla": (1024,)}
    found = [
        tiles.tile_for(op, arch, dim, rows, itemsize, cache_bytes)  # type: ignore[arg-type]
        for op, dims in widths.items()
        for dim, rows, itemsize, cache_bytes in itertools.product(
            dims, (16, 32, 64), (1, 2), (1 << 20, 1 << 26, 1 << 40)
        )
    ]
    return {f"{t.block_m}x{t.block_n} {t.num_warps}w {t.num_stages}s" for t in found}


# --- the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The configuration of a small model; there are no weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=32,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_at_once_share_a_cache(tmp_path: Path, model: str) -> None:
    """Both succeed with the same code; what they leave is whole, so that a third compiles nothing."""
    cache = tmp_path / "cache"
    start = functools.partial(headway_compile, tmp_path, cache, "--model", model, "--jobs", "1")
    at_once = [start("--target", "gfx942", json_name=f"{n}.json") for n in (0, 1)]
    for run in at_once:
        _, errors = run.communicate()
        assert run.returncode == 0, errors
    first, second = (results(tmp_path / f"{n}.json") for n in (0, 1))
    assert without_times(first) == without_times(second)
    files = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    assert not [path for path in files if ".tmp" in path.name or "pid_" in path.name]
    for path, content in files.items():
        if path.suffix == ".json":
            json.loads(content)
    third = start("--target", "gfx942", json_name="3.json")
    _, errors = third.communicate()
    assert third.returncode == 0, errors
    assert without_times(results(tmp_path / "3.json")) == without_times(first)
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == files
    # So does the engine, which runs on meta tensors here, in a process that finds the cache.
    served = json.dumps(("gfx942", {"model": model, "kv_cache_tokens": 2000}))
    command = [sys.executable, "-m", "tests.engine.recorded_run", "looked-up", served]
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    assert set(found["names"]) >= {"attention_kernel", "store_kernel", "norm_kernel"}
    assert found["missing"] == []


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_what_a_model_needs_is_known_from_its_configuration(model: str) -> None:
    from headway.engine.config import EngineConfig

    labels = [case.label for case in precompile.model_cases(EngineConfig(model=model))]
    few = ["2 new tokens", "3 to 4 new tokens", "5 to 8 new tokens", "9 to 16 new tokens"]
    steps = ["decode", *few, "17 to 32 new tokens", "write"]
    blocks = ["norms 256", "gates 512 silu", "greedy"]
    assert labels == [*steps, *blocks]


def test_what_says_how_a_model_is_served_needs_one(model: str) -> None:
    for words, reason in (
        (["--page-size", "64"], "page_size: got 64; want --model beside it"),
        (["--every", "--model", model], "every: got with --model"),
        (["--attention-backend", "fa3", "--model", model], "bring kernels of their own"),
    ):
        run = CliRunner().invoke(cli.app, ["compile", "--target", "sm90", *words])
        assert isinstance(run.exception, InvalidInputError)
        assert reason in str(run.exception)


def test_an_unknown_target_is_a_mistake_that_names_those_there_are() -> None:
    with pytest.raises(HeadwayError, match=r"sm89.*sm90"):
        precompile.check_targets(["sm90", "sm89"])


def raises() -> None:
    raise RuntimeError("this launcher is broken")


def launches_nothing() -> None:
    pass


def test_a_failure_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (Case("broken", raises), Case("empty", launches_nothing))
    monkeypatch.setattr(precompile, "default_cases", lambda every: cases)
    run = CliRunner().invoke(cli.app, ["compile", "--target", "sm90", "--jobs", "1"])
    assert run.exit_code == 1
    assert "2 failed" in run.output
    assert "this launcher is broken" in run.output
    assert "launched no kernel" in run.output


def test_too_much_shared_memory_is_a_failure() -> None:
    fits, not_quite = (Report("a", "k", "sm120", shared_bytes=n << 10) for n in (99, 100))
    assert fits.failure is None
    assert not_quite.failure is not None
    assert "102400" in not_quite.failure
