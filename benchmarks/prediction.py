"""How well the time to first token is foreseen: misses, half hits and full hits, alone and in batches.

    python -m benchmarks.prediction [--requests N] [--seed N]

The product's own decision and learning, over the replayer's engines with the step times that were fitted to
real vLLM runs (docs/validation.md): virtual time, so the machine's load changes nothing. A request counts
after its class has had `WARM` answers. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Final

from extproc.choosing.deciding import SendNow
from extproc.choosing.rows import expected_ttft_s
from extproc.choosing.stateful import FleetView, Sent
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.policies.ours import LeastCompletion
from tokenway.simulator.replay.fleet import Fleet, Member
from tokenway.simulator.replay.run import Replay
from tokenway.simulator.replay.settings import RunSettings
from tokenway.simulator.replay.trace import Runs, Trace, TraceRequest

ENGINES: Final = ("llama8b-rtx4090", "llama8b-rtxpro6000", "llama8b-h100", "llama8b-a100")
"""The first two were fitted to measured runs of vLLM, the others are made from data sheets."""

REPLICAS: Final = 2

WARM: Final = 50
"""Answers of a class that teach before one counts: as many as a cold group learns from early."""

BLOCK_TOKENS: Final = 64

ALONE_GAP_S: Final = 20.0
"""Between requests that meet no other: longer than any of them takes."""

BATCH: Final = 8
"""Requests that run on each engine at once, on average, in the batched part."""

MEDIAN_PROMPT: Final = 2_000
MEDIAN_ANSWER: Final = 60


@dataclass(frozen=True, slots=True)
class Foreseen:
    """One answered request.

    Attributes:
        cached_ratio: Of its prompt, as the engine counted.
        predicted_s: Its TTFT when it was decided.
        actual_s: As it came.
    """

    cached_ratio: float
    predicted_s: float
    actual_s: float

    @property
    def kind(self) -> str:
        """`miss`, `half` or `full`; what lies between is named after the nearest."""
        if self.cached_ratio < 0.25:
            return "miss"
        return "half" if self.cached_ratio < 0.75 else "full"

    @property
    def error(self) -> float:
        """Relative, signed: > 0 if too long was foreseen."""
        return self.predicted_s / self.actual_s - 1.0


class Watched(LeastCompletion):
    """The product's rule, with a note of what it foresaw and what came."""

    __slots__ = ("_at", "_cached", "_predicted_s", "seen")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Foreseen] = []
        self._predicted_s = 0.0
        self._at: dict[int, tuple[float, float]] = {}
        self._cached: dict[int, float] = {}

    def place(self, view: FleetView, decided: SendNow) -> int:
        """Note what was foreseen of the row that was chosen."""
        row = super().place(view, decided)
        self._predicted_s = expected_ttft_s(decided.snapshot, row)
        return row

    def on_sent(self, sent: Sent) -> None:
        """See `StatefulPolicy`."""
        super().on_sent(sent)
        self._at[sent.request.request_id] = (self._predicted_s, 0.0)

    def on_first_token(self, sent: Sent, now_s: float) -> None:
        """See `StatefulPolicy`."""
        super().on_first_token(sent, now_s)
        request_id = sent.request.request_id
        self._at[request_id] = (self._at[request_id][0], now_s - sent.sent_s)

    def on_usage(self, sent: Sent, prompt_tokens: int, cached_tokens: int) -> None:
        """See `StatefulPolicy`."""
        super().on_usage(sent, prompt_tokens, cached_tokens)
        self._cached[sent.request.request_id] = cached_tokens / prompt_tokens

    def on_finished(self, sent: Sent, now_s: float, output_tokens: int) -> None:
        """See `StatefulPolicy`."""
        super().on_finished(sent, now_s, output_tokens)
        request_id = sent.request.request_id
        predicted_s, actual_s = self._at.pop(request_id)
        cached = self._cached.pop(request_id, None)
        if output_tokens and cached is not None and actual_s > 0.0:
            self.seen.append(Foreseen(cached, predicted_s, actual_s))


def workload(requests: int, gap_s: float, rng: Random) -> Trace:
    """A third each: new prompts, prompts of which half was asked before, prompts that were asked before.

    Args:
        requests: How many.
        gap_s: Mean time between them.
        rng: Lengths, kinds and arrivals.
    """
    made: list[TraceRequest] = []
    next_id, at_s = 0, 0.0
    for number in range(requests):
        blocks = max(4, min(128, round(rng.lognormvariate(0.0, 0.6) * MEDIAN_PROMPT / BLOCK_TOKENS)))
        kind = number % 3
        earlier = rng.choice(made[-60:]) if len(made) > 3 else None
        if earlier is None or kind == 0:
            runs: Runs = ((next_id, blocks),)
            next_id += blocks
        elif kind == 1:
            half = max(1, earlier.prompt_tokens // BLOCK_TOKENS // 2)
            runs = (*_head(earlier.runs, half), (next_id, half))
            next_id, blocks = next_id + half, 2 * half
        else:
            runs, blocks = earlier.runs, earlier.prompt_tokens // BLOCK_TOKENS
        answer = max(2, min(400, round(rng.lognormvariate(0.0, 0.5) * MEDIAN_ANSWER)))
        tokens = blocks * BLOCK_TOKENS
        made.append(TraceRequest(at_s, tokens, answer, runs, tokens))
        at_s += rng.expovariate(1.0 / gap_s)
    return Trace("prediction", BLOCK_TOKENS, tuple(made))


def _head(runs: Runs, blocks: int) -> Iterator[tuple[int, int]]:
    for first, count in runs:
        if blocks <= 0:
            return
        yield first, min(count, blocks)
        blocks -= count


def foreseen(profile: str, requests: int, gap_s: float, seed: int) -> list[Foreseen]:
    """One run over `REPLICAS` engines."""
    fleet: Fleet = (Member(PROFILES[profile]),) * REPLICAS
    watched = Watched()
    trace = workload(requests, gap_s, Random(f"{seed}/workload"))
    settings = RunSettings()
    draws = lambda use: Random(f"{seed}/{use}")  # noqa: E731
    Replay(trace, fleet, lambda _: watched, settings, draws, time.perf_counter).run()
    return watched.seen


def batched_gap_s(profile: str) -> float:
    """Time between requests at which about `BATCH` run on each engine."""
    engine = PROFILES[profile]
    step_s = engine.step_s(BATCH, 0.0, BATCH * MEDIAN_PROMPT, BATCH)
    prefill_s = engine.step_s(MEDIAN_PROMPT // 2, 0.0, 0, 1)
    return (MEDIAN_ANSWER * (step_s + prefill_s / 4) + prefill_s) / (BATCH * REPLICAS)


def table(seen: list[Foreseen]) -> dict[str, dict[str, float]]:
    """By kind: how many counted, median absolute relative error, median signed one, total over total."""
    by_kind: dict[str, list[Foreseen]] = {}
    for one in seen:
        by_kind.setdefault(one.kind, []).append(one)
    found = {}
    for kind in ("miss", "half", "full"):
        counted = by_kind.get(kind, [])[WARM:]
        if counted:
            found[kind] = {
                "requests": len(counted),
                "median_error": round(median(abs(one.error) for one in counted), 3),
                "bias": round(median(one.error for one in counted), 3),
                "total": round(
                    sum(one.predicted_s for one in counted) / sum(one.actual_s for one in counted), 3
                ),
                "actual_ms": round(1e3 * median(one.actual_s for one in counted), 1),
            }
    return found


def main() -> int:
    """Print the table; exit code 0."""
    parser = argparse.ArgumentParser(description="Errors of the predicted TTFT by class")
    parser.add_argument("--requests", type=int, default=1500, help="of each run")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    print(
        "engine, load, class: requests, actual p50 ms, median |error|, median error, sum foreseen / sum came"
    )
    for profile in ENGINES:
        for load, gap_s in (("alone", ALONE_GAP_S), ("batched", batched_gap_s(profile))):
            figures = table(foreseen(profile, options.requests, gap_s, options.seed))
            results.setdefault(profile, {})[load] = figures
            for kind, row in figures.items():
                print(
                    f"{profile:20} {load:8} {kind:5} {row['requests']:6.0f} {row['actual_ms']:9.1f} "
                    f"{row['median_error']:7.3f} {row['bias']:+7.3f} {row['total']:7.3f}",
                    flush=True,
                )
    print(json.dumps({"seed": options.seed, "requests": options.requests, "ttft": results}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
