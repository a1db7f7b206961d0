"""Endings as counts: a listener that feeds the metrics."""

from __future__ import annotations

from extproc.observing.recorder import Recorder
from extproc.values.endings import Ending
from extproc.values.requests import COMPUTING_NOTHING


class EndingCounts:
    """Counts endings.

    Args:
        recorder: Counts.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def ended(self, ending: Ending) -> None:
        """Count one ending, with all it shows about our predictions."""
        record, outcome, request, recorder = ending.record, ending.outcome, ending.request, self._recorder
        if request is None:
            if record.rejected is not None:
                recorder.rejected(record.rejected, record.model, outcome.status or 0)
            return
        if outcome.attempts and outcome.endpoint != record.chosen:
            recorder.fell_back(record.cluster or "")
        says_nothing = outcome.prompt_tokens is None and outcome.completion_tokens is None
        if says_nothing and ending.is_answered and request.operation not in COMPUTING_NOTHING:
            recorder.usage_unknown(record.model, ending.usage_unseen or "absent")
        waited_s = record.held_s + ending.retried_s
        recorder.observe_end(request.operation, record.model, outcome, waited_s, ending.tpot_s)
