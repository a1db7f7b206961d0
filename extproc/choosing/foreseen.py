"""What a decision expected of one of its candidates."""

from __future__ import annotations

from extproc.choosing.rows import expected_ttft_s
from extproc.choosing.snapshots import row_step_s
from extproc.values.decisions import DecisionRecord


def foreseen_ttft_s(record: DecisionRecord, row: int) -> float | None:
    """Time to first token expected of candidate `row`, in seconds; None for a rejected request."""
    return None if record.snapshot is None else expected_ttft_s(record.snapshot, row)


def foreseen_tpot_s(record: DecisionRecord, row: int) -> float | None:
    """Time per output token expected of candidate `row`, in seconds; None for a rejected request."""
    snapshot = record.snapshot
    if snapshot is None:
        return None
    return snapshot.steps_s[row] if snapshot.steps_s else row_step_s(record.prices, snapshot, row)
