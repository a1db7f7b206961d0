"""The product's least completion, decided at once or late, with what it learns from its own answers.

Here is only what the product's router does around `extproc.choosing`: a snapshot is made, and answers teach.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from heapq import nsmallest
from math import inf

from extproc.choosing.completion import DECODE_TOKENS, TPOT_LIMIT_S
from extproc.choosing.deciding import Claim, SendNow, TurnDown, WaitForRoom, decide
from extproc.choosing.displacing import teach_recomputed
from extproc.choosing.holding import HoldQueue
from extproc.choosing.learning import Learner, Lesson
from extproc.choosing.least_completion import saved_s
from extproc.choosing.max_num_seqs import Reading, SequenceLimits
from extproc.choosing.snapshots import Demand, Engines, Load, Prompt, completion_snapshot
from extproc.choosing.stateful import (
    Decision,
    FleetView,
    Hold,
    PolicyRequest,
    Sent,
    Shed,
    StatefulPolicy,
)
from extproc.choosing.sunk import crowded_ratios
from extproc.predicting.predictor import Predictor
from extproc.values.balancing import LoadBalancing
from extproc.values.choices import Snapshot
from extproc.values.prices import Prices
from metadata_center.history.radix_tree import Run
from metadata_center.history.running_blocks import RunningBlocks
from metadata_center.history.seen_prefixes import SeenPrefixes
from metadata_center.sharing.lines import MAX_WAITERS
from metadata_center.types import EndpointKey, Waiter, value

MODEL = "model"
"""All requests of a replay are for one."""

LINGER_S = 1.0
"""The product's `extproc.routing.running.LINGER_S`."""

READ_S = 5.0
"""The product reads an engine's metrics when it probes, by default this often."""

_SETTINGS = LoadBalancing(fallbacks=0)
"""The product's default policy; nothing fails here, so there is no second choice."""


@value
class _Lesson:
    """What an answer will be compared with.

    Attributes:
        snapshot: What was decided from.
        row: Where it went.
        group: Of that endpoint.
        key: That endpoint.
        prefill_s: See `Inflight.prefill_s`.
    """

    snapshot: Snapshot
    row: int
    group: str
    key: EndpointKey
    prefill_s: float = inf


class LeastCompletion(StatefulPolicy):
    """Decides at once.

    Args:
        learn: False leaves every price at its prior: a predictor that never gets warm.
        bias: Factor on what it predicts of prefill, > 0: one that is wrong and does not know.
        max_num_seqs: Of each engine, as the operator says; 0: it is to be learned.
    """

    __slots__ = (
        "_bias",
        "_counted",
        "_early",
        "_first_s",
        "_learn",
        "_learner",
        "_lesson",
        "_lingering",
        "_load",
        "_max_num_seqs",
        "_predictor",
        "_read_s",
        "_running",
        "_seen",
        "_sent",
        "_sequence_limits",
        "_usage",
    )

    def __init__(self, *, learn: bool = True, bias: float = 1.0, max_num_seqs: int = 0) -> None:
        self._learn = learn
        self._bias = bias
        self._max_num_seqs = max_num_seqs
        self._predictor = Predictor()
        self._learner = Learner(self._predictor)
        self._running = RunningBlocks()
        self._seen = SeenPrefixes()
        self._counted: dict[int, Run] = {}
        self._early: set[int] = set()
        self._lingering: deque[tuple[float, EndpointKey, Run]] = deque()
        self._load: tuple[Sequence[int], Sequence[int]] = ((), ())
        self._sequence_limits = SequenceLimits()
        self._read_s: list[float] = []
        self._sent: dict[int, _Lesson] = {}
        self._first_s: dict[int, float] = {}
        self._usage: dict[int, tuple[int, int]] = {}
        self._lesson: _Lesson | None = None

    def snapshot(self, view: FleetView) -> Snapshot:
        """What the product's router would hand to its policy."""
        self._read_metrics(view)
        self._load = view.requests, view.prefilling
        while self._lingering and self._lingering[0][0] <= view.now_s:
            _, key, run = self._lingering.popleft()
            self._running.remove(key, run)
        request, predictor = view.request, self._predictor
        cached_tokens = view.matched_tokens()
        limits = DECODE_TOKENS, TPOT_LIMIT_S
        if request.slo_ttft_s is not None and request.slo_tpot_s:
            limits = request.slo_ttft_s / request.slo_tpot_s, request.slo_tpot_s
        groups = view.groups if len(set(view.groups)) > 1 else view.groups[:1]
        under_way_s = [
            view.now_s - since_s if prefilling else 0.0
            for since_s, prefilling in zip(view.since_s, view.prefilling, strict=False)
        ]
        return completion_snapshot(
            view.keys,
            view.weights,
            # Kept until the answer teaches, so of its own: the view's columns go on changing.
            Load(*map(tuple, (view.requests, view.prefilling, view.prefill_tokens, view.context_tokens))),
            Prompt(
                request.prompt_tokens,
                cached_tokens,
                tuple(view.matched_blocks),
                len(request.blocks),
                crowded_ratios(
                    self._running,
                    request.blocks,
                    view.requests,
                    view.gateways,
                    request.prompt_tokens,
                    cached_tokens,
                ),
            ),
            self._prices(groups),
            Engines(
                view.kv_tokens,
                self._sequence_limits.column(view.keys),
                self._running.distinct_ratios(view.keys),
                under_way_s,
            ),
            Demand(predictor.traffic((MODEL, MODEL)), view.now_s, len(view.keys) / view.gateways, *limits),
        )

    def _prices(self, groups: Sequence[str]) -> Sequence[Prices]:
        prices = self._predictor.row_prices(MODEL, groups)
        if self._bias == 1.0:
            return prices
        return tuple(
            replace(each, ttft_prices_s=tuple(self._bias * price for price in each.ttft_prices_s))
            for each in prices
        )

    def choose(self, view: FleetView) -> Decision:
        """One draw if tied."""
        decided = self.decide(view)
        if isinstance(decided, WaitForRoom):
            wait = decided.wait
            return Hold(wait.until_s, wait.rank, wait.closed, polls=True)
        if isinstance(decided, TurnDown):
            return Shed(max(1.0, decided.retry_after_s))
        return self.place(view, decided)

    def decide(self, view: FleetView) -> SendNow | WaitForRoom | TurnDown:
        """The product's decision, at once."""
        return decide(self.snapshot(view), _SETTINGS, view.rng, 0, view.now_s)

    def place(self, view: FleetView, decided: SendNow) -> int:
        """Note what was decided, for learning; returns the row."""
        row = decided.choice.order[0]
        work_s = inf
        if decided.costs is not None:
            work_s = decided.costs.works_s[row]
            more_s = saved_s(decided.costs, row, decided.snapshot.cached_tokens)
            traffic = self._predictor.traffic((MODEL, MODEL))
            traffic.placed(view.now_s, work_s, more_s)
            teach_recomputed(traffic, self._seen, view.request.blocks, decided.snapshot, row)
        self._lesson = _Lesson(
            decided.snapshot, row, view.groups[row], view.keys[row], work_s * view.gateways
        )
        return row

    def on_sent(self, sent: Sent) -> None:
        """Remember what it was predicted from."""
        assert self._lesson is not None, "sent is what was chosen"
        self._sent[sent.request.request_id] = self._lesson
        run = self._running.add(self._lesson.key, sent.request.blocks)
        if run is not None:
            self._counted[sent.request.request_id] = run

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """Learn from it if the group is cold; else remember when, until the end."""
        request_id = sent.request.request_id
        self._first_s[request_id] = now_s
        lesson = self._sent[request_id]
        decoding = self._decoding(sent.row)
        self._sequence_limits.first_token(lesson.key, decoding, sent.sent_s, now_s, lesson.prefill_s)
        if self._learn:
            ttft_s = now_s - sent.sent_s
            answer = Lesson(
                (MODEL, lesson.group), lesson.snapshot, lesson.row, None, None, None, ttft_s, None
            )
            if self._learner.first_token(answer):
                self._early.add(request_id)

    def on_usage(self, sent: Sent, prompt_tokens: int, cached_tokens: int) -> None:
        """Remember what the engine counted, until the end."""
        self._usage[sent.request.request_id] = (prompt_tokens, cached_tokens)

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:
        """Learn what the answer shows."""
        request_id = sent.request.request_id
        lesson = self._sent.pop(request_id)
        first_s = self._first_s.pop(request_id, None)
        if first_s is not None:
            self._sequence_limits.ended(lesson.key, self._decoding(sent.row), now_s)
        prompt_tokens, cached_tokens = self._usage.pop(request_id, (None, None))
        run = self._counted.pop(request_id, None)
        if run is not None:
            self._lingering.append((now_s + LINGER_S, lesson.key, run))
        if not output_tokens:
            self._early.discard(request_id)
            return
        self._predictor.traffic((MODEL, MODEL)).answered(lesson.key, output_tokens)
        if self._learn:
            answer = Lesson(
                (MODEL, lesson.group),
                lesson.snapshot,
                lesson.row,
                prompt_tokens,
                cached_tokens,
                output_tokens,
                None if first_s is None else first_s - sent.sent_s,
                None if first_s is None else now_s - first_s,
            )
            self._learner.learn(answer, now_s, is_first_learned=request_id in self._early)
        self._early.discard(request_id)

    def _decoding(self, row: int) -> int:
        """Requests at an endpoint that had their first token; the view's columns go on changing."""
        requests, prefilling = self._load
        return requests[row] - prefilling[row]

    def _read_metrics(self, view: FleetView) -> None:
        """Learn from each engine's metrics as often as the product reads them, one engine after another."""
        if not self._read_s:
            rows = len(view.keys)
            self._read_s = [view.now_s + READ_S * row / rows for row in range(rows)]
            for key, group in zip(view.keys, view.groups, strict=True):
                self._sequence_limits.configure(key, group, self._max_num_seqs)
        for row, due_s in enumerate(self._read_s):
            if view.now_s >= due_s:
                self._read_s[row] = max(due_s, view.now_s - READ_S) + READ_S
                prompt_tokens = view.computed_tokens[row] if view.computed_tokens else None
                reading = view.running[row], view.waiting[row], view.kv_usage[row], prompt_tokens
                self._sequence_limits.observe(view.keys[row], Reading(0, *reading))


class LateCompletion(LeastCompletion):
    """Holds a request while its best endpoint is full.

    Args:
        learn: As above.
        bias: As above.
        max_num_seqs: As above.
        max_hold_s: Longest hold before a request is refused.
        max_held: Most requests held.
        refuse: One beyond these bounds is refused; else it is sent.
        listens: False: who waits at other gateways is not known here, as it was before they told each other.
    """

    __slots__ = ("_laters", "_listens", "_queue")

    def __init__(
        self,
        *,
        learn: bool = True,
        bias: float = 1.0,
        max_num_seqs: int = 0,
        max_hold_s: float = 50.0,
        max_held: int = 1000,
        refuse: bool = False,
        listens: bool = True,
    ) -> None:
        super().__init__(learn=learn, bias=bias, max_num_seqs=max_num_seqs)
        self._queue = HoldQueue(max_held=max_held, max_hold_s=max_hold_s, refuses=refuse)
        self._listens = listens
        self._laters: dict[int, WaitForRoom] = {}

    def on_left(self, request: PolicyRequest) -> None:
        """It is in no other's way."""
        self._queue.forget(request.request_id)
        self._laters.pop(request.request_id, None)

    def line(self) -> Sequence[Waiter]:
        """As the product tells it."""
        waiting = [later.waiter() for later in self._laters.values()]
        return nsmallest(MAX_WAITERS, waiting, key=lambda each: each.rank)

    def on_line(self, gateway: str, line: Sequence[Waiter], now_s: float) -> None:
        """They go before those here whose place is later."""
        if self._listens:
            self._queue.others.hear(gateway, line, now_s)

    def decide(self, view: FleetView) -> SendNow | WaitForRoom | TurnDown:
        """The product's decision, with the requests that wait in mind."""
        request = view.request
        before = self._laters.pop(request.request_id, None)
        claim = Claim(request.request_id, request.arrived_s, request.slo_ttft_s, before)
        decided = decide(self.snapshot(view), _SETTINGS, view.rng, 0, view.now_s, self._queue, claim)
        if isinstance(decided, WaitForRoom):
            self._laters[request.request_id] = decided
        return decided
