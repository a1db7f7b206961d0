"""What the packages that serve a request report to the metrics.

They know this interface alone: what becomes of a count is no part of a decision. `metrics.collector.Metrics`
is the one of a worker. All methods are synchronous and cheap, and none fails.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from extproc.errors import Reason
from extproc.values.balancing import Algorithm
from extproc.values.control import ControlHeader, Flaw
from extproc.values.decisions import HoldEnding, HoldReason
from extproc.values.outcomes import Outcome
from extproc.values.requests import Operation
from metadata_center.types import EndpointKey


class Recorder(Protocol):
    """Gets each event of a request once, when it happens."""

    def observe_decision(
        self,
        model: str,
        algorithm: Algorithm,
        endpoint: EndpointKey,
        decision_s: float,
        score: float | None,
        match_ratio: float,
        view: str,
    ) -> None:
        """One choice was made.

        Args:
            model: The client's model.
            algorithm: The policy that chose.
            endpoint: Named first.
            decision_s: Seconds from the whole body to the decision.
            score: Of the chosen endpoint; None for policies without scores.
            match_ratio: Cached share of the prompt's blocks at the chosen endpoint, 0..1.
            view: Which cache view says so.
        """

    def held(self, model: str, reason: HoldReason) -> None:
        """One request has to wait."""

    def hold_ended(self, model: str, ending: HoldEnding, held_s: float) -> None:
        """One wait ended."""

    def observe_end(
        self,
        operation: Operation,
        model: str,
        outcome: Outcome,
        waited_s: float = 0.0,
        tpot_s: float | None = None,
    ) -> None:
        """One request that was sent upstream ended.

        Args:
            operation: What was asked for.
            model: The client's model.
            outcome: How it ended.
            waited_s: How long it waited before it was sent to the endpoint that answered: here, and for
                attempts that failed.
            tpot_s: Mean time between the output tokens of one of its choices; None if that is not known.
        """

    def rejected(self, reason: Reason, model: str, status: int) -> None:
        """The gateway refused one request itself, with this HTTP status."""

    def header_ignored(self, control: ControlHeader, flaw: Flaw) -> None:
        """One control header of a request says nothing."""

    def fell_back(self, cluster: str) -> None:
        """One request was answered by another endpoint than the one named first."""

    def usage_unknown(self, model: str, reason: str) -> None:
        """One completed answer came without usage; `reason` is `absent` or `encoded`."""

    def endpoint_failed(self, endpoint: EndpointKey, kind: StrEnum) -> None:
        """One request failed at an endpoint."""

    def poison(self) -> None:
        """Several endpoints failed at one request."""

    def stream_ended(self, phase: StrEnum, how: StrEnum) -> None:
        """One ext_proc stream was closed."""

    def access_log_entry(self, kind: StrEnum) -> None:
        """One access log entry came."""

    def access_log_lag(self, lag_s: float) -> None:
        """The oldest entry of a batch came `lag_s` after its request ended; below zero, clocks differ."""

    def handed_over(self) -> None:
        """One access log entry was given to the worker that decided."""

    def access_log_unmatched(self) -> None:
        """One access log entry belongs to no request known here."""

    def leases_expired(self, count: int) -> None:
        """So many charges were released because no end was reported."""
