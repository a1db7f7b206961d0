"""What answers teach: lengths, first tokens and pace of completed requests, beside what was foreseen.

Rules:
    1. Nothing is learned from a request that did not complete; that is the caller's to know.
    2. What the engine reports goes before what was believed.
    3. A first token that waited for more than prefill says nothing of the prices of prefill.
    4. The first answers of a group teach at their first token already, with what was believed to be cached:
       until they end, all decisions would be made at the prior prices.
"""

from __future__ import annotations

from math import inf
from typing import Final

from extproc.choosing.rows import backlog, has_room
from extproc.choosing.snapshots import batch_of
from extproc.predicting.predictor import ModelKey, Predictor
from extproc.values.choices import Snapshot
from metadata_center.types import value

LEARN_INTERVAL_S: Final = 0.02
"""One TTFT and one TPOT are learned per model and group and this interval: 50 a second follow any drift (the
models remember 200) and bound what learning costs at any rate of requests."""

COLD_ANSWERS: Final = 50
"""First tokens that a group learns from before their answers end. Fifty bring the error of an engine unlike
the prior down to that of its noise; later ones wait for what the engine counts."""

MAX_GROUPS: Final = 1024
"""As many as the predictor keeps."""


MOST_OFF: Final = 4.0
OFF_TOKENS: Final = 1024
"""How far the estimate of a prompt may be off: from 0.25 tokens per byte to one, and the text of a template.
A prompt of another length than ours would teach what no other endpoint can speak against."""


@value
class Lesson:
    """What one completed request may teach.

    Attributes:
        key: Model and group of the endpoint that served it.
        snapshot: What its decision looked at.
        row: The endpoint that served it.
        prompt_tokens: As the engine counted; None if it did not say.
        cached_tokens: Likewise.
        output_tokens: Likewise, of one choice.
        ttft_s: From sending to the first token; None if that is not known.
        stream_s: From the first token to the last; None if that is not known.
        predicted_ttft_s: What was foreseen; None if nothing was.
        predicted_tpot_s: Likewise.
    """

    key: ModelKey
    snapshot: Snapshot
    row: int
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    ttft_s: float | None
    stream_s: float | None
    predicted_ttft_s: float | None = None
    predicted_tpot_s: float | None = None


class Learner:
    """Teaches a predictor.

    Args:
        predictor: Learns.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._learned_s: dict[ModelKey, float] = {}
        self._early: dict[ModelKey, int] = {}

    def is_cold(self, key: ModelKey) -> bool:
        """Whether a group learns from first tokens of answers that go on."""
        return self._early.get(key, 0) < COLD_ANSWERS

    def first_token(self, answer: Lesson) -> bool:
        """Learn the first token of an answer that goes on, while its group is cold; True if that was done."""
        early = self._early.get(answer.key, 0)
        if early >= COLD_ANSWERS:
            return False
        if len(self._early) >= MAX_GROUPS:
            self._early.clear()
        self._early[answer.key] = early + 1
        self._first_token(answer, teaches=True)
        return True

    def is_due(self, key: ModelKey, now_s: float) -> bool:
        """Whether `learn` would learn from an answer of a group."""
        return now_s - self._learned_s.get(key, -inf) >= LEARN_INTERVAL_S

    def learn(self, answer: Lesson, now_s: float, *, is_first_learned: bool = False) -> None:
        """Learn first token and pace of an answer that ended; one per group and `LEARN_INTERVAL_S`.

        Args:
            answer: All of it.
            now_s: Monotonic time.
            is_first_learned: `first_token` did; what was foreseen is still compared with what came.
        """
        key = answer.key
        if not self.is_due(key, now_s):
            return
        if len(self._learned_s) >= MAX_GROUPS:
            self._learned_s.clear()
        self._learned_s[key] = now_s
        self._first_token(answer, teaches=not is_first_learned)
        self._pace(answer)

    def _first_token(self, answer: Lesson, *, teaches: bool) -> None:
        if answer.ttft_s is None or answer.ttft_s <= 0.0:
            return
        snapshot, row = answer.snapshot, answer.row
        cached = snapshot.cached_tokens[row] if answer.cached_tokens is None else answer.cached_tokens
        prompt = snapshot.prompt_tokens
        if answer.prompt_tokens is not None:
            least, most = int(prompt / MOST_OFF), int(prompt * MOST_OFF) + OFF_TOKENS
            prompt = max(least, min(answer.prompt_tokens, most))
        cached = min(cached, prompt)
        self._predictor.observe_ttft(
            answer.key,
            backlog(snapshot, row),
            uncached=max(0, prompt - cached),
            cached=cached,
            predicted_s=answer.predicted_ttft_s,
            actual_s=answer.ttft_s,
            weight=snapshot.weights[row],
            endpoint=snapshot.keys[row],
            teaches=teaches and has_room(snapshot, row),
        )

    def _pace(self, answer: Lesson) -> None:
        tokens = answer.output_tokens
        if tokens is None or tokens <= 1 or not answer.stream_s:
            return
        batch, context = batch_of(answer.snapshot, answer.row)
        self._predictor.observe_tpot(
            answer.key,
            batch=batch,
            context=context,
            predicted_s=answer.predicted_tpot_s,
            actual_s=answer.stream_s / (tokens - 1),
            weight=answer.snapshot.weights[answer.row],
            endpoint=answer.snapshot.keys[answer.row],
        )
