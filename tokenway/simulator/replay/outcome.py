"""What a run gives: what became of each request, and what the engines did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Served:
    """What became of one request.

    Attributes:
        index: In the trace.
        arrived_s: At the gateway, for the first time.
        sent_s: To the engine; None if it never was.
        row: Its endpoint, or None.
        first_s: When its first token came; None if it was refused or abandoned.
        end_s: When its last token came, it was refused for good, or its client left.
        prompt_tokens: Real length.
        output_tokens: Real length.
        cached_tokens: What its engine had cached at admission.
        best_tokens: What the best of all engines had cached when it was sent, at a router block's precision.
        available_tokens: What a cache of the whole fleet that forgets nothing would have had.
        foreseen_tokens: What the gateway expected to be cached where it was sent.
        decisions: How often its gateway decided.
        decision_s: Real time of those decisions, seconds.
        tries: How often it came, >= 1.
        held_s: How long it was held.
        is_abandoned: Its client left before the first token.
        admitted_s: When its engine began with it; None if it never did.
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
    available_tokens: int = 0
    foreseen_tokens: int = 0
    decisions: int = 0
    decision_s: float = 0.0
    tries: int = 1
    held_s: float = 0.0
    is_abandoned: bool = False
    admitted_s: float | None = None


@dataclass(slots=True)
class Replayed:
    """A whole run.

    Attributes:
        served: In the order of their ends.
        computed_tokens: Per endpoint, tokens by the second in which they were computed, 0 the first.
        steps: Of all engines.
        preemptions: Of all engines.
        end_s: Last event.
    """

    served: list[Served] = field(default_factory=list)
    computed_tokens: list[Counter[int]] = field(default_factory=list)
    steps: int = 0
    preemptions: int = 0
    end_s: float = 0.0
