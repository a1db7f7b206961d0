"""What it costs to be the endpoint picker of a foreign gateway: CPU per request and per chunk, added latency.

    make bench-picker          (python -m benchmarks.picker [--seconds S] [--rounds N])

One Envoy with Istio's configuration for an InferencePool (`testbed.foreign_gateway`), one Tokenway as its
picker, one engine that answers at once, one client, all on loopback:

    alone       a listener without a picker
    echo        Istio's own: FULL_DUPLEX_STREAMED in both directions, every chunk passes the picker
    streamed    response body STREAMED, the stream left after the first token (`leave_early`)
    none        response body NONE, the stream left with the decision (`leave_early`)

CPU is what the kernel's scheduler says of all threads of a process (/proc/PID/task/*/schedstat), Envoy's and
the picker's apart, over a phase, divided by its requests; of Envoy that of `alone` is in it. The four take
turns, `--rounds` times; a figure of CPU is the median of the rounds, `_least` the least. A chunk's is that of
a phase of long streams, divided by the messages that Envoy counts. Latencies are at the client, of requests
one at a time: each round's quantile less that of `alone` in the same round, and of those the median. The last
line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import tempfile
import urllib.request
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks import processes
from benchmarks.processes import scheduled_s
from benchmarks.setups import ENVOY, python_module
from benchmarks.traffic import MODEL, ApartEngine, Target, closed_loop, over_rounds, requests
from testbed.foreign_gateway import bootstrap
from testbed.processes import free_port

Figures = dict[str, Any]
"""Names with units to numbers; `machine` is an object of its own."""

SIZES: Final = {"4kb": 4_096, "220kb": 220_000, "800kb": 800_000, "3400kb": 3_400_000}
"""Prompts: a chat's; the median of long contexts; the median and the 99th percentile of an agent's turn."""

LISTENERS: Final = {
    "alone": "alone",
    "echo": "metadata",
    "streamed": "streamed_logged",
    "none": "none_logged",
}

STREAM_TOKENS: Final = 500
STREAM_CLIENTS: Final = 16
PACE_S: Final = 0.004
"""Between two tokens, so that each is a chunk of its own."""

LEAST_STREAMS_S: Final = 5.0
"""Of a phase of streams: several of each client's, of two seconds and more."""

WARM_UP_S: Final = 0.5
LAST_MESSAGES_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Bench:
    """What runs.

    Attributes:
        targets: A listener of Envoy's by the name of its set-up.
        picker: Process id of Tokenway.
        envoy: Process id of Envoy.
        envoy_admin: Port of its admin surface.
    """

    targets: dict[str, Target]
    picker: int
    envoy: int
    envoy_admin: int

    def messages(self) -> int:
        """Messages of ext_proc that Envoy has received so far."""
        url = f"http://127.0.0.1:{self.envoy_admin}/stats?filter=stream_msgs_received"
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
        return sum(map(int, re.findall(r"stream_msgs_received: (\d+)", text)))


class PacedEngine(ApartEngine):
    """Takes bodies in chunks, as a gateway with a picker sends them, and streams token by token."""

    apart_s = PACE_S

    def data_received(self, data: bytes) -> None:
        """Answer a request once it is whole; the next one comes after its answer."""
        self._buffer += data
        head_end = self._buffer.find(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in self._buffer[: max(0, head_end)].lower():
            super().data_received(b"")
        elif self._buffer.endswith(b"\r\n0\r\n\r\n"):
            body = bytes(self._buffer[head_end + 4 :])
            self._buffer.clear()
            self._answer(b"", body)


async def serve_engine(port: int) -> None:
    """Be the engine, until killed."""
    await asyncio.get_running_loop().create_server(PacedEngine, "127.0.0.1", port)
    await asyncio.Event().wait()


@asynccontextmanager
async def running(root: Path) -> AsyncIterator[Bench]:
    """Engine, picker and Envoy; killed at the end."""
    engine, picker_port, admin, envoy_admin = (free_port() for _ in range(4))
    ports = {listener: free_port() for listener in LISTENERS.values()}
    clusters = {"clusters": [{"name": "bench", "endpoints": [{"address": "127.0.0.1", "port": engine}]}]}
    (root / "clusters.json").write_text(json.dumps(clusters))
    config = {
        "server": {"run_dir": str(root / "run"), "admin": {"port": admin}},
        "endpoint_picker": {"listen": [f"127.0.0.1:{picker_port}"], "leave_early": True},
        "logging": {"requests": False, "level": "warning"},
        "models": {MODEL: {"rules": [{"cluster": "bench"}]}},
    }
    (root / "tokenway.yaml").write_text(json.dumps(config))
    text = bootstrap(ports, envoy_admin, picker_port, free_port(), [engine], is_tls=False)
    (root / "envoy.json").write_text(text)
    with ExitStack() as stack:
        stack.enter_context(python_module("benchmarks.picker", "--engine", str(engine)))
        picker = stack.enter_context(python_module("tokenway.cli.main", "serve", str(root / "tokenway.yaml")))
        await processes.until(lambda: asyncio.to_thread(_answers, admin, "/readyz"), "tokenway")
        flags = ("--concurrency", "1", "--use-dynamic-base-id", "-l", "off")
        envoy = stack.enter_context(processes.running(str(ENVOY), "-c", str(root / "envoy.json"), *flags))
        await processes.until(lambda: asyncio.to_thread(_answers, envoy_admin, "/ready"), "envoy")
        targets = {name: Target(name, ports[listener]) for name, listener in LISTENERS.items()}
        yield Bench(targets, picker, envoy, envoy_admin)


def _answers(port: int, path: str) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=1) as response:
        return bool(response.status == 200)


async def measure(seconds: float, rounds: int) -> Figures:
    """All figures.

    Args:
        seconds: Length of one phase.
        rounds: Phases of each set-up.
    """
    figures: Figures = {}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="twp", ignore_cleanup_errors=True) as folder:
        async with running(Path(folder)) as bench:
            for label, num_bytes in SIZES.items():
                figures |= await _whole(bench, label, num_bytes, seconds, rounds)
                loads.append(os.getloadavg()[0])
                print(f"[{label}] {json.dumps(figures)}", flush=True)
            figures |= await _streams(bench, seconds, rounds)
            loads.append(os.getloadavg()[0])
    figures["machine"] = {**processes.machine(), "load_average": [round(min(loads), 1), round(max(loads), 1)]}
    return figures


@dataclass(slots=True)
class Rounds:
    """What the phases of one set-up cost.

    Attributes:
        picker_us: CPU per request, of each phase.
        envoy_us: The same of Envoy.
        latencies_ms: Of the requests of each phase.
        messages: From the picker to Envoy, of all phases.
    """

    picker_us: list[float] = field(default_factory=list)
    envoy_us: list[float] = field(default_factory=list)
    latencies_ms: list[list[float]] = field(default_factory=list)
    messages: int = 0

    async def add(
        self, bench: Bench, target: Target, asked: list[bytes], clients: int, seconds: float
    ) -> None:
        """One phase more."""
        await closed_loop(target, asked, clients, WARM_UP_S)
        await asyncio.sleep(LAST_MESSAGES_S)
        messages, picker_s, envoy_s = bench.messages(), scheduled_s(bench.picker), scheduled_s(bench.envoy)
        latencies_ms = await closed_loop(target, asked, clients, seconds)
        await asyncio.sleep(LAST_MESSAGES_S)
        self.picker_us.append((scheduled_s(bench.picker) - picker_s) / len(latencies_ms) * 1e6)
        self.envoy_us.append((scheduled_s(bench.envoy) - envoy_s) / len(latencies_ms) * 1e6)
        self.latencies_ms.append(latencies_ms)
        self.messages += bench.messages() - messages


async def _rounds(
    bench: Bench, asked: list[bytes], clients: int, seconds: float, rounds: int
) -> dict[str, Rounds]:
    """Of each set-up, in turns."""
    measured = {name: Rounds() for name in bench.targets}
    for _ in range(rounds):
        for name, target in bench.targets.items():
            await measured[name].add(bench, target, asked, clients, seconds)
    return measured


async def _whole(bench: Bench, label: str, num_bytes: int, seconds: float, rounds: int) -> Figures:
    """Requests of a size, answered by a little JSON, one at a time."""
    measured = await _rounds(bench, requests(8, num_bytes), 1, seconds, rounds)
    alone_ms = measured["alone"].latencies_ms
    figures: Figures = {}
    for name, found in measured.items():
        figures[f"{name}_{label}_envoy_us"] = round(median(found.envoy_us), 1)
        if name == "alone":
            continue
        figures[f"{name}_{label}_picker_us"] = round(median(found.picker_us), 1)
        figures[f"{name}_{label}_picker_us_least"] = round(min(found.picker_us), 1)
        for q, quantile_name in ((0.5, "p50"), (0.99, "p99")):
            added_ms = over_rounds(found.latencies_ms, q, alone_ms)
            figures[f"{name}_{label}_added_{quantile_name}_ms"] = round(added_ms.median, 3)
    return figures


async def _streams(bench: Bench, seconds: float, rounds: int) -> Figures:
    """Streams, several at a time, each token by itself: what one costs, and a chunk that comes back."""
    asked = requests(8, SIZES["4kb"], stream_tokens=STREAM_TOKENS)
    measured = await _rounds(bench, asked, STREAM_CLIENTS, max(seconds, LEAST_STREAMS_S), rounds)
    figures: Figures = {}
    for name, found in measured.items():
        figures[f"{name}_streams_envoy_us_per_token"] = round(median(found.envoy_us) / STREAM_TOKENS, 2)
        if name == "alone":
            continue
        messages = found.messages / sum(map(len, found.latencies_ms))
        figures[f"{name}_streams_picker_us_per_token"] = round(median(found.picker_us) / STREAM_TOKENS, 2)
        figures[f"{name}_streams_picker_us_per_message"] = round(median(found.picker_us) / messages, 2)
        figures[f"{name}_streams_picker_us_per_message_least"] = round(min(found.picker_us) / messages, 2)
        figures[f"{name}_streams_messages_per_stream"] = round(messages, 1)
    figures["echo_chunks_per_s_per_core"] = round(1e6 / figures["echo_streams_picker_us_per_message"])
    saved = figures["echo_streams_picker_us_per_token"] - figures["streamed_streams_picker_us_per_token"]
    figures["saved_by_leaving_us_per_token"] = round(saved, 2)
    return figures


def main() -> None:
    """Run the benchmark; what is known so far is printed on the way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="a phase, of four set-ups and five loads")
    parser.add_argument("--rounds", type=int, default=3, help="phases of each")
    parser.add_argument("--engine", type=int, metavar="PORT", help="be the engine of a benchmark")
    options = parser.parse_args()
    if options.engine is not None:
        asyncio.run(serve_engine(options.engine))
        return
    print(json.dumps(asyncio.run(measure(options.seconds, options.rounds))))


if __name__ == "__main__":
    main()
