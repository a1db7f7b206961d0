"""What a run gives: what became of each request, and what the engines did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Served:
    """What became of one request.

    Attributes:
        index: In the trace.
        arrived_s: At the gateway.
        sent_s: To the engine; None if it never was.
        row: Its endpoint, or None.
        first_s: When its first token came; None if it was refused.
        end_s: When its last token came, or it was refused.
        prompt_tokens: Real length.
        output_tokens: Real length.
        cached_tokens: What its engine had cached at admission.
        best_tokens: What the best of all engines had cached when it was sent, at a router block's precision.
        decisions: How often its gateway decided.
        decision_s: Real time of those decisions, seconds.
    """

    index: int
    arrived_s: float
    sent_s: float | None
    row: int | None
    first_s: float | None
    end_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    best_tokens: int = 0
    decisions: int = 0
    decision_s: float = 0.0


@dataclass(slots=True)
class Replayed:
    """A whole run.

    Attributes:
        served: In the order of their ends.
        computed_tokens: Per endpoint, tokens computed in each second of the run.
        steps: Of all engines.
        preemptions: Of all engines.
        end_s: Last event.
    """

    served: list[Served] = field(default_factory=list)
    computed_tokens: list[list[int]] = field(default_factory=list)
    steps: int = 0
    preemptions: int = 0
    end_s: float = 0.0
