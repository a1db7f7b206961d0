"""How a request waited, as explain shows it: for what, and what its place in the line was made of.

Rules:
    1. The JSON holds each part of the place, and how often the work counted is recomputed of its cause: the
       work that waited, and whether fairness ids took turns.
    2. A place never gets worse but by yielding, and may be of before the request was sent. So what the
       snapshot gives anew is a bound on it: the decision that sent the request had that place in mind too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from extproc.choosing.foreseen import foreseen_ttft_s
from extproc.choosing.holding import times_of
from extproc.choosing.least_completion import completion_costs
from extproc.observing.wording import finite, in_ms
from extproc.values.choices import Snapshot
from extproc.values.decisions import DecisionRecord

_TOLERANCE_S: Final = 1e-6
"""Places are differences of times on a clock that counts since the host started, and of priorities' bands."""


def hold_json(record: DecisionRecord) -> dict[str, Any] | None:
    """What it waited for, in which place, and its TTFT as foreseen without the wait and with it."""
    hold, chosen = record.hold, record.chosen
    if hold is None:
        return None
    row = None if chosen is None else record.row(chosen)
    ttft_s = None if row is None else foreseen_ttft_s(record, row)
    return {
        "reason": hold.reason,
        "endpoint": hold.endpoint,
        "foreseen_at_once_s": finite(hold.at_once_s),
        "bound_s": finite(hold.bound_s),
        "foreseen_s": None if ttft_s is None else finite(record.held_s + ttft_s),
        "place_s": hold.place_s,
        "counted": asdict(hold.counted),
        "yielded": hold.yields_s > 0.0,
        "yields_s": hold.yields_s,
        "fairness_lag_s": hold.lag_s,
        "elsewhere_s": finite(hold.elsewhere_s),
    }


def place_fault(hold: Mapping[str, Any], snapshot: Snapshot) -> str | None:
    """What is not as the rules of the line give it; None if all is.

    Args:
        hold: From `hold_json`.
        snapshot: Of the decision that sent the request.
    """
    counted = hold["counted"]
    work_s, mean_s = counted["work_s"], counted["mean_s"]
    times = times_of(counted["waiting_s"], work_s, mean_s, are_turns=counted["are_turns"])
    if abs(times - counted["times"]) > _TOLERANCE_S:
        return f"work counts {times:.2f} times"
    place_s = times * work_s + hold["fairness_lag_s"] + hold["yields_s"]
    if abs(place_s - hold["place_s"]) > _TOLERANCE_S:
        return f"place in line {in_ms(place_s)} after its arrival"
    if not snapshot.ahead_s:  # it was sent without being asked for in the line
        return None
    work_s = min(completion_costs(snapshot).works_s)
    times = times_of(snapshot.held_s / len(snapshot.keys), work_s, mean_s, are_turns=False)
    most_s = times * work_s + hold["fairness_lag_s"] + hold["yields_s"]
    if hold["place_s"] > most_s + _TOLERANCE_S:
        return f"place in line {in_ms(most_s)} after its arrival at most"
    return None


def hold_lines(hold: Mapping[str, Any] | None) -> list[str]:
    """For a page, from `hold_json`: one line on what it waited for, one on its place."""
    if hold is None:
        return []
    elsewhere = ""
    if hold["elsewhere_s"]:
        elsewhere = f"   behind {in_ms(hold['elsewhere_s'])} of work that waited at other gateways or workers"
    return [
        f"waited for {hold['endpoint']}   short of {hold['reason']}{elsewhere}   TTFT foreseen on arrival, "
        f"sent at once {in_ms(hold['foreseen_at_once_s'])}; as it went {in_ms(hold['foreseen_s'])}; "
        f"at most {in_ms(hold['bound_s'])} here",
        _place_line(hold),
    ]


def _place_line(hold: Mapping[str, Any]) -> str:
    counted = hold["counted"]
    if counted["are_turns"]:
        why = "once, for fairness ids took turns"
    elif counted["times"] == 1.0:
        why = "once, for no work of others waited"
    else:
        why = f"{counted['times']:.2f} times, for {in_ms(counted['waiting_s'])} of work waited per endpoint"
        if counted["mean_s"] > 0.0:
            why += f" and the mean request had {in_ms(counted['mean_s'])}"
    when = "before" if hold["place_s"] < 0 else "after"
    line = (
        f"in line    {in_ms(abs(hold['place_s']))} {when} its arrival   "
        f"its work, {in_ms(counted['work_s'])}, counted {why}"
    )
    if hold["fairness_lag_s"] > 0:
        line += f"   its fairness id had its turn: {in_ms(hold['fairness_lag_s'])} later"
    elif hold["fairness_lag_s"] < 0:
        line += f"   other fairness ids had more: {in_ms(-hold['fairness_lag_s'])} sooner"
    if hold["yielded"]:
        line += f"   behind those that could still be in time: {in_ms(hold['yields_s'])} later"
    return line
