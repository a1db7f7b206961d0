"""Headers by which clients and gateways talk to an endpoint picker, and what they say.

Rules:
    1. Each has a deprecated alias; where both come the new name wins.
    2. None of them reaches an engine.
    3. What is not well-formed says nothing: a request is not refused for it.

Source: llm-d-router, pkg/epp/metadata; Gateway API inference extension, docs/proposals/004.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from extproc.values.headers import SLO_TPOT_HEADER, SLO_TTFT_HEADER
from extproc.values.standing import Standing

_OBJECTIVE: Final = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
_FAIRNESS: Final = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
_MODEL: Final = ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")
_LIMITS: Final = (
    ("x-llm-d-slo-ttft-ms", SLO_TTFT_HEADER),
    ("x-llm-d-slo-tpot-ms", SLO_TPOT_HEADER),
)

CONTROL_HEADERS: Final = tuple(name for names in (_OBJECTIVE, _FAIRNESS, _MODEL, *_LIMITS) for name in names)
"""All of them."""

MAX_MODEL_CHARS: Final = 256

_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
"""Of a Kubernetes object, RFC 1123."""

_TOKEN: Final = re.compile(r"[!-~]{1,128}")


def standing_of(headers: Mapping[str, str], priority_of: Callable[[str], int]) -> Standing | None:
    """Whose the request is; None if it does not say.

    Args:
        headers: Lower-case names.
        priority_of: Of an objective.
    """
    objective, fairness_id = _said(headers, _OBJECTIVE, _NAME), _said(headers, _FAIRNESS, _TOKEN)
    if objective is None and fairness_id is None:
        return None
    return Standing(objective, 0 if objective is None else priority_of(objective), fairness_id)


def model_of(headers: Mapping[str, str]) -> str | None:
    """The model to ask for in place of the body's."""
    model = _first(headers, _MODEL)
    return None if model is None or not 0 < len(model) <= MAX_MODEL_CHARS else model


def take_limits(headers: dict[str, str]) -> None:
    """Let the request's own limits on its latency be under the names that choosing reads."""
    for new, old in _LIMITS:
        if new in headers:
            headers[old] = headers[new]


def _first(headers: Mapping[str, str], names: tuple[str, str]) -> str | None:
    for name in names:
        if name in headers:
            return headers[name]
    return None


def _said(headers: Mapping[str, str], names: tuple[str, str], form: re.Pattern[str]) -> str | None:
    value = _first(headers, names)
    return None if value is None or form.fullmatch(value) is None else value
