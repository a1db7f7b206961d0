"""What a request costs a worker in process: all that it does, without Envoy and without a transport.

    make bench-own-work          (python -m benchmarks.own_work)

A whole worker is made and started; in place of its gRPC server stands a loop that hands it the messages that
Envoy sends for one streamed chat: headers, body, first chunk, and the access log's entry of the end. The
parsing of messages is in; 16 requests are in flight at any time. Per phase and in all: the median and the
least of the requests' times, in microseconds. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import yaml
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from benchmarks import processes
from benchmarks.setups import python_module
from benchmarks.traffic import EVENT, MODEL, Client
from extproc.accesslog.lines import SEPARATOR
from extproc.server import building
from extproc.server.listening.rpc_server import RpcServer
from extproc.server.worker import Worker
from extproc.transport.seam import Message, Receiver, Rpc, Status, joined
from testbed.processes import free_port
from tokenway.cli.serve import GC_THRESHOLDS

PHASES: Final = ("headers", "body", "first_chunk", "end")
IN_FLIGHT: Final = 16
PROMPTS: Final = 64
WARM_UP: Final = 600
CASES: Final = ((3, 4096), (10, 4096), (100, 4096), (1000, 4096), (3, 220_000))
"""Endpoints, bytes of the prompt."""

USAGE: Final = '{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":10,"prompt_tokens_details":null}'


class Peer:
    """A call of Envoy, which keeps what it is answered; see `extproc.transport.seam.Call`."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []

    @property
    def peer(self) -> str:
        """There is none."""
        return ""

    def send(self, message: Message, sent: Callable[[], None] | None = None) -> None:
        """Keep it."""
        self.answers.append(joined(message))
        if sent is not None:
            sent()

    def finish(self, last: Message | None = None) -> None:
        """Keep the last."""
        if last:
            self.answers.append(joined(last))

    def abort(self, status: Status, detail: str) -> None:
        """Not in these exchanges."""
        raise RuntimeError(f"{status}: {detail}")


class NoServer:
    """In place of a gRPC server: has the methods that would be served."""

    def __init__(self) -> None:
        self.open: dict[str, Callable[[Any], Receiver]] = {}

    def serves(self, rpcs: Iterable[Rpc]) -> None:
        """These would be."""
        self.open = {rpc.method: rpc.open for rpc in rpcs}

    async def listen(self) -> None:
        """Nowhere."""

    async def drain(self, grace_s: float) -> None:
        """Nothing runs."""

    async def close(self) -> None:
        """Nothing is open."""

    def is_reached(self) -> bool:
        """Nobody is connected."""
        return False

    def sockets(self) -> tuple[Path, ...]:
        """None."""
        return ()

    async def renew(self, path: Path) -> None:
        """There is none."""


def headers_of(request_id: str) -> bytes:
    """Envoy's first message."""
    message = pb.ProcessingRequest()
    for key, value in (
        *((":method", "POST"), (":path", "/v1/chat/completions"), (":authority", "127.0.0.1:10000")),
        *(("content-type", "application/json"), ("x-tokenway-request-id", request_id)),
    ):
        message.request_headers.headers.headers.add(key=key, raw_value=value.encode())
    return bytes(message.SerializeToString())


def body_of(number: int, prompt_bytes: int) -> bytes:
    """Envoy's second."""
    prompt = (f"{number:08d}" + " lorem ipsum" * (prompt_bytes // 12 + 1))[:prompt_bytes]
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
    message = pb.ProcessingRequest()
    message.request_body.body = json.dumps(body | {"stream": True, "max_tokens": 10}).encode()
    message.request_body.end_of_stream = True
    return bytes(message.SerializeToString())


def first_chunk() -> bytes:
    """Envoy's third."""
    message = pb.ProcessingRequest()
    message.response_body.body = EVENT
    return bytes(message.SerializeToString())


def is_patience(answer: bytes) -> bool:
    """The worker asks Envoy to wait: the answer proper is still to come."""
    return bool(pb.ProcessingResponse.FromString(answer).HasField("override_message_timeout"))


def end_of(request_id: str, answer: bytes, prompt_tokens: int) -> bytes:
    """The access log's entry, with the fields that Envoy fills in by itself.

    Args:
        request_id: Whose.
        answer: The worker's decision, which names owner and endpoint.
        prompt_tokens: As the engine counted.
    """
    decision = pb.ProcessingResponse.FromString(answer)
    lb = decision.dynamic_metadata.fields["envoy.lb"].struct_value
    endpoints = lb.fields["x-gateway-destination-endpoint"].string_value
    address, _, port = endpoints.partition(",")[0].rpartition(":")
    set_headers = decision.request_body.response.header_mutation.set_headers
    owner = next(each.header.raw_value for each in set_headers if each.header.key == ":tokenway-owner")
    message = als_pb2.StreamAccessLogsMessage()
    entry = message.http_logs.log_entry.add()
    common, response = entry.common_properties, entry.response
    common.upstream_remote_address.socket_address.address = address
    common.upstream_remote_address.socket_address.port_value = int(port)
    common.start_time.FromNanoseconds(time.time_ns() - 500_000_000)
    for field, took_ms in (
        *(("time_to_first_upstream_tx_byte", 1), ("time_to_first_upstream_rx_byte", 20)),
        *(("time_to_last_upstream_rx_byte", 400), ("time_to_last_downstream_tx_byte", 401)),
        ("duration", 401),
    ):
        getattr(common, field).FromMilliseconds(took_ms)
    common.upstream_cluster, common.route_name = "bench", "decided"
    common.upstream_request_attempt_count = 1
    common.access_log_type = accesslog_pb2.DownstreamEnd
    usage = USAGE % (prompt_tokens, prompt_tokens + 10)
    line = (
        *("DownstreamEnd", request_id, owner.decode(), endpoints.partition(",")[0], "1", "200", "-"),
        *("20000", "380000", "401000", "401", "4200", "2500", "via_upstream", "-", "-", usage, "-"),
    )
    common.custom_tags.update({"rid": request_id, "owner": owner.decode(), "line": SEPARATOR.join(line)})
    common.metadata.filter_metadata["llm.usage"].fields["top"].string_value = usage
    entry.request.path, entry.request.request_body_bytes = "/v1/chat/completions", 4200
    response.response_code.value = 200
    response.response_body_bytes = 2500
    response.response_code_details = "via_upstream"
    response.response_headers["content-type"] = "text/event-stream"
    return bytes(message.SerializeToString())


async def measure(endpoints: int, prompt_bytes: int, count: int) -> dict[str, tuple[float, float]]:
    """Median and least microseconds of each phase, and in all.

    Args:
        endpoints: Of the one model.
        prompt_bytes: Length of the prompts.
        count: Requests.
    """
    port = free_port()
    every_address = "0.0.0.0"  # noqa: S104 - 127.0.x.y stand for the engines
    with (
        tempfile.TemporaryDirectory(prefix="two") as folder,
        python_module("benchmarks.traffic", every_address, str(port)),
    ):
        await processes.until(lambda: _listens(port), "engine")  # its first probes are not to be refused
        worker, methods = _worker(Path(folder), endpoints, port)
        await worker.start()
        try:
            return await _drive(methods, prompt_bytes, count)
        finally:
            await worker.stop()


async def _listens(port: int) -> bool:
    (await Client.connect(port)).close()
    return True


def _worker(folder: Path, endpoints: int, port: int) -> tuple[Worker, NoServer]:
    places = [{"address": f"127.0.{i // 250}.{i % 250 + 1}", "port": port} for i in range(endpoints)]
    clusters = {"clusters": [{"name": "bench", "endpoints": places}]}
    (folder / "clusters.json").write_text(json.dumps(clusters))
    settings = {
        "server": {"run_dir": str(folder), "admin": {"port": free_port()}, "drain_s": 0},
        "logging": {"requests": False, "level": "error"},
        "models": {MODEL: {"rules": [{"cluster": "bench"}]}},
    }
    (folder / "tokenway.yaml").write_text(yaml.safe_dump(settings))
    server = NoServer()

    def stand_in(_transport: object, rpcs: Iterable[Rpc], *_places: object) -> RpcServer:
        server.serves(rpcs)
        return server

    with patch.object(building, "rpc_server", stand_in):
        return building.build_worker(folder / "tokenway.yaml"), server


async def _drive(methods: NoServer, prompt_bytes: int, count: int) -> dict[str, tuple[float, float]]:
    clock = time.perf_counter
    bodies = [body_of(number, prompt_bytes) for number in range(PROMPTS)]
    chunk, log = first_chunk(), methods.open["StreamAccessLogs"](Peer())
    running: deque[tuple[str, bytes]] = deque()
    took_us: dict[str, list[float]] = {phase: [] for phase in PHASES}
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    for number in range(WARM_UP + count):
        if number == WARM_UP:
            for times in took_us.values():
                times.clear()
        if number % 100 == 0:
            await asyncio.sleep(0.001)  # what else the worker has to do
        request_id = f"{number:08d}-0000-4000-8000-000000000000"
        messages = (headers_of(request_id), bodies[number * 7 % PROMPTS], chunk)
        peer = Peer()
        exchange = methods.open["Process"](peer)
        for phase, message in zip(PHASES, messages, strict=False):
            began_s = clock()
            exchange.on_message(message)
            took_us[phase].append((clock() - began_s) * 1e6)
            if phase == "body":
                while is_patience(peer.answers[-1]):  # noqa: ASYNC110 - read elsewhere, on a busy machine
                    await asyncio.sleep(0.001)
                running.append((request_id, peer.answers[-1]))
        if len(running) > IN_FLIGHT:
            entry = end_of(*running.popleft(), prompt_bytes // 4)
            began_s = clock()
            log.on_message(entry)
            took_us["end"].append((clock() - began_s) * 1e6)
    took_us["whole"] = [sum(times) for times in zip(*took_us.values(), strict=False)]
    return {
        phase: (round(statistics.median(times), 1), round(min(times), 1)) for phase, times in took_us.items()
    }


def main() -> None:
    """Print the figures; the last line is a JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    figures: dict[str, Any] = {}
    for endpoints, prompt_bytes in CASES:
        found = asyncio.run(measure(endpoints, prompt_bytes, options.requests))
        figures[f"{endpoints}_endpoints_{prompt_bytes}_bytes"] = found
        line = ", ".join(f"{phase} {median} ({least})" for phase, (median, least) in found.items())
        print(f"{endpoints} endpoints, {prompt_bytes} bytes: {line}", flush=True)
    figures["load_average"] = round(os.getloadavg()[0], 2)
    print(json.dumps(figures))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
