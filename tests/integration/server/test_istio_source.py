"""The connection to istiod, against a fake of it: streams, limits, TLS and tokens, losses and returns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from extproc.config.schema import Config
from extproc.config.sections.discovery import IstioDiscovery
from extproc.discovery.fleet import Fleet
from extproc.discovery.istio.messages import CLUSTERS, Resource, Response
from extproc.discovery.listed import Listed
from extproc.server.sources.istio_source import IstioSource
from metadata_center.tokens import MALFORMED
from testbed.certificates import issued, workload
from testbed.processes import free_port
from tests.fake_istiod import FakeIstiod
from tests.mesh import SERVICE, assignments, clusters
from tests.waiting import until

pytestmark = pytest.mark.asyncio

A, B = "10.0.0.1", "10.0.0.2"
CONFIG = Config.model_validate({"models": {"m": {"rules": [{"cluster": SERVICE}]}}})


class Following:
    """A source, and the fleet that it feeds.

    Attributes:
        reports: How many there were.
    """

    def __init__(self, port: int, **settings: Any) -> None:
        self.fleet = Fleet()
        self.reports = 0
        self._changed = asyncio.Event()
        where = IstioDiscovery.model_validate({"address": f"127.0.0.1:{port}", **settings})
        self.source = IstioSource(where, 0, self.take)
        self.source.follow(CONFIG)

    def take(self, clusters_told: Mapping[str, Sequence[Listed] | None]) -> None:
        """A report."""
        self.reports += 1
        self.fleet.update("istio", clusters_told)
        self._changed.set()

    def hosts(self, name: str = SERVICE) -> list[str] | None:
        """Of a cluster."""
        endpoints = self.fleet.clusters.get(name)
        return None if endpoints is None else [one.address.host for one in endpoints]

    async def has(self, *hosts: str) -> None:
        """Wait until the service has these."""
        async with asyncio.timeout(20):
            while self.hosts() != list(hosts):
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def following(port: int, **settings: Any) -> AsyncIterator[Following]:
    """A source that runs."""
    made = Following(port, **settings)
    await made.source.start()
    try:
        yield made
    finally:
        await made.source.stop()


@pytest.fixture
async def istiod() -> AsyncIterator[FakeIstiod]:
    """A fake one with one service."""
    fake = FakeIstiod()
    await fake.start()
    fake.set(SERVICE, A)
    yield fake
    await fake.stop()


async def test_what_istiod_lists_is_reported_as_it_changes(istiod: FakeIstiod) -> None:
    """At first, and at each change; every response is acknowledged."""
    async with following(istiod.port) as made:
        async with asyncio.timeout(20):
            await made.source.first_state()
        assert made.hosts() == [A]
        assert made.source.status().is_connected
        assert made.source.status().age_s == 0
        istiod.set(SERVICE, A, B)
        await made.has(A, B)
        istiod.remove(SERVICE)
        await until(lambda: made.hosts() is None)
        first = istiod.requests[0]
        assert first.node.id.startswith("router~127.0.0.1~")
        assert not any(request.HasField("node") for request in istiod.requests[1:])
        assert not any(request.HasField("error_detail") for request in istiod.requests)
    assert made.hosts() is None


async def test_istiod_stopped_and_started_again(istiod: FakeIstiod) -> None:
    """Nothing flaps, the age rises, and an edit made meanwhile is there."""
    async with following(istiod.port) as made:
        await made.has(A)
        reports = made.reports
        await istiod.stop()
        await until(lambda: not made.source.status().is_connected)
        assert made.source.status().age_s > 0
        assert made.hosts() == [A]
        istiod.services[SERVICE] = [A, B]
        await istiod.start()
        await made.has(A, B)
        assert made.reports == reports + 1
        await until(lambda: made.source.status().age_s == 0)


async def test_istiod_may_come_later() -> None:
    """A source that starts before its control plane asks again and again."""
    fake = FakeIstiod()
    fake.port, fake.services[SERVICE] = free_port(), [A]
    async with following(fake.port) as made:
        await until(lambda: made.source.status().age_s > 0.3)
        await fake.start()
        await made.has(A)
    await fake.stop()


async def test_what_cannot_be_used_is_refused(istiod: FakeIstiod) -> None:
    """Istiod hears why; what is no response at all ends the stream, and another one is opened."""
    async with following(istiod.port) as made:
        await made.has(A)
        istiod.push(Response(CLUSTERS, "bad", (Resource(SERVICE, b"\xff"),)))
        refusal = await istiod.asked(lambda request: request.response_nonce == "bad")
        assert SERVICE in refusal.error_detail.message
        assert made.source.status().rejects == 1
        istiod.push(b"\xff\xff")
        await istiod.asked(lambda request: request.HasField("node") and request is not istiod.requests[0])
        assert made.hosts() == [A]


async def test_a_response_larger_than_the_limit_raises_it(istiod: FakeIstiod) -> None:
    """5 MiB of other services do not fit gRPC's default: the stream is opened anew, with room for them."""
    others = Response(
        CLUSTERS, "big", tuple(Resource(f"outbound|80||{n}.internal", bytes(1024)) for n in range(5_000))
    )
    async with following(istiod.port) as made:
        await made.has(A)
        istiod.push(others)
        await istiod.asked(lambda request: request.HasField("node") and request is not istiod.requests[0])
        await until(lambda: made.source.status().age_s == 0)
        istiod.push(others)
        accepted = await istiod.asked(lambda request: request.response_nonce == "big")
        assert not accepted.HasField("error_detail")
        assert made.hosts() == [A]


async def test_a_source_that_is_stopped_leaves_nothing() -> None:
    """While it connects, twice, or before it ever started."""
    made = Following(free_port())
    await made.source.start()
    await made.source.stop()
    await made.source.stop()
    never_started = Following(free_port())
    await never_started.source.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_tls_and_a_token_that_rotates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each connection is made with the CA and the token as they are then; a file that has none is named."""
    for name in ("authority", "other"):
        issued(tmp_path, name)
    issued(tmp_path, "istiod", "authority", who="DNS:istiod.test")
    ca, token = tmp_path / "ca.pem", tmp_path / "token"
    ca.write_bytes((tmp_path / "other.pem").read_bytes())
    token.write_text("first\n")
    pair = ((tmp_path / "istiod.key").read_bytes(), (tmp_path / "istiod.pem").read_bytes())
    credentials = grpc.ssl_server_credentials([pair])
    fake = FakeIstiod()
    fake.services[SERVICE] = [A]
    await fake.start(credentials)
    tls = {"ca_file": str(ca), "token_file": str(token), "server_name": "istiod.test"}
    async with following(fake.port, tls=tls) as made:
        await until(lambda: made.source.status().age_s > 0.5)
        assert made.hosts() is None, "the CA is another one"
        ca.write_bytes((tmp_path / "authority.pem").read_bytes())
        await made.has(A)
        assert fake.headers[-1]["authorization"] == "Bearer first"
        token.write_text("second\n")
        await fake.stop()
        await until(lambda: not made.source.status().is_connected)
        await fake.start(credentials)
        await until(lambda: made.source.status().is_connected)
        assert fake.headers[-1]["authorization"] == "Bearer second"
        token.write_text("s3cret\ns3cret\n")
        await fake.stop()
        await until(lambda: not made.source.status().is_connected)
        await fake.start(credentials)
        await until(lambda: f"{token}: {MALFORMED}" in [vars(each).get("cause") for each in caplog.records])
        token.write_text("\ufeffthird\n")
        await until(lambda: made.source.status().is_connected)
        assert fake.headers[-1]["authorization"] == "Bearer third"
    await fake.stop()


async def test_a_certificate_that_rotates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is read for each connection; a pair half replaced is named, and connects to nothing meanwhile."""
    for name in ("authority", "other"):
        issued(tmp_path, name)
    issued(tmp_path, "istiod", "authority", who="DNS:istiod.test")
    issued(tmp_path, "right", "authority", who=workload("default"))
    issued(tmp_path, "wrong", "other", who=workload("default"))
    files = {"cert_file": tmp_path / "shown.pem", "key_file": tmp_path / "shown.key"}

    def show(name: str, *kinds: str) -> None:
        for kind in kinds:
            (tmp_path / f"shown.{kind}").write_bytes((tmp_path / f"{name}.{kind}").read_bytes())

    pair = ((tmp_path / "istiod.key").read_bytes(), (tmp_path / "istiod.pem").read_bytes())
    root = (tmp_path / "authority.pem").read_bytes()
    credentials = grpc.ssl_server_credentials([pair], root, require_client_auth=True)
    fake = FakeIstiod()
    fake.services[SERVICE] = [A]
    await fake.start(credentials)
    tls = {"ca_file": str(tmp_path / "authority.pem"), "server_name": "istiod.test"}
    show("wrong", "pem", "key")
    async with following(fake.port, tls={**tls, **{key: str(path) for key, path in files.items()}}) as made:
        await until(lambda: made.source.status().age_s > 0.5)
        assert made.hosts() is None
        show("right", "pem", "key")
        await made.has(A)
        show("wrong", "key")
        await fake.stop()
        await until(lambda: not made.source.status().is_connected)
        await fake.start(credentials)
        await until(lambda: "KEY_VALUES_MISMATCH" in str([vars(record) for record in caplog.records]))
        assert made.hosts() == [A]
        show("right", "key")
        await until(lambda: made.source.status().is_connected)
    await fake.stop()


async def test_a_source_that_repeats_itself_reports_once(istiod: FakeIstiod) -> None:
    """What is the same is compared, not applied."""
    async with following(istiod.port) as made:
        await made.has(A)
        for number in range(3):
            istiod.push(clusters(f"same{number}", SERVICE))
        await istiod.asked(lambda request: request.response_nonce == "same2")
        assert made.reports == 1
        istiod.push(assignments("none"))
        await istiod.asked(lambda request: request.response_nonce == "none")
        assert made.reports == 1
