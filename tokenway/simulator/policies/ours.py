"""The product's least completion, decided at once or late, with what it learns from its own answers.

Here is only what the product's router does around `extproc.choosing`: a snapshot is made, and answers teach.
"""

from __future__ import annotations

from extproc.choosing.completion import DECODE_TOKENS, Backlog, PrefillModel, Traffic
from extproc.choosing.deciding import Claim, Later, No, Now, decide
from extproc.choosing.holding import HoldQueue
from extproc.choosing.least_completion import backlog, has_room
from extproc.choosing.seats import Seats
from extproc.choosing.settings import LoadBalancing
from extproc.predicting.tpot import TpotModel
from extproc.types import Learned, Snapshot
from metadata_center.types import value
from tokenway.simulator.policies.view import Decision, Hold, Policy, Sent, Shed, View

_FIRST_OUTPUT_TOKENS = 200.0
"""Expected length of an answer before any was seen."""

_OUTPUT_GAIN = 0.02
"""Share of the newest answer's length in the expected one."""


_SETTINGS = LoadBalancing(fallbacks=0)
"""The product's default policy; nothing fails here, so there is no second choice."""


class _Group:
    """What is learned of one group of endpoints."""

    __slots__ = ("prefill", "tpot")

    def __init__(self) -> None:
        self.prefill = PrefillModel()
        self.tpot = TpotModel()


@value
class _Lesson:
    """What an answer will be compared with.

    Attributes:
        group: Of its endpoint.
        backlog: Of its endpoint when it was sent.
        uncached_tokens: Of its prompt.
        cached_tokens: Of its prompt.
        has_room: See `extproc.choosing.least_completion.has_room`.
    """

    group: str
    backlog: Backlog
    uncached_tokens: int
    cached_tokens: int
    has_room: bool


class LeastCompletion(Policy):
    """Decides at once.

    Args:
        learn: False leaves every price at its prior: a predictor that never gets warm.
    """

    __slots__ = (
        "_first_s",
        "_groups",
        "_learn",
        "_lesson",
        "_output_tokens",
        "_scraped_s",
        "_seats",
        "_sent",
        "_traffic",
    )

    def __init__(self, *, learn: bool = True) -> None:
        self._learn = learn
        self._groups: dict[str, _Group] = {}
        self._traffic = Traffic()
        self._output_tokens = _FIRST_OUTPUT_TOKENS
        self._seats: list[Seats] = []
        self._scraped_s: list[float] = []
        self._sent: dict[int, _Lesson] = {}
        self._first_s: dict[int, float] = {}
        self._lesson: _Lesson | None = None

    def snapshot(self, view: View) -> Snapshot:
        """What the product's router would hand to its policy."""
        self._read_metrics(view)
        request, half = view.request, self._output_tokens / 2
        groups = [self._group(name) for name in view.groups]
        decode_tokens = DECODE_TOKENS
        if request.slo_ttft_s is not None and request.slo_tpot_s:
            decode_tokens = request.slo_ttft_s / request.slo_tpot_s
        steps_s = [
            group.tpot.predict(requests, context + max(0, requests - prefilling) * half)
            for group, requests, prefilling, context in zip(
                groups, view.requests, view.prefilling, view.context_tokens, strict=True
            )
        ]
        share = len(groups) / view.gateways
        return Snapshot(
            keys=view.keys,
            requests=view.requests,
            prefill_tokens=view.prefill_tokens,
            context_tokens=view.context_tokens,
            matched_blocks=view.matched_blocks,
            num_blocks=len(request.blocks),
            weights=[1.0] * len(groups),  # what weights stand for is learned per group
            prefilling=view.prefilling,
            cached_tokens=view.matched_tokens(),
            steps_s=steps_s,
            kv_tokens=view.kv_tokens,
            prompt_tokens=request.prompt_tokens,
            output_tokens=self._output_tokens,
            learned=Learned(
                groups[0].prefill.prices_s,
                self._traffic.followers_per_s(view.now_s, share),
                decode_tokens,
                self._traffic.rate_per_s(view.now_s, share),
                tuple(group.prefill.prices_s for group in groups),
            ),
            seats=[seats.limit for seats in self._seats],
            kv_used=[
                int(usage * tokens) for usage, tokens in zip(view.kv_usage, view.kv_tokens, strict=True)
            ],
            under_way_s=[
                view.now_s - since_s if prefilling else 0.0
                for since_s, prefilling in zip(view.since_s, view.prefilling, strict=True)
            ]
            if view.since_s
            else (),
        )

    def choose(self, view: View) -> Decision:
        """One draw if tied."""
        decided = self.decide(view)
        if isinstance(decided, Later):
            wait = decided.wait
            return Hold(wait.until_s, wait.rank, wait.closed, polls=True)
        if isinstance(decided, No):
            return Shed(decided.retry_after_s)
        return self.place(view, decided)

    def decide(self, view: View) -> Now | Later | No:
        """The product's decision, at once."""
        return decide(self.snapshot(view), _SETTINGS, view.rng, 0, view.now_s)

    def place(self, view: View, decided: Now) -> int:
        """Note what was decided, for learning; returns the row."""
        row, snapshot = decided.choice.order[0], decided.snapshot
        cached = snapshot.cached_tokens[row]
        self._lesson = _Lesson(
            view.groups[row],
            backlog(snapshot, row),
            snapshot.prompt_tokens - cached,
            cached,
            has_room(snapshot, row),
        )
        if decided.costs is not None:
            self._traffic.placed(view.now_s, decided.costs.works_s[row])
        return row

    def on_sent(self, sent: Sent) -> None:
        """Remember what it was predicted from."""
        assert self._lesson is not None, "sent is what was chosen"
        self._sent[sent.request.request_id] = self._lesson

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """Learn the prefill."""
        request_id = sent.request.request_id
        lesson = self._sent[request_id]
        self._first_s[request_id] = now_s
        if self._learn and lesson.has_room:
            prefill, ttft_s = self._group(lesson.group).prefill, now_s - sent.sent_s
            prefill.learn(lesson.backlog, lesson.uncached_tokens, lesson.cached_tokens, ttft_s)

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:
        """Learn the length and the pace of the answer."""
        request_id = sent.request.request_id
        lesson = self._sent.pop(request_id)
        first_s = self._first_s.pop(request_id, None)
        if output_tokens:
            self._output_tokens += _OUTPUT_GAIN * (output_tokens - self._output_tokens)
        if self._learn and first_s is not None and output_tokens > 1 and now_s > first_s:
            running = lesson.backlog.decoding + lesson.backlog.prefilling
            context = lesson.backlog.context_tokens + lesson.backlog.prompt_tokens
            self._group(lesson.group).tpot.learn(running, context, (now_s - first_s) / (output_tokens - 1))

    def _read_metrics(self, view: View) -> None:
        """Learn from what was scraped since the last look."""
        if not self._seats:
            self._seats = [Seats() for _ in view.keys]
            self._scraped_s = [-1.0] * len(view.keys)
        for row, scraped_s in enumerate(view.scraped_s):
            if scraped_s != self._scraped_s[row]:
                self._scraped_s[row] = scraped_s
                self._seats[row].observe(view.running[row], view.waiting[row], view.kv_usage[row])

    def _group(self, name: str) -> _Group:
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group()
        return group


class LateCompletion(LeastCompletion):
    """Holds a request while its best endpoint is full.

    Args:
        learn: As above.
        max_hold_s: Longest hold before a request is refused.
        max_held: Most requests held.
    """

    __slots__ = ("_laters", "_queue")

    def __init__(self, *, learn: bool = True, max_hold_s: float = 30.0, max_held: int = 1000) -> None:
        super().__init__(learn=learn)
        self._queue = HoldQueue(max_held=max_held, max_hold_s=max_hold_s)
        self._laters: dict[int, Later] = {}

    def decide(self, view: View) -> Now | Later | No:
        """The product's decision, with the requests that wait in mind."""
        request = view.request
        before = self._laters.pop(request.request_id, None)
        claim = Claim(request.request_id, request.arrived_s, request.slo_ttft_s, before)
        decided = decide(self.snapshot(view), _SETTINGS, view.rng, 0, view.now_s, self._queue, claim)
        if isinstance(decided, Later):
            self._laters[request.request_id] = decided
        return decided
