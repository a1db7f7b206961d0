"""What is made of a configuration beside the event loop, before it comes into force."""

from __future__ import annotations

from typing import Final, Protocol

from extproc.config.schema import Config
from extproc.request.rules import RuleTable

MANY_MODELS: Final = 100
"""Rules of more are compiled in a thread; of these it takes some 3 ms."""


class Preparation(Protocol):
    """Makes something."""

    def is_needed(self, config: Config) -> bool:
        """Whether there is something to be made that would hold up requests."""

    def prepare(self, config: Config) -> None:
        """Make it; blocks, and may run in a thread of its own."""


class CompiledRules:
    """Rules of the last two configurations that had many; a `Preparation`.

    One is made while the one before waits for Envoy to come into force.
    """

    def __init__(self) -> None:
        self._made: tuple[tuple[Config, RuleTable], ...] = ()

    def is_needed(self, config: Config) -> bool:
        """See `Preparation`."""
        return len(config.models) > MANY_MODELS

    def prepare(self, config: Config) -> None:
        """See `Preparation`."""
        self._made = (*self._made[-1:], (config, RuleTable(config.rules())))

    def of(self, config: Config) -> RuleTable:
        """The rules of a configuration: as they were prepared, or made now."""
        made = next((table for known, table in self._made if known is config), None)
        return RuleTable(config.rules()) if made is None else made
