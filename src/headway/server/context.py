"""What the endpoints of one server share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from headway.errors import InvalidInputError
from headway.server.async_engine import AsyncEngine
from headway.server.logprobs import TokenTexts
from headway.server.metrics import Metrics


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server.

    Args:
        served_model_names: names clients may use for the model; empty: the engine's own.
        api_key: when set, every path but /health wants ``Authorization: Bearer KEY``.
    """

    served_model_names: tuple[str, ...] = ()
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise InvalidInputError("api_key", "an empty string", "a key, or None for open access")


class Traffic:
    """Counts the generation requests inside, and closes the door when the server drains."""

    def __init__(self) -> None:
        self.active = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        self.active += 1
        self._idle.clear()

    def leave(self) -> None:
        self.active -= 1
        if self.active == 0:
            self._idle.set()

    async def until_idle(self, timeout: float) -> bool:
        """Whether the last request left within ``timeout`` seconds."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True


@dataclass(frozen=True)
class ServerContext:
    """The parts of a running server."""

    engine: AsyncEngine
    settings: ServerSettings
    metrics: Metrics
    texts: TokenTexts
    created: int  # when the server started, seconds since the epoch
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.settings.served_model_names or (self.engine.engine.model_name,)

    async def drain(self, timeout: float) -> bool:
        """Refuse new work, let running requests finish, and cancel those left after ``timeout`` seconds.

        Returns whether all finished by themselves.
        """
        self.traffic.draining = True
        finished = await self.traffic.until_idle(timeout)
        if not finished:
            self.engine.cancel_all()
        return finished
