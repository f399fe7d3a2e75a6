"""What providers can do, as tables made from their capabilities.

For documentation and for ``headway providers``::

    python -m headway.providers.table          prints the tables of docs/providers.md
    python -m headway.providers.table FILE     writes them between the marks in FILE
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from headway import providers
from headway.problem import KVLayout
from headway.providers.base import Capabilities, Exclusion, Feature, Trait, name_of
from headway.providers.order import ORDERS

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


@dataclass(frozen=True)
class Status:
    """A provider on one device of this machine."""

    provider: str
    package: str  # name and version; empty: none installed, or none needed
    reason: str  # why it cannot be used here; empty: it can
    capabilities: Capabilities | None


def status(device: torch.device) -> list[Status]:
    """Every provider as it stands on a device: installed or not, usable or why not, what it can do."""
    found = []
    for name in providers.NAMES:
        provider = providers.get(name)
        package, reason = provider.package(), provider.unavailable(device)
        can = provider.capabilities(device) if reason is None else None
        if can is not None and device.type not in can.device_types:
            reason, can = f"runs on {', '.join(sorted(can.device_types))}", None
        found.append(Status(name, " ".join(package or ()), reason or "", can))
    return found


def columns() -> list[tuple[str, Capabilities]]:
    """Every provider and kind of device that documentation speaks of, in a fixed order."""
    return [
        (f"{name} ({kind})", can)
        for name in providers.NAMES
        for kind, can in providers.get(name).documented().items()
    ]


# --- markdown -----------------------------------------------------------------------------------------


def tables() -> str:
    """All tables of docs/providers.md."""
    notes = _Notes()
    parts = [_features(notes), _limits(), _order()]
    parts.insert(1, notes.text())
    return "\n\n".join(parts)


class _Notes:
    """Numbered notes: what does not go together, each sentence once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def marks(self, exclusions: Iterable[Exclusion]) -> str:
        numbers = {
            self._numbers.setdefault(f"{e}: {e.why}", len(self._numbers) + 1) for e in exclusions
        }
        return " ".join(f"[{number}]" for number in sorted(numbers))

    def text(self) -> str:
        lines = [f"- [{number}] not {said}" for said, number in self._numbers.items()]
        return "What does not go together:\n\n" + "\n".join(lines)


def _features(notes: _Notes) -> str:
    shown = columns()
    aspects = (*Feature, *KVLayout, *Trait)
    rows = [["", *(title for title, _ in shown)]]
    for aspect in aspects:
        if isinstance(aspect, Trait) and not any(_about(can, aspect) for _, can in shown):
            continue
        cells = [_cell(can, aspect, notes) for _, can in shown]
        rows.append([name_of(aspect), *cells])
    return _markdown(rows)


#: Traits that only calls with this feature can have.
_PART_OF = {
    Trait.WINDOW_RIGHT: Feature.WINDOW,
    Trait.WINDOW_ZERO: Feature.WINDOW,
    Trait.APPEND_RAGGED: Feature.APPEND,
    Trait.APPEND_QUANTISED: Feature.APPEND,
    Trait.ROTARY_SEQLENS: Feature.ROTARY,
    Trait.DESCALES_VARY: Feature.DESCALE,
    Trait.LARGE_SOFTCAP: Feature.SOFTCAP,
}


def _cell(can: Capabilities, aspect: Feature | KVLayout | Trait, notes: _Notes) -> str:
    if isinstance(aspect, Trait) and _PART_OF.get(aspect, Feature.OUT) not in can.features:
        return "no"
    if isinstance(aspect, Feature) and aspect not in can.features:
        return "no"
    if isinstance(aspect, KVLayout) and aspect not in can.kv_layouts:
        return "no"
    about = _about(can, aspect)
    if any(e.aspects == {aspect} and e.dims is None for e in about):
        return f"no {notes.marks(about)}"
    return f"yes {notes.marks(about)}".strip()


def _about(can: Capabilities, aspect: Feature | KVLayout | Trait) -> list[Exclusion]:
    """Exclusions that name an aspect. Each pair stands at the first of its two in the table."""
    order: list[object] = [*Feature, *KVLayout, *Trait]
    return [
        e
        for e in can.exclusions
        if aspect in e.aspects and aspect == min(e.aspects, key=order.index)
    ]


def _limits() -> str:
    rows = [["", "dtypes (q, k / v)", "head dims", "pages", "sinks", "rows behind the last key"]]
    for title, can in columns():
        float8 = can.float8_head_dims
        dims = str(can.head_dims) + ("" if float8 is None else f"; float8: {float8}")
        tails = "must be finite" if can.needs_finite_tails else "anything"
        rows.append([title, _dtypes(can), dims, _pages(can), _sinks(can), tails])
    return _markdown(rows)


def _pages(can: Capabilities) -> str:
    if KVLayout.PAGED not in can.kv_layouts:
        return "no"
    multiple = can.page_size_multiple_of
    sizes = "any size" if multiple == 1 else f"multiples of {multiple}"
    return sizes + (f"; head dims {can.paged_head_dims}" if can.paged_head_dims is not None else "")


def _dtypes(can: Capabilities) -> str:
    if len(can.dtypes) > 12:
        return "any with any"
    pairs = sorted({(_short(q), _short(k)) for q, k in can.dtypes})
    return ", ".join(q if q == k else f"{q} with {k}" for q, k in pairs)


def _sinks(can: Capabilities) -> str:
    if Feature.SINKS not in can.features:
        return "no"
    if can.sink_dtypes is None:
        return "any float"
    return ", ".join(sorted(_short(dtype) for dtype in can.sink_dtypes))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _order() -> str:
    rows = [["device", "work", "tried in this order", "reading"]]
    for row in ORDERS:
        names = [name for name in row.providers if name in providers.NAMES]
        rows.append([", ".join(row.kinds), ", ".join(row.work), ", ".join(names), row.reading])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows
    )
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def written(text: str) -> str:
    """A page with its tables made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        print(tables())
        return
    page = Path(arguments[0])
    page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
