"""A source whose keys are no addresses, through a whole worker: request, charge, ending, release."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import pytest
from aiohttp import web
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb

from extproc.discovery.listed import Listed
from extproc.protocol import wire
from extproc.server import building
from extproc.server.listening.run_dir import socket_path
from extproc.server.reloading.applying import Owners
from extproc.server.worker import Worker
from extproc.values.headers import REQUEST_ID_HEADER
from metadata_center.addresses import Address

pytestmark = pytest.mark.asyncio

REQUEST_ID = "00000001-0000-4000-8000-000000000000"
BODY = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "lorem ipsum " * 100}], "stream": True}
)
DEADLINE_S = 10.0
STREAM_ACCESS_LOGS = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"


@pytest.fixture
async def engines() -> AsyncIterator[dict[Address, str]]:
    """Two engines that are well, and the key by which the source knows each."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    for _ in range(2):
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield {Address(host, port): f"uid/{number}" for number, (host, port) in enumerate(runner.addresses, 1)}
    await runner.cleanup()


@pytest.fixture
async def worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: dict[Address, str]
) -> AsyncIterator[Worker]:
    """One whose rule names a cluster that no file lists, but another source."""
    owners = Owners()
    monkeypatch.setattr(building, "Owners", lambda: owners)
    (tmp_path / "clusters.json").write_text('{"clusters": []}')
    (tmp_path / "tokenway.yaml").write_text(
        json.dumps(
            {
                "server": {"run_dir": str(tmp_path / "run"), "admin": {"port": 0}, "drain_s": 0},
                "models": {"m": {"rules": [{"cluster": "pods"}]}},
            }
        )
    )
    worker = building.build_worker(tmp_path / "tokenway.yaml")
    await worker.start()
    replicas = [Listed(key, address) for address, key in engines.items()]
    owners.report("pods", {"pods": replicas})
    yield worker
    await worker.stop()


async def page(worker: Worker, target: str) -> str:
    """The body of a page of the admin port."""
    url = f"http://127.0.0.1:{worker.admin_port}{target}"
    async with aiohttp.ClientSession() as session, session.get(url) as reply:
        assert reply.status == 200
        return await reply.text()


async def endpoints(worker: Worker) -> dict[str, dict[str, Any]]:
    """What `/endpoints` shows, by key."""
    rows = json.loads(await page(worker, "/endpoints"))["endpoints"]
    return {row["key"]: row for row in rows}


def headers() -> pb.ProcessingRequest:
    """Envoy's first message."""
    message = pb.ProcessingRequest()
    values = {":method": "POST", ":path": "/v1/chat/completions", REQUEST_ID_HEADER: REQUEST_ID}
    for name, value in values.items():
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    return message


def end(owner: str, address: Address) -> als_pb2.StreamAccessLogsMessage:
    """The access log's entry of an answer from there."""
    message = als_pb2.StreamAccessLogsMessage()
    entry = message.http_logs.log_entry.add()
    common = entry.common_properties
    common.access_log_type = accesslog_pb2.DownstreamEnd
    common.custom_tags.update({"rid": REQUEST_ID, "owner": owner})
    common.upstream_remote_address.socket_address.address = str(address.host)
    common.upstream_remote_address.socket_address.port_value = address.port
    common.start_time.FromNanoseconds(time.time_ns() - 500_000_000)
    common.duration.FromMilliseconds(400)
    common.upstream_request_attempt_count = 1
    entry.response.response_code.value = 200
    entry.response.response_code_details = "via_upstream"
    entry.response.response_body_bytes = 2500
    entry.response.response_headers["content-type"] = "text/event-stream"
    return message


async def test_a_request_is_charged_and_released_by_the_key_of_its_source(
    worker: Worker, engines: dict[Address, str], tmp_path: Path
) -> None:
    """Envoy gets and reports addresses; everything shown of the endpoint has the key."""
    assert {key: row["requests"] for key, row in (await endpoints(worker)).items()} == {
        "uid/1": 0,
        "uid/2": 0,
    }
    async with grpc.aio.insecure_channel(f"unix:{socket_path(tmp_path / 'run', 0)}") as channel:
        call = channel.stream_stream(
            wire.PROCESS,
            request_serializer=pb.ProcessingRequest.SerializeToString,
            response_deserializer=pb.ProcessingResponse.FromString,
        )()
        await call.write(headers())
        await call.read()
        body = pb.HttpBody(body=BODY.encode(), end_of_stream=True)
        await call.write(pb.ProcessingRequest(request_body=body))
        answer: Any = await call.read()
        lb = answer.dynamic_metadata.fields["envoy.lb"].struct_value
        named = lb.fields["x-gateway-destination-endpoint"].string_value.split(",")
        assert set(named) <= {str(address) for address in engines}
        mutation = answer.request_body.response.header_mutation
        (owner,) = (
            each.header.raw_value for each in mutation.set_headers if each.header.key == ":tokenway-owner"
        )

        address = next(address for address in engines if str(address) == named[0])
        key = engines[address]
        rows = await endpoints(worker)
        assert {name: row["requests"] for name, row in rows.items()} == {
            name: int(name == key) for name in engines.values()
        }
        assert rows[key]["prefill_tokens"] > 0
        in_flight = f'tokenway_requests_in_flight{{cluster="pods",endpoint="{key}"}}'
        assert f"{in_flight} 1.0" in await page(worker, "/metrics")

        log = channel.stream_unary(
            STREAM_ACCESS_LOGS,
            request_serializer=als_pb2.StreamAccessLogsMessage.SerializeToString,
            response_deserializer=als_pb2.StreamAccessLogsResponse.FromString,
        )
        await log(iter([end(owner.decode(), address)]))
        async with asyncio.timeout(DEADLINE_S):
            while (row := (await endpoints(worker))[key])["requests"]:  # noqa: ASYNC110 - the page is polled
                await asyncio.sleep(0.01)
    assert (row["prefill_tokens"], row["context_tokens"], row["served_total"]) == (0, 0, 1)
    assert f"{in_flight} 0.0" in await page(worker, "/metrics")
    (record,) = json.loads(await page(worker, "/explain?last=1"))["records"]
    order = record["choice"]["order"]
    assert (record["snapshot"]["keys"][order[0]], record["outcome"]["endpoint"]) == (key, key)
