"""What `least_completion` learns from this worker's own requests, per model and endpoint group.

Rules:
    1. One `Completion` per group, at most as many as the predictor keeps; the least recently used goes first.
    2. A decision takes values out of it (`Learned`), so its record stays what it was.
    3. What one endpoint says teaches as far as the others of its group agree (docs/adr/0018).
"""

from __future__ import annotations

from collections import OrderedDict
from math import inf
from typing import Final

from extproc.choosing.completion import DECODE_TOKENS, PrefillModel, Traffic
from extproc.choosing.least_completion import backlog, has_room
from extproc.predicting.agreement import Agreement
from extproc.predicting.lengths import AnswerLength
from extproc.predicting.predictor import TIMES_FACTOR
from extproc.types import Learned, Snapshot
from metadata_center.types import EndpointKey

MAX_GROUPS: Final = 1024
"""As many as the predictor keeps."""

FIRST_OUTPUT_TOKENS: Final = 200.0
"""Expected length of an answer before any was seen: public conversation traces have means of 200 to 350."""

SLO_TTFT_HEADER: Final = "x-slo-ttft-ms"
SLO_TPOT_HEADER: Final = "x-slo-tpot-ms"

_MOST_DECODE_TOKENS: Final = 100_000.0


class Completion:
    """One group."""

    __slots__ = ("_agreement", "_lengths", "prefill", "traffic")

    def __init__(self) -> None:
        self.prefill = PrefillModel()
        self.traffic = Traffic()
        self._agreement = Agreement(TIMES_FACTOR)
        self._lengths = AnswerLength(FIRST_OUTPUT_TOKENS)

    @property
    def output_tokens(self) -> float:
        """Usual length of an answer."""
        return self._lengths.expected_tokens

    def learned(self, now_s: float, endpoints: float, decode_tokens: float) -> Learned:
        """The values in force, for one decision.

        Args:
            now_s: The time.
            endpoints: How many take what this worker places, > 0.
            decode_tokens: See `decode_tokens_of`.
        """
        traffic = self.traffic
        return Learned(
            self.prefill.prices_s,
            traffic.followers_per_s(now_s, endpoints),
            decode_tokens,
            traffic.rate_per_s(now_s, endpoints),
        )

    def observe(
        self, snapshot: Snapshot, row: int, uncached_tokens: int, cached_tokens: int, ttft_s: float
    ) -> None:
        """A first token came `ttft_s` after its request was sent."""
        if not has_room(snapshot, row):
            return
        ahead, uncached_tokens = backlog(snapshot, row), max(1, uncached_tokens)
        if 0.0 < ttft_s < inf:
            expected_s = self.prefill.ttft_s(ahead, uncached_tokens, cached_tokens)
            ttft_s = self._agreement.believed(
                snapshot.keys[row], ttft_s, expected_s, self.prefill.reference_s
            )
            if self._agreement.is_contradicted():
                self.prefill = PrefillModel()
        self.prefill.learn(ahead, uncached_tokens, cached_tokens, ttft_s)

    def answered(self, endpoint: EndpointKey, output_tokens: int) -> None:
        """An answer of `endpoint` had so many tokens."""
        self._lengths.learn(endpoint, float(output_tokens))


class Completions:
    """All groups."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, str], Completion] = OrderedDict()

    def __getitem__(self, group: tuple[str, str]) -> Completion:
        found = self._groups.get(group)
        if found is None:
            if len(self._groups) >= MAX_GROUPS:
                self._groups.popitem(last=False)
            found = self._groups[group] = Completion()
        else:
            self._groups.move_to_end(group)
        return found


def limit_s_of(ttft_ms: str | None) -> float | None:
    """The request's own limit on the time to its first token, in seconds; None if it has none."""
    if ttft_ms is None:
        return None
    try:
        limit_ms = float(ttft_ms)
    except ValueError:
        return None
    return limit_ms / 1000.0 if 0.0 < limit_ms < inf else None


def decode_tokens_of(ttft_ms: str | None, tpot_ms: str | None) -> float:
    """What a token of decoding counts: the request's own limit on TTFT over that on TPOT, if it has both."""
    if ttft_ms is None or tpot_ms is None:
        return DECODE_TOKENS
    try:
        ratio = float(ttft_ms) / float(tpot_ms)
    except (ValueError, ZeroDivisionError):
        return DECODE_TOKENS
    return ratio if 0.0 < ratio <= _MOST_DECODE_TOKENS else DECODE_TOKENS
