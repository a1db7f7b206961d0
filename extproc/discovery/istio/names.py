"""Host names among the members of DNS clusters: which addresses they have, asked again and again.

Rules:
    1. Pure: questions go out by `due`, answers come in. A name is asked once at a time.
    2. A name whose look-up fails keeps the addresses that it had.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

INTERVAL_S: Final = 5.0
"""Between an answer and the next question, as for names of the clusters file."""


@dataclass(slots=True)
class _Known:
    due_s: float
    addresses: tuple[str, ...] = ()
    is_asked: bool = False
    is_judged: bool = False


class HostNames:
    """The names in use."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    @property
    def are_judged(self) -> bool:
        """Each name was answered, or failed, once at least."""
        return all(map(self.is_judged, self._known))

    def is_judged(self, name: str) -> bool:
        """It was answered, or failed, once at least."""
        known = self._known.get(name)
        return known is not None and known.is_judged

    def use(self, names: Iterable[str], now_s: float) -> None:
        """These and no others are in use; answers about others are void."""
        used = set(names)
        for name in self._known.keys() - used:
            del self._known[name]
        for name in used - self._known.keys():
            self._known[name] = _Known(now_s)

    def addresses(self, name: str) -> Sequence[str]:
        """The last ones of a name, sorted; empty if it never had any."""
        known = self._known.get(name)
        return () if known is None else known.addresses

    def next_s(self) -> float | None:
        """When a question is due; None if none will be by itself."""
        return min((known.due_s for known in self._known.values() if not known.is_asked), default=None)

    def due(self, now_s: float) -> list[str]:
        """Names to look up now; each is to be `answered`."""
        names = [name for name, known in self._known.items() if not known.is_asked and now_s >= known.due_s]
        for name in names:
            self._known[name].is_asked = True
        return names

    def answered(self, name: str, addresses: Iterable[str], now_s: float) -> bool:
        """A look-up ended: with addresses, or with none if it failed. True if that says anything new."""
        known = self._known.get(name)
        if known is None:
            return False
        is_first, found = not known.is_judged, tuple(sorted(set(addresses)))
        known.is_asked, known.is_judged, known.due_s = False, True, now_s + INTERVAL_S
        if not found or found == known.addresses:
            return is_first
        known.addresses = found
        return True
