"""How one endpoint does for one model: the shares of its answers that failed, and its trials."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from extproc.health.failures import MAY_BE_THE_CLIENTS
from extproc.values.evidence import FailureKind

MEMORY_S: Final = 60.0
"""What an endpoint did longer ago says nothing of it now; the longest ejection by default."""

FAST: Final = 0.3
"""Gain of the failing share that acts: the last few answers count, one failure lifts it over the doubt."""

_SLOW: Final = 0.05
"""Gain of the failing share that distinguishes fluctuation from fault: the last twenty answers or so."""

TRIAL_S: Final = 0.25
"""From a doubt to the first trial; doubles with each that fails. A failure costs a client, so not less; an
engine that hiccupped is back before its queue has run dry."""

MAX_TRIAL_S: Final = 30.0
"""Longest time between trials."""

TRIAL_LEASE_S: Final = 30.0
"""A trial that was not heard of any more is over after this."""

MISS_S: Final = 10.0
"""From a miss to the next request that may try; doubles up to `MAX_MISS_S`. Adapters are loaded by hand."""

MAX_MISS_S: Final = 300.0


@dataclass(slots=True)
class Level:
    """How one endpoint does for one model.

    Attributes:
        fast: Share of failures among its last few answers.
        slow: The same among its last twenty.
        good_s: Its last success, or None.
        bad_s: The first failure since, or None.
        heard_s: Its last answer of either kind.
        misses: 404s in a row.
        doubted: Why it is doubted, or None.
        trial_due_s: From when a request may try it.
        trial_until_s: A trial is under way until then at most.
        failed_trials: In a row.
    """

    fast: float = 0.0
    slow: float = 0.0
    good_s: float | None = None
    bad_s: float | None = None
    heard_s: float = 0.0
    misses: int = 0
    doubted: FailureKind | None = None
    trial_due_s: float = 0.0
    trial_until_s: float = 0.0
    failed_trials: int = 0

    def succeeded(self, now_s: float) -> None:
        """It answered."""
        self.fast *= 1.0 - FAST
        self.slow *= 1.0 - _SLOW
        self.good_s = self.heard_s = now_s
        self.bad_s = None
        self.misses = self.failed_trials = 0
        self.pass_trial(now_s)

    def failed(self, kind: FailureKind, now_s: float) -> None:
        """It failed; a trial that is under way did so too."""
        self.heard_s = now_s
        self.end_trial(now_s, TRIAL_S, MAX_TRIAL_S)
        if kind is not FailureKind.MISSING_MODEL:
            weight = 0.5 if kind in MAY_BE_THE_CLIENTS else 1.0
            self.fast += weight * FAST * (1.0 - self.fast)
            self.slow += weight * _SLOW * (1.0 - self.slow)
            if self.bad_s is None:
                self.bad_s = now_s

    def retracted(self, kind: FailureKind) -> None:
        """A failure of this kind, reported before, was not its own."""
        weight = 0.5 if kind in MAY_BE_THE_CLIENTS else 1.0
        fast, slow = weight * FAST, weight * _SLOW
        self.fast = max(0.0, (self.fast - fast) / (1.0 - fast))
        self.slow = max(0.0, (self.slow - slow) / (1.0 - slow))

    def doubt(self, kind: FailureKind, now_s: float, wait_s: float) -> None:
        """Doubted from now on; the first trial may be in `wait_s`."""
        self.doubted = kind
        self.trial_until_s, self.trial_due_s, self.failed_trials = 0.0, now_s + wait_s, 0

    def try_now(self, now_s: float) -> None:
        """No trial is under way, and the next may be at once."""
        self.trial_until_s, self.trial_due_s = 0.0, now_s

    def pass_trial(self, now_s: float) -> None:
        """A trial went well as far as it went; the more failed before, the longer until the next."""
        self.trial_until_s, self.trial_due_s = 0.0, now_s + TRIAL_S * self.fast

    def end_trial(self, now_s: float, first_s: float, most_s: float) -> None:
        """A trial failed, if one is under way; what fails otherwise was sent before the doubt."""
        if self.trial_until_s > now_s:
            self.failed_trials = min(self.failed_trials + 1, 16)
            self.trial_due_s = now_s + min(first_s * 2**self.failed_trials, most_s)
        self.trial_until_s = 0.0
