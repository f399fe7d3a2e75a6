"""The command line: help at once, flags that follow the settings, mistakes without tracebacks."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

from headway import cli, flags, providers
from headway.bench.serving import LoadSettings
from headway.engine.config import EngineConfig
from headway.errors import InvalidInputError
from tests.server.live import serving
from tests.server.stand_in import EchoEngine
from tests.stand_ins import installed

HEAVY = ("torch", "transformers", "fastapi", "triton", "numba", "matplotlib")


def headway(*words: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headway", *words],
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )  # type: ignore[call-overload]


def test_compiling_says_in_a_log_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from headway import precompile

    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])

    def compile_all(cases, targets, jobs, progress):  # type: ignore[no-untyped-def]
        for done in range(31):
            progress(done, 30, "sm90 forward")
            now[0] += 1.0

    monkeypatch.setattr(precompile, "compile_all", compile_all)
    cli._compile((), ("sm90",), 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"compiling: {done} of 30 kernels" for done in (10, 20, 30)]


@pytest.mark.parametrize("words", [["--help"], ["serve", "-h"], ["bench", "serve", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from headway import cli; sys.argv = ['headway', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        f"finally: print('loaded:', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "loaded: []" in run.stdout


def test_version() -> None:
    assert re.fullmatch(r"headway \d+\.\d+\.\d+\n", headway("--version").stdout)


@pytest.mark.parametrize("command", ["serve", "generate", "bench generate"])
def test_every_engine_setting_is_a_flag(command: str) -> None:
    text = CliRunner().invoke(cli.app, [*command.split(), "--help"]).stdout
    for field in dataclasses.fields(EngineConfig):
        if field.name != "model":
            assert f"--{field.name.replace('_', '-')} " in text, field.name


@pytest.mark.parametrize("settings", [EngineConfig, LoadSettings])
def test_every_setting_is_documented(settings: type) -> None:
    docs = flags.field_docs(settings)
    assert set(docs) == {field.name for field in dataclasses.fields(settings)}


def test_flags_arrive_as_the_settings_they_name() -> None:
    import typer

    got: list[tuple[EngineConfig, int]] = []
    app = typer.Typer()

    @app.command()
    @flags.takes(EngineConfig, "config")
    def command(config: EngineConfig, port: int = 8000) -> None:
        got.append((config, port))

    words = "m --port 1 --page-size 7 --disable-prefix-cache --flash-attn-version 3 --dtype float32"
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
    wanted = EngineConfig(
        "m", page_size=7, disable_prefix_cache=True, flash_attn_version=3, dtype="float32"
    )
    assert got == [(wanted, 1)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("serve ./no/such/model", "model: got ./no/such/model"),
        ("serve m --page-size 0", "--page-size: got 0; want at least 1"),
        ("serve m --host 999.1.1.1", "host, port"),
        ("generate ./no/such/model hello", "model: got"),
        ("generate m hello --top-p 3", "--top-p: got 3.0"),
        ("generate m hello --raw --system x", "--system"),
        ("explain --heads many", "--heads: got 'many'"),
        ("explain --heads 5/3", "q: got 5 heads"),
        ("explain --backend warp", "--backend: got 'warp'"),
        ("explain --window a,b", "--window"),
        ("explain --window 5,3,2", "--window: got '5,3,2'"),
        ("bench serve --url http://127.0.0.1:1", "no server answers"),
        ("bench serve --num-prompts 0", "--num-prompts: got 0"),
        ("bench generate m --batch-sizes 1,x", "--batch-sizes"),
        ("bench generate m --peers tgi", "--peers: got 'tgi'"),
        ("bench generate m --peers vllm", "vllm_python"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["headway", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("headway: ")
    assert message in said
    assert "Traceback" not in said


def test_no_traceback_in_a_process_of_its_own() -> None:
    run = headway("serve", "./no/such/model")
    assert run.returncode == 2
    assert run.stderr.startswith("headway: model: got ./no/such/model; want")
    assert headway("frobnicate").returncode == 2


def test_explain_lists_every_provider_and_marks_the_winner() -> None:
    words = "explain --heads 32/8 --head-dim 128 --page-size 16 --window 100 --device cpu"
    result = CliRunner().invoke(cli.app, words.split())
    assert result.exit_code == 0, result.output
    *rows, why = result.output.splitlines()
    assert [row[3:].split()[0] for row in rows] == list(providers.NAMES)
    assert [row.startswith("-> ") for row in rows].count(True) == 1
    assert why


def test_explain_pins_and_takes_every_feature() -> None:
    words = (
        "explain --device cpu --backend reference --heads 8 --head-dim 192/128 --dtype fp16 --seqlen-q 5 "
        "--page-size 0 --window 7,0 --attention-chunk 0 --softcap 30 --sinks --lse --ver 4 --no-causal"
    )
    result = CliRunner().invoke(cli.app, words.split())
    assert result.exit_code == 0, result.output
    assert "-> reference" in result.output
    assert "pinned by backend=reference" in result.output


def test_explain_knows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_BACKEND", "reference")
    assert "-> reference" in CliRunner().invoke(cli.app, ["explain", "--device", "cpu"]).output
    words = ["explain", "--device", "cpu", "--backend", "cpu"]
    assert "pinned by backend=cpu" in CliRunner().invoke(cli.app, words).output
    monkeypatch.setenv("HEADWAY_BACKEND", "fa9")
    result = CliRunner().invoke(cli.app, ["explain", "--device", "cpu"])
    assert "HEADWAY_BACKEND: got 'fa9'" in str(result.exception)


def test_explain_says_that_a_pinned_provider_cannot_run_the_call() -> None:
    result = CliRunner().invoke(cli.app, ["explain", "--device", "cpu", "--backend", "fa3"])
    assert result.exit_code == 0, result.output
    assert "->" not in result.output
    assert "pinned by backend=fa3, which cannot run this call" in result.output


def test_providers_are_listed() -> None:
    result = CliRunner().invoke(cli.app, ["providers"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in providers.NAMES)
    assert "cpu: yes" in result.output


def test_providers_say_what_is_installed_and_why_it_cannot_run() -> None:
    with installed("sm90", "fa2", "fa3_fwd"):
        result = CliRunner().invoke(cli.app, ["providers"], env={"COLUMNS": "250"})
    rows = {line.split("│")[1].strip(): line for line in result.output.splitlines() if "│" in line}
    assert "fa3-fwd" in rows["fa3"]
    assert "cpu: yes" in rows["fa3"]  # where the stand-ins say that every device is such a GPU
    assert "attention_chunk" in rows["fa3"]
    assert "flash-attn" in rows["fa2"]
    assert "package flash-attn-4 is not" in rows["fa4"]
    assert "Moore Threads" in rows["mate"]


def test_bench_serve_prints_its_table_and_writes_its_reading(tmp_path: Path) -> None:
    path = tmp_path / "reading.json"
    with serving(EchoEngine()) as live:
        words = [
            "bench", "serve", "--url", live.url, "--num-prompts", "8", "--max-concurrency", "4",
            "--random-input-len", "16", "--random-output-len", "8", "--output", str(path),
        ]  # fmt: skip
        result = CliRunner().invoke(cli.app, words, env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    for label in ("Successful requests", "Output token throughput", "TTFT", "TPOT", "ITL"):
        assert label in result.output
    reading = json.loads(path.read_text())
    (row,) = reading["results"]
    assert (row["successful_requests"], row["output_tokens"], row["input_tokens"]) == (8, 64, 128)
    assert reading["settings"]["model"] == "echo"


def test_bench_serve_fails_when_every_request_does() -> None:
    with serving(EchoEngine()) as live:
        run = headway(
            "bench", "serve", "--url", live.url, "--num-prompts", "2", "--num-warmups", "0",
            "--random-input-len", "9999",
        )  # fmt: skip
    assert run.returncode == 2
    assert "all 2 requests failed" in run.stderr
    assert "9999" in run.stderr


def test_messages_spell_the_arguments_that_were_flags_as_flags() -> None:
    error = InvalidInputError("page_size", 0, "1")
    assert flags.as_flag(error, ["m", "--page-size=0"]) == "--page-size: got 0; want 1"
    assert flags.as_flag(error, ["m"]) == "page_size: got 0; want 1"
