"""What Tokenway costs: CPU per request, added latency, saturation, beside Envoy alone and a bare servicer.

    make bench-overhead          (python -m benchmarks.overhead)

Three set-ups run side by side in one go, each an Envoy with the shipped bootstrap's data path, one upstream that
answers at once, and a closed- or open-loop client on loopback:

    alone     Envoy without ext_proc and access log
    floor     Envoy with a gRPC servicer that answers the same messages with constants and drops access-log bytes
    tokenway  Envoy with Tokenway, three endpoints

CPU is user + system time of the Python process from /proc, over a phase, divided by its requests; access logs are
included. Latencies are medians and 99th percentiles at the client, minus those of `alone` in the same round; rounds
of the set-ups alternate, so that what else the machine does falls on all of them alike. What is left out: TLS,
HTTP/2 clients, more than one Envoy thread.

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from extproc.server import bootstrap

ENVOY = Path(os.environ.get("TOKENWAY_ENVOY", Path(__file__).parents[1] / ".tools/envoy/envoy/_bin/envoy"))
MODEL = "bench"
STREAM_RATE = 15.0
"""Streams of 10,000 tokens a second: 150,000 tokens, about what one Envoy thread, client and upstream can do here."""

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


# --- processes ---------------------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ValueError("no VmRSS")


@dataclass
class Setup:
    """One Envoy and what stands behind it."""

    name: str
    port: int
    pid: int | None
    envoy_pid: int


@contextlib.contextmanager
def running(*command: str) -> Any:
    """A child process, killed at the end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


async def until(ready: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 20.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            if await ready():
                return
        await asyncio.sleep(0.05)
    raise TimeoutError(what)


# --- the upstream: answers at once, streams as many chunks as max_tokens asks for ----------------------------

CHUNK = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"tok "}}]}\n\n'
USAGE = b'"usage":{"prompt_tokens":1000,"completion_tokens":10,"prompt_tokens_details":{"cached_tokens":512}}'
JSON_ANSWER = b'{"id":"x","object":"chat.completion","choices":[],' + USAGE + b"}"


class Upstream(asyncio.Protocol):
    """A minimal HTTP/1.1 engine: the cheapest thing that can answer."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each complete request."""
        self._buffer += data
        while True:
            head_end = self._buffer.find(b"\r\n\r\n")
            if head_end < 0:
                return
            head = bytes(self._buffer[:head_end]).lower()
            length = 0
            if b"content-length:" in head:
                length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
            if len(self._buffer) < head_end + 4 + length:
                return
            body = bytes(self._buffer[head_end + 4 : head_end + 4 + length])
            del self._buffer[: head_end + 4 + length]
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        if b'"stream":true' not in body:
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                % (len(JSON_ANSWER), JSON_ANSWER)
            )
            return
        chunks = int(body.split(b'"max_tokens":', 1)[1].split(b",", 1)[0].split(b"}", 1)[0])
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        piece = b"%x\r\n%s\r\n" % (len(CHUNK), CHUNK)
        self._transport.write(head + piece)
        left = chunks - 1
        last = b'data: {"id":"x","choices":[],' + USAGE + b"}\n\ndata: [DONE]\n\n"
        tail = b"%x\r\n%s\r\n0\r\n\r\n" % (len(last), last)
        loop = asyncio.get_running_loop()

        def more(left: int) -> None:
            now = min(left, 50)  # many tokens a packet, so that the client keeps up
            if self._transport.is_closing():
                return
            self._transport.write(piece * now)
            if left > now:
                loop.call_soon(more, left - now)
            else:
                self._transport.write(tail)

        loop.call_later(0.001, more, left)


async def upstream(ports: list[int]) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(Upstream, "127.0.0.1", port)
    await asyncio.Event().wait()


# --- the floor: a servicer that answers the same messages and does nothing -----------------------------------


async def floor(socket: str, endpoints: list[str], first_chunk: bool) -> None:
    """The transport's floor."""
    import grpc

    import extproc.cli  # noqa: F401 - the same transport settings
    from extproc.protocol import wire

    answer = wire.Answers("0.floor").decision("request_body", tuple(endpoints), "bench")
    await_body = wire.AWAIT_BODY_AND_FIRST_CHUNK if first_chunk else wire.AWAIT_BODY

    async def process(_: Any, context: Any) -> None:
        await context.read()
        await context.write(await_body)
        body = await context.read()
        await context.write(answer)
        if first_chunk and b'"stream":true' in body:
            await context.read()

    async def drop(_: Any, context: Any) -> bytes:
        while await context.read() is not grpc.aio.EOF:
            pass
        return b""

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 64 << 20)])
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                wire.SERVICE, {"Process": grpc.stream_stream_rpc_method_handler(process)}
            ),
            grpc.method_handlers_generic_handler(
                "envoy.service.accesslog.v3.AccessLogService",
                {"StreamAccessLogs": grpc.stream_unary_rpc_method_handler(drop)},
            ),
        )
    )
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    await asyncio.Event().wait()


# --- set-ups -------------------------------------------------------------------------------------------------


def envoy_config(kind: str, port: int, admin_port: int, socket: str, engines: list[int]) -> str:
    """The shipped bootstrap; `alone` loses ext_proc and logs; both but tokenway get static clusters."""
    document = yaml.safe_load(
        bootstrap.render(
            bootstrap.template(), listen=("127.0.0.1", port), admin_port=admin_port, sockets=[socket]
        )
    )
    if kind == "tokenway":
        return yaml.safe_dump(document)
    static = document["static_resources"]
    manager = static["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    del document["dynamic_resources"]
    policy = {
        "policies": [
            {
                "typed_extension_config": {
                    "name": "envoy.load_balancing_policies.override_host",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost",
                        "override_host_sources": [
                            {
                                "metadata": {
                                    "key": "envoy.lb",
                                    "path": [{"key": "x-gateway-destination-endpoint"}],
                                }
                            }
                        ],
                        "fallback_policy": {
                            "policies": [
                                {
                                    "typed_extension_config": {
                                        "name": "envoy.load_balancing_policies.round_robin",
                                        "typed_config": {
                                            "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin"
                                        },
                                    }
                                }
                            ]
                        },
                    },
                }
            }
        ]
    }
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": engine}}}}
        for engine in engines
    ]
    static["clusters"] = [cluster for cluster in static["clusters"] if cluster["name"] != "tokenway-xds"] + [
        {
            "name": name,
            "type": "STATIC",
            "connect_timeout": "0.5s",
            "circuit_breakers": {
                "thresholds": [
                    {"max_connections": 100000, "max_pending_requests": 100000, "max_requests": 100000}
                ]
            },
            "load_balancing_policy": policy,
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": endpoints}]},
        }
        for name in ("bench", "tokenway-default")
    ]
    if kind == "alone":
        manager["http_filters"] = [manager["http_filters"][-1]]
        del manager["http_filters"][0]["typed_config"]["upstream_log"]
        del manager["access_log"]
        static["clusters"] = static["clusters"][2:]
    return yaml.safe_dump(document)


@contextlib.asynccontextmanager
async def setup(
    kind: str, root: Path, engines: list[int], *, first_chunk: bool, endpoints: int | None = None
) -> AsyncIterator[Setup]:
    """One Envoy with what stands behind it, ready to serve."""
    run_dir = root / f"{kind}{first_chunk:d}{endpoints or 0}"
    run_dir.mkdir()
    socket = str(run_dir / "gw0.sock")
    port, envoy_admin, admin = free_port(), free_port(), free_port()
    (run_dir / "envoy.yaml").write_text(envoy_config(kind, port, envoy_admin, socket, engines))
    with contextlib.ExitStack() as stack:
        pid = None
        if kind == "floor":
            keys = [f"127.0.0.1:{engine}" for engine in engines]
            pid = stack.enter_context(
                running(
                    sys.executable,
                    "-m",
                    "benchmarks.overhead",
                    "--role",
                    "floor",
                    socket,
                    str(int(first_chunk)),
                    *keys,
                )
            ).pid
            await until(lambda: _is(Path(socket).exists()), "floor")
        elif kind == "tokenway":
            config = run_dir / "tokenway.yaml"
            config.write_text(
                yaml.safe_dump(
                    {
                        "server": {"run_dir": str(run_dir), "admin": {"port": admin}},
                        "signals": {"first_chunk": first_chunk},
                        "logging": {"requests": False, "level": "warning"},
                        "models": {MODEL: {"rules": [{"cluster": "bench"}]}},
                    }
                )
            )
            ports = engines if endpoints is None else (engines * endpoints)[:endpoints]
            addresses = [
                {"address": f"127.0.{i // 250}.{i % 250 + 1}" if endpoints else "127.0.0.1", "port": engine}
                for i, engine in enumerate(ports)
            ]
            (run_dir / "clusters.json").write_text(
                json.dumps({"clusters": [{"name": "bench", "endpoints": addresses}]})
            )
            pid = stack.enter_context(
                running(sys.executable, "-m", "extproc.cli.main", "serve", str(config))
            ).pid
            await until(lambda: _answers(f"http://127.0.0.1:{admin}/readyz"), "tokenway")
        envoy = stack.enter_context(
            running(
                str(ENVOY),
                "-c",
                str(run_dir / "envoy.yaml"),
                "--concurrency",
                "1",
                "--use-dynamic-base-id",
                "-l",
                "off",
            )
        )
        await until(lambda: _serves(port), f"envoy {kind}")
        yield Setup(kind, port, pid, envoy.pid)


async def _is(value: bool) -> bool:
    return value


async def _answers(url: str) -> bool:
    def get() -> bool:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)

    return await asyncio.to_thread(get)


async def _serves(port: int) -> bool:
    client = await Client.connect(port)
    try:
        return await client.ask(request(port, 1, "x")) == 200
    finally:
        client.close()


# --- the client ----------------------------------------------------------------------------------------------


def request(port: int, prompt_bytes: int, salt: str, *, stream_tokens: int | None = None) -> bytes:
    """One chat request on the wire; `salt` begins the prompt."""
    content = (salt + " lorem ipsum" * (prompt_bytes // 12 + 1))[:prompt_bytes]
    stream = b"" if stream_tokens is None else b',"stream":true,"max_tokens":%d' % stream_tokens
    body = b'{"model":"%s","messages":[{"role":"user","content":"%s"}]%s}' % (
        MODEL.encode(),
        content.encode(),
        stream,
    )
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (port, len(body), body)
    )


class Client:
    """One keep-alive connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Client:
        """Open it."""
        return cls(*await asyncio.open_connection("127.0.0.1", port, limit=1 << 20))

    async def ask(self, message: bytes) -> int:
        """Send a request, read the whole answer; returns its status."""
        self._writer.write(message)
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        if b"transfer-encoding: chunked" in head:
            await self._reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            length = int(head.split(b"content-length: ", 1)[1].split(b"\r\n", 1)[0])
            await self._reader.readexactly(length)
        return status

    def close(self) -> None:
        """Close it."""
        self._writer.close()


async def closed_loop(target: Setup, messages: list[bytes], concurrency: int, seconds: float) -> list[float]:
    """Latencies in ms of as many requests as `concurrency` connections manage in `seconds`."""
    latencies: list[float] = []
    deadline = time.perf_counter() + seconds

    async def one(offset: int) -> None:
        client = await Client.connect(target.port)
        turn = offset
        while time.perf_counter() < deadline:
            began = time.perf_counter()
            status = await client.ask(messages[turn % len(messages)])
            latencies.append((time.perf_counter() - began) * 1e3)
            if status != 200:
                raise RuntimeError(f"{target.name}: status {status}")
            turn += concurrency
        client.close()

    await asyncio.gather(*(one(i) for i in range(concurrency)))
    return latencies


async def open_loop(target: Setup, messages: list[bytes], rate: float, seconds: float) -> list[float]:
    """Latencies in ms of Poisson arrivals; waiting for a free connection counts."""
    latencies: list[float] = []
    idle: list[Client] = []
    rng = random.Random(1)

    async def one(message: bytes, due: float) -> None:
        client = idle.pop() if idle else await Client.connect(target.port)
        if await client.ask(message) != 200:
            raise RuntimeError(f"{target.name}: failed")
        latencies.append((time.perf_counter() - due) * 1e3)
        idle.append(client)

    began = due = time.perf_counter()
    tasks = []
    while due < began + seconds:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(messages[len(tasks) % len(messages)], time.perf_counter())))
    await asyncio.gather(*tasks)
    for client in idle:
        client.close()
    return latencies


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, nearest rank."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


async def cpu_per_request(target: Setup, messages: list[bytes], concurrency: int, seconds: float) -> float:
    """Microseconds of the Python process per request."""
    assert target.pid is not None
    await closed_loop(target, messages, concurrency, 0.5)
    before = cpu_s(target.pid)
    done = len(await closed_loop(target, messages, concurrency, seconds))
    await asyncio.sleep(0.1)  # the last access-log entries
    return (cpu_s(target.pid) - before) / done * 1e6


# --- the run -------------------------------------------------------------------------------------------------


async def measure(seconds: float, rounds: int) -> dict[str, Any]:
    """All figures."""
    root = Path(tempfile.mkdtemp(prefix="twb"))
    figures: dict[str, Any] = {}
    engines = [free_port() for _ in range(3)]
    try:
        with running(sys.executable, "-m", "benchmarks.overhead", "--role", "upstream", *map(str, engines)):
            await _compare(root, engines, seconds, rounds, figures)
        await _idle(root, engines, figures)
        figures["decision_us"] = decision_us()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    figures["machine"] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    return figures


async def _compare(
    root: Path, engines: list[int], seconds: float, rounds: int, figures: dict[str, Any]
) -> None:
    async with (
        setup("alone", root, engines, first_chunk=False) as alone,
        setup("floor", root, engines, first_chunk=False) as floor_plain,
        setup("floor", root, engines, first_chunk=True) as floor_chunk,
        setup("tokenway", root, engines, first_chunk=False) as plain,
        setup("tokenway", root, engines, first_chunk=True) as chunk,
    ):
        json_4k = [request(10000, 4096, f"{i:08d}") for i in range(64)]
        sse_4k = [request(10000, 4096, f"{i:08d}", stream_tokens=10) for i in range(64)]
        cpu: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, target, messages in (
                ("floor_us_per_request", floor_plain, json_4k),
                ("cpu_us_per_request", plain, json_4k),
                ("floor_us_per_request_first_chunk", floor_chunk, sse_4k),
                ("cpu_us_per_request_first_chunk", chunk, sse_4k),
            ):
                cpu.setdefault(name, []).append(await cpu_per_request(target, messages, 4, seconds))
        for name, values in cpu.items():
            figures[name] = round(statistics.median(values), 1)
        for suffix in ("", "_first_chunk"):
            total, base = figures[f"cpu_us_per_request{suffix}"], figures[f"floor_us_per_request{suffix}"]
            figures[f"own_us_per_request{suffix}"] = round(total - base, 1)
            figures[f"total_to_floor_ratio{suffix}"] = round(total / base, 3)
        print_progress("cpu per request", figures)

        for label, run in (
            ("concurrency_1", lambda target: closed_loop(target, json_4k, 1, seconds)),
            ("300_per_s", lambda target: open_loop(target, json_4k, 300.0, seconds)),
        ):
            latencies: dict[str, list[float]] = {}
            for _ in range(rounds):
                for target in (alone, floor_plain, plain):
                    latencies.setdefault(target.name, []).extend(await run(target))
            for q, name in ((0.5, "p50"), (0.99, "p99")):
                base = quantile(latencies["alone"], q)
                figures[f"added_{name}_ms_{label}"] = round(quantile(latencies["tokenway"], q) - base, 3)
                figures[f"floor_added_{name}_ms_{label}"] = round(quantile(latencies["floor"], q) - base, 3)
        print_progress("latency", figures)

        for label, size, concurrency in (("4kb", 4096, 32), ("220kb", 220_000, 16)):
            messages = [request(10000, size, f"{i:08d}") for i in range(16)]
            for target in (alone, floor_plain, plain):
                done = len(await closed_loop(target, messages, concurrency, seconds))
                name = "requests_per_s" if target is plain else f"{target.name}_requests_per_s"
                figures[f"{name}_{label}"] = round(done / seconds, 1)
            figures[f"cpu_us_per_request_{label}_saturated"] = round(
                await cpu_per_request(plain, messages, concurrency, seconds), 1
            )
        print_progress("saturation", figures)

        # At the same rate, so that what the process does between requests weighs the same in both.
        ratios = []
        for _ in range(rounds):
            used = []
            for tokens in (10, 10_000):
                messages = [request(10000, 4096, f"{i:08d}", stream_tokens=tokens) for i in range(64)]
                assert chunk.pid is not None
                before = cpu_s(chunk.pid)
                done = len(await open_loop(chunk, messages, STREAM_RATE, max(8.0, 2 * seconds)))
                await asyncio.sleep(0.1)
                used.append((cpu_s(chunk.pid) - before) / done)
            ratios.append(used[1] / used[0])
        figures["cpu_ratio_10k_vs_10_output_tokens"] = round(statistics.median(ratios), 3)
        assert plain.pid is not None
        figures["rss_mib"] = round(rss_mib(plain.pid), 1)
        print_progress("streams", figures)


async def _idle(root: Path, engines: list[int], figures: dict[str, Any]) -> None:
    with running(sys.executable, "-m", "benchmarks.overhead", "--role", "health", *map(str, engines[:1])):
        async with setup("tokenway", root, engines[:1], first_chunk=True, endpoints=100) as target:
            assert target.pid is not None
            await asyncio.sleep(8)  # first probes and scrapes
            before, began = cpu_s(target.pid), time.monotonic()
            await asyncio.sleep(15)
            figures["idle_cores_100_endpoints"] = round(
                (cpu_s(target.pid) - before) / (time.monotonic() - began), 4
            )
            figures["rss_mib_100_endpoints"] = round(rss_mib(target.pid), 1)


def decision_us() -> dict[str, float]:
    """Microseconds from a parsed body's bytes to a charged decision, by number of endpoints, 4 KB prompt."""
    from benchmarks.decision import decisions

    return {str(n): round(decisions(n), 1) for n in (10, 100, 1000)}


def print_progress(what: str, figures: dict[str, Any]) -> None:
    """Show what is known so far."""
    print(f"[{what}] {json.dumps(figures)}", flush=True)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    """Run the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="per phase")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--role", choices=("upstream", "floor", "health"), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "upstream":
        asyncio.run(upstream([int(port) for port in options.rest]))
    elif options.role == "health":
        asyncio.run(health(int(options.rest[0])))
    elif options.role == "floor":
        socket, first_chunk, *endpoints = options.rest
        asyncio.run(floor(socket, endpoints, first_chunk == "1"))
    else:
        print(json.dumps(asyncio.run(measure(options.seconds, options.rounds))))


async def health(port: int) -> None:
    """Answer probes on every loopback address, in a process of its own."""
    loop = asyncio.get_running_loop()
    await loop.create_server(Upstream, "0.0.0.0", port)  # noqa: S104 - 127.0.x.y stand for a hundred engines
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
