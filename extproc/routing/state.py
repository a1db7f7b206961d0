"""What one worker knows, and what changes each part: made whole, given to each reader as far as it reads.

| part | read by | changed by |
|---|---|---|
| `load` | scheduling, status | scheduling charges, `running` releases |
| `running` | endings, stored responses | scheduling begins, first tokens, endings and leases end |
| `caches` | scheduling, status | `history`, `running`, scheduling (`seen`), other workers and gateways |
| `engines` | scheduling, endings | probes, `running` |
| `health`, `poison` | scheduling, status | probes, first tokens, the evidence of endings |
| `predictor` | parsing, scheduling, status | `teaching` |
| `homes` | scheduling, requests that name a response | `stored`, other workers and gateways |
| `records` | the admin port, stored responses | scheduling adds, endings attach |
| `endpoints` | status | endings |
| `ages` | scheduling | the configuration, changes of health |
| `rivals` | scheduling | scheduling, first tokens, endings |
| `lines` | scheduling | other workers and gateways |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from extproc.choosing.lines import OtherLines
from extproc.choosing.teaching import Teaching
from extproc.health.poison import Poison
from extproc.health.states import Transition
from extproc.health.tracker import HealthTracker
from extproc.observing.recorder import Recorder
from extproc.observing.records import RecordRing
from extproc.predicting.predictor import Predictor
from extproc.routing.ages import Ages
from extproc.routing.cache_history import CacheHistory
from extproc.routing.caches import Caches
from extproc.routing.endpoint_stats import EndpointStatsTable
from extproc.routing.engines import Engines
from extproc.routing.first_tokens import FirstTokens
from extproc.routing.homes import Homes
from extproc.routing.rivals import Rivals
from extproc.routing.running import RunningRequests
from extproc.routing.stored_responses import StoredResponses
from extproc.values.inflight import Inflight
from metadata_center.store import LoadStore
from metadata_center.types import EndpointKey, Waiter


def _share_nothing(_endpoint: EndpointKey, _blocks: Sequence[int]) -> None:
    """A gateway of one worker has no other to share with."""


def _one() -> int:
    """No other process schedules requests here."""
    return 1


def _wake_none() -> None:
    """Requests are scheduled at once."""


def _always_current(_now_s: float) -> float:
    """No other load counts."""
    return 0.0


def _ignore_lost(_request: Inflight, _now_s: float) -> None:
    """Lost requests are of no interest."""


def _ignore_transition(_transition: Transition) -> None:
    """Transitions are of no interest."""


@dataclass(frozen=True, slots=True)
class Outside:
    """What the state sends to the rest of the gateway and asks of it; the defaults suit a lone worker.

    Attributes:
        share: Informs the other workers and gateways what an endpoint has cached.
        processes: How many processes schedule requests on these endpoints, of all gateways, this one
            included.
        load_age_s: How old the news of other gateways' load is at a given monotonic time.
        freed: Called when room was freed at an endpoint.
        on_lost: Called with a request whose lease expired, after its release.
        on_transition: Called when an endpoint's health changed.
        lines: Who waits at other workers and gateways; whoever hears of it writes it there.
        tell_line: Tells the others who waits here, first in line first; None where there are none.
    """

    share: Callable[[EndpointKey, Sequence[int]], None] = _share_nothing
    processes: Callable[[], int] = _one
    load_age_s: Callable[[float], float] = _always_current
    freed: Callable[[], None] = _wake_none
    on_lost: Callable[[Inflight, float], None] = _ignore_lost
    on_transition: Callable[[Transition], None] = _ignore_transition
    lines: OtherLines = field(default_factory=OtherLines)
    tell_line: Callable[[Sequence[Waiter]], None] | None = None


@dataclass(frozen=True, slots=True)
class SchedulingState:
    """What scheduling a request reads; of these it charges `load`, begins in `running` and adds to `records`.

    Attributes:
        load: The load ledger: which endpoint is charged for what.
        running: Decided requests that have not ended.
        caches: What each endpoint has cached.
        engines: What is known of engines beside their load.
        health: Which endpoints may be chosen.
        poison: Requests that several endpoints failed at.
        predictor: TTFT, TPOT, tokens per byte.
        homes: Where stored responses live.
        records: Recent decisions.
        recorder: Counts.
        ages: How old all of it is.
        rivals: Rules of other gateways that are compared.
        processes: How many processes schedule requests on these endpoints, of all gateways.
        lines: Who waits at other workers and gateways.
        tell_line: Tells them who waits here; None where there are none.
    """

    load: LoadStore
    running: RunningRequests
    caches: Caches
    engines: Engines
    health: HealthTracker
    poison: Poison
    predictor: Predictor
    homes: Homes
    records: RecordRing
    recorder: Recorder
    ages: Ages
    rivals: Rivals
    processes: Callable[[], int]
    lines: OtherLines
    tell_line: Callable[[Sequence[Waiter]], None] | None


@dataclass(frozen=True, slots=True)
class EndingState:
    """What the end of a request changes.

    Attributes:
        running: Decided requests that have not ended.
        engines: Know how much an answer may have.
        health: Which endpoints may be chosen.
        poison: Requests that several endpoints failed at.
        history: What was routed where.
        stored: Where stored responses come to live.
        teaching: Teaches the predictor.
        records: Recent decisions.
        endpoints: Totals per endpoint.
        rivals: Rules of other gateways that are compared.
        recorder: Counts.
        on_transition: Called when an endpoint's health changed.
    """

    running: RunningRequests
    engines: Engines
    health: HealthTracker
    poison: Poison
    history: CacheHistory
    stored: StoredResponses
    teaching: Teaching
    records: RecordRing
    endpoints: EndpointStatsTable
    rivals: Rivals
    recorder: Recorder
    on_transition: Callable[[Transition], None]


@dataclass(frozen=True, slots=True)
class RoutingState:
    """All of it, for what makes a worker, or shows one.

    Attributes:
        scheduling: What scheduling needs.
        ending: What endings need.
        first_tokens: What a first token changes.
    """

    scheduling: SchedulingState
    ending: EndingState
    first_tokens: FirstTokens


def make_routing_state(
    load: LoadStore,
    caches: Caches,
    health: HealthTracker,
    records: RecordRing,
    recorder: Recorder,
    homes: Homes,
    outside: Outside,
) -> RoutingState:
    """RoutingState without a request.

    Args:
        load: The load ledger: which endpoint is charged for what.
        caches: What each endpoint has cached.
        health: Which endpoints may be chosen.
        records: Recent decisions.
        recorder: Counts.
        homes: Where stored responses live.
        outside: What it sends to the rest of the gateway, and asks of it.
    """
    engines, predictor = Engines(), Predictor()
    history = CacheHistory(caches.history, lambda endpoint: health.state(endpoint) is not None, outside.share)
    scheduling = SchedulingState(
        load=load,
        running=RunningRequests(
            load, caches.running, engines, recorder, outside.freed, history.record, outside.on_lost
        ),
        caches=caches,
        engines=engines,
        health=health,
        poison=Poison(),
        predictor=predictor,
        homes=homes,
        records=records,
        recorder=recorder,
        ages=Ages(outside.load_age_s),
        rivals=Rivals(engines, lambda keys: load.prefill_since_s(load.slots(keys)), outside.processes),
        processes=outside.processes,
        lines=outside.lines,
        tell_line=outside.tell_line,
    )
    ending = _ending_state(scheduling, history, outside)
    first_tokens = FirstTokens(
        scheduling.running, health, history, ending.teaching, scheduling.rivals, outside.on_transition
    )
    return RoutingState(scheduling, ending, first_tokens)


def _ending_state(scheduling: SchedulingState, history: CacheHistory, outside: Outside) -> EndingState:
    """What the ends of requests change of what scheduling reads, and beside it."""
    running, homes, records = scheduling.running, scheduling.homes, scheduling.records
    return EndingState(
        running=running,
        engines=scheduling.engines,
        health=scheduling.health,
        poison=scheduling.poison,
        history=history,
        stored=StoredResponses(homes, running, records, outside.share),
        teaching=Teaching(scheduling.predictor),
        records=records,
        endpoints=EndpointStatsTable(),
        rivals=scheduling.rivals,
        recorder=scheduling.recorder,
        on_transition=outside.on_transition,
    )
