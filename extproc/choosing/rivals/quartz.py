"""QUARTZ: worker and moment by a high quantile of what requests may cost, not by its mean.

Source: Liu, Zheng, Kong, Zhao, "QUARTZ: Quantile-Aware Routing and Queueing for TTFT SLOs in LLM
Serving", Findings of ACL 2026, 37886-37896: the abstract alone was to be had. It says that the router
predicts conservative quantiles of a request's cost from what it sees itself, and uses them with its backlog
to choose workers and to admit, against head-of-line blocking and in keeping with fairness. Everything below
that is more exact is an assumption of ours, the constants too.

1. Cost of a prompt is its uncached tokens times the `quantile` of seconds per token among the last 64 prompts
   of its size (powers of two); a prompt took from when it was sent, or from the first token before it at that
   worker if that was later, to its own first token.
2. The worker is the one with the least cost of prompts under way plus own cost, ties at random.
3. A request waits while that worker has more than `window_s` of cost under way. Those that wait go in the
   order of arrival plus own cost: short ones first, and none overtaken for longer than it costs itself.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Final

from extproc.choosing.rivals.ties import least
from extproc.choosing.stateful import Decision, FleetView, Hold, Sent, StatefulPolicy

_SAMPLES: Final = 64
_PRIOR_S_PER_TOKEN: Final = 1.0 / 16_000.0
"""Until prompts of a size were seen: the order of an 8B to 32B model on one or two H100."""


class _Rate:
    """Quantile of seconds per token of one size of prompts."""

    __slots__ = ("_quantile", "_seen", "s_per_token")

    def __init__(self, quantile: float) -> None:
        self._quantile = quantile
        self._seen: deque[float] = deque(maxlen=_SAMPLES)
        self.s_per_token = _PRIOR_S_PER_TOKEN

    def observe(self, s_per_token: float) -> None:
        self._seen.append(s_per_token)
        ordered = sorted(self._seen)
        self.s_per_token = ordered[min(len(ordered) - 1, int(self._quantile * len(ordered)))]


class Quartz(StatefulPolicy):
    """Rules 1 to 3.

    Args:
        quantile: Of the cost, 0..1; assumed.
        window_s: Cost under way at a worker beyond which requests wait, > 0; assumed: two engine steps.
    """

    __slots__ = ("_backlog_s", "_ended_s", "_quantile", "_rates", "_under_way", "_window_s")

    def __init__(self, *, quantile: float = 0.9, window_s: float = 0.2) -> None:
        self._quantile = quantile
        self._window_s = window_s
        self._rates: dict[int, _Rate] = {}
        self._backlog_s: list[float] = []
        self._ended_s: list[float] = []
        self._under_way: dict[int, tuple[int, float, int]] = {}

    def cost_s(self, tokens: int) -> float:
        """Quantile of the cost of so many uncached tokens, seconds."""
        rate = self._rates.get(tokens.bit_length())
        return tokens * (_PRIOR_S_PER_TOKEN if rate is None else rate.s_per_token)

    def choose(self, view: FleetView) -> Decision:
        """One draw if tied."""
        if not self._backlog_s:
            self._backlog_s = [0.0] * len(view.keys)
            self._ended_s = [-inf] * len(view.keys)
        own_s = [self.cost_s(tokens) for tokens in view.uncached_tokens()]
        backlog_s = self._backlog_s
        row = least([ahead + own for ahead, own in zip(backlog_s, own_s, strict=True)], view.rng)
        if backlog_s[row] <= self._window_s:
            return row
        rank = view.request.arrived_s + min(own_s)
        return Hold(inf, rank, closed=min(backlog_s) > self._window_s)

    def on_sent(self, sent: Sent) -> None:
        """Its cost is under way."""
        tokens = max(1, sent.request.prompt_tokens - sent.matched_tokens)
        cost_s = self.cost_s(tokens)
        self._under_way[sent.request.request_id] = (sent.row, cost_s, tokens)
        self._backlog_s[sent.row] += cost_s

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """Learn what it took."""
        tokens = self._over(sent)
        if tokens is not None:
            began_s = max(sent.sent_s, self._ended_s[sent.row])
            rate = self._rates.setdefault(tokens.bit_length(), _Rate(self._quantile))
            rate.observe(max(0.0, now_s - began_s) / tokens)
            self._ended_s[sent.row] = now_s

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:  # noqa: ARG002 - of `StatefulPolicy`
        """Nothing of it is under way."""
        self._over(sent)

    def _over(self, sent: Sent) -> int | None:
        """Take its cost off, once; returns its uncached tokens."""
        found = self._under_way.pop(sent.request.request_id, None)
        if found is None:
            return None
        row, cost_s, tokens = found
        self._backlog_s[row] = max(0.0, self._backlog_s[row] - cost_s)
        return tokens
