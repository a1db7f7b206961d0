"""What Tokenway costs: CPU per request, added latency, saturation, beside Envoy alone and a bare servicer.

    make bench-overhead          (python -m benchmarks.overhead)

Set-ups run side by side in one go, each an Envoy with the shipped bootstrap's data path, one upstream that
answers at once, and a closed- or open-loop client on loopback:

    alone         Envoy without ext_proc and access log
    floor         Envoy with a servicer that answers the same messages with constants and drops access logs,
                  by Tokenway's own HTTP/2
    grpcio_floor  the same by grpc.aio, with Tokenway's settings
    plain_floor   the same with gRPC as it comes
    tokenway      Envoy with Tokenway, three endpoints
    grpcio        the same with `server.transport: grpcio`

CPU is what the scheduler says of the Python process, over a phase, divided by its requests; access logs
are included. Latencies are medians and 99th percentiles at the client, each round's minus that of `alone` in
the same round, and of those the median; rounds of the set-ups alternate, so that what else the machine does
falls on all of them alike; with `--real-time` nothing else has a processor meanwhile. What is left out: TLS,
HTTP/2 clients, more than one Envoy thread.

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.decision import decisions
from benchmarks.setups import Setup, python_module, setup
from benchmarks.traffic import closed_loop, open_loop, over_rounds, requests, run
from extproc.values.balancing import Algorithm
from testbed.processes import free_port

Figures = dict[str, Any]
"""Names with units to numbers; `decision_us` and `machine` are objects of their own."""

Load = Coroutine[Any, Any, list[float]]
"""Traffic yet to be sent; its latencies in ms, one per request."""

PROMPT_BYTES = 4096
WARM_UP_S = 0.5
LAST_LOGS_S = 0.1
"""From the last answer until its access-log entry has been handled."""

PACED_PER_S = 300.0
"""Requests a second: about a sixth of what the slowest set-up manages here, so that none of them queues."""

STREAMS_PER_S = 15.0
"""Of 10,000 tokens: 150,000 tokens a second, about what one Envoy thread, client and upstream can do here."""

STREAMS_MIN_S = 8.0
"""For some 120 streams: CPU is counted in ticks of 10 ms, and a ratio needs many of them."""

_PREFIXES = {name: f"{name}_" for name in ("alone", "floor", "grpcio_floor", "plain_floor", "grpcio")}
"""Of the figures of each set-up but Tokenway itself."""

FIRST_SCRAPES_S = 8.0
IDLE_S = 15.0
"""Three rounds of probes and scrapes at their default intervals."""


async def measure(seconds: float, rounds: int, rates_per_s: Sequence[float], workers: int) -> Figures:
    """All figures.

    Args:
        seconds: Length of one phase.
        rounds: How often phases repeat whose set-ups alternate.
        rates_per_s: Steady rates at which added latency is measured.
        workers: Saturation is also measured with so many; 1 leaves that out.
    """
    figures: Figures = {}
    engines = [free_port() for _ in range(3)]
    with tempfile.TemporaryDirectory(prefix="twb", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        with python_module("benchmarks.traffic", "127.0.0.1", *map(str, engines)):
            await _compare(root, engines, seconds, rounds, rates_per_s, figures)
            if workers > 1:
                figures |= await _several(root, engines, seconds, workers)
                _print_progress(f"{workers} workers", figures)
        every_address = "0.0.0.0"  # noqa: S104 - 127.0.x.y stand for a hundred engines
        with python_module("benchmarks.traffic", every_address, str(engines[0])):
            figures |= await _idle(root, engines[0])
    algorithm = Algorithm.LEAST_COMPLETION
    figures["decision_us"] = {str(n): round(decisions(n, algorithm), 1) for n in (10, 100, 1000)}
    figures["machine"] = processes.machine()
    return figures


async def _compare(
    root: Path,
    engines: list[int],
    seconds: float,
    rounds: int,
    rates_per_s: Sequence[float],
    figures: Figures,
) -> None:
    async with (
        setup("alone", root, engines, first_chunk=False) as alone,
        setup("floor", root, engines, first_chunk=False) as floor,
        setup("floor", root, engines, first_chunk=True) as floor_chunk,
        setup("grpcio_floor", root, engines, first_chunk=False) as grpcio_floor,
        setup("grpcio_floor", root, engines, first_chunk=True) as grpcio_floor_chunk,
        setup("plain_floor", root, engines, first_chunk=False) as plain_floor,
        setup("plain_floor", root, engines, first_chunk=True) as plain_floor_chunk,
        setup("tokenway", root, engines, first_chunk=False) as tokenway,
        setup("tokenway", root, engines, first_chunk=True) as tokenway_chunk,
        setup("grpcio", root, engines, first_chunk=False) as grpcio,
        setup("grpcio", root, engines, first_chunk=True) as grpcio_chunk,
    ):
        figures |= await _cpu(
            (plain_floor, grpcio_floor, floor, grpcio, tokenway),
            (plain_floor_chunk, grpcio_floor_chunk, floor_chunk, grpcio_chunk, tokenway_chunk),
            seconds,
            rounds,
        )
        _print_progress("cpu per request", figures)
        figures |= await _latency(alone, (floor, grpcio, tokenway), seconds, rounds, rates_per_s)
        _print_progress("latency", figures)
        figures |= await _saturation((alone, floor, grpcio, tokenway), seconds)
        _print_progress("saturation", figures)
        figures |= await _streams(tokenway_chunk, seconds, rounds)
        figures["rss_mib"] = round(tokenway.rss_mib(), 1)
        _print_progress("streams", figures)


async def _cpu(whole: Sequence[Setup], first_chunk: Sequence[Setup], seconds: float, rounds: int) -> Figures:
    """CPU of a JSON request, and of a streamed one with its first chunk; the transport's part and our own."""
    json_requests = requests(64, PROMPT_BYTES)
    stream_requests = requests(64, PROMPT_BYTES, stream_tokens=10)
    used_us: dict[str, list[float]] = {}
    for _ in range(rounds):
        for suffix, targets, messages in (
            ("", whole, json_requests),
            ("_first_chunk", first_chunk, stream_requests),
        ):
            for target in targets:
                used = await _warm_cpu_us(target, messages, 4, seconds)
                name = f"{_PREFIXES.get(target.name, 'cpu_')}us_per_request{suffix}"
                used_us.setdefault(name, []).append(used)
    figures: Figures = {name: round(statistics.median(values), 1) for name, values in used_us.items()}
    for suffix in ("", "_first_chunk"):
        total, base = figures[f"cpu_us_per_request{suffix}"], figures[f"floor_us_per_request{suffix}"]
        figures[f"own_us_per_request{suffix}"] = round(total - base, 1)
        figures[f"total_to_floor_ratio{suffix}"] = round(total / base, 3)
        for name in ("plain_floor", "grpcio"):
            other = figures[f"{name}_us_per_request{suffix}"]
            figures[f"total_to_{name}_ratio{suffix}"] = round(total / other, 3)
        grpcio_base = figures[f"grpcio_floor_us_per_request{suffix}"]
        figures[f"floor_to_grpcio_floor_ratio{suffix}"] = round(base / grpcio_base, 3)
    return figures


async def _latency(
    alone: Setup, others: Sequence[Setup], seconds: float, rounds: int, rates_per_s: Sequence[float]
) -> Figures:
    """What is added to Envoy's own latency, one request at a time and at steady rates."""

    def at(rate_per_s: float) -> Callable[[Setup], Load]:
        return lambda target: open_loop(target, messages, rate_per_s, seconds)

    messages = requests(64, PROMPT_BYTES)
    loads: dict[str, Callable[[Setup], Load]] = {
        "concurrency_1": lambda target: closed_loop(target, messages, 1, seconds),
        **{f"{rate_per_s:.0f}_per_s": at(rate_per_s) for rate_per_s in rates_per_s},
    }
    figures: Figures = {}
    for label, load in loads.items():
        latencies_ms: dict[str, list[list[float]]] = {}
        for _ in range(rounds):
            for target in (alone, *others):
                latencies_ms.setdefault(target.name, []).append(await load(target))
        for q, name in ((0.5, "p50"), (0.99, "p99")):
            for target in others:
                added_ms = over_rounds(latencies_ms[target.name], q, latencies_ms["alone"]).median
                figures[f"{_PREFIXES.get(target.name, '')}added_{name}_ms_{label}"] = round(added_ms, 3)
    return figures


async def _saturation(targets: Sequence[Setup], seconds: float) -> Figures:
    """Requests a second with more connections than anybody here can serve at once."""
    figures: Figures = {}
    for label, prompt_bytes, concurrency in (("4kb", PROMPT_BYTES, 32), ("220kb", 220_000, 16)):
        messages = requests(16, prompt_bytes)
        for target in targets:
            done = len(await closed_loop(target, messages, concurrency, seconds))
            figures[f"{_PREFIXES.get(target.name, '')}requests_per_s_{label}"] = round(done / seconds, 1)
        for target in targets[1:]:
            used_us = await _warm_cpu_us(target, messages, concurrency, seconds)
            name = f"{_PREFIXES.get(target.name, 'cpu_')}us_per_request_{label}_saturated"
            figures[name] = round(used_us, 1)
    return figures


async def _several(root: Path, engines: list[int], seconds: float, workers: int) -> Figures:
    """Requests a second with several workers behind one Envoy thread."""
    figures: Figures = {}
    async with setup("tokenway", root, engines, first_chunk=False, workers=workers) as target:
        for label, prompt_bytes, concurrency in (("4kb", PROMPT_BYTES, 32), ("220kb", 220_000, 16)):
            messages = requests(16, prompt_bytes)
            await closed_loop(target, messages, concurrency, WARM_UP_S)
            done = len(await closed_loop(target, messages, concurrency, seconds))
            figures[f"requests_per_s_{label}_{workers}_workers"] = round(done / seconds, 1)
    return figures


async def _streams(target: Setup, seconds: float, rounds: int) -> Figures:
    """CPU of a long stream over that of a short one: Tokenway's part ends with the first token.

    Both come at the same rate, so that what the process does between requests weighs the same in both.
    """
    lasting_s = max(STREAMS_MIN_S, 2 * seconds)
    ratios = []
    for _ in range(rounds):
        short_us, long_us = [
            await _cpu_us(target, open_loop(target, messages, STREAMS_PER_S, lasting_s))
            for messages in (requests(64, PROMPT_BYTES, stream_tokens=tokens) for tokens in (10, 10_000))
        ]
        ratios.append(long_us / short_us)
    return {"cpu_ratio_10k_vs_10_output_tokens": round(statistics.median(ratios), 3)}


async def _idle(root: Path, engine: int) -> Figures:
    """What Tokenway uses without requests, when it probes and scrapes a hundred endpoints."""
    async with setup("tokenway", root, [engine], first_chunk=True, endpoints=100) as target:
        await asyncio.sleep(FIRST_SCRAPES_S)
        before_s, began_s = target.cpu_s(), time.monotonic()
        await asyncio.sleep(IDLE_S)
        cores = (target.cpu_s() - before_s) / (time.monotonic() - began_s)
        return {
            "idle_cores_100_endpoints": round(cores, 4),
            "rss_mib_100_endpoints": round(target.rss_mib(), 1),
        }


async def _warm_cpu_us(target: Setup, messages: list[bytes], concurrency: int, seconds: float) -> float:
    await closed_loop(target, messages, concurrency, WARM_UP_S)
    return await _cpu_us(target, closed_loop(target, messages, concurrency, seconds))


async def _cpu_us(target: Setup, load: Load) -> float:
    before_s = target.cpu_s()
    done = len(await load)
    await asyncio.sleep(LAST_LOGS_S)
    return (target.cpu_s() - before_s) / done * 1e6


def _print_progress(what: str, figures: Figures) -> None:
    print(f"[{what}] {json.dumps(figures)}", flush=True)


def main() -> None:
    """Run the benchmark; what is known so far is printed on the way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="per phase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[PACED_PER_S],
        metavar="PER_S",
        help="steady rates of the latency phases, requests a second (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=1, help="saturation with so many workers as well")
    parser.add_argument("--real-time", action="store_true", help="go before all other processes")
    options = parser.parse_args()
    if options.real_time:
        processes.go_first()
    measuring = measure(options.seconds, options.rounds, options.rates, options.workers)
    print(json.dumps(run(measuring)))


if __name__ == "__main__":
    main()
