"""Headers by which clients and gateways talk to an endpoint picker, and what they say.

Rules:
    1. Each has a deprecated alias; of those that are well-formed the new name wins.
    2. None of them reaches an engine.
    3. What is not well-formed says nothing: a request is not refused for it. Nor does an objective that
       nobody knows give a priority; it is the request's objective all the same.

Source: llm-d-router, pkg/epp/metadata; Gateway API inference extension, docs/proposals/004.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from extproc.values.control import ControlHeader, Flaw, Ignored
from extproc.values.headers import SLO_TPOT_HEADER, SLO_TTFT_HEADER
from extproc.values.limits import limit_ms
from extproc.values.standing import OBJECTIVE_NAME, Standing
from metadata_center.types import value

MAX_MODEL_CHARS: Final = 256

_objective = re.compile(OBJECTIVE_NAME).fullmatch
_token = re.compile(r"[!-~]{1,128}").fullmatch

_NAMES: Final[Mapping[ControlHeader, tuple[str, str]]] = {
    ControlHeader.MODEL: ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"),
    ControlHeader.OBJECTIVE: ("x-llm-d-inference-objective", "x-gateway-inference-objective"),
    ControlHeader.FAIRNESS_ID: ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"),
    ControlHeader.TTFT_LIMIT: ("x-llm-d-slo-ttft-ms", SLO_TTFT_HEADER),
    ControlHeader.TPOT_LIMIT: ("x-llm-d-slo-tpot-ms", SLO_TPOT_HEADER),
}
"""The new name of each, and its alias."""

_IS_WELL_FORMED: Final[Mapping[ControlHeader, Callable[[str], object]]] = {
    ControlHeader.MODEL: lambda text: 0 < len(text) <= MAX_MODEL_CHARS,
    ControlHeader.OBJECTIVE: _objective,
    ControlHeader.FAIRNESS_ID: _token,
    ControlHeader.TTFT_LIMIT: limit_ms,
    ControlHeader.TPOT_LIMIT: limit_ms,
}
"""True, or what is, of a value that says something."""

CONTROL_HEADERS: Final = tuple(name for names in _NAMES.values() for name in names)
"""All of them."""

_ALL: Final = frozenset(CONTROL_HEADERS)


@value
class Said:
    """What a request's control headers say.

    Attributes:
        model: To ask for in place of the body's; None says nothing of it.
        standing: Whose the request is; None if it does not say.
        limits: Its own limits on its latency, under the names that choosing reads.
        ignored: Those that say nothing, as far as they were looked at: an alias only where it counts.
    """

    model: str | None
    standing: Standing | None
    limits: Mapping[str, str]
    ignored: tuple[Ignored, ...]


_NOTHING: Final = Said(None, None, {}, ())


def said_by(headers: Mapping[str, str], priority_of: Callable[[str], int | None]) -> Said:
    """What a request's control headers say.

    Args:
        headers: Lower-case names.
        priority_of: Of an objective; None of one that nobody knows.
    """
    if _ALL.isdisjoint(headers):
        return _NOTHING
    ignored: list[Ignored] = []
    said = {control: _first(headers, control, ignored) for control in _NAMES}
    limits = {
        _NAMES[control][1]: limit
        for control in (ControlHeader.TTFT_LIMIT, ControlHeader.TPOT_LIMIT)
        if (limit := said[control]) is not None
    }
    standing = _standing(headers, said, priority_of, ignored)
    return Said(said[ControlHeader.MODEL], standing, limits, tuple(ignored))


def _first(headers: Mapping[str, str], control: ControlHeader, ignored: list[Ignored]) -> str | None:
    """The first of its names that says something; those before it are ignored."""
    for name in _NAMES[control]:
        text = headers.get(name)
        if text is None:
            continue
        if _IS_WELL_FORMED[control](text):
            return text
        ignored.append(Ignored(control, Flaw.MALFORMED, name))
    return None


def _standing(
    headers: Mapping[str, str],
    said: Mapping[ControlHeader, str | None],
    priority_of: Callable[[str], int | None],
    ignored: list[Ignored],
) -> Standing | None:
    objective, fairness_id = said[ControlHeader.OBJECTIVE], said[ControlHeader.FAIRNESS_ID]
    if objective is None:
        return None if fairness_id is None else Standing(None, 0, fairness_id)
    priority = priority_of(objective)
    if priority is not None:
        return Standing(objective, priority, fairness_id)
    (name, *_) = [each for each in _NAMES[ControlHeader.OBJECTIVE] if headers.get(each) == objective]
    ignored.append(Ignored(ControlHeader.OBJECTIVE, Flaw.UNKNOWN, name, objective))
    return Standing(objective, 0, fairness_id, is_known=False)
