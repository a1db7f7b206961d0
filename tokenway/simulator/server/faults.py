"""Faults a test can switch on.

Rules:
    1. A fault takes the next `count` generation requests, one each, or all of them until it is cleared.
    2. `slow` and the health status hold as long as the fault is set, whatever the count.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class FaultKind(StrEnum):
    """What goes wrong."""

    NONE = "none"
    STATUS = "status"
    RESET_BEFORE = "reset_before"
    RESET_AFTER = "reset_after"
    HANG = "hang"
    SLOW = "slow"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault as `POST /sim/fault` spells it.

    Attributes:
        kind: `status` answers with an error, `reset_before` resets the connection instead of answering,
            `reset_after` resets a stream after `chunks` tokens, `hang` never answers, `slow` stretches every
            step, `none` clears.
        count: Requests it takes, or None for all.
        status: HTTP status of `status`.
        chunks: Tokens that `reset_after` lets through.
        factor: How many times longer a step takes under `slow`.
        health: Status of `/health` while the fault is set.
    """

    kind: FaultKind = FaultKind.NONE
    count: int | None = 1
    status: int = 503
    chunks: int = 1
    factor: float = 1.0
    health: int = 200


def parse_fault(body: Any) -> Fault:
    """A fault from decoded JSON.

    Raises:
        ValueError: Not an object, an unknown field or kind, or a value out of range.
    """
    if not isinstance(body, dict) or not body.keys() <= set(Fault.__slots__):
        raise ValueError(f"a fault is an object with only {', '.join(Fault.__slots__)}")
    fields = {**body, "kind": FaultKind(str(body.get("kind")))}
    for name, low in (("count", 1), ("status", 400), ("chunks", 0), ("factor", 0.01), ("health", 200)):
        value = fields.get(name, low)
        if value is None and name == "count":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value < low:
            raise ValueError(f"{name} must be a number of at least {low}")
    return Fault(**fields)


class FaultBoard:
    """The fault in force and how many requests it still takes."""

    def __init__(self) -> None:
        self.fault = Fault()
        self._left: int | None = 0

    def set(self, fault: Fault) -> None:
        """Replace the fault in force."""
        self.fault = fault
        self._left = fault.count

    def take(self) -> Fault | None:
        """The fault this generation request meets, or None."""
        if self.fault.kind in (FaultKind.NONE, FaultKind.SLOW) or self._left == 0:
            return None
        if self._left is not None:
            self._left -= 1
        return self.fault
