"""Requests that endpoints fail at, by fingerprint: several that fail the same one speak against it.

Rules:
    1. A fingerprint is a hash of the body; the prompt itself is never kept.
    2. A request is *poison* once two endpoints failed at it, within one request or in several of the same
       body (a client that retries). What an endpoint fails at alone is its own fault until then.
    3. An answer to it takes that back, and lays the failures at the doors of the endpoints that failed.
    4. At most `MAX_SUSPECTS` are remembered, each for `MEMORY_S` after its last failure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from extproc.values.evidence import FailureKind
from metadata_center.types import EndpointKey

MAX_SUSPECTS: Final = 4096
"""More different bodies than one client fails with in `MEMORY_S` at one a tenth of a second; 1 MB or so."""

MEMORY_S: Final = 300.0
"""Clients retry within seconds to minutes; an engine repaired meanwhile is tried again after this."""

_MOST_ENDPOINTS: Final = 4
"""Two are proof; a few more can be blamed if it turns out not to be poison."""


@dataclass(slots=True)
class _Suspect:
    until_s: float = 0.0
    failed: dict[EndpointKey, FailureKind] = field(default_factory=dict)


class Poison:
    """Fingerprints of requests that failed. Pure; owned by one event loop."""

    def __init__(self) -> None:
        self._suspects: OrderedDict[int, _Suspect] = OrderedDict()

    def __len__(self) -> int:
        """How many are remembered, poison or not yet."""
        return len(self._suspects)

    def is_poison(self, fingerprint: int, now_s: float) -> bool:
        """True if several endpoints failed at it."""
        suspect = self._suspects.get(fingerprint)
        return suspect is not None and suspect.until_s > now_s and len(suspect.failed) > 1

    def failed(
        self, fingerprint: int, at: Mapping[EndpointKey, FailureKind], now_s: float
    ) -> dict[EndpointKey, FailureKind] | None:
        """A request failed for good, at these endpoints.

        Returns:
            None if it is not (yet) poison: the failure counts. Else the endpoints whose earlier failure
            was counted and does not count any more; usually none.
        """
        suspect = self._suspects.pop(fingerprint, None)
        if suspect is None or suspect.until_s <= now_s:
            suspect = _Suspect()
        while len(self._suspects) >= MAX_SUSPECTS:
            self._suspects.popitem(last=False)
        self._suspects[fingerprint] = suspect
        suspect.until_s = now_s + MEMORY_S
        before = dict(suspect.failed)
        for key, kind in at.items():
            if len(suspect.failed) < _MOST_ENDPOINTS:
                suspect.failed.setdefault(key, kind)
        if len(suspect.failed) < 2:
            return None
        return before if len(before) == 1 else {}

    def answered(self, fingerprint: int, now_s: float) -> dict[EndpointKey, FailureKind]:
        """An endpoint answered it: forgotten; returns the endpoints that are to blame after all."""
        if not self._suspects:
            return {}
        suspect = self._suspects.pop(fingerprint, None)
        if suspect is None or suspect.until_s <= now_s or len(suspect.failed) < 2:
            return {}
        return suspect.failed
