"""One run: a trace through a fleet under one policy, event by event in virtual time.

Rules:
    1. Events happen in the order of their time, equal times in the order of their making; no event makes an
       earlier one. Equal arguments give equal runs, decision times apart.
    2. A step's tokens, ends and cache events become known at its end; gateways hear of them when their
       settings say so.
    3. A held request is asked for again when anything frees capacity, as its gateway knows, and when its own
       time is up. If it says so it is asked every `POLL_S` too, and what other gateways freed is found then,
       as the product does it. News of one moment are all heard before anybody is asked. No request is held
       longer than `max_hold_s`, and no gateway holds more than `max_held`.
    4. What clients do is `tokenway.simulator.replay.clients`: a request that is refused, or whose client
       leaves, gives up all that it held, and one that waited for it goes on as after an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import exp
from typing import Final

from extproc.choosing.holding import POLL_S, SchedulingRound
from extproc.choosing.stateful import Hold, PolicyRequest, Shed, StatefulPolicy
from tokenway.simulator.engine.engine import EngineRequest, StepResult
from tokenway.simulator.engine.prefix_cache import BlocksRemoved, BlocksStored, CacheEvent
from tokenway.simulator.replay.agenda import Agenda
from tokenway.simulator.replay.caches import CacheView, EventBlocks, Events, History, ViewKind
from tokenway.simulator.replay.clients import RETRY_AFTER_S, Clients
from tokenway.simulator.replay.draws import MakeDraws
from tokenway.simulator.replay.fleet import Fleet, endpoint_keys, fitting_block_size
from tokenway.simulator.replay.gateway import FleetFacts, Held, Live, ReplayGateway, Scrape, missed_cache
from tokenway.simulator.replay.ledger import Change
from tokenway.simulator.replay.lines import LineNews
from tokenway.simulator.replay.outcome import Replayed, Served
from tokenway.simulator.replay.replica import Replica
from tokenway.simulator.replay.reuse import EverSeen
from tokenway.simulator.replay.settings import RunSettings, Spread
from tokenway.simulator.replay.trace import Trace, arrivals, block_ratio, engine_keys

BYTES_PER_TOKEN: Final = 4.0
"""English text under current byte-pair vocabularies, on average; routers start from the same guess."""

MIN_HOLD_S: Final = 0.001
"""A policy that holds until now is asked again a millisecond later, not for ever at the same moment."""


class Truth:
    """What an oracle may know: the engines themselves and every request's real size."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = replicas
        self.live: dict[int, Live] = {}


class Replay:
    """The event loop of one run.

    Args:
        trace: What comes.
        fleet: The engines; one block size throughout.
        make_policy: Called once per gateway, in order.
        settings: How.
        make_draws: Randomness; equal draws make equal runs.
        clock: Real seconds, to time decisions.

    Raises:
        ValueError: The fleet is empty or mixes block sizes, the trace's blocks do not fit it, or a request
            fits no engine's cache.
    """

    def __init__(
        self,
        trace: Trace,
        fleet: Fleet,
        make_policy: Callable[[Truth], StatefulPolicy],
        settings: RunSettings,
        make_draws: MakeDraws,
        clock: Callable[[], float],
    ) -> None:
        self._block_size = fitting_block_size(trace, fleet)
        self._trace = trace
        self._settings = settings
        self._ratio = block_ratio(trace, self._block_size, settings.router_block_tokens)
        self._router_tokens = self._ratio * self._block_size
        self._arrivals = make_draws("arrivals")
        texts = make_draws("texts")
        # Drawn in the order of the trace: every policy has the same texts to judge.
        self._bytes_per_token = [
            BYTES_PER_TOKEN * exp(settings.token_error * texts.gauss(0.0, 1.0)) for _ in trace.requests
        ]
        self._assign = make_draws("gateways")
        self._lost = make_draws("lost events")
        self._clients = Clients(trace, settings, make_draws("patience"))
        self._ever = EverSeen(trace.block_tokens // self._block_size, self._block_size)
        self._agenda = Agenda()
        self._turn = 0
        self._replicas = [Replica(member.profile) for member in fleet]
        self._truth = Truth(self._replicas)
        self._busy = [False] * len(fleet)
        self._live: dict[str, Live] = {}
        self._event_blocks = EventBlocks(len(fleet))
        self._hears_events = settings.view in (ViewKind.EVENTS, ViewKind.EVENTS_PENDING)
        rows = len(fleet)
        self._prompt_tokens = [0] * rows
        self._scrape = Scrape([0] * rows, [0] * rows, [0.0] * rows, [0.0] * rows, [0] * rows)
        facts = FleetFacts(
            endpoint_keys(fleet),
            tuple(member.profile.name for member in fleet),
            tuple(member.weight for member in fleet),
            tuple(member.profile.kv_tokens for member in fleet),
        )
        self._gateways = [
            ReplayGateway(
                index,
                settings.gateways,
                facts,
                self._scrape,
                self._view(facts),
                make_policy(self._truth),
                make_draws(f"policy/{index}"),
                clock,
                first_token=settings.first_token,
            )
            for index in range(settings.gateways)
        ]
        self._lines = LineNews(self._agenda, self._gateways, settings.push_delay_s)
        self._held: list[dict[int, Held]] = [{} for _ in self._gateways]
        self._polled, self._woken = ([False] * len(self._gateways) for _ in range(2))
        self._open = 0
        self._outcome = Replayed(computed_tokens=[Counter() for _ in fleet])

    def run(self) -> Replayed:
        """Play the trace to its last token."""
        self._open = len(self._trace.requests)
        for index, arrival_s in enumerate(arrivals(self._trace, self._arrivals, self._settings.speed)):
            if self._trace.requests[index].after is None:
                self._comes(arrival_s, index)
        if self._settings.metric_age_s:
            self._agenda.at(self._settings.metric_age_s, self._scraped)
        while self._open:
            self._outcome.end_s = self._agenda.next()
        return self._outcome

    def _view(self, facts: FleetFacts) -> CacheView:
        rows = len(facts.keys)
        match self._settings.view:
            case ViewKind.HISTORY | ViewKind.HISTORY_CONFIRMED as kind:
                capacities = [tokens // self._router_tokens for tokens in facts.kv_tokens]
                return History(facts.keys, capacities, confirmed=kind is ViewKind.HISTORY_CONFIRMED)
            case kind:
                return Events(self._event_blocks, rows, pending=kind is ViewKind.EVENTS_PENDING)

    # Requests

    def _arrived(self, now_s: float, index: int) -> None:
        source, settings, ratio = self._trace.requests[index], self._settings, self._ratio
        keys = engine_keys(source, self._trace.block_tokens, self._block_size)
        prompt_bytes = max(1, round(source.prompt_tokens * self._bytes_per_token[index]))
        gateway = self._gateways[self._assigned()]
        prompt_tokens = gateway.estimate(prompt_bytes) if settings.token_error else source.prompt_tokens
        live = Live(
            index,
            source,
            PolicyRequest(
                request_id=index,
                arrived_s=now_s,
                prompt_tokens=prompt_tokens,
                blocks=keys[ratio - 1 : source.prompt_tokens // self._block_size : ratio],
                session=source.session,
                slo_ttft_s=source.slo_ttft_s,
                slo_tpot_s=source.slo_tpot_s,
            ),
            gateway.index,
            keys,
            prompt_bytes,
            # A router cuts blocks by bytes: what is off in a prompt's length is off in each of its blocks.
            max(1, round(self._router_tokens * prompt_tokens / source.prompt_tokens)),
        )
        live.came_s = now_s
        self._truth.live[index] = live
        leaves_s = self._clients.leaves_s(index, now_s)
        if leaves_s is not None:
            self._agenda.at(leaves_s, self._leaves, live)
        self._ask(now_s, live)
        self._lines.tell(now_s, gateway)

    def _again(self, now_s: float, live: Live) -> None:
        """The client of a refused request tries once more."""
        if not live.is_over:
            live.tries += 1
            live.request = replace(live.request, arrived_s=now_s)
            self._ask(now_s, live)

    def _leaves(self, now_s: float, live: Live) -> None:
        """An impatient client goes, unless it has its first token; its room is free at once."""
        if live.is_over or live.first_s is not None:
            return
        gateway = self._gateways[live.gateway]
        live.is_abandoned = True
        if live.sent is None:
            self._release_hold(now_s, live)
            gateway.policy.on_left(live.request)
        else:
            self._replicas[live.sent.row].abort(str(live.index))
            del self._live[str(live.index)]
            self._over(now_s, gateway, live)
        self._ended(now_s, live)
        self._wake_held(now_s, gateway)

    def _comes(self, time_s: float, index: int) -> None:
        """A request will arrive; if that is too late for this run, neither it nor what waits for it does."""
        duration_s = self._settings.duration_s
        if duration_s is None or time_s <= duration_s:
            self._agenda.at(time_s, self._arrived, index)
            return
        late = [index]
        while late:
            late += self._clients.followers(late.pop())
            self._open -= 1

    def _assigned(self) -> int:
        """Index of the gateway that the next request comes to."""
        gateways = len(self._gateways)
        if self._settings.spread is Spread.RANDOM:
            return int(self._assign.random() * gateways)
        self._turn += 1
        return (self._turn - 1) % gateways

    def _ask(self, now_s: float, live: Live) -> Hold | None:
        """Decide on one request; returns the hold if it goes on waiting."""
        gateway, settings = self._gateways[live.gateway], self._settings
        if not settings.metric_age_s:
            self._read_metrics(now_s)
        decision = gateway.decide(live, now_s)
        held = self._held[live.gateway]
        latest_s = live.request.arrived_s + settings.max_hold_s
        known = held.get(live.index)
        if isinstance(decision, Hold):
            if now_s < latest_s and (known is not None or len(held) < settings.max_held):
                until_s = min(max(decision.until_s, now_s + MIN_HOLD_S), latest_s)
                if known is not None and now_s < known.timer_s <= until_s:
                    timer_s = known.timer_s
                else:
                    timer_s = until_s
                    self._agenda.at(timer_s, self._time_up, live)
                held[live.index] = Held(live, decision.rank, timer_s)
                live.held_since_s = now_s if known is None else live.held_since_s
                if decision.polls and not self._polled[gateway.index]:
                    self._polled[gateway.index] = True
                    self._agenda.at(now_s + POLL_S, self._poll, gateway)
                return decision
            decision = Shed(RETRY_AFTER_S)
        self._release_hold(now_s, live)
        if isinstance(decision, Shed):
            self._refused(now_s, live, decision.retry_after_s)
        else:
            self._send(now_s, gateway, live, decision)
        return None

    def _release_hold(self, now_s: float, live: Live) -> None:
        if self._held[live.gateway].pop(live.index, None) is not None and live.held_since_s is not None:
            live.held_s += now_s - live.held_since_s
            live.held_since_s = None

    def _refused(self, now_s: float, live: Live, retry_after_s: float) -> None:
        """Its client comes again, or that was it."""
        again_s = self._clients.again_s(live.tries, retry_after_s, now_s)
        if again_s is None:
            self._ended(now_s, live)
        else:
            live.sent = None
            self._agenda.at(again_s, self._again, live)

    def _ask_held(self, now_s: float, gateway: ReplayGateway) -> None:
        """Something was freed: ask for the held requests again, best rank first."""
        waiting = SchedulingRound(self._held[gateway.index].values())
        while (held := waiting.next(now_s)) is not None:
            again = self._ask(now_s, held.live)
            if again is not None and again.closed:
                waiting.close(held.queue)
        self._lines.tell(now_s, gateway)

    def _poll(self, now_s: float, gateway: ReplayGateway) -> None:
        self._polled[gateway.index] = False
        self._ask_held(now_s, gateway)

    def _wake_held(self, now_s: float, gateway: ReplayGateway) -> None:
        """Ask for the held requests once all that happens now has happened."""
        if not self._woken[gateway.index]:
            self._woken[gateway.index] = True
            self._agenda.at(now_s, self._woke, gateway)

    def _woke(self, now_s: float, gateway: ReplayGateway) -> None:
        self._woken[gateway.index] = False
        self._ask_held(now_s, gateway)

    def _time_up(self, now_s: float, live: Live) -> None:
        held = self._held[live.gateway].get(live.index)
        if held is not None and held.timer_s == now_s:
            self._ask(now_s, live)

    def _send(self, now_s: float, gateway: ReplayGateway, live: Live, row: int) -> None:
        source, request_id = live.source, str(live.index)
        live.best_tokens = max(
            replica.cached_tokens(live.keys, source.prompt_tokens) for replica in self._replicas
        )
        live.available_tokens = self._ever.found_tokens(live.keys, source.prompt_tokens)
        self._ever.add(live.keys[: source.prompt_tokens // self._block_size])
        entry, due_s = gateway.send(live, row, now_s)
        self._share_change(now_s, gateway, entry)
        for other in self._gateways:
            if other is not gateway:
                blocks = live.request.blocks
                self._agenda.at(
                    now_s + self._settings.push_delay_s, self._hear_sent, other, live.index, row, blocks
                )
        rejection = self._replicas[row].submit(
            EngineRequest(request_id, source.prompt_tokens, source.output_tokens, live.keys), now_s
        )
        if rejection is not None:
            self._over(now_s, gateway, live)
            self._refused(now_s, live, RETRY_AFTER_S)
            self._agenda.at(now_s, self._ask_held, gateway)
            return
        self._live[request_id] = live
        if due_s is not None:
            self._agenda.at(due_s, self._prefill_due, gateway, live)
        self._wake(now_s, row)

    def _ended(self, now_s: float, live: Live) -> None:
        """Note the end, and let those come that waited for it."""
        source, sent = live.source, live.sent
        live.is_over = True
        if live.first_s is not None:
            self._ever.add(live.keys)
        self._outcome.served.append(
            Served(
                live.index,
                live.came_s,
                None if sent is None else sent.sent_s,
                None if sent is None else sent.row,
                live.first_s,
                now_s,
                source.prompt_tokens,
                source.output_tokens,
                live.cached_tokens,
                live.best_tokens,
                live.available_tokens,
                live.foreseen_tokens,
                live.decisions,
                live.decision_s,
                live.tries,
                live.held_s,
                live.is_abandoned,
                live.admitted_s,
            )
        )
        del self._truth.live[live.index]
        self._open -= 1
        for follower in self._clients.followers(live.index):
            self._comes(now_s + self._trace.requests[follower].think_s, follower)

    # What gateways learn

    def _share_change(self, now_s: float, gateway: ReplayGateway, entry: Change) -> None:
        for other in self._gateways:
            if other is not gateway:
                self._agenda.at(now_s + self._settings.push_delay_s, self._hear_change, other, entry)

    def _hear_change(self, now_s: float, gateway: ReplayGateway, entry: Change) -> None:
        gateway.ledger.apply(entry, now_s)
        is_less = entry.prefilling < 0 or entry.requests < 0
        if is_less and not self._polled[gateway.index]:
            self._wake_held(now_s, gateway)

    def _hear_sent(
        self, _: float, gateway: ReplayGateway, request_id: int, row: int, blocks: Sequence[int]
    ) -> None:
        gateway.view.sent(request_id, row, blocks)

    def _hear_prefilled(self, _: float, gateway: ReplayGateway, request_id: int) -> None:
        gateway.view.prefilled(request_id)

    def _settled(self, _: float, gateway: ReplayGateway, request_id: int, missing: bool) -> None:
        gateway.view.settled(request_id, missing)

    def _prefilled(self, now_s: float, gateway: ReplayGateway, live: Live) -> None:
        """The gateway sees a first token."""
        entry = gateway.first_token(live, now_s)
        if entry is not None:
            self._share_change(now_s, gateway, entry)
        for other in self._gateways:
            if other is not gateway:
                delay_s = self._settings.push_delay_s
                self._agenda.at(now_s + delay_s, self._hear_prefilled, other, live.index)

    def _prefill_due(self, now_s: float, gateway: ReplayGateway, live: Live) -> None:
        """No first token is seen, but it should have come by now."""
        entry = gateway.ledger.prefilled(live.index, now_s)
        if entry is not None:
            self._share_change(now_s, gateway, entry)
            self._ask_held(now_s, gateway)

    def _over(self, now_s: float, gateway: ReplayGateway, live: Live) -> None:
        """A request that was sent is over; its cache events are on their way."""
        self._share_change(now_s, gateway, gateway.finished(live, now_s))
        missing, settings = missed_cache(live), self._settings
        for each in self._gateways:
            delay_s = settings.event_lag_s
            if each is not gateway:
                delay_s = max(delay_s, settings.push_delay_s)
                if live.first_s is not None:
                    self._agenda.at(now_s + settings.push_delay_s, self._hear_prefilled, each, live.index)
            self._agenda.at(now_s + delay_s, self._settled, each, live.index, missing)

    def _heard(self, _: float, row: int, events: tuple[CacheEvent, ...]) -> None:
        """Cache events arrive at the gateways."""
        ratio = self._ratio
        for event in events:
            if isinstance(event, BlocksStored):
                first = (ratio - 1 - event.first_block) % ratio
                self._event_blocks.stored(row, event.keys[first::ratio])
            elif isinstance(event, BlocksRemoved):
                gone = self._event_blocks.removed(
                    row, [key for key in event.keys if key % ratio == ratio - 1]
                )
                if gone:
                    for gateway in self._gateways:
                        gateway.policy.on_evicted(row, gone)

    def _is_lost(self) -> bool:
        return self._settings.event_loss > 0.0 and self._lost.random() < self._settings.event_loss

    def _scraped(self, now_s: float) -> None:
        self._read_metrics(now_s)
        age_s = self._settings.metric_age_s
        due_s = now_s + age_s
        if not self._truth.live:  # a night without requests: until something happens, all readings are alike
            due_s += age_s * max(0.0, (self._agenda.next_s - due_s) // age_s)
        self._agenda.at(due_s, self._scraped)

    def _read_metrics(self, now_s: float) -> None:
        scrape = self._scrape
        for row, replica in enumerate(self._replicas):
            scrape.waiting[row] = replica.num_waiting
            scrape.running[row] = replica.num_running
            scrape.kv_usage[row] = replica.kv_usage_ratio
            scrape.computed_tokens[row] = self._prompt_tokens[row]
            scrape.scraped_s[row] = now_s

    # Engines

    def _wake(self, now_s: float, row: int) -> None:
        if self._busy[row]:
            return
        due_s = self._replicas[row].next_step_due()
        if due_s is not None:
            self._busy[row] = True
            self._agenda.at(max(due_s, now_s), self._start_step, row)

    def _start_step(self, now_s: float, row: int) -> None:
        step = self._replicas[row].step(now_s)
        outcome = self._outcome
        outcome.steps += 1
        outcome.preemptions += len(step.preempted)
        outcome.computed_tokens[row][int(now_s)] += step.scheduled_tokens
        self._agenda.at(step.end_s, self._step_ended, row, step)

    def _step_ended(self, now_s: float, row: int, step: StepResult) -> None:
        for admission in step.admitted:
            if (live := self._live.get(admission.request_id)) is not None:
                live.cached_tokens, live.admitted_s = admission.cached_tokens, step.start_s
        if step.events and self._hears_events and not self._is_lost():
            self._agenda.at(now_s + self._settings.event_lag_s, self._heard, row, step.events)
        freed: set[int] = set()
        for request_id in step.first_tokens:
            if (live := self._live.get(request_id)) is None:
                continue  # its client left while the step ran
            live.first_s = now_s
            self._prompt_tokens[row] += live.source.prompt_tokens
            if self._settings.first_token:
                self._prefilled(now_s, self._gateways[live.gateway], live)
                freed.add(live.gateway)
        for request_id in step.finished:
            if (live := self._live.pop(request_id, None)) is None:
                continue
            self._over(now_s, self._gateways[live.gateway], live)
            self._ended(now_s, live)
            freed.add(live.gateway)
        self._busy[row] = False
        self._wake(now_s, row)
        for index in sorted(freed):
            self._ask_held(now_s, self._gateways[index])
