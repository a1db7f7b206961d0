"""Tokenway as the picker of a foreign gateway (`testbed.foreign_gateway`) on loopback; how to ask both."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import openai
import yaml
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.protocol import wire
from testbed.foreign_gateway import HINT, LISTENERS, bootstrap
from testbed.processes import Subprocess, free_ports
from tests.e2e.harness import Recorder, Reply, Stack, answers, envoy_binary, eventually
from tokenway.simulator.server.app import SimulatorServer

PATH = "/v1/chat/completions"
DESTINATION = "x-gateway-destination-endpoint"
DROPPED = "x-llm-d-request-dropped-reason"


@dataclass(slots=True)
class PickerStack:
    """A gateway of ours as picker, and an Envoy that is not ours.

    Attributes:
        tokenway: The process, its files and its admin port.
        picker_port: Where it picks.
        health_port: Where it answers for its health alone.
        metrics_port: Where its metrics are.
        ports: Of the foreign Envoy's listeners, by their names.
        is_tls: The picker's port is encrypted, by a certificate that is not verified.
    """

    tokenway: Stack
    picker_port: int
    health_port: int
    metrics_port: int
    ports: Mapping[str, int]
    is_tls: bool
    envoy: Subprocess | None = None

    def url(self, listener: str = "metadata") -> str:
        """Of a listener."""
        return f"http://127.0.0.1:{self.ports[listener]}"

    @asynccontextmanager
    async def channel(self, port: int | None = None, *, is_tls: bool | None = None) -> AsyncIterator[Any]:
        """GRPC to the picker's port, or to another one in clear text."""
        address = f"127.0.0.1:{self.picker_port if port is None else port}"
        if port is None and (self.is_tls if is_tls is None else is_tls):
            root = (self.tokenway.run_dir / "picker0.crt").read_bytes()
            override = (("grpc.ssl_target_name_override", "tokenway"),)
            opened = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(root), override)
        else:
            opened = grpc.aio.insecure_channel(address)
        async with opened as channel:
            yield channel

    def client(self) -> openai.AsyncOpenAI:
        """The official client, which must not hide failures by retrying."""
        return openai.AsyncOpenAI(base_url=f"{self.url()}/v1", api_key="sk-test", max_retries=0, timeout=60)


@asynccontextmanager
async def running_picker(
    clusters: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None = None,
    *,
    is_tls: bool = False,
    workers: int = 1,
    **settings: Any,
) -> AsyncIterator[PickerStack]:
    """Picker first, then the foreign Envoy; everything is killed at the end.

    Args:
        clusters: As clusters.json has them; all their endpoints are in one cluster of the foreign Envoy.
        config: Of tokenway.yaml.
        is_tls: The picker makes itself a certificate, and the gateway verifies none.
        workers: Of the picker.
        **settings: Of `endpoint_picker`.
    """
    folder = Path(tempfile.mkdtemp(prefix="tw", dir="/tmp"))
    stack = Stack(folder, workers=workers)
    ports = free_ports(5 + len(LISTENERS))
    picker_port, health_port, metrics_port, envoy_admin, dead_port, *others = ports
    listeners = dict(zip(LISTENERS, others, strict=True))
    picker = PickerStack(stack, picker_port, health_port, metrics_port, listeners, is_tls)
    try:
        own = {
            "listen": [f"127.0.0.1:{picker_port}"],
            "health_listen": [f"127.0.0.1:{health_port}"],
            "metrics_listen": [f"127.0.0.1:{metrics_port}"],
            "self_signed": is_tls,
        }
        stack.write_config({**(config or {}), "endpoint_picker": {**own, **settings}})
        stack.write_clusters(*clusters)
        await stack.start_gateway()
        listed = [endpoint["port"] for each in clusters for endpoint in each["endpoints"]]
        engines = list(dict.fromkeys(listed))
        text = bootstrap(listeners, envoy_admin, picker_port, dead_port, engines, is_tls=is_tls)
        path = folder / "envoy.yaml"
        path.write_text(yaml.safe_dump(json.loads(text)))
        picker.envoy = await Subprocess.start(
            [str(envoy_binary()), "-c", str(path), "--concurrency", "1", "--disable-hot-restart"],
            folder / "envoy.log",
        )
        await answers(picker.envoy, f"http://127.0.0.1:{envoy_admin}/ready")
        yield picker
    finally:
        if picker.envoy is not None:
            await picker.envoy.kill()
        await stack.stop()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Picked:
    """A picker and what is behind it.

    Attributes:
        picker: Serves `sim` (simulators), `recorded` and `tuned` (the recorder, as `base`), `three` (the
            three recorders) and `adapted` (the first of the three, by the adapter `polite`).
        engines: The simulators.
        recorder: Keeps what it is sent.
        three: Recorders that are alike.
    """

    picker: PickerStack
    engines: Sequence[SimulatorServer]
    recorder: Recorder
    three: Sequence[Recorder] = ()

    async def post(self, body: Any, *, listener: str = "metadata", **headers: str) -> Reply:
        """One chat request; underscores in names of headers stand for dashes."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.send("POST", PATH, data, listener=listener, headers=named)

    async def send(
        self,
        method: str,
        path: str,
        data: bytes | None = None,
        *,
        listener: str = "metadata",
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request on a connection of its own."""
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                method,
                self.picker.url(listener) + path,
                data=None if data is None else io.BytesIO(data),
                headers=headers,
            ) as reply,
        ):
            received = {name.lower(): value for name, value in reply.headers.items()}
            return Reply(reply.status, received, await reply.read())

    async def last_outcome(self) -> dict[str, Any]:
        """Of the latest request that was decided."""
        (record,) = await eventually(
            lambda: self.picker.tokenway.last(1), lambda got: bool(got[0]["outcome"])
        )
        outcome: dict[str, Any] = record["outcome"]
        return outcome

    def reset(self) -> None:
        """Recorders forget everything and answer plainly."""
        for recorder in (self.recorder, *self.three):
            recorder.reset()

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[Stream]:
        """A request as a gateway sends it, spoken by hand to the picker's port."""
        async with self.picker.channel() as channel:
            call = channel.stream_stream(wire.PROCESS)()
            yield Stream(call)
            call.cancel()


class Stream:
    """One HTTP request's stream, from the gateway's side.

    Args:
        call: Of `Process`.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    async def say(self, message: pb.ProcessingRequest) -> None:
        """Send one message."""
        await self._call.write(message.SerializeToString())

    async def ask(
        self, path: str = PATH, *, method: str = "POST", hint: Sequence[str] | None = None, **headers: str
    ) -> None:
        """The headers of a request; one that is a GET has no body."""
        message = pb.ProcessingRequest(request_headers=pb.HttpHeaders(end_of_stream=method == "GET"))
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in {":method": method, ":path": path, ":authority": "x", **named}.items():
            message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
        if hint is not None:
            message.metadata_context.filter_metadata[HINT].update(
                {"x-gateway-destination-endpoint-subset": list(hint)}
            )
        await self.say(message)

    async def body(self, data: bytes, *, end: bool) -> None:
        """A chunk of it."""
        await self.say(pb.ProcessingRequest(request_body=pb.HttpBody(body=data, end_of_stream=end)))

    async def answer(self, *, served: str | None = None, end: bool = False) -> None:
        """The headers of an answer."""
        message = pb.ProcessingRequest(response_headers=pb.HttpHeaders(end_of_stream=end))
        message.response_headers.headers.headers.add(key=":status", raw_value=b"200")
        if served is not None:
            message.metadata_context.filter_metadata["envoy.lb"].update(
                {"x-gateway-destination-endpoint-served": served}
            )
        await self.say(message)

    async def chunk(self, data: bytes, *, end: bool) -> None:
        """A chunk of an answer."""
        await self.say(pb.ProcessingRequest(response_body=pb.HttpBody(body=data, end_of_stream=end)))

    async def heard(self) -> pb.ProcessingResponse:
        """The next thing that the picker says."""
        async with asyncio.timeout(20):
            return pb.ProcessingResponse.FromString(await self._call.read())

    async def request_given_back(self) -> tuple[pb.ProcessingResponse, list[pb.StreamedBodyResponse]]:
        """What is said of the headers, and the chunks of the body up to the last."""
        headers = await self.heard()
        chunks: list[pb.StreamedBodyResponse] = []
        while headers.HasField("request_headers") and not (chunks and chunks[-1].end_of_stream):
            message = await self.heard()
            chunks.append(message.request_body.response.body_mutation.streamed_response)
        return headers, chunks


def destination_of(message: pb.ProcessingResponse) -> str:
    """Where a request is to go: the header and the metadata, which are equal."""
    mutation = message.request_headers.response.header_mutation
    (said,) = [each.header.raw_value for each in mutation.set_headers if each.header.key == DESTINATION]
    named = message.dynamic_metadata["envoy.lb"][DESTINATION]
    assert said.decode() == named
    return str(named)
