"""A decision record as JSON, the decision made again from that JSON, and a page a person can read.

Rules:
    1. The JSON is complete: `recompute` uses nothing else and gives the order that was chosen.
    2. Floats survive exactly (shortest round-trip decimal); NaN and infinity, which JSON lacks, are null.
    3. Absence is null, never a missing key.
    4. The page never passes control characters on: model names and the like come from clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from extproc.choosing.choose import choose, terms_of
from extproc.choosing.foreseen import foreseen_tpot_s, foreseen_ttft_s
from extproc.choosing.replay import ReplayRng
from extproc.observing.holds import hold_json, hold_lines, place_fault
from extproc.observing.printable import printable
from extproc.observing.wording import counted, finite, in_ms
from extproc.values.balancing import Algorithm, LoadBalancing
from extproc.values.choices import Learned, Snapshot
from extproc.values.decisions import DecisionRecord
from metadata_center.types import EndpointKey

_SNAPSHOT = tuple(field.name for field in fields(Snapshot))


def to_json(record: DecisionRecord) -> dict[str, Any]:
    """Everything `record` holds, in JSON types; rows of arrays are in the order of `snapshot.keys`."""
    return {
        "request_id": record.request_id,
        "time_unix_s": record.time_unix_s,
        "operation": record.operation,
        "model": record.model,
        "upstream_model": record.upstream_model,
        "lora": record.lora,
        "cluster": record.cluster,
        "route_name": record.route_name,
        "settings": None if record.settings is None else asdict(record.settings),
        "stream": record.stream,
        "prompt_bytes": record.prompt_bytes,
        "prompt_tokens": record.prompt_tokens,
        "num_blocks": record.num_blocks,
        "block_bytes": record.block_bytes,
        "snapshot": None if record.snapshot is None else _snapshot_json(record.snapshot),
        "choice": _choice_json(record),
        "draws": list(record.draws),
        "turn": record.turn,
        "predicted_ttft_s": _predicted(record, foreseen_ttft_s),
        "predicted_tpot_s": _predicted(record, foreseen_tpot_s),
        "cached_tokens": None if record.snapshot is None else list(record.cached_tokens),
        "placed": record.placed,
        "holder": record.holder,
        "views": None if record.snapshot is None else list(record.views),
        "filtered": [{"endpoint": key, "reason": reason} for key, reason in record.filtered],
        "data_age_s": {name: finite(age_s) for name, age_s in record.data_age_s.items()},
        "decision_us": record.decision_us,
        "held_s": record.held_s,
        "hold": hold_json(record),
        "rejected": record.rejected,
        "standing": None if record.standing is None else asdict(record.standing),
        "outcome": None if record.outcome is None else asdict(record.outcome),
    }


def recompute(record_json: Mapping[str, Any]) -> tuple[int, ...]:
    """Make the decision again.

    Returns:
        Row indices, best first, as `Choice.order`.

    Raises:
        ValueError: The request was rejected, so nothing was chosen; or the recorded random numbers
            do not suffice, so today's policy is not the one that chose.
    """
    snapshot, settings = record_json["snapshot"], record_json["settings"]
    if snapshot is None or settings is None:
        raise ValueError("a rejected request has no choice to recompute")
    lb = LoadBalancing(**{**settings, "algorithm": Algorithm(settings["algorithm"])})
    return choose(_snapshot(snapshot), lb, ReplayRng(record_json["draws"]), record_json["turn"]).order


def verdict(record_json: Mapping[str, Any]) -> str | None:
    """Whether the decision, and the place in line of a held request, come out the same today.

    None for a rejected request.
    """
    if record_json["choice"] is None:
        return None
    try:
        order = recompute(record_json)
    except ValueError as exc:
        return f"recomputed: DIFFERENT ({exc})"
    if order != tuple(record_json["choice"]["order"]):
        keys = record_json["snapshot"]["keys"]
        return f"recomputed: DIFFERENT ({', '.join(keys[row] for row in order)})"
    if record_json["hold"] is None:
        return "recomputed: same choice"
    fault = place_fault(record_json["hold"], _snapshot(record_json["snapshot"]))
    if fault is None:
        return "recomputed: same choice, same place in line"
    return f"recomputed: DIFFERENT ({fault})"


def render(record_json: Mapping[str, Any]) -> str:
    """A terminal page: what was asked, every candidate, the choice, and what happened."""
    lines = [*_header(record_json), ""]
    if record_json["snapshot"] is not None:
        lines += [*_candidates(record_json), ""]
    elif record_json["filtered"]:
        lines += [*_table([["endpoint", "filtered"], *_filtered_rows(record_json, 0)]), ""]
    lines += _choice_lines(record_json)
    lines += _outcome_lines(record_json)
    ages = ", ".join(
        f"{name} {'never' if age_s is None else f'{age_s:.3f} s'}"
        for name, age_s in record_json["data_age_s"].items()
    )
    lines.append(f"data age   {ages or '-'}")
    comparison = verdict(record_json)
    if comparison is not None:
        lines += ["", comparison]
    return "".join(f"{printable(line).rstrip()}\n" for line in lines)


def _snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """Every field under its name, columns as lists."""
    made: dict[str, Any] = {}
    for name in _SNAPSHOT:
        value = getattr(snapshot, name)
        if not isinstance(value, int | float | Learned | None):
            value = [finite(one) if isinstance(one, float) else one for one in value]
        made[name] = value
    learned = snapshot.learned
    if learned is not None:
        made["learned"] = asdict(replace(learned, row_prices_s=list(learned.row_prices_s)))
    else:
        made["learned"] = None
    return made


def _snapshot(shown: Mapping[str, Any]) -> Snapshot:
    """The snapshot of which `shown` is the JSON."""
    return Snapshot(
        **{
            **{name: shown[name] for name in _SNAPSHOT},
            "keys": tuple(EndpointKey(key) for key in shown["keys"]),
            "learned": None if shown["learned"] is None else _learned(shown["learned"]),
        }
    )


def _learned(learned: Mapping[str, Any]) -> Learned:
    prices_s = tuple(learned["prefill_prices_s"])
    row_prices_s = [tuple(row) for row in learned["row_prices_s"]]
    return Learned(**{**learned, "prefill_prices_s": prices_s, "row_prices_s": row_prices_s})


def _choice_json(record: DecisionRecord) -> dict[str, Any] | None:
    choice, snapshot, settings = record.choice, record.snapshot, record.settings
    if choice is None or snapshot is None or settings is None:
        return None
    terms = {} if choice.scores is None else terms_of(snapshot, settings)
    return {
        "order": list(choice.order),
        "scores": _floats(choice.scores),
        "terms": {name: _floats(term) for name, term in terms.items()},
        "candidates": choice.candidates,
    }


def _predicted(
    record: DecisionRecord, foresee: Callable[[DecisionRecord, int], float | None]
) -> list[float | None] | None:
    if record.prices is None or record.snapshot is None:
        return None
    return [foresee(record, row) for row in range(len(record.snapshot.keys))]


def _floats(values: Sequence[float] | None) -> list[float | None] | None:
    return None if values is None else [finite(value) for value in values]


def _header(record: Mapping[str, Any]) -> list[str]:
    model = record["model"] or "-"
    if record["upstream_model"] not in (None, record["model"]):
        model += f" -> {record['upstream_model']}"
    if record["lora"] is not None:
        model += f" (adapter {record['lora']})"
    stream = "yes" if record["stream"] else "no"
    route, cluster = record["route_name"] or "-", record["cluster"] or "-"
    algorithm = "-" if record["settings"] is None else record["settings"]["algorithm"]
    standing = record["standing"]
    whose = []
    if standing is not None:
        whose = [
            f"objective  {standing['objective'] or '-'}   priority {standing['priority']}"
            f"{'' if standing['is_known'] else ', for none of that name is known'}   "
            f"fairness id {standing['fairness_id'] or '-'}"
        ]
    return [
        f"request    {record['request_id']}   unix time {record['time_unix_s']:.3f}",
        f"asked for  {record['operation'] or '-'}   model {model}   stream {stream}",
        f"routed by  {route}   cluster {cluster}   algorithm {algorithm}",
        *whose,
        f"prompt     {counted(record['prompt_bytes'], 'byte')}   "
        f"~{counted(record['prompt_tokens'], 'token')}   "
        f"{counted(record['num_blocks'], 'block')} of {record['block_bytes']} bytes",
        f"took       {record['decision_us']:.0f} us   held {record['held_s']:.3f} s",
        *hold_lines(record["hold"]),
    ]


def _candidates(record: Mapping[str, Any]) -> list[str]:
    """One row per candidate in order of choice, then by score; then the endpoints that were none."""
    snapshot, choice = record["snapshot"], record["choice"]
    scores, terms, order = choice["scores"], choice["terms"], choice["order"]
    num_candidates, sunk = len(snapshot["keys"]), snapshot["sunk_ratios"]
    limits = [limit or None for limit in snapshot["max_num_seqs"]]
    columns: list[tuple[str, Sequence[str]]] = [
        ("endpoint", snapshot["keys"]),
        ("cached tok", _cells(record["cached_tokens"], num_candidates)),
        ("view", record["views"] or ["-"] * num_candidates),
        ("matched", [f"{matched}/{snapshot['num_blocks']}" for matched in snapshot["matched_blocks"]]),
        ("requests", _cells(snapshot["requests"], num_candidates)),
        *([("may run", _cells(limits, num_candidates))] if any(limits) else ()),
        ("prefill tok", _cells(snapshot["prefill_tokens"], num_candidates)),
        ("context tok", _cells(snapshot["context_tokens"], num_candidates)),
        ("weight", _cells(snapshot["weights"], num_candidates, "g")),
        *([("sunk", _cells(sunk, num_candidates, ".2f"))] if sunk else ()),
        ("TTFT ms", _cells(_milliseconds(record["predicted_ttft_s"]), num_candidates, ".1f")),
        ("TPOT ms", _cells(_milliseconds(record["predicted_tpot_s"]), num_candidates, ".1f")),
        *((f"{name} term", _cells(term, num_candidates, ".4f")) for name, term in terms.items()),
        ("score", _cells(scores, num_candidates, ".4f")),
    ]
    place = {row: index for index, row in enumerate(order)}

    def rank(row: int) -> tuple[int, float]:
        score = None if scores is None else scores[row]
        return place.get(row, len(order)), float("inf") if score is None else -score

    rows = sorted(range(num_candidates), key=rank)
    marks = {0: "chosen", **{index: f"fallback {index}" for index in range(1, len(order))}}
    body = [[cells[row] for _, cells in columns] + [marks.get(place.get(row, -1), "")] for row in rows]
    body += _filtered_rows(record, len(columns) - 1)
    return _table([[*(name for name, _ in columns), ""], *body])


def _filtered_rows(record: Mapping[str, Any], blanks: int) -> list[list[str]]:
    return [
        [
            entry["endpoint"],
            *["-"] * blanks,
            entry["reason"] if blanks == 0 else f"filtered: {entry['reason']}",
        ]
        for entry in record["filtered"]
    ]


def _choice_lines(record: Mapping[str, Any]) -> list[str]:
    if record["choice"] is None:
        return [f"rejected   {record['rejected'] or '-'}"]
    keys, order = record["snapshot"]["keys"], record["choice"]["order"]
    chosen = f"chosen     {keys[order[0]]}   {_among(record['choice'], len(keys))}"
    holder = record["holder"]
    if holder is not None:  # what was chosen is tried where it is the holder, or as the one other
        other = next((keys[row] for row in order if keys[row] != holder), "none")
        return [chosen, f"placed     {holder}   which holds the response it builds on   fallbacks {other}"]
    fallbacks = ", ".join(keys[row] for row in order[1:]) or "none"
    placed = []
    if record["placed"] is not None:
        rule = record["settings"]["rival"]
        by = "compare-and-set" if rule is None else f"the rival {rule}"
        placed = [f"placed     {record['placed']}   by {by}"]
    return [f"{chosen}   fallbacks {fallbacks}", *placed]


def _among(choice: Mapping[str, Any], rows: int) -> str:
    """What the first was taken from: the one best, the best few, or those that are equal."""
    scores, candidates = choice["scores"], choice["candidates"]
    if scores is None:
        return f"of {rows}"
    if candidates > 1:
        return f"drawn from the best {candidates} of {rows}"
    equal = sum(score == scores[choice["order"][0]] for score in scores)
    return f"the best of {rows}" if equal == 1 else f"drawn from {equal} equal ones of {rows}"


def _outcome_lines(record: Mapping[str, Any]) -> list[str]:
    outcome = record["outcome"]
    if outcome is None:
        return ["happened   nothing yet" if record["rejected"] is None else "happened   answered here"]
    flags = ",".join(outcome["response_flags"]) or "-"
    return [
        f"happened   {outcome['ended']}   status {_text(outcome['status'])}   served by "
        f"{outcome['endpoint'] or '-'}   attempts {outcome['attempts']}   flags {flags}   "
        f"details {outcome['details'] or '-'}",
        f"TTFT       predicted {in_ms(outcome['predicted_ttft_s'])}   actual {in_ms(outcome['ttft_s'])}   "
        f"whole answer {in_ms(outcome['duration_s'])}",
        f"tokens     prompt {_text(outcome['prompt_tokens'])} (estimated {record['prompt_tokens']})   "
        f"output {_text(outcome['completion_tokens'])}   cached: predicted "
        f"{_text(outcome['predicted_cached_tokens'])}, reported {_text(outcome['cached_tokens'])}",
        f"bytes      request {outcome['request_bytes']}   response {outcome['response_bytes']}",
    ]


def _milliseconds(values_s: Sequence[float | None] | None) -> list[float | None] | None:
    return None if values_s is None else [None if value is None else value * 1e3 for value in values_s]


def _cells(values: Sequence[float | None] | None, count: int, form: str = "d") -> list[str]:
    if values is None:
        return ["-"] * count
    return ["-" if value is None else format(value + 0, form) for value in values]  # -0.0 + 0 is 0.0


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first and the last to the left, numbers between them to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if index in (0, last) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
