"""What a gateway says of a request beside where it may go: whose it is and how much it matters."""

from __future__ import annotations

from typing import Final

from metadata_center.types import value

OBJECTIVE_NAME: Final = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
"""Of an InferenceObjective, as of any Kubernetes object: RFC 1123."""


@value
class Standing:
    """What of a request's headers is no matter of its prompt.

    Attributes:
        objective: Name of an InferenceObjective; None names none.
        priority: Of that objective; 0 where it has none. Of requests that wait the higher one goes first;
            below 0 none waits.
        fairness_id: The tenant that the gateway counts it for; None names none. Of requests that wait each
            tenant has its turn.
        is_known: False if nothing here says what the objective's priority is.
    """

    objective: str | None
    priority: int
    fairness_id: str | None
    is_known: bool = True
