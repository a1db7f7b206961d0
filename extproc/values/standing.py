"""What a gateway says of a request beside where it may go: whose it is and how much it matters."""

from __future__ import annotations

from metadata_center.types import value


@value
class Standing:
    """What of a request's headers is no matter of its prompt.

    Attributes:
        objective: Name of an InferenceObjective; None names none.
        priority: Of that objective; 0 where it has none. Of requests that wait the higher one goes first;
            below 0 none waits.
        fairness_id: The tenant that the gateway counts it for; None names none. Of requests that wait each
            tenant has its turn.
    """

    objective: str | None
    priority: int
    fairness_id: str | None
