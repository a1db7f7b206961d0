"""What requests teach the predictor: first tokens as they come, and answers at their end.

Rules:
    1. Nothing is learned from a request that did not complete.
    2. Time to first token and pace are learned where nothing else is mixed in: one attempt, a stream, at an
       endpoint that was a candidate.
"""

from __future__ import annotations

from extproc.choosing.foreseen import foreseen_tpot_s
from extproc.choosing.learning import Learner, Lesson
from extproc.predicting.predictor import Predictor
from extproc.values.endings import Ending
from extproc.values.inflight import Inflight


class Teaching:
    """Teaches a predictor; listens to endings.

    Args:
        predictor: Learns.
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._learner = Learner(predictor)

    def first_token(self, request: Inflight, ttft_s: float) -> None:
        """The first token of a request came after so long; it teaches while its group is cold.

        Nothing is learned if another endpoint serves than was chosen.
        """
        record = request.record
        row, snapshot = record.row(request.endpoint), record.snapshot
        if row is None or snapshot is None or request.endpoint != record.chosen:
            return
        key = request.key(row)
        if self._learner.is_cold(key):
            self._learner.first_token(Lesson(key, snapshot, row, None, None, None, ttft_s, None))
            request.is_learned = True

    def ended(self, ending: Ending) -> None:
        """Learn from an answer: tokens per byte, its length, its times."""
        request = ending.request
        if request is None or not ending.is_answered:
            return
        record, outcome, predictor = ending.record, ending.outcome, self._predictor
        if outcome.prompt_tokens and record.prompt_bytes:
            predictor.observe_usage(
                record.model, record.prompt_bytes, outcome.prompt_tokens, request.endpoint
            )
        choice_tokens = ending.choice_tokens
        if choice_tokens:
            predictor.traffic((record.model, request.group)).answered(request.endpoint, choice_tokens)
        row, snapshot = ending.row, record.snapshot
        if row is None or snapshot is None or outcome.attempts != 1 or not record.stream:
            return
        key = request.key(row)
        if not self._learner.is_due(key, ending.now_s):
            return
        self._learner.learn(
            Lesson(
                key,
                snapshot,
                row,
                outcome.prompt_tokens,
                outcome.cached_tokens,
                choice_tokens,
                outcome.ttft_s,
                ending.stream_s,
                outcome.predicted_ttft_s,
                foreseen_tpot_s(record, row),
            ),
            ending.now_s,
            is_first_learned=request.is_learned,
        )
