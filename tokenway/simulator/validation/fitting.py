"""The step model's constants, from how long requests took.

Rules:
    1. Constants are positive: their logarithms are fitted, by damped least squares with numeric derivatives.
    2. What a run does not show stays where it began: each logarithm is pulled to its start as one residual.
    3. Only the requests asked for are judged, but all of them are sent: later ones slow down those that came
       before. Their lengths and arrivals are inputs; their times are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tokenway.simulator.engine.profile import EngineProfile
from tokenway.simulator.validation.measured import Run
from tokenway.simulator.validation.playing import play

CONSTANTS: Final = (
    "a_ms",
    "w0_ms",
    "b_ms_per_token",
    "c_ms_per_pair",
    "d_ms_per_context_token",
    "e_ms_per_seq",
)
"""Of the step model. `alpha0_ms` stays as it is: the clocks' difference hides it."""

PRIOR: Final = 0.05
"""Weight of the pull: to double one constant costs as much as residuals of 1.4 % on average."""

_STEPS: Final = (0.3, 0.1, 0.03)
"""Of a logarithm, for derivatives. Preemptions that move make small ones jump: the large come first."""

_ROUNDS: Final = 10
"""Bound per step; fits of the measured runs needed 1 to 8."""

_TRIES: Final = 5
"""Of one direction, each time five times as careful."""

_ENOUGH: Final = 1e-3
"""A round that gains a smaller share than this of the squared error is the last."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted constants.

    Attributes:
        profile: With them.
        error: Root mean square of the deviations, see `deviations`.
        begun: The same at the start.
        plays: How often the run was played.
    """

    profile: EngineProfile
    error: float
    begun: float
    plays: int


def fit(
    start: EngineProfile,
    run: Run,
    judged: Sequence[int],
    *,
    ranks: int = 1,
    constants: Sequence[str] = CONSTANTS,
) -> Fit:
    """Fit the step model to a measured run.

    Args:
        start: Limits of the engine, and where to begin, such as `from_datasheet`.
        run: Measured.
        judged: Indices of the requests whose times count; at least one.
        ranks: As for `play`.
        constants: Fields of `start` to fit, each > 0.

    Raises:
        ValueError: A request does not fit the engine.
    """
    begun = np.log([getattr(start, name) for name in constants])
    plays = 0

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        nonlocal plays
        plays += 1
        played = play(_with(start, constants, logs), run.loads, ranks)
        own = deviations(run, played, judged) / np.sqrt(len(judged))
        return np.concatenate([own, PRIOR * (logs - begun) / np.sqrt(len(constants))])

    best = _least_squares(residuals, begun)
    profile = _with(start, constants, best)
    return Fit(
        profile,
        _rms(deviations(run, play(profile, run.loads, ranks), judged)),
        _rms(deviations(run, play(start, run.loads, ranks), judged)),
        plays,
    )


def deviations(measured: Run, played: Run, judged: Sequence[int]) -> NDArray[np.float64]:
    """How far each judged request is off.

    Returns:
        Differences of TTFT, then of TPOT, each over its measured mean; shape (<= 2 · len(judged),).
    """
    ttft, tpot = [], []
    for index in judged:
        real, ours = measured.timings[index], played.timings[index]
        ttft.append((real.ttft_s, ours.ttft_s))
        if real.tpot_s is not None and ours.tpot_s is not None:
            tpot.append((real.tpot_s, ours.tpot_s))
    pairs = (np.array(each) for each in (ttft, tpot) if each)
    return np.concatenate([(each[:, 1] - each[:, 0]) / each[:, 0].mean() for each in pairs])


def _with(start: EngineProfile, constants: Sequence[str], logs: NDArray[np.float64]) -> EngineProfile:
    changes: dict[str, Any] = dict(zip(constants, np.exp(logs).tolist(), strict=True))
    return replace(start, **changes)


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _least_squares(
    residuals: Callable[[NDArray[np.float64]], NDArray[np.float64]], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Levenberg-Marquardt, its derivatives taken over ever smaller steps."""
    at, damping = start, 1e-2
    here = residuals(at)
    error = float(here @ here)
    identity = np.eye(len(at))
    for step in _STEPS:
        for _ in range(_ROUNDS):
            slopes = np.stack([(residuals(at + shift) - here) / step for shift in step * identity], axis=1)
            curvature, gradient = slopes.T @ slopes, slopes.T @ here
            gained = 0.0
            for _ in range(_TRIES):
                move = np.clip(
                    np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), -gradient), -1.0, 1.0
                )
                there = residuals(at + move)
                gained = error - float(there @ there)
                if gained > 0.0:
                    break
                damping *= 5.0
            if gained <= 0.0:
                damping = 1e-2
                break
            at, here, error, damping = at + move, there, error - gained, damping / 5.0
            if gained < _ENOUGH * error:
                break
    return at
