"""The product's least completion, decided at once or late, with what it learns from its own answers."""

from __future__ import annotations

from dataclasses import replace

from extproc.choosing.completion import (
    DECODE_TOKENS,
    Backlog,
    Cost,
    PrefillModel,
    Traffic,
    costs,
    least,
    room_wait_s,
)
from extproc.choosing.holding import OPEN_STEPS, HoldQueue, Refuse, Wait
from extproc.predicting.tpot import TpotModel
from simulator.policies.view import Decision, Hold, Policy, Sent, Shed, View

_FIRST_OUTPUT_TOKENS = 200.0
"""Expected length of an answer before any was seen."""

_OUTPUT_GAIN = 0.02
"""Share of the newest answer's length in the expected one."""


class _Group:
    """What is learned of one group of endpoints."""

    __slots__ = ("prefill", "tpot")

    def __init__(self) -> None:
        self.prefill = PrefillModel()
        self.tpot = TpotModel()


class LeastCompletion(Policy):
    """Decides at once.

    Args:
        learn: False leaves every price at its prior: a predictor that never gets warm.
    """

    __slots__ = ("_first_s", "_groups", "_learn", "_output_tokens", "_sent", "_traffic", "_work")

    def __init__(self, *, learn: bool = True) -> None:
        self._learn = learn
        self._groups: dict[str, _Group] = {}
        self._traffic = Traffic()
        self._output_tokens = _FIRST_OUTPUT_TOKENS
        self._sent: dict[int, tuple[str, Backlog, int, int]] = {}
        self._first_s: dict[int, float] = {}
        self._work: tuple[str, Backlog, int, int] | None = None

    def backlogs(self, view: View) -> list[Backlog]:
        """What is on each endpoint, by the books; what was generated so far is taken for half an answer."""
        half = self._output_tokens / 2
        found = []
        for row, requests in enumerate(view.requests):
            decoding = max(0, requests - view.prefilling[row])
            context = view.context_tokens[row] - view.prompt_tokens[row] + decoding * half
            found.append(
                Backlog(
                    view.prefilling[row],
                    view.prefill_tokens[row],
                    view.prompt_tokens[row],
                    decoding,
                    max(0.0, context),
                )
            )
        return found

    def costs(self, view: View, backlogs: list[Backlog], held_s: float = 0.0) -> list[Cost]:
        """One per endpoint."""
        request = view.request
        times_s, rooms_s, steps_s = [], [], []
        for row, (backlog, cached) in enumerate(zip(backlogs, view.matched_tokens(), strict=True)):
            group = self._group(view.groups[row])
            uncached, kv_tokens = request.prompt_tokens - cached, view.kv_tokens[row]
            running = backlog.decoding + backlog.prefilling
            step_s = group.tpot.predict(running, backlog.context_tokens + backlog.prompt_tokens)
            times_s.append(group.prefill.times_s(backlog, uncached, cached))
            rooms_s.append(
                room_wait_s(
                    backlog.prefill_tokens + uncached,
                    view.kv_usage[row] * kv_tokens,
                    kv_tokens,
                    self._output_tokens,
                    step_s,
                )
            )
            steps_s.append(step_s)
        decode_tokens = DECODE_TOKENS
        if request.slo_ttft_s is not None and request.slo_tpot_s:
            decode_tokens = request.slo_ttft_s / request.slo_tpot_s
        followers = self._traffic.followers_per_s(view.now_s, len(backlogs) / view.gateways)
        return costs(times_s, rooms_s, steps_s, followers, decode_tokens, held_s)

    def choose(self, view: View) -> Decision:
        """One draw if tied."""
        backlogs = self.backlogs(view)
        costs_s = self.costs(view, backlogs)
        row = least(costs_s, view.rng)
        self.place(view, row, backlogs[row], costs_s[row])
        return row

    def place(self, view: View, row: int, backlog: Backlog, cost: Cost) -> None:
        """Note what was decided, for learning."""
        cached = view.matched_tokens()[row]
        self._work = (view.groups[row], backlog, view.request.prompt_tokens - cached, cached)
        self._traffic.placed(view.now_s, cost.work_s)

    def on_sent(self, sent: Sent) -> None:
        """Remember what it was predicted from."""
        assert self._work is not None, "sent is what was chosen"
        self._sent[sent.request.request_id] = self._work

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """Learn the prefill."""
        request_id = sent.request.request_id
        group, backlog, uncached, cached = self._sent[request_id]
        self._first_s[request_id] = now_s
        if self._learn:
            self._group(group).prefill.learn(backlog, uncached, cached, now_s - sent.sent_s)

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:
        """Learn the length and the pace of the answer."""
        request_id = sent.request.request_id
        group, backlog, *_ = self._sent.pop(request_id)
        first_s = self._first_s.pop(request_id, None)
        if output_tokens:
            self._output_tokens += _OUTPUT_GAIN * (output_tokens - self._output_tokens)
        if self._learn and first_s is not None and output_tokens > 1 and now_s > first_s:
            running = backlog.decoding + backlog.prefilling
            context = backlog.context_tokens + backlog.prompt_tokens
            self._group(group).tpot.learn(running, context, (now_s - first_s) / (output_tokens - 1))

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

    __slots__ = ("_queue",)

    def __init__(self, *, learn: bool = True, max_hold_s: float = 30.0, max_held: int = 1000) -> None:
        super().__init__(learn=learn)
        self._queue = HoldQueue(max_held=max_held, max_hold_s=max_hold_s)

    def choose(self, view: View) -> Decision:
        """One draw if tied."""
        request, queue = view.request, self._queue
        backlogs = self.backlogs(view)
        costs_s = self.costs(view, backlogs, queue.least_s)
        rank = queue.rank(request.arrived_s, [cost.work_s for cost in costs_s])
        ahead_s = queue.ahead_s(request.request_id, rank, len(costs_s))
        costs_s = [
            replace(cost, wait_s=cost.wait_s + ahead) for cost, ahead in zip(costs_s, ahead_s, strict=True)
        ]
        opens_s = [
            OPEN_STEPS * self._group(name).prefill.step_s(backlog)
            for name, backlog in zip(view.groups, backlogs, strict=True)
        ]
        verdict = queue.decide(
            request.request_id,
            request.arrived_s,
            view.now_s,
            costs_s,
            opens_s,
            least(costs_s, view.rng),
            request.slo_ttft_s,
        )
        if isinstance(verdict, Wait):
            return Hold(verdict.until_s, verdict.rank, verdict.closed)
        if isinstance(verdict, Refuse):
            return Shed(verdict.retry_after_s)
        self.place(view, verdict.row, backlogs[verdict.row], costs_s[verdict.row])
        return verdict.row
