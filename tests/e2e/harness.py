"""A whole gateway on loopback: the real Envoy, the real gateway process, simulated or recording engines.

Everything is owned by an async context manager that kills what it started, whatever happened.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import aiohttp
import openai
import yaml
from aiohttp import web

from extproc.config.loading import parse
from testbed.processes import Subprocess, free_port, get, get_json
from testbed.processes import answers as answers
from testbed.processes import envoy_binary as envoy_binary
from testbed.processes import eventually as eventually
from tokenway.cli.bootstrap import rendered
from tokenway.simulator.engine.profile import PROFILES
from tokenway.simulator.server.app import SimulatorServer, running
from tokenway.simulator.server.settings import ServerSettings

DEBUG_TOKEN = "operators-only"
DEBUG_TOKEN_ENV = "TOKENWAY_E2E_DEBUG_TOKEN"
DEBUG_HEADERS = {"x-tokenway-debug": DEBUG_TOKEN}
DECISION_HEADER = "x-tokenway-decision-id"

TRANSPORT = {"transport": named} if (named := os.environ.get("TOKENWAY_TRANSPORT")) else {}
"""Runs every stack with this `server.transport`; without the variable, with the default."""

IS_ISTIO_PROFILE = os.environ.get("TOKENWAY_PROFILE") == "istio"
"""Every stack's Envoy has what is rendered for an Istio gateway, which older ones can load too."""

_ENVOY_STARTS = 3
"""A port is lost to another process once in many runs; twice in a row there is another cause."""

FAST_HEALTH = {"interval_s": 0.5, "recovery_interval_s": 0.2, "ejection_s": 0.5, "timeout_s": 1.0}
"""Probes quick enough for a test to watch an engine go and come back."""


def is_alive(pid: int) -> bool:
    """True if the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


class EngineProcess:
    """One simulator in a process of its own, which can be killed and started again on its port."""

    def __init__(self, log: Path, *words: str) -> None:
        self.port = free_port()
        self._log = log
        self._words = words
        self._process: Subprocess | None = None

    @property
    def key(self) -> str:
        """`ip:port`."""
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start, and wait until it is healthy."""
        self._process = await Subprocess.start(
            [sys.executable, "-m", "tokenway.simulator", "--port", str(self.port), *self._words], self._log
        )
        await answers(self._process, f"http://{self.key}/health")

    def pause(self) -> None:
        """SIGSTOP: it keeps its connections and says nothing."""
        assert self._process is not None
        self._process.signal(signal.SIGSTOP)

    async def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            await self._process.kill()

    async def state(self) -> dict[str, Any]:
        """`/sim/state`."""
        return await get_json(f"http://{self.key}/sim/state")


@dataclass(frozen=True, slots=True)
class Received:
    """One request as an engine saw it; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


Behaviour = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def answer_chat(_: web.Request) -> web.StreamResponse:
    """A small whole answer."""
    return web.json_response(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "recorded",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "well"},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6},
        }
    )


class Recorder:
    """An engine that keeps what it is sent and answers as the test says.

    Attributes:
        received: Inference requests, oldest first.
        behaviour: Answers the next requests.
    """

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.behaviour: Behaviour = answer_chat
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def key(self) -> str:
        """`ip:port`."""
        return f"127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Forget everything and answer plainly."""
        self.received.clear()
        self.behaviour = answer_chat

    async def start(self) -> None:
        """Listen."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self._health)
        app.router.add_route("*", "/{path:.*}", self._record)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024).start()  # Envoy waits 0.25 s for each
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _record(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/metrics":
            return web.Response(status=404)
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(request.method, request.path_qs, headers, await request.read()))
        return await self.behaviour(request)


@asynccontextmanager
async def recording() -> AsyncIterator[Recorder]:
    """A started recorder for the length of a block."""
    recorder = Recorder()
    await recorder.start()
    try:
        yield recorder
    finally:
        await recorder.stop()


@asynccontextmanager
async def simulators(
    count: int, *, time_scale: float, models: tuple[str, ...] = ("sim",)
) -> AsyncIterator[list[SimulatorServer]]:
    """Simulated replicas in this process for the length of a block."""
    settings = ServerSettings(models=models, profile=PROFILES["llama8b-h100"], time_scale=time_scale)
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(running(settings)) for _ in range(count)]


def key_of(engine: SimulatorServer) -> str:
    """`ip:port` of a simulator in this process."""
    return f"127.0.0.1:{engine.port}"


def cluster(
    name: str, keys: Iterable[str], *, model: str | None = None, **of_endpoints: Any
) -> dict[str, Any]:
    """A cluster as clusters.json has it; `of_endpoints` is added to each endpoint."""
    endpoints = []
    for key in keys:
        address, _, port = key.rpartition(":")
        endpoints.append({"address": address, "port": int(port), **of_endpoints})
    return {"name": name, "endpoints": endpoints} | ({} if model is None else {"model": model})


@dataclass(slots=True)
class Stack:
    """A gateway and its Envoy in a run directory; `running_stack` starts and ends it.

    Attributes:
        run_dir: Configuration, sockets and logs; short, for Unix sockets take 107 bytes.
        workers: Gateway processes.
        port: Where clients connect.
        envoy_admin_port: Envoy's own admin surface.
        admin_port: The gateway's.
        adapt: Makes of Envoy's configuration another.
    """

    run_dir: Path
    workers: int
    port: int = field(default_factory=free_port)
    envoy_admin_port: int = field(default_factory=free_port)
    admin_port: int = field(default_factory=free_port)
    adapt: Callable[[str], str] = str
    _gateway: Subprocess | None = None
    _envoy: Subprocess | None = None

    @property
    def url(self) -> str:
        """For clients."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_url(self) -> str:
        """The gateway's admin port."""
        return f"http://127.0.0.1:{self.admin_port}"

    @property
    def gateway(self) -> Subprocess:
        """The running gateway."""
        assert self._gateway is not None
        return self._gateway

    @property
    def envoy(self) -> Subprocess:
        """The running Envoy."""
        assert self._envoy is not None
        return self._envoy

    def client(self) -> openai.AsyncOpenAI:
        """The official client, which must not hide failures by retrying."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="sk-test", max_retries=0, timeout=60)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Put tokenway.yaml in place in one step."""
        server = {
            "workers": self.workers,
            "run_dir": str(self.run_dir),
            "admin": {"port": self.admin_port},
            "drain_s": 0,
            **TRANSPORT,
            **config.get("server", {}),
        }
        text = yaml.safe_dump({**config, "server": server}, sort_keys=False)
        self._put("tokenway.yaml", text)

    def write_clusters(self, *clusters: Mapping[str, Any]) -> None:
        """Put clusters.json in place in one step."""
        self.write_clusters_text(json.dumps({"clusters": clusters}, indent=1))

    def write_clusters_text(self, text: str) -> None:
        """The same with any text."""
        self._put("clusters.json", text)

    def _put(self, name: str, text: str) -> None:
        new = self.run_dir / f"{name}.new"
        new.write_text(text)
        new.replace(self.run_dir / name)

    async def start_gateway(self) -> None:
        """Start the gateway and wait until every worker is ready."""
        self._gateway = await Subprocess.start(
            [sys.executable, "-m", "tokenway.cli.main", "serve", str(self.run_dir / "tokenway.yaml")],
            self.run_dir / "gateway.log",
            {DEBUG_TOKEN_ENV: DEBUG_TOKEN},
        )
        await answers(self._gateway, f"{self.admin_url}/readyz", self._all_ready)

    def _all_ready(self, body: bytes) -> bool:
        ready: int = json.loads(body).get("workers_ready", 1)
        return ready == self.workers

    async def start_envoy(self) -> None:
        """Start Envoy and wait until it knows the endpoints of every cluster.

        Its ports were free when they were chosen; if another process has taken one since, there are others.
        """
        for _ in range(_ENVOY_STARTS - 1):
            try:
                return await self._start_envoy()
            except AssertionError as error:
                if "Address already in use" not in str(error):
                    raise
            self.port, self.envoy_admin_port = free_port(), free_port()
        return await self._start_envoy()

    def envoy_config(self) -> str:
        """What Envoy is started with, as YAML."""
        path = self.run_dir / "tokenway.yaml"
        config = parse(path.read_text(), str(path))
        text: str = rendered(config, f"127.0.0.1:{self.port}", self.envoy_admin_port)
        return text

    async def _start_envoy(self) -> None:
        path = self.run_dir / "envoy.yaml"
        path.write_text(self.adapt(self.envoy_config()))
        self._envoy = await Subprocess.start(
            [
                str(envoy_binary()),
                "-c",
                str(path),
                "--concurrency",
                str(self.workers),
                "--disable-hot-restart",
            ],
            self.run_dir / "envoy.log",
        )
        clusters = json.loads((self.run_dir / "clusters.json").read_text())["clusters"]
        wanted = {f"{c['name']}::127.0.0.1:{e['port']}::" for c in clusters for e in c["endpoints"]}
        await answers(
            self._envoy,
            f"http://127.0.0.1:{self.envoy_admin_port}/clusters",
            lambda body: all(row in body.decode() for row in wanted),
        )
        await answers(self._envoy, f"http://127.0.0.1:{self.envoy_admin_port}/ready")

    async def stop(self) -> None:
        """Kill everything."""
        for process in (self._envoy, self._gateway):
            if process is not None:
                await process.kill()

    async def endpoints(self) -> dict[str, Any]:
        """`/endpoints` of the gateway."""
        return await get_json(f"{self.admin_url}/endpoints")

    async def rows(self) -> dict[str, dict[str, Any]]:
        """The rows of `/endpoints` by key."""
        return {row["key"]: row for row in (await self.endpoints())["endpoints"]}

    async def explain(self, request_id: str) -> dict[str, Any]:
        """One decision record."""
        return await get_json(f"{self.admin_url}/explain/{request_id}")

    async def last(self, count: int) -> list[dict[str, Any]]:
        """The latest decision records, newest first."""
        records: list[dict[str, Any]] = (await get_json(f"{self.admin_url}/explain?last={count}"))["records"]
        return records

    async def metrics(self) -> str:
        """One scrape."""
        return (await get(f"{self.admin_url}/metrics")).decode()

    async def envoy_clusters(self) -> str:
        """Envoy's own view of its endpoints."""
        return (await get(f"http://127.0.0.1:{self.envoy_admin_port}/clusters")).decode()

    async def envoy_health(self, cluster: str) -> dict[str, str]:
        """What Envoy was told of a cluster's endpoints: `health_flags` by `ip:port`."""
        rows = (line.split("::") for line in (await self.envoy_clusters()).splitlines())
        return {row[1]: row[3] for row in rows if row[0] == cluster and row[2] == "health_flags"}

    def gateway_log(self) -> list[dict[str, Any]]:
        """The gateway's log lines, but for one that is being written."""
        *lines, _ = self.gateway.log.read_text().split("\n")
        return [json.loads(line) for line in lines if line.startswith("{")]

    async def logged(self, event: str, *, since: int) -> dict[str, Any]:
        """Wait for a line of the gateway's log after its first `since` ones."""

        async def read() -> list[dict[str, Any]]:
            return [line for line in self.gateway_log()[since:] if line["event"] == event]

        return (await eventually(read, bool))[0]

    async def settled(self) -> None:
        """Every counter is exactly zero, at once or shortly, and stays there."""
        await eventually(self.charged, lambda charged: not charged)

    async def charged(self) -> dict[str, int]:
        """Every load counter that is not zero, by name."""
        view = await self.endpoints()
        counters = {"in_flight": view["in_flight"]} | {
            f"{row['key']} {name}": row[name]
            for row in view["endpoints"]
            for name in ("requests", "prefill_tokens", "context_tokens")
        }
        return {name: value for name, value in counters.items() if value}


@asynccontextmanager
async def running_stack(
    clusters: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None = None,
    *,
    workers: int = 1,
    adapt: Callable[[str], str] = str,
) -> AsyncIterator[Stack]:
    """Gateway first, then Envoy, so that Envoy's clusters come at once; everything is killed at the end.

    Args:
        clusters: As clusters.json has them.
        config: As tokenway.yaml has it.
        workers: Of the gateway, and Envoy's threads.
        adapt: Makes of Envoy's configuration another.
    """
    stack = _kind_of_stack()(Path(tempfile.mkdtemp(prefix="tw", dir="/tmp")), workers, adapt=adapt)
    try:
        stack.write_config(config or {})
        stack.write_clusters(*clusters)
        await stack.start_gateway()
        await stack.start_envoy()
        yield stack
    finally:
        await stack.stop()
        shutil.rmtree(stack.run_dir, ignore_errors=True)


def _kind_of_stack() -> type[Stack]:
    if not IS_ISTIO_PROFILE:
        return Stack
    from tests.e2e.assembled_stack import AssembledStack

    return AssembledStack


LEASE_S = 6.0
"""Of the stack whose workers are killed: what a lost access log would have released is released by then."""


class Served(Protocol):
    """What can be asked."""

    @property
    def url(self) -> str:
        """Of the gateway."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without a whole, correct answer.

    Attributes:
        began_s: Monotonic.
        what: A status with the end of its body, or an error.
    """

    began_s: float
    what: str


class Load:
    """Clients that ask again and again until the block ends.

    Attributes:
        answers: Whole, correct answers so far.
        failures: What every other request met.

    Args:
        stack: Whom they ask.
        model: For which.
        clients: How many.
        stream: They want streams.
        max_tokens: Of each answer.
        padding: Bytes of each prompt, beside what tells it from others.
    """

    def __init__(
        self, stack: Served, model: str, *, clients: int, stream: bool, max_tokens: int = 8, padding: int = 0
    ) -> None:
        self._padding = " and" * (padding // 4)
        self._stack = stack
        self._model = model
        self._clients = clients
        self._stream = stream
        self._max_tokens = max_tokens
        self._is_over = False
        self._tasks: list[asyncio.Task[None]] = []
        self.answers = 0
        self.failures: list[Failure] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.ask_no_more()
        await asyncio.gather(*self._tasks)

    def ask_no_more(self) -> None:
        """Requests that run go on; none is sent after them."""
        self._is_over = True

    async def more(self, count: int) -> None:
        """Wait for `count` further answers."""
        goal = self.answers + count

        async def read() -> tuple[int, list[Failure]]:
            return self.answers, self.failures[-3:]

        await eventually(read, lambda found: found[0] >= goal, 20)

    async def _ask(self, number: int) -> None:
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            turn = 0
            while not self._is_over:
                turn += 1
                began_s = time.monotonic()
                text = f"client {number} turn {turn}{self._padding}"
                body = chat(self._model, text, self._max_tokens, self._stream)
                try:
                    async with session.post(f"{self._stack.url}/v1/chat/completions", json=body) as reply:
                        answer = await reply.read()
                except (aiohttp.ClientError, TimeoutError) as error:
                    self.failures.append(Failure(began_s, repr(error)))
                    continue
                end = b"data: [DONE]\n\n" if self._stream else b"}"
                if reply.status == 200 and answer.endswith(end):
                    self.answers += 1
                else:
                    self.failures.append(Failure(began_s, f"{reply.status} {answer[-400:]!r}"))


def chat(model: str, text: str, max_tokens: int = 8, stream: bool = False) -> dict[str, Any]:
    """A chat request's body."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
        "stream": stream,
        "ignore_eos": True,
    }


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The decoded body."""
        return json.loads(self.body)


def check(reply: Reply, status: int, code: str) -> dict[str, str]:
    """The error object of an answer that must be OpenAI-shaped."""
    assert (reply.status, reply.json["error"]["code"]) == (status, code), reply
    assert reply.headers["content-type"] == "application/json"
    assert reply.json.keys() == {"error"}
    error: dict[str, str] = reply.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    return error


def check_for_any_api(reply: Reply, status: int, code: str) -> dict[str, str]:
    """The error object of an answer that clients of OpenAI's and of Anthropic's API parse alike."""
    said = reply.json
    assert (said.keys(), said["type"], said["request_id"]) == ({"type", "error", "request_id"}, "error", None)
    body = json.dumps({"error": said["error"]}).encode()
    return check(Reply(reply.status, reply.headers, body), status, code)


async def post(stack: Served, body: object, headers: Mapping[str, str] | None = None) -> Reply:
    """POST to `/v1/chat/completions`: an object as JSON, bytes as they are."""
    return await send(stack, "POST", "/v1/chat/completions", body, headers)


async def send(
    stack: Served, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> Reply:
    """One request on a connection of its own."""
    encoded = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    data = None if encoded is None else io.BytesIO(encoded)
    sent = {"content-type": "application/json", **(headers or {})}
    timeout = aiohttp.ClientTimeout(total=30)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.request(method, stack.url + path, data=data, headers=sent) as reply,
    ):
        received = {name.lower(): value for name, value in reply.headers.items()}
        return Reply(reply.status, received, await reply.read())


async def send_until_heard(
    stack: Stack, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
) -> Reply:
    """As clients do that are asked to try again: once more while Envoy finds the gateway too busy."""

    def is_heard(reply: Reply) -> bool:
        return reply.status != 503 or reply.json["error"]["code"] != "gateway_unavailable"

    return await eventually(lambda: send(stack, method, path, body, headers), is_heard)


async def exchange(port: int, *parts: bytes, pause_s: float = 0.0) -> Reply:
    """Write raw bytes with a pause after each part, then read one answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        async with asyncio.timeout(20):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status_line, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            if headers.get("transfer-encoding") == "chunked":
                body = await _read_chunks(reader)
            else:
                body = await reader.readexactly(int(headers["content-length"]))
    finally:
        writer.close()
    return Reply(int(status_line.split()[1]), headers, body)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).strip(), 16):
        body += (await reader.readexactly(size + len(b"\r\n")))[:size]
    return body


def sample(scrape: str, series: str) -> float | None:
    """The value of one series, or None if it is not in the scrape."""
    found = re.search(rf"^{re.escape(series)} (\S+)$", scrape, re.MULTILINE)
    return None if found is None else float(found[1])
