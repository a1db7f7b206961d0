"""The books of one worker, shared by who decides and who learns the outcome; no other owner."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from extproc.choosing.snapshots import Engines as EnginesView
from extproc.choosing.teaching import Teaching
from extproc.health.poison import Poison
from extproc.health.states import Transition
from extproc.health.tracker import HealthTracker
from extproc.observing.recorder import Recorder
from extproc.observing.records import RecordRing
from extproc.predicting.predictor import Predictor
from extproc.routing.cache_history import CacheHistory
from extproc.routing.caches import Caches
from extproc.routing.endpoint_stats import EndpointStatsTable
from extproc.routing.engines import Engines
from extproc.routing.homes import Homes
from extproc.routing.inflight import InflightTable
from extproc.routing.stored_responses import StoredResponses
from extproc.values.inflight import Inflight
from metadata_center.history.radix_tree import Run
from metadata_center.store import LoadStore
from metadata_center.types import EndpointKey, RequestId

LINGER_S: Final = 1.0
"""A busy engine's announcement was seen to lag by 0.1 s, and its blocks to be evicted in many seconds."""

MAX_LINGERING: Final = 16_384
"""A second's worth of what a worker can serve, ten times over; beyond it the oldest linger no longer."""


def _tell_nobody(_transition: Transition) -> None:
    """Nobody watches."""


def _share_nothing(_endpoint: EndpointKey, _blocks: list[int]) -> None:
    """A gateway of one worker has nobody to tell."""


def _alone() -> int:
    """Nobody else places requests here."""
    return 1


def _nobody_asks(_request: Inflight, _now_s: float) -> None:
    """Nobody wants to know of lost requests."""


def _nobody_waits() -> None:
    """Requests are placed at once."""


def _always_current(_now_s: float) -> float:
    """Nobody else's load counts."""
    return 0.0


@dataclass(slots=True)
class State:
    """Everything a worker knows.

    Attributes:
        load: Who is charged for what.
        caches: What each endpoint has cached.
        health: Who may be chosen.
        predictor: TTFT, TPOT, tokens per byte.
        records: Recent decisions.
        lingering: Blocks of completed requests and until when they still count as running, oldest first.
        inflight: Decided requests that have not ended.
        engines: What is known of engines beside their load.
        endpoints: Totals per endpoint.
        metrics: Counters.
        homes: Where stored responses live.
        share: Tells the other workers and gateways what an endpoint has cached.
        placing: Processes that place requests on these endpoints, of all gateways, this one included.
        freed: Called when room was freed at an endpoint.
        history: Keeps the routing history.
        teaching: Teaches the predictor.
        stored: Knows where stored responses come to live.
        load_age_s: How old the news of other gateways' load is at a given monotonic time.
        configured_s: Monotonic time of the configuration in force.
        health_changed_s: Monotonic time of the last change of health.
        poison: Requests that several endpoints failed at.
        on_lost: Told of a request whose lease expired, after its release.
        on_transition: Told when a first token changed an endpoint's health.
    """

    load: LoadStore
    caches: Caches
    health: HealthTracker
    predictor: Predictor
    records: RecordRing
    metrics: Recorder
    lingering: deque[tuple[float, EndpointKey, Run]] = field(default_factory=deque)
    inflight: InflightTable = field(default_factory=InflightTable)
    engines: Engines = field(default_factory=Engines)
    endpoints: EndpointStatsTable = field(default_factory=EndpointStatsTable)
    homes: Homes = field(default_factory=Homes)
    share: Callable[[EndpointKey, list[int]], None] = _share_nothing
    placing: Callable[[], int] = _alone
    freed: Callable[[], None] = _nobody_waits
    load_age_s: Callable[[float], float] = _always_current
    history: CacheHistory = field(init=False)
    teaching: Teaching = field(init=False)
    stored: StoredResponses = field(init=False)
    configured_s: float = 0.0
    health_changed_s: float = 0.0
    poison: Poison = field(default_factory=Poison)
    on_lost: Callable[[Inflight, float], None] = _nobody_asks
    on_transition: Callable[[Transition], None] = _tell_nobody

    def __post_init__(self) -> None:
        health = self.health
        self.history = CacheHistory(
            self.caches.history, lambda endpoint: health.state(endpoint) is not None, self.share
        )
        self.teaching = Teaching(self.predictor)
        self.stored = StoredResponses(self.homes, self.inflight, self.records, self.share)

    def health_changed(self, now_s: float) -> None:
        """An endpoint's health is another one since now."""
        self.health_changed_s = now_s

    def configure(self, keys: frozenset[EndpointKey], gone: frozenset[EndpointKey], now_s: float) -> None:
        """A configuration is in force since now.

        Args:
            keys: All endpoints.
            gone: Those that were there before; all that is known of them is forgotten.
            now_s: Monotonic time.
        """
        self.configured_s = now_s
        self.health_changed_s = self.health_changed_s or now_s
        self.load.retain(keys)
        self.endpoints.retain(keys)
        for key in gone:
            self.caches.history.remove(key)
            self.caches.running.forget(key)
            self.engines.forget(key)

    def advance(self, now_s: float) -> None:
        """Release what time has released: predicted prefills, lost requests. Cheap when nothing is due."""
        lingering = self.lingering
        while lingering and (lingering[0][0] <= now_s or len(lingering) > MAX_LINGERING):
            _, endpoint, run = lingering.popleft()
            self.caches.running.remove(endpoint, run)
        expired = self.load.advance(now_s)
        for request_id in expired.prefills:
            inflight = self.inflight.get(request_id)
            if inflight is not None:
                self.prefill_ended(inflight.endpoint, now_s)
                self.history.record(inflight)
        if expired.requests:
            self.metrics.leases_expired(len(expired.requests))
            for request_id in expired.requests:
                request = self.finish(request_id, now_s, completed=False)
                if request is not None:
                    self.on_lost(request, now_s)

    def begin(self, request_id: RequestId, inflight: Inflight) -> None:
        """A request was decided and charged."""
        self.inflight.add(request_id, inflight)
        inflight.running = self.caches.running.add(inflight.endpoint, inflight.blocks)

    def finish(self, request_id: RequestId, now_s: float, *, completed: bool) -> Inflight | None:
        """It is over: what was remembered of it; None if nothing is.

        The blocks of a completed request count as running for `LINGER_S` more: its engine has them, and under
        load announces them later than it answers.
        """
        inflight = self.inflight.pop(request_id)
        if inflight is not None and inflight.first_token_s is None:
            self.prefill_ended(inflight.endpoint, now_s)
        else:
            self.freed()
        if inflight is not None and inflight.running is not None:
            run, inflight.running = inflight.running, None
            if completed:
                self.lingering.append((now_s + LINGER_S, inflight.endpoint, run))
            else:
                self.caches.running.remove(inflight.endpoint, run)
        return inflight

    def placed(self, request_id: RequestId, at: EndpointKey) -> None:
        """Compare-and-set gave a decided request another place, before anybody was told of the first."""
        inflight = self.inflight.get(request_id)
        if inflight is not None:
            self.move(inflight, at)
            inflight.record.placed = at

    def move(self, inflight: Inflight, to: EndpointKey) -> None:
        """Another endpoint serves it after all."""
        if inflight.running is not None:
            self.caches.running.remove(inflight.endpoint, inflight.running)
            inflight.running = self.caches.running.add(to, inflight.blocks)
        inflight.endpoint = to

    def first_token(self, request_id: RequestId, now_s: float, *, late: bool) -> None:
        """The first token of a request passes now: its prefill is done and its blocks are cached.

        Args:
            request_id: Whose.
            now_s: Monotonic time.
            late: Other bytes of the body came before it (keep-alive comments): Envoy's time of the first
                body byte is not that of the token.
        """
        inflight = self.inflight.get(request_id)
        if inflight is None or inflight.first_token_s is not None:
            return
        inflight.first_token_s = now_s
        self.prefill_ended(inflight.endpoint, now_s)
        inflight.first_byte_is_token = not late
        for transition in self.health.alive(inflight.endpoint, inflight.served_model, now_s):
            self.on_transition(transition)
        self.load.release_prefill(request_id)
        self.history.record(inflight)
        self.teaching.first_token(inflight, now_s - inflight.decided_s)

    def engines_of(self, keys: Sequence[EndpointKey], prefilling: Sequence[int], now_s: float) -> EnginesView:
        """What is known of engines beside their load.

        Args:
            keys: Whose.
            prefilling: Requests not known to be prefilled, one per key; empty leaves out what is under way.
            now_s: The time.
        """
        engines, sizes = self.engines, self.engines.kv_tokens
        return EnginesView(
            kv_tokens=[sizes.get(key, 0) for key in keys] if sizes else (),
            seats=engines.seats(keys),
            distinct_ratios=list(map(self.caches.running.distinct_ratio, keys)) if sizes else (),
            under_way_s=engines.under_way_s(keys, prefilling, now_s) if prefilling else (),
        )

    def prefill_ended(self, endpoint: EndpointKey, now_s: float) -> None:
        """A prefill is over at an endpoint, or taken to be: the next one begins."""
        self.engines.prefill_ended(endpoint, now_s)
        self.freed()

    def data_age_s(self, now_s: float) -> Mapping[str, float]:
        """How old each input of a decision is; this worker's own books are always current."""
        return {
            "load": self.load_age_s(now_s),
            "health": now_s - self.health_changed_s,
            "configuration": now_s - self.configured_s,
        }
