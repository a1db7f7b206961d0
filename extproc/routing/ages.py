"""How old each input of a decision is, for its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class Ages:
    """One worker's; its own ledger is always current.

    Args:
        load_age_s: How old the news of other gateways' load is at a given monotonic time.
    """

    def __init__(self, load_age_s: Callable[[float], float]) -> None:
        self._load_age_s = load_age_s
        self._configured_s = 0.0
        self._health_changed_s = 0.0

    def configured(self, now_s: float) -> None:
        """A configuration is in force since now."""
        self._configured_s = now_s
        self._health_changed_s = self._health_changed_s or now_s

    def health_changed(self, now_s: float) -> None:
        """Some endpoint's health is another one since now."""
        self._health_changed_s = now_s

    def of(self, now_s: float) -> Mapping[str, float]:
        """Seconds, by what is meant."""
        return {
            "load": self._load_age_s(now_s),
            "health": now_s - self._health_changed_s,
            "configuration": now_s - self._configured_s,
        }
