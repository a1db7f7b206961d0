"""What a source of endpoints with a connection of its own offers, whatever control plane is behind it.

Rules:
    1. A source reports what it lists by a callback that it is made with: `Report`. What it listed last
       stays while its control plane is away.
    2. It connects, and connects again, by itself; it never raises for a control plane that is away.
    3. Its age is the time since it was last known to have all that its control plane lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from extproc.config.schema import Config
from extproc.discovery.listed import Listed

Report = Callable[[Mapping[str, Sequence[Listed] | None]], None]
"""Says what some clusters have now, as `Fleet.update` takes it: None takes a cluster away."""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """How a source stands with its control plane.

    Attributes:
        is_connected: It hears of changes as they happen.
        age_s: Since it was last known to be in sync, 0 while it is; since its start if it never was.
        updates: Times so far that it listed other endpoints than before.
        rejects: Words of its control plane so far that could not be used, and changed nothing.
    """

    is_connected: bool
    age_s: float
    updates: int = 0
    rejects: int = 0


class LiveSource(Protocol):
    """A source; owned by one event loop."""

    @property
    def name(self) -> str:
        """What the fleet, the log and the metrics call it."""

    def follow(self, config: Config) -> None:
        """A configuration is in force: its rules may name other clusters. Neither awaits nor fails."""

    def foresee(self, config: Config | None) -> None:
        """This configuration is to come into force, or none is any more; else as `follow`, which ends it."""

    def is_heard(self) -> bool:
        """The fleet has what its control plane lists of clusters that are only foreseen."""

    async def start(self) -> None:
        """Begin; returns at once."""

    async def first_state(self) -> None:
        """Return when it has listed all that its control plane lists for the first time."""

    async def stop(self) -> None:
        """End; what was listed stays. Idempotent, harmless before `start`."""

    def status(self) -> SourceStatus:
        """Now."""
