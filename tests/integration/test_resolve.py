"""Addresses of the configuration → literal endpoints, through the event loop's resolver."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import pytest

from extproc.discovery.clusters import ClusterSpec, EndpointSpec
from extproc.discovery.resolve import ResolveError, resolve
from extproc.types import Endpoint
from metadata_center.types import EndpointKey

pytestmark = pytest.mark.asyncio

RECORDS = {"engines.test": ["10.0.0.2", "10.0.0.1", "2001:db8::1", "10.0.0.2"], "one.test": ["10.0.0.1"]}


@pytest.fixture
async def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names looked up; a resolver with `RECORDS` stands in for the network's."""
    names: list[str] = []

    async def getaddrinfo(host: str, port: object, **_: Any) -> list[tuple[Any, ...]]:
        names.append(host)
        if host == "slow.test":
            await asyncio.sleep(60)
        if host not in RECORDS:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in RECORDS[host]]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    return names


def cluster(name: str, *endpoints: EndpointSpec) -> ClusterSpec:
    """A cluster as written."""
    return ClusterSpec(name=name, endpoints=endpoints)


async def test_literals_pass_through() -> None:
    """IP literals need no look-up and keep everything the operator wrote."""
    spec = EndpointSpec("2001:db8::1", 8000, weight=3, labels={"gpu": "h200"}, draining=True)
    resolution = await resolve([cluster("m", EndpointSpec("10.0.0.1", 80), spec), cluster("empty")])
    assert not resolution.has_host_names
    assert resolution.clusters["empty"] == ()
    assert resolution.endpoints == (
        Endpoint(EndpointKey("10.0.0.1:80"), "m"),
        Endpoint(EndpointKey("[2001:db8::1]:8000"), "m", 3, {"gpu": "h200"}, draining=True),
    )


async def test_localhost_is_resolved_by_the_system() -> None:
    """A host name becomes addresses, and the caller learns that asking again may pay."""
    resolution = await resolve([cluster("m", EndpointSpec("localhost", 80))])
    assert resolution.has_host_names
    assert "127.0.0.1:80" in [e.key for e in resolution.endpoints]


async def test_each_name_is_asked_once_and_duplicates_fall_away(asked: list[str]) -> None:
    """Every record becomes one endpoint; in a cluster the first mention of a key counts."""
    resolution = await resolve(
        [
            cluster("m", EndpointSpec("10.0.0.1", 80, weight=7), EndpointSpec("engines.test", 80)),
            cluster("n", EndpointSpec("engines.test", 80), EndpointSpec("one.test", 81)),
        ]
    )
    assert sorted(asked) == ["engines.test", "one.test"]
    assert [(e.key, e.weight) for e in resolution.clusters["m"]] == [
        ("10.0.0.1:80", 7),
        ("10.0.0.2:80", 1),
        ("[2001:db8::1]:80", 1),
    ]
    assert [e.key for e in resolution.clusters["n"]] == [
        "10.0.0.1:80",
        "10.0.0.2:80",
        "[2001:db8::1]:80",
        "10.0.0.1:81",
    ]


async def test_failed_names_are_all_named_in_bounded_time(asked: list[str]) -> None:
    """Names without an answer fail the resolution together, and none is waited for beyond the bound."""
    start_s = time.monotonic()
    names = ("slow.test", "gone.test", "one.test")
    with pytest.raises(ResolveError, match=r"'gone\.test'.*'slow\.test'") as error:
        await resolve([cluster("m", *(EndpointSpec(name, 80) for name in names))], timeout_s=0.1)
    assert list(error.value.failures) == ["gone.test", "slow.test"]
    assert time.monotonic() - start_s < 1.0
    assert len(asked) == 3
