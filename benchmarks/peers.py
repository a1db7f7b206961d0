"""What a request costs: Tokenway with its Envoy, Envoy alone, and routers of others, side by side.

    make bench-peers             (python -m benchmarks.peers [--seconds 1.5] [--rounds 3] [--only NAME,...])

All stand before the same three engines, which answer at once (`benchmarks.traffic`), and take turns within
each round, so that what else the machine does falls on all alike; each round begins with another of them.

CPU is time on a processor of all processes in the path and their children (`/proc/<pid>/schedstat`), over a
phase, divided by its requests; figures are medians over rounds. In brackets: Tokenway's over it, median of
the rounds' ratios, which is what a busy machine moves least. Latency is what is added at a steady rate: each
round's quantile less that of the engine, asked directly in the same round; the median over rounds, in
brackets the least and the most. Memory is what is resident at the end.

What is not alike: Envoy has one thread and Tokenway one worker here, the others as many threads as there are
processors. Tokenway reads each answer's usage and end, which the others do not. All prompts come again and
again, so that every router's memory of them stays small.

A router whose wheel cannot be had is named and left out; so is Tokenway with its request path compiled, where
`make compiled` has not been run. How well they choose: `benchmarks.peer_quality`. The last line is a JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import peer_environment, processes
from benchmarks.peer_routers import Router, add_only, chosen
from benchmarks.setups import Setup, python_module, setup
from benchmarks.traffic import Target, closed_loop, open_loop, over_rounds, requests, run
from testbed.processes import free_port

OURS: Final = "tokenway"
COMPILED: Final = peer_environment.ROOT / ".tools/compiled"
"""Tokenway as it was last compiled there."""

DIRECT: Final = "direct"
ENGINES: Final = 3
WARM_UP_S: Final = 0.3
LAST_LOGS_S: Final = 0.1
"""From the last answer until its access-log entry has been handled."""

PACED_PER_S: Final = 300.0
MANY: Final = 32
FEW: Final = 4


@dataclass(frozen=True, slots=True)
class Contender(Target):
    """What stands between client and engines.

    Attributes:
        parts: Its processes, by what they are called; none for the engine itself.
    """

    parts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Phase:
    """What is sent in one phase.

    Attributes:
        name: For reports.
        messages: In turn.
        concurrency: Connections, each with a request at a time.
    """

    name: str
    messages: Sequence[bytes]
    concurrency: int = FEW


@dataclass(frozen=True, slots=True)
class Measured:
    """What a round says of one contender.

    Attributes:
        cpu_us: Per request, by phase.
        part_us: The same by part of the contender.
        requests_per_s: By phase.
        latencies_ms: At the steady rate.
        rss_mib: At its end.
    """

    cpu_us: dict[str, float]
    part_us: dict[str, dict[str, float]]
    requests_per_s: dict[str, float]
    latencies_ms: list[float]
    rss_mib: float


def phases() -> tuple[Phase, ...]:
    """All that are measured in a closed loop."""
    return (
        Phase("4 KB JSON", requests(64, 4096)),
        Phase("stream of 200", requests(64, 4096, stream_tokens=200)),
        Phase("220 KB", requests(64, 220_000)),
        Phase("0.8 MB", requests(32, 800_000)),
        Phase(f"4 KB, {MANY} at once", requests(64, 4096), MANY),
    )


async def contenders(
    stack: AsyncExitStack, root: Path, engines: list[int], routers: Sequence[Router]
) -> list[Contender]:
    """All that start; the name of one that does not is printed."""
    alone = await stack.enter_async_context(setup("alone", root, engines, first_chunk=False))
    found = [await _tokenway(stack, OURS, setup("tokenway", root, engines, first_chunk=True))]
    if COMPILED.exists():
        compiled = setup("tokenway", root, engines, first_chunk=True, checkout=COMPILED)
        found.append(await _tokenway(stack, f"{OURS}, compiled", compiled))
    else:
        print("left out: tokenway, compiled, which `make compiled` makes", flush=True)
    found.append(Contender("envoy alone", alone.port, {"Envoy": alone.envoy_pid}))
    for router in routers:
        try:
            port, pid = await stack.enter_async_context(router.running(engines))
        except TimeoutError:
            print(f"left out: {router.name} does not start", flush=True)
        else:
            found.append(Contender(router.name, port, {"router": pid}))
    return found


async def _tokenway(
    stack: AsyncExitStack, name: str, starting: AbstractAsyncContextManager[Setup]
) -> Contender:
    started = await stack.enter_async_context(starting)
    assert started.pid is not None
    return Contender(name, started.port, {"Envoy": started.envoy_pid, "Python": started.pid})


async def one_round(contender: Contender, sent: Sequence[Phase], seconds: float) -> Measured:
    """All phases once."""
    part_us: dict[str, dict[str, float]] = {}
    requests_per_s = {}
    for phase in sent:
        messages = list(phase.messages)
        await closed_loop(contender, messages, phase.concurrency, WARM_UP_S)
        before_s = _used_s(contender)
        done = len(await closed_loop(contender, messages, phase.concurrency, seconds))
        await asyncio.sleep(LAST_LOGS_S)
        part_us[phase.name] = {
            part: (used_s - before_s[part]) / done * 1e6 for part, used_s in _used_s(contender).items()
        }
        requests_per_s[phase.name] = done / seconds
    paced_ms = await open_loop(contender, list(sent[0].messages), PACED_PER_S, seconds)
    cpu_us = {phase: sum(parts.values()) for phase, parts in part_us.items()}
    rss_mib = processes.tree_rss_mib(contender.parts.values())
    return Measured(cpu_us, part_us, requests_per_s, paced_ms, rss_mib)


def _used_s(contender: Contender) -> dict[str, float]:
    return {part: processes.on_cpu_s([pid]) for part, pid in contender.parts.items()}


def table(rounds: Mapping[str, Sequence[Measured]], sent: Sequence[Phase]) -> str:
    """The figures of all contenders in Markdown.

    Args:
        rounds: By contender, `OURS` and `DIRECT` among them.
        sent: The phases, in order; the last is the one whose requests per second are shown.
    """
    names = [phase.name for phase in sent]
    head = (
        f"| CPU µs per request (ours over it) | {' | '.join(names)} | requests/s, {MANY} at once "
        f"| added at {PACED_PER_S:.0f}/s: p50, p99 ms (least..most) | MiB |"
    )
    lines = [head, "|---" * (len(names) + 4) + "|"]
    for name, measured in rounds.items():
        if name == DIRECT:
            continue
        cells = [
            f"{statistics.median(each.cpu_us[phase] for each in measured):,.0f}"
            f" ({_ratio(rounds[OURS], measured, phase):.2f})"
            for phase in names
        ]
        cells += [
            f"{statistics.median(each.requests_per_s[names[-1]] for each in measured):,.0f}",
            ", ".join(_added(measured, rounds[DIRECT], q) for q in (0.5, 0.99)),
            f"{measured[-1].rss_mib:.0f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for part in next(iter(rounds[OURS][0].part_us.values())):
        cells = [f"{statistics.median(each.part_us[at][part] for each in rounds[OURS]):,.0f}" for at in names]
        lines.append(f"| of ours, {part} | {' | '.join(cells)} | | | |")
    return "\n".join(lines)


def _ratio(ours: Sequence[Measured], theirs: Sequence[Measured], phase: str) -> float:
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(our.cpu_us[phase] / their.cpu_us[phase] for our, their in pairs)


def _added(measured: Sequence[Measured], direct: Sequence[Measured], q: float) -> str:
    found_ms, base_ms = ([each.latencies_ms for each in rounds] for rounds in (measured, direct))
    added_ms = over_rounds(found_ms, q, base_ms)
    return f"{added_ms.median:.2f} ({added_ms.least:.2f}..{added_ms.most:.2f})"


async def compare(routers: Sequence[Router], seconds: float, rounds: int) -> dict[str, Any]:
    """Everything, printed on the way; what the last line holds.

    Args:
        routers: Beside Tokenway and Envoy alone.
        seconds: Per phase.
        rounds: In which all take turns.
    """
    engines = [free_port() for _ in range(ENGINES)]
    sent = phases()
    found: dict[str, list[Measured]] = {}
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="twp", dir="/tmp", ignore_cleanup_errors=True)
        )
        stack.enter_context(python_module("benchmarks.traffic", "127.0.0.1", *map(str, engines)))
        taking_part = await contenders(stack, Path(folder), engines, routers)
        load_before = os.getloadavg()[0]
        direct = Contender(DIRECT, engines[0], {})
        for each in taking_part:
            found[each.name] = []
        found[DIRECT] = []
        for number in range(rounds):
            turn = number % len(taking_part)
            for contender in (*taking_part[turn:], *taking_part[:turn]):
                found[contender.name].append(await one_round(contender, sent, seconds))
            paced_ms = await open_loop(direct, list(sent[0].messages), PACED_PER_S, seconds)
            found[DIRECT].append(Measured({}, {}, {}, paced_ms, 0.0))
            print(f"round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}", flush=True)
    print(f"\n{table(found, sent)}\n", flush=True)
    return {
        "machine": processes.machine(),
        "load_before": round(load_before, 2),
        "rounds": rounds,
        "seconds": seconds,
        "cpu_us_per_request": {
            name: {phase: [round(each.cpu_us[phase], 1) for each in measured] for phase in measured[0].cpu_us}
            for name, measured in found.items()
        },
    }


def main() -> None:
    """Install what can be had, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=1.5, help="per phase (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="in which all take turns (default: %(default)s)"
    )
    add_only(parser)
    options = parser.parse_args()
    routers = chosen(parser, options.only)
    print(json.dumps(run(compare(routers, options.seconds, options.rounds))))


if __name__ == "__main__":
    main()
