"""SMetric: stay where the conversation's cache is while its time to first token allows it, else least work.

Source: vllm-project/router `src/policies/smetric.rs` at 8bef7312; parameters, which its code leaves to the
operator, from the paper's prototype: hit ratio 0.5, slack 1, a TTFT budget of 1 s + prompt/16,000 tokens.

work(n, L) = n + n·(L - n/2)/`attention_tokens` for n uncached of L tokens: what attention adds to the linear
layers. An endpoint's pending work is released at the first token; its speed is the 90th percentile of work /
elapsed over the last 64 requests, unknown before 8 (then any budget is met).

1. The endpoint with the longest match is kept if this is not a first turn, the match is over `hit_ratio` of
   what the conversation was before this turn, and pending + own work meets the budget there or nowhere.
2. Else the least (pending + own work) · requests, scanned from an endpoint that moves on by one each time.

Assumed: tokens for characters; the matches of the view in use (as shipped: a text tree of what was routed,
which is the view "history"). Whether this is a first turn is read from the messages there; here a turn is a
follow-up if its session was seen, or, without session names, if an endpoint matches more than all do. "What
the conversation was" is the session's previous prompt, or, without session names, the whole prompt, which
is stricter.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from math import ceil
from typing import Final

from extproc.choosing.stateful import FleetView, Sent, StatefulPolicy

_WINDOW: Final = 64
_MIN_SAMPLES: Final = 8
_RATE_SHARE: Final = 0.9
_SESSIONS: Final = 65_536
"""Sessions remembered; the least recently used is forgotten."""


class SMetric(StatefulPolicy):
    """Rules 1 and 2.

    Args:
        hit_ratio: As above.
        slack: Factor on the budget.
        budget_base_s: As above.
        budget_tokens_per_s: As above.
        attention_tokens: Context at which attention costs as much as the linear layers: 2·parameters / (4 ·
            layers · heads · head size), 30,600 for an 8B Llama.
    """

    __slots__ = (
        "_attention_tokens",
        "_budget_base_s",
        "_budget_tokens_per_s",
        "_charged",
        "_hit_ratio",
        "_pending",
        "_rates",
        "_samples",
        "_sessions",
        "_slack",
        "_start",
        "_work",
    )

    def __init__(
        self,
        *,
        hit_ratio: float = 0.5,
        slack: float = 1.0,
        budget_base_s: float = 1.0,
        budget_tokens_per_s: float = 16_000.0,
        attention_tokens: float = 30_600.0,
    ) -> None:
        self._hit_ratio = hit_ratio
        self._slack = slack
        self._budget_base_s = budget_base_s
        self._budget_tokens_per_s = budget_tokens_per_s
        self._attention_tokens = attention_tokens
        self._start = 0
        self._pending: list[int] = []
        self._rates: list[float | None] = []
        self._samples: list[deque[float]] = []
        self._work: list[int] = []
        self._charged: dict[int, int] = {}
        self._sessions: OrderedDict[str, int] = OrderedDict()

    def work(self, uncached_tokens: int, prompt_tokens: int) -> int:
        """Prefill work in tokens of linear layers, rounded up."""
        attention = uncached_tokens * (prompt_tokens - uncached_tokens / 2) / self._attention_tokens
        return ceil(uncached_tokens + attention)

    def choose(self, view: FleetView) -> int:
        """No draw."""
        rows = len(view.keys)
        if not self._pending:
            self._pending = [0] * rows
            self._rates = [None] * rows
            self._samples = [deque(maxlen=_WINDOW) for _ in range(rows)]
        prompt = view.request.prompt_tokens
        order = [(self._start + step) % rows for step in range(rows)]
        self._start = (self._start + 1) % rows
        matched = view.matched_tokens()
        self._work = [self.work(prompt - cached, prompt) for cached in matched]
        queued = [pending + work for pending, work in zip(self._pending, self._work, strict=True)]
        budget_s = self._slack * (self._budget_base_s + prompt / self._budget_tokens_per_s)
        meets = [
            rate is None or work / rate <= budget_s for work, rate in zip(queued, self._rates, strict=True)
        ]
        home = max(order, key=matched.__getitem__)
        expected = self._expected_hit(view, matched)
        follows = expected is not None and matched[home] > self._hit_ratio * expected
        if follows and (meets[home] or not any(meets)):
            return home
        return min(order, key=lambda row: queued[row] * view.requests[row])

    def on_sent(self, sent: Sent) -> None:
        """Charge its work, and remember how long the conversation is."""
        request = sent.request
        work = self._work[sent.row]
        self._charged[request.request_id] = work
        self._pending[sent.row] += work
        if request.session is not None:
            self._sessions[request.session] = request.prompt_tokens
            self._sessions.move_to_end(request.session)
            if len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """Release its work and learn how fast it was done."""
        work = self._release(sent)
        if work and now_s > sent.sent_s:
            samples = self._samples[sent.row]
            samples.append(work / (now_s - sent.sent_s))
            if len(samples) >= _MIN_SAMPLES:
                self._rates[sent.row] = sorted(samples)[round((len(samples) - 1) * _RATE_SHARE)]

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:  # noqa: ARG002 - of `StatefulPolicy`
        """Release its work, if it ended without a first token."""
        self._release(sent)

    def _release(self, sent: Sent) -> int:
        work = self._charged.pop(sent.request.request_id, 0)
        self._pending[sent.row] -= work
        return work

    def _expected_hit(self, view: FleetView, matched: list[int]) -> int | None:
        """Tokens the conversation had before this turn; None at a first turn."""
        session = view.request.session
        if session is not None:
            return self._sessions.get(session)
        return view.request.prompt_tokens if max(matched) > min(matched) else None
