"""Two versions of Tokenway by turns in one run: own work, CPU per request of Tokenway and Envoy, latency.

    make bench-versions BEFORE=FOLDER          (python -m benchmarks.versions FOLDER)

FOLDER is a checkout of the version to compare with (`git worktree add FOLDER COMMIT`); it runs under this
Python, so its dependencies have to be these. Own work is what `benchmarks.own_work` of either checkout
prints, the least of its rounds. The whole is each version behind an Envoy of its own, and Envoy alone and a
bare servicer beside them; CPU is what the scheduler says of all threads, over a phase, divided by its
requests, the median of the rounds. Of quantiles of latency, and of what they are above those of Envoy alone
in the same round, it is the median too, with the least and the most of a round beside it. Each round goes
through all set-ups, so that what else the machine does falls on all alike: ratios hold on a busy machine,
microseconds do not; with `--real-time` nothing else has a processor meanwhile. The last line is a JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import processes
from benchmarks.setups import Setup, python_module, setup
from benchmarks.traffic import closed_loop, open_loop, over_rounds, requests, run
from testbed.processes import free_port

PROMPTS_BYTES: Final = {"4kb": 4_096, "220kb": 220_000, "800kb": 800_000, "3400kb": 3_400_000}
"""A chat's; the median of long contexts; the median and the 99th percentile of a coding agent's turn."""

CONCURRENCY: Final = 4
SATURATED: Final = 32
QUANTILES: Final = {"p50": 0.5, "p99": 0.99}
WARM_UP_S: Final = 0.5
LAST_LOGS_S: Final = 0.1

Samples = dict[str, list[float]]
"""Values by what they are of."""

Rounds = dict[str, list[list[float]]]
"""The same, each round apart."""


def own_work(checkouts: Sequence[Path], rounds: int, count: int) -> dict[str, Any]:
    """What `benchmarks.own_work` says in each checkout, microseconds: least, and least median, of the rounds.

    Args:
        checkouts: Where; the first is what the others are compared with.
        rounds: How often, by turns.
        count: Requests per case.

    Raises:
        subprocess.CalledProcessError: It failed there.
    """
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for _ in range(rounds):
        for checkout in checkouts:
            command = (sys.executable, "-m", "benchmarks.own_work", "--requests", str(count))
            said = subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True)  # noqa: S603
            cases = json.loads(said.stdout.splitlines()[-1])
            for case, phases in cases.items():
                if type(phases) is dict:
                    found.setdefault(case, {}).setdefault(str(checkout), []).append(phases["whole"])
    figures: dict[str, Any] = {}
    for case, by_checkout in found.items():
        if len(by_checkout) < len(checkouts):
            continue  # a case that one of them does not have
        medians, leasts = (
            [min(each[which] for each in by_checkout[str(checkout)]) for checkout in checkouts]
            for which in (0, 1)
        )
        figures[case] = {
            "median_us": medians,
            "least_us": leasts,
            "ratio": [round(medians[-1] / medians[0], 3), round(leasts[-1] / leasts[0], 3)],
        }
    return figures


async def whole(before: Path, seconds: float, rounds: int, rates_per_s: Sequence[float]) -> dict[str, Any]:
    """CPU per request in microseconds, latencies in ms and requests a second of the set-ups.

    Args:
        before: The checkout to compare with.
        seconds: Length of one phase.
        rounds: How often all phases repeat.
        rates_per_s: Steady rates at which latency is measured.
    """
    engines = [free_port() for _ in range(3)]
    samples: Samples = {}
    latencies_ms: Rounds = {}
    with tempfile.TemporaryDirectory(prefix="twv", ignore_cleanup_errors=True) as folder:
        root = Path(folder)
        with python_module("benchmarks.traffic", "127.0.0.1", *map(str, engines)):
            async with (
                setup("alone", root, engines, first_chunk=False) as alone,
                setup("floor", root, engines, first_chunk=True) as floor,
                setup("tokenway", root, engines, first_chunk=True, checkout=before) as old,
                setup("tokenway", root, engines, first_chunk=True) as new,
            ):
                targets = (alone, floor, old, new)
                for number in range(rounds):
                    await _cpu(targets, seconds, samples)
                    await _latency(targets, seconds, rates_per_s, latencies_ms)
                    print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
                memory = {target.name: round(target.rss_mib(), 1) for target in (old, new)}
    figures: dict[str, Any] = {name: round(statistics.median(values), 1) for name, values in samples.items()}
    return figures | quantiles(latencies_ms, alone.name) | {"rss_mib": memory}


def quantiles(latencies_ms: Rounds, base: str) -> dict[str, Any]:
    """Medians and 99th percentiles in ms over rounds, and what they are above those of `base`.

    Args:
        latencies_ms: By set-up and load, `SETUP: LOAD`; each load of `base` among them.
        base: A set-up.

    Raises:
        KeyError: `base` has not all loads.
    """
    found: dict[str, Any] = {}
    for name, rounds in latencies_ms.items():
        setup_name, load = name.split(": ", 1)
        found[name] = {label: over_rounds(rounds, q).rounded for label, q in QUANTILES.items()}
        if setup_name != base:
            of_base = latencies_ms[f"{base}: {load}"]
            found[name] |= {
                f"added {label}": over_rounds(rounds, q, of_base).rounded for label, q in QUANTILES.items()
            }
    return found


async def _cpu(targets: Sequence[Setup], seconds: float, samples: Samples) -> None:
    loads = {f"json {name}": requests(16, size) for name, size in PROMPTS_BYTES.items()}
    loads["stream 4kb"] = requests(64, PROMPTS_BYTES["4kb"], stream_tokens=10)
    loads["json 4kb"] = requests(64, PROMPTS_BYTES["4kb"])
    for label, messages in loads.items():
        for target in targets:
            await closed_loop(target, messages, CONCURRENCY, WARM_UP_S)
            envoy_s, python_s = target.envoy_cpu_s(), target.cpu_s() if target.pid else 0.0
            done = len(await closed_loop(target, messages, CONCURRENCY, seconds))
            await asyncio.sleep(LAST_LOGS_S)
            name = f"{target.name}: {label}"
            if target.pid:
                samples.setdefault(f"{name}, python us", []).append((target.cpu_s() - python_s) / done * 1e6)
            samples.setdefault(f"{name}, envoy us", []).append((target.envoy_cpu_s() - envoy_s) / done * 1e6)
    for target in targets:
        done = len(await closed_loop(target, loads["json 4kb"], SATURATED, seconds))
        samples.setdefault(f"{target.name}: requests/s, {SATURATED} at once", []).append(done / seconds)


async def _latency(
    targets: Sequence[Setup], seconds: float, rates_per_s: Sequence[float], latencies_ms: Rounds
) -> None:
    messages = requests(64, PROMPTS_BYTES["4kb"])
    for target in targets:
        name = f"{target.name}: ms, one at a time"
        latencies_ms.setdefault(name, []).append(await closed_loop(target, messages, 1, seconds))
    for rate_per_s in rates_per_s:
        for target in targets:
            found_ms = await open_loop(target, messages, rate_per_s, seconds)
            latencies_ms.setdefault(f"{target.name}: ms, {rate_per_s:.0f}/s", []).append(found_ms)


def main() -> None:
    """Print the figures; the last line is a JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="checkout of the version to compare with")
    parser.add_argument("--seconds", type=float, default=2.0, help="per phase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=1500, help="per case of own work; 0 leaves that out")
    parser.add_argument("--rates", type=float, nargs="*", default=[300.0, 500.0], metavar="PER_S")
    parser.add_argument("--own-work-only", action="store_true", help="no Envoy")
    parser.add_argument("--real-time", action="store_true", help="go before all other processes")
    options = parser.parse_args()
    if options.real_time:
        processes.go_first()
    here, before = Path(__file__).parents[1], options.before.resolve()
    figures: dict[str, Any] = {}
    if options.requests:
        figures["own work"] = own_work((before, here), options.rounds, options.requests)
    if not options.own_work_only:
        figures |= run(whole(before, options.seconds, options.rounds, options.rates))
    for name, found in sorted(figures.items()):
        print(f"{name}: {found}")
    figures["machine"] = processes.machine()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
