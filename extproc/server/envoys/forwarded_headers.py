"""Warns of rules that match headers which Envoy, set up before them, does not forward."""

from __future__ import annotations

import logging

from extproc.config.schema import Config
from extproc.server.envoys.bootstrap import template, withheld

_log = logging.getLogger("tokenway.worker")


class ForwardedHeaders:
    """Remembers all headers that rules ever matched; those of the start are in Envoy's bootstrap."""

    def __init__(self) -> None:
        self._names: frozenset[str] | None = None

    def follow(self, config: Config) -> None:
        """Warn of those that came."""
        names = config.rule_headers()
        known = names if self._names is None else self._names
        self._names = names | known
        added = names - known
        withheld_headers = withheld(template(), added) if added else []
        if withheld_headers:
            extra = {"names": withheld_headers, "do": "tokenway bootstrap, then restart Envoy with it"}
            _log.warning("new rules match what Envoy may not forward", extra=extra)
