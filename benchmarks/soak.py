"""A long run at a modest rate with all that goes wrong in a week: does it end with nothing left over?

    make soak SECONDS=600        (python -m benchmarks.soak [--seconds 600] [--rate 20])

Envoy, Tokenway and four simulated engines (an H100's speed). Clients stream or do not, and some leave at a
random moment. Meanwhile, in turn and at random: an engine is drained and comes back; another is killed and
started again; the configuration is changed and read again; the list of endpoints loses one and gets it back.

At the end, when clients are gone and engines idle, all that counts what runs must be 0: charges, pending
tokens, ext_proc streams, held requests, Envoy's active requests. So must be what counts faults of our own:
expired leases, entries of unknown requests, refused discovery, transport faults. Memory is flat if the median
of its last quarter is at most `MAX_GROWTH_MIB` above that of its second: the first fills what is bounded.

The exit status is 1 where something is not so. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from random import Random
from typing import Any, Final

import aiohttp
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import processes
from benchmarks.real_engines import ENGINES, MODEL, Engine, Front, engine_command, until_answers
from benchmarks.real_path_setups import CLUSTER, SETUPS, folder_of
from testbed.processes import free_port
from testbed.tokenizer_folder import write_tokenizer

PROMPTS: Final = 300
"""Different ones, so that what is kept of prompts is full before the first quarter is over."""

LEAVING_RATIO: Final = 0.2
STREAMED_RATIO: Final = 0.7
MAX_OUTPUT_TOKENS: Final = 60
MAX_AT_ONCE: Final = 200
PATIENCE_S: Final = 60.0
BETWEEN_EVENTS_S: Final = (2.0, 5.0)
AWAY_S: Final = (1.0, 4.0)
SAMPLE_S: Final = 2.0
QUIET_S: Final = 45.0
"""At most so long until all is reported, after the last request."""

MAX_GROWTH_MIB: Final = 6.0

RUNNING: Final = (
    "tokenway_requests_in_flight",
    "tokenway_prefill_tokens_pending",
    "tokenway_context_tokens",
    "tokenway_streams_active",
    "tokenway_held_requests",
)
"""Gauges that are 0 once nothing runs."""

FAULTS: Final = (
    "tokenway_lease_expirations_total",
    "tokenway_access_log_unmatched_total",
    "tokenway_bus_dropped_total",
    "tokenway_transport_faults_total",
    "tokenway_ads_nacks_total",
)
"""Counters of what must not happen."""

ENVOY_RUNNING: Final = ("downstream_rq_active", "upstream_rq_active", "upstream_rq_pending_active")


class Engines:
    """Four engines that can be killed and started again at the same addresses.

    Args:
        tokenizer: Their `tokenizer.json`.
    """

    def __init__(self, tokenizer: Path) -> None:
        self._tokenizer = tokenizer
        self._lives: dict[int, ExitStack] = {}
        ports = [free_port() for _ in range(3 * ENGINES)]
        self.all = [
            Engine(serve, f"tcp://127.0.0.1:{events}", f"tcp://127.0.0.1:{replay}", 0)
            for serve, events, replay in zip(ports[::3], ports[1::3], ports[2::3], strict=True)
        ]

    def start(self, engine: Engine) -> None:
        """Start one that does not run."""
        life = self._lives[engine.port] = ExitStack()
        command = engine_command(self._tokenizer, engine.port, engine.events, engine.replay, 1.0)
        life.enter_context(processes.running(*command))

    def kill(self, engine: Engine) -> None:
        """Kill one that runs."""
        self._lives.pop(engine.port).close()

    def kill_all(self) -> None:
        """Kill those that run."""
        for life in self._lives.values():
            life.close()
        self._lives.clear()


class Trouble:
    """What is done to the gateway meanwhile.

    Args:
        engines: Behind it.
        run_dir: Where its files are.
        rng: Draws what and when.
    """

    def __init__(self, engines: Engines, run_dir: Path, rng: Random) -> None:
        self._engines = engines
        self._clusters = run_dir / "clusters.json"
        self._config = run_dir / "tokenway.yaml"
        self._rng = rng
        self.done: Counter[str] = Counter()

    async def make(self, until_s: float) -> None:
        """Trouble until a time by `time.monotonic()`; at the end all is as it was."""
        kinds = [self._drain, self._restart, self._reload, self._remove]
        while time.monotonic() < until_s:
            await asyncio.sleep(self._rng.uniform(*BETWEEN_EVENTS_S))
            kind = self._rng.choice(kinds)
            await kind(self._rng.choice(self._engines.all))
            self.done[kind.__name__.strip("_")] += 1

    async def _drain(self, engine: Engine) -> None:
        self._list({engine.port: {"draining": True}})
        await self._while_away()
        self._list({})

    async def _remove(self, engine: Engine) -> None:
        self._list({engine.port: None})
        await self._while_away()
        self._list({})

    async def _restart(self, engine: Engine) -> None:
        self._engines.kill(engine)
        await self._while_away()
        self._engines.start(engine)

    async def _reload(self, _: Engine) -> None:
        config = yaml.safe_load(self._config.read_text())
        config["signals"] = {"first_chunk": self._rng.random() < 0.5}
        config["holding"] = {"enabled": self._rng.random() < 0.5}
        _replace(self._config, yaml.safe_dump(config))

    async def _while_away(self) -> None:
        await asyncio.sleep(self._rng.uniform(*AWAY_S))

    def _list(self, changed: Mapping[int, Mapping[str, Any] | None]) -> None:
        endpoints = []
        for engine in self._engines.all:
            change = changed.get(engine.port, {})
            if change is not None:
                endpoints.append({"address": "127.0.0.1", "port": engine.port, **change})
        _replace(self._clusters, json.dumps({"clusters": [{"name": CLUSTER, "endpoints": endpoints}]}))


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.rename(path)


class Clients:
    """Requests at a steady rate, and what became of them.

    Args:
        url: Of Envoy.
        rng: Draws prompts, lengths, and who leaves when.
    """

    def __init__(self, url: str, rng: Random) -> None:
        self._url = f"{url}/v1/completions"
        self._rng = rng
        self.ends: Counter[str] = Counter()

    async def send(self, rate: float, until_s: float) -> None:
        """Send requests until a time by `time.monotonic()`, and wait for the last answer."""
        running: set[asyncio.Task[None]] = set()
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            while time.monotonic() < until_s:
                await asyncio.sleep(self._rng.expovariate(rate))
                if len(running) >= MAX_AT_ONCE:
                    self.ends["not sent: too many at once"] += 1
                    continue
                leaves_s = self._rng.uniform(0, 0.6) if self._rng.random() < LEAVING_RATIO else None
                task = asyncio.create_task(self._one(session, self._body(), leaves_s))
                running.add(task)
                task.add_done_callback(running.discard)
            if running:
                await asyncio.wait(running)

    def _body(self) -> dict[str, Any]:
        number = self._rng.randrange(PROMPTS)
        words = [f" w{number % 20}" for _ in range(200)] + [f" x{number}" for _ in range(100)]
        return {
            "model": MODEL,
            "prompt": "".join(words),
            "max_tokens": self._rng.randint(1, MAX_OUTPUT_TOKENS),
            "stream": self._rng.random() < STREAMED_RATIO,
        }

    async def _one(
        self, session: aiohttp.ClientSession, body: Mapping[str, Any], leaves_s: float | None
    ) -> None:
        try:
            async with asyncio.timeout(leaves_s), session.post(self._url, json=body) as reply:
                await reply.read()
                self.ends[f"{reply.status}"] += 1
        except TimeoutError:
            self.ends["left" if leaves_s is not None else "no answer in time"] += 1
        except aiohttp.ClientError:
            self.ends["broke off"] += 1


async def sample(pids: Mapping[str, Sequence[int]], until_s: float) -> dict[str, list[float]]:
    """Resident memory in MiB by role, every `SAMPLE_S` until a time by `time.monotonic()`."""
    found: dict[str, list[float]] = {role: [] for role in pids}
    while time.monotonic() < until_s:
        for role, each in pids.items():
            found[role].append(processes.tree_rss_mib(each))
        await asyncio.sleep(SAMPLE_S)
    return found


def growth_mib(samples: Sequence[float]) -> float:
    """Median of the last quarter less that of the second, in MiB; at least four samples."""
    quarter = len(samples) // 4
    return statistics.median(samples[-quarter:]) - statistics.median(samples[quarter : 2 * quarter])


def sums(exposition: str, names: Sequence[str]) -> dict[str, float]:
    """Values of families of a scrape, each summed over its labels; 0 for one that is not there."""
    found = dict.fromkeys(names, 0.0)
    for family in text_string_to_metric_families(exposition):
        for each in family.samples:
            if each.name in found:
                found[each.name] += each.value
    return found


def envoy_sums(stats: str) -> dict[str, float]:
    """Values of Envoy's gauges of what runs, each summed over clusters and listeners.

    The connection on which this is asked is one of the admin listener, which is left out; so are Envoy's own
    streams to Tokenway that last for ever (access log, discovery).
    """
    found = dict.fromkeys(ENVOY_RUNNING, 0.0)
    for line in stats.splitlines():
        name, _, value = line.partition(": ")
        last = name.rpartition(".")[2]
        if last in found and not name.startswith(
            ("http.admin.", "cluster.tokenway-als.", "cluster.tokenway-xds.")
        ):
            found[last] += float(value)
    return found


async def left_over(front: Front) -> dict[str, float]:
    """What still runs, by Tokenway and by Envoy, once it is nothing or `QUIET_S` have passed."""
    deadline_s = time.monotonic() + QUIET_S
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{front.admin_url}/metrics") as reply:
                found = sums(await reply.text(), RUNNING)
            async with session.get(f"{front.envoy_admin_url}/stats?filter=rq_.*active") as reply:
                found |= envoy_sums(await reply.text())
            if not any(found.values()) or time.monotonic() > deadline_s:
                return found
            await asyncio.sleep(0.5)


async def soak(seconds: float, rate: float, seed: int) -> tuple[dict[str, Any], list[str]]:
    """The whole run.

    Returns:
        What the last line holds, and what is not as it should be.

    Raises:
        TimeoutError: Something does not start.
    """
    rng = Random(seed)
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tws", dir="/tmp")))
        tokenizer = write_tokenizer(folder / "tokenizer")
        run_dir = folder / "run"
        run_dir.mkdir()
        engines = Engines(tokenizer)
        stack.callback(engines.kill_all)
        for engine in engines.all:
            engines.start(engine)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5.0)) as session:
            for engine in engines.all:
                await until_answers(session, f"{engine.url}/health", "engine")
        gateway = next(setup for setup in SETUPS if setup.name == "least_completion")
        front = await stack.enter_async_context(gateway.serving(engines.all, run_dir, tokenizer))
        trouble, clients = Trouble(engines, folder_of(run_dir), rng), Clients(front.url, Random(rng.random()))
        until_s = time.monotonic() + seconds
        memory, _, _ = await asyncio.gather(
            sample(front.pids, until_s), clients.send(rate, until_s), trouble.make(until_s - AWAY_S[1] - 5.0)
        )
        running = await left_over(front)
        async with aiohttp.ClientSession() as session, session.get(f"{front.admin_url}/metrics") as reply:
            exposition = await reply.text()
    faults = sums(exposition, FAULTS)
    growth = {role: growth_mib(samples) for role, samples in memory.items()}
    wrong = [f"{name} is {value:g} at the end" for name, value in {**running, **faults}.items() if value]
    wrong += [f"{role} grew by {mib:.1f} MiB" for role, mib in growth.items() if mib > MAX_GROWTH_MIB]
    report = {
        "machine": processes.machine(),
        "seconds": seconds,
        "requests": dict(clients.ends),
        "trouble": dict(trouble.done),
        "running_at_the_end": running,
        "faults": faults,
        "mib_at_quarters": {
            role: [round(samples[min(len(samples) - 1, part * len(samples) // 4)], 1) for part in range(5)]
            for role, samples in memory.items()
        },
        "growth_mib": {role: round(mib, 1) for role, mib in growth.items()},
        "stalls": sums(exposition, ("tokenway_loop_stall_seconds_count",)),
    }
    return report, wrong


def main() -> None:
    """Run it; the exit status says whether anything was left over."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="at least 60 (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    report, wrong = asyncio.run(soak(options.seconds, options.rate, options.seed))
    for each in wrong:
        print(each, flush=True)
    print(json.dumps(report))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
