"""Endpoints left out of the choice for a model: those that fail more than their peers, or do not have it.

Rules 4 to 7 of `tracker` are kept here. Doubts are kept by model: the usual question, whether an endpoint is
doubted for this one, is a look-up that finds nothing.
"""

from __future__ import annotations

from typing import Final

from extproc.health.levels import MAX_MISS_S, MEMORY_S, MISS_S, TRIAL_S, Level
from extproc.health.records import ROUNDING, Record, Records
from extproc.health.states import HealthState
from extproc.values.evidence import FailureKind
from metadata_center.types import EndpointKey

MAX_MODELS: Final = 256
"""Models whose failures one endpoint remembers; the one not heard of for longest goes first."""

_DOUBT: Final = 0.25
"""Fast share above the peers' that doubts: one failure where they have none; two that may be the client's."""

_TRUST: Final = 0.125
"""And below which the doubt is over: half of it, so that one answer does not change it to and fro."""

_SLOW_RATIO: Final = 1.5
"""The slow share must exceed the peers' this many times: if a client breaks half of all requests by itself,
shares of 0.5 scatter by 0.08, and of a hundred endpoints none is doubted for that."""

_SLOW_MARGIN: Final = 0.03
"""And by this: less than one failure, or two that may be the client's."""

_ALONE_RATIO: Final = 4.0
"""For an ejection it must exceed that of all peers, doubted ones included, this many times: three failures in
a row against peers of which none failed lately. A client that breaks half of all requests by itself lets one
endpoint look so in its first moments at most."""

_WELL: Final = 0.1
"""A peer below this share, and not failing now, is well: nine successes after three failures."""

_MISSES_IN_A_ROW: Final = 3
"""Of an endpoint that answered for the model within `MEMORY_S`: one 404 may be about something else that the
request names (a stored response), and clients can name anything."""


class Doubts:
    """The doubts of one tracker.

    Args:
        records: The endpoints.

    Attributes:
        by_model: Endpoints doubted for each model; no model without any.
    """

    __slots__ = ("_records", "by_model")

    def __init__(self, records: Records) -> None:
        self._records = records
        self.by_model: dict[str, set[EndpointKey]] = {}

    def level(self, key: EndpointKey, record: Record, model: str, now_s: float) -> Level:
        """How an endpoint does for `model`; blank if it was not heard of lately."""
        levels = record.levels
        level = levels.get(model)
        if level is None:
            if len(levels) >= MAX_MODELS:
                oldest = min(levels, key=lambda name: levels[name].heard_s)
                self.trust(key, oldest)
                del levels[oldest]
            level = levels[model] = Level()
        elif level.doubted is None and now_s - level.heard_s > MEMORY_S:
            level = levels[model] = Level()
        return level

    def missed(self, key: EndpointKey, level: Level, model: str, now_s: float) -> None:
        """An endpoint answered that it does not have `model`."""
        level.misses += 1
        level.heard_s = now_s
        if level.doubted is FailureKind.MISSING_MODEL:
            level.end_trial(now_s, MISS_S, MAX_MISS_S)
            return
        answers = level.good_s is not None and now_s - level.good_s <= MEMORY_S
        if answers and level.misses < _MISSES_IN_A_ROW:
            return
        level.doubt(FailureKind.MISSING_MODEL, now_s, MISS_S)
        self._began(key, model)

    def forget_misses(self, key: EndpointKey) -> None:
        """Whatever models an endpoint did not have, it is asked for again."""
        record = self._records.by_key[key]
        for model, level in record.levels.items():
            if level.doubted is FailureKind.MISSING_MODEL:
                level.misses = 0
                self.trust(key, model)

    def review(
        self, key: EndpointKey, record: Record, model: str, now_s: float, kind: FailureKind | None = None
    ) -> None:
        """Doubt, or trust again, the endpoints of these clusters that the newest answer says something about.

        Args:
            key: Whose answer it was.
            record: Its record.
            model: What was asked for.
            now_s: The time.
            kind: How it failed; None if it did not.
        """
        level = record.levels[model]
        if kind is not None and level.doubted is None and record.state is HealthState.HEALTHY:
            company, fast, slow = self._peers(key, record, model, now_s)
            if (
                company
                and level.fast - fast >= _DOUBT - ROUNDING
                and level.slow >= _SLOW_RATIO * slow + _SLOW_MARGIN
            ):
                level.doubt(kind, now_s, TRIAL_S)
                self._began(key, model)
        for other in tuple(self.by_model.get(model, ())):
            peer = self._records.by_key[other]
            known = peer.levels[model]
            if known.doubted is FailureKind.MISSING_MODEL:
                if other == key and known.good_s == now_s:
                    self.trust(other, model)
            elif peer.clusters & record.clusters:
                _, fast, _ = self._peers(other, peer, model, now_s)
                if known.fast - fast < _TRUST:
                    self.trust(other, model)

    def is_alone(self, key: EndpointKey, record: Record, level: Level, model: str, now_s: float) -> bool:
        """Nothing else it was asked succeeded since it began to fail, and its peers are well meanwhile."""
        began_s = level.bad_s
        if began_s is None or any(
            other.good_s is not None and other.good_s > began_s for other in record.levels.values()
        ):
            return False
        heard, slow, is_anybody_well = 0, 0.0, False
        for _, peer in self._records.others(key, record):
            known = peer.levels.get(model)
            if (
                known is None
                or peer.state is not HealthState.HEALTHY
                or known.doubted is FailureKind.MISSING_MODEL
                or now_s - known.heard_s > MEMORY_S
            ):
                continue
            heard += 1
            slow += known.slow
            if known.good_s is not None:
                is_well = known.bad_s is None and known.fast < _WELL and now_s - known.good_s <= MEMORY_S
                is_anybody_well |= is_well or known.good_s >= began_s
        return is_anybody_well and level.slow >= _ALONE_RATIO * slow / heard

    def trust(self, key: EndpointKey, model: str) -> None:
        """An endpoint is doubted no more for `model`, if it was."""
        keys = self.by_model.get(model)
        self._records.by_key[key].levels[model].doubted = None
        if keys is not None and key in keys:
            keys.remove(key)
            if not keys:
                del self.by_model[model]
            self._records.changed(self._records.by_key[key].clusters)

    def _began(self, key: EndpointKey, model: str) -> None:
        self.by_model.setdefault(model, set()).add(key)
        self._records.changed(self._records.by_key[key].clusters)

    def _peers(self, key: EndpointKey, record: Record, model: str, now_s: float) -> tuple[bool, float, float]:
        """Whether there is anybody else to choose, and the mean shares of those that were heard lately."""
        company, heard, fast, slow = False, 0, 0.0, 0.0
        doubted = self.by_model.get(model, ())
        for other, peer in self._records.others(key, record):
            if peer.state is not HealthState.HEALTHY or other in doubted:
                continue
            company = True
            level = peer.levels.get(model)
            if level is not None and now_s - level.heard_s <= MEMORY_S:
                heard += 1
                fast += level.fast
                slow += level.slow
        return company, fast / max(1, heard), slow / max(1, heard)
