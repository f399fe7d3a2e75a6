"""Readings: what a benchmark measured, on what, with what; and how readings are shown.

One run is one JSON file. Its ``results`` are flat rows, so that every benchmark's can be put into a table
or a plot by the same few functions:

    {"benchmark": "serve", "date": "2026-11-21T04:00:00+00:00", "command": "headway bench serve ..",
     "commit": "8251ec8..", "device": {"cpu": .., "cores": .., "gpu": ..}, "versions": {"torch": ..},
     "settings": {..what was asked for..}, "results": [{..one row..}, ..]}
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.errors import InvalidInputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = Mapping[str, Any]

_PACKAGES = (
    "headway",
    "torch",
    "triton",
    "numpy",
    "numba",
    "transformers",
    "vllm",
    "sglang",
    "fa3-fwd",
    "flash-attn-4",
    "flashinfer-python",
    "nvidia-cudnn-cu13",
)
_SECRET_FLAGS = ("--api-key",)


@dataclass(frozen=True)
class Reading:
    """One run of one benchmark."""

    benchmark: str
    settings: dict[str, Any]
    results: list[dict[str, Any]]
    device: dict[str, Any] = field(default_factory=lambda: device())
    versions: dict[str, str] = field(default_factory=lambda: versions())
    commit: str | None = field(default_factory=lambda: commit())
    command: str = field(default_factory=lambda: command())
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(
            "T", "seconds"
        )
    )

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Reading:
        """Raises InvalidInputError where the file is no reading."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InvalidInputError("reading", f"{path} ({error})", "a benchmark's JSON") from None


# --- where and with what ------------------------------------------------------------------------------


def device() -> dict[str, Any]:
    """This machine: CPU, cores this process may use, memory, GPUs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": cores}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory_gib"] = round(total / 2**30, 1)
    found["gpu"] = _gpu_names()
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    """By the driver's own tool: asking torch would load it, and take memory on the GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def versions() -> dict[str, str]:
    """Python and the packages that decide the speed, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout this package runs from, ``-dirty`` with changes; None if installed."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return run.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "src")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "") or None


def command() -> str:
    """The command line of this process, without its keys and without the folders of this machine."""
    program = Path(sys.argv[0]).name
    return " ".join(["headway" if program == "__main__.py" else program, *_shown(sys.argv[1:])])


def _shown(words: Iterable[str]) -> list[str]:
    """Words of a command line as anyone may read them. One with spaces in it may be flags of another."""
    shown: list[str] = []
    hide = False
    for word in words:
        flag, has_value, value = word.partition("=")
        if hide:
            word = "***"
        elif " " in word:
            word = " ".join(_shown(word.split(" ")))
        elif has_value and flag in _SECRET_FLAGS:
            word = f"{flag}=***"
        elif word.startswith("/"):
            word = Path(word).name
        elif has_value and value.startswith("/"):
            word = f"{flag}={Path(value).name}"
        hide = word.endswith(_SECRET_FLAGS)
        shown.append(shlex.quote(word) if " " in word else word)
    return shown


# --- showing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A key of the rows, its title (with the unit), and the format of its numbers."""

    key: str
    title: str
    format: str = ""

    def text(self, row: Row) -> str:
        value = row.get(self.key)
        if value is None:
            return "-"
        return format(value, self.format) if isinstance(value, int | float) else str(value)


def console() -> Console:
    """Standard output; a file or a pipe, which has no width, takes a whole table."""
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 160)


def table(rows: Iterable[Row], columns: Sequence[Column], title: str | None = None) -> Table:
    """A table for the terminal. Where that is narrow, lines are broken and nothing is cut off."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column.title, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(column.text(row) for column in columns))
    return made


def markdown(rows: Iterable[Row], columns: Sequence[Column]) -> str:
    """A table for a README."""
    lines = [
        " | ".join(column.title for column in columns),
        " | ".join("---" if i == 0 else "---:" for i in range(len(columns))),
    ]
    lines += [" | ".join(column.text(row) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def plot(
    rows: Iterable[Row],
    *,
    x: str,
    y: str,
    by: str,
    path: Path,
    title: str = "",
    x_title: str | None = None,
    y_title: str | None = None,
    log_x: bool = True,
) -> None:
    """One line per value of ``by``, y over x, as a picture (the suffix of ``path`` says which kind)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(x) is not None and row.get(y) is not None:
            lines.setdefault(str(row.get(by)), []).append((row[x], row[y]))
    for name, points in lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o", label=name)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=x_title or x, ylabel=y_title or y, title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Panel:
    """Rows that share an axis: the key of what is shown, and the axis's title."""

    rows: Sequence[Row]
    value: str
    title: str


def bars(panels: Sequence[Panel], *, label: str, by: str, path: Path) -> None:
    """Groups of horizontal bars, one per value of ``label``, one bar in each per value of ``by``."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(str(row[by]) for panel in panels for row in panel.rows))
    groups = [list(dict.fromkeys(str(row[label]) for row in panel.rows)) for panel in panels]
    height = sum(len(group) for group in groups) * (0.14 * len(names) + 0.12) + 1.2 * len(panels)
    figure = Figure(figsize=(9, height), layout="constrained")
    sizes = [len(group) for group in groups]
    every = figure.subplots(len(panels), squeeze=False, height_ratios=sizes)[:, 0]
    for axes, panel, group in zip(every, panels, groups, strict=True):
        place = {name: i for i, name in enumerate(group)}
        width = 0.84 / len(names)
        for i, name in enumerate(names):
            mine = [row for row in panel.rows if str(row[by]) == name]
            at = [place[str(row[label])] + (i - (len(names) - 1) / 2) * width for row in mine]
            axes.barh(at, [row[panel.value] for row in mine], width, label=name)
        axes.set_yticks(range(len(group)), group, fontsize=7)
        axes.set(xlabel=panel.title, ylim=(len(group) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
    every[0].legend(ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
