"""Says which changed settings a reload does not bring into force."""

from __future__ import annotations

import logging

from extproc.config.schema import Config
from extproc.config.taking_effect import Effect, out_of_reach

_log = logging.getLogger("tokenway.configuration")

_TO_DO = {
    Effect.RESTART: "restart Tokenway",
    Effect.BOOTSTRAP: "tokenway bootstrap, then restart Envoy with it",
}


class PendingSettings:
    """Compares each configuration with that of the start.

    Args:
        start: What the processes were made from.
    """

    def __init__(self, start: Config) -> None:
        self._start = start
        self._logged: dict[Effect, list[str]] = {}

    def follow(self, config: Config) -> None:
        """Warn of what waits, once for each change of it."""
        pending = out_of_reach(self._start, config)
        for effect, names in pending.items():
            if self._logged.get(effect) != names:
                extra = {"settings": names, "do": _TO_DO[effect]}
                _log.warning("changed settings are not in force yet", extra=extra)
        self._logged = pending
