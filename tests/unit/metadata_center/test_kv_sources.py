"""Where an engine may say that its events are."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metadata_center.addresses import Address
from metadata_center.kv_events.errors import DiscoveryError
from metadata_center.kv_events.sources import (
    MAX_RANKS,
    Source,
    configured,
    parse_sources,
    with_port_offset,
)
from metadata_center.types import EndpointKey

ENGINE = EndpointKey("uid/5")
AT = Address("10.0.0.5", 8000)
LOOPBACK = Address("127.0.0.1", 8000)


def answer(*ranks: dict[str, Any]) -> bytes:
    """What vLLM 0.32 answers, one entry per rank."""
    base = {"enable_kv_cache_events": True, "publisher": "zmq", "replay_endpoint": None, "topic": ""}
    return orjson.dumps({str(rank): base | entry for rank, entry in enumerate(ranks)})


def found(events: Any, at: Address = AT, **fields: Any) -> list[Source]:
    """Sources of an answer of one rank."""
    return parse_sources(answer({"endpoint": events} | fields), ENGINE, at, {})


def test_an_engine_that_binds_is_connected_to() -> None:
    """A wildcard is the engine's own host; topic and replay are taken over."""
    for host in ("*", "0.0.0.0", "[::]", "10.0.0.5"):
        assert found(f"tcp://{host}:5557", replay_endpoint=f"tcp://{host}:5558", topic="kv@r0@m") == [
            Source(ENGINE, 0, "tcp://10.0.0.5:5557", "tcp://10.0.0.5:5558", "kv@r0@m", False)
        ]
    six = Address("fd00::5", 8000)
    assert found("tcp://*:5557", six)[0].events_address == "tcp://[fd00::5]:5557"
    assert found("tcp://[fd00:0::5]:5557", six)[0].events_address == "tcp://[fd00::5]:5557"


@pytest.mark.parametrize(
    "address",
    [
        "tcp://10.0.0.6:5557",
        "tcp://127.0.0.1:5557",
        "tcp://localhost:5557",
        "tcp://metadata.internal:80",
        "ipc:///run/engine.sock",
        "inproc://x",
        "udp://10.0.0.5:5557",
        "http://10.0.0.5:5557",
        "tcp://10.0.0.5",
        "tcp://10.0.0.5:0",
        "tcp://10.0.0.5:65536",
        "tcp://10.0.0.5:*",
        "tcp://10.0.0.6:1;10.0.0.5:5557",
        "tcp://10.0.0.5:5557\n",
        "tcp://10.0.0.5:5557/x",
        "",
        7,
        None,
        ["tcp://*:5557"],
    ],
)
def test_an_engine_may_name_only_itself(address: Any) -> None:
    """Other hosts, this host, other transports and malformed addresses are refused, for replays too."""
    with pytest.raises(DiscoveryError):
        found(address)
    if address:
        with pytest.raises(DiscoveryError):
            found("tcp://*:5557", replay_endpoint=address)


def test_an_engine_on_loopback_may_name_loopback() -> None:
    """In any spelling, and Unix sockets of this machine."""
    assert found("tcp://localhost:5557", LOOPBACK)[0].events_address == "tcp://localhost:5557"
    assert found("tcp://127.0.0.1:5557", LOOPBACK)[0].events_address == "tcp://127.0.0.1:5557"
    assert found("ipc:///run/engine.sock", LOOPBACK)[0].events_address == "ipc:///run/engine.sock"
    with pytest.raises(DiscoveryError):
        found("tcp://10.0.0.5:5557", LOOPBACK)


def test_ranks_with_one_address_get_the_ports_of_their_ranks() -> None:
    """An answer may state each rank's own ports, or the configured ones for all."""
    own = (
        {"endpoint": f"tcp://*:{5557 + rank}", "replay_endpoint": f"tcp://*:{6557 + rank}"} for rank in (0, 1)
    )
    same = {"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:6557"}
    expected = configured(ENGINE, AT, "tcp://*:5557", "tcp://*:6557", ranks=2)
    assert [source.events_address for source in expected] == ["tcp://10.0.0.5:5557", "tcp://10.0.0.5:5558"]
    assert parse_sources(answer(*own), ENGINE, AT, {}) == expected
    assert parse_sources(answer(same, same), ENGINE, AT, {}) == expected


def test_an_array_of_sources_is_understood() -> None:
    """Later versions name the rank in each entry and say less."""
    entries = [
        {"data_parallel_rank": 1, "endpoint": "tcp://*:5558", "replay_endpoint": None, "topic": ""},
        {"data_parallel_rank": 0, "endpoint": "tcp://*:5557", "replay_endpoint": None, "topic": ""},
    ]
    assert parse_sources(orjson.dumps(entries), ENGINE, AT, {}) == configured(
        ENGINE, AT, "tcp://*:5557", ranks=2
    )


def test_an_engine_that_publishes_to_us_is_bound_for() -> None:
    """Only at addresses of the operator; its replay socket is still its own."""
    listen = {"tcp://10.0.0.9:5557": "tcp://*:5557"}
    same = {"endpoint": "tcp://10.0.0.9:5557", "replay_endpoint": "tcp://*:6557", "topic": "kv@r0@m"}
    assert parse_sources(answer(same, same), ENGINE, AT, listen) == [
        Source(ENGINE, 0, "tcp://*:5557", "tcp://10.0.0.5:6557", "kv@r0@m", True),
        Source(ENGINE, 1, "tcp://*:5558", "tcp://10.0.0.5:6558", "kv@r0@m", True),
    ]
    silent = parse_sources(answer(same | {"topic": ""}), ENGINE, AT, listen)
    assert [source.topic for source in silent] == ["10.0.0.5:8000"]
    with pytest.raises(DiscoveryError):
        parse_sources(answer(same | {"endpoint": "tcp://10.0.0.9:5556"}), ENGINE, AT, listen)


def test_an_engine_without_events_has_no_sources() -> None:
    """An empty object, events switched off, or another publisher."""
    assert parse_sources(b"{}", ENGINE, AT, {}) == []
    assert parse_sources(b"[]", ENGINE, AT, {}) == []
    assert found("tcp://*:5557", enable_kv_cache_events=False) == []
    assert found("tcp://*:5557", publisher="null") == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no",
        b"3",
        b"null",
        b'"x"',
        b'{"0":3}',
        b'{"zero":{"endpoint":"tcp://*:1"}}',
        b'{"-1":{"endpoint":"tcp://*:1"}}',
        b'{"0":{"endpoint":"tcp://*:1"},"00":{"endpoint":"tcp://*:2"}}',
        b'{"0":{}}',
        b'{"0":{"endpoint":"tcp://*:1","topic":3}}',
        b'[{"data_parallel_rank":"x","endpoint":"tcp://*:1"}]',
        orjson.dumps({str(rank): {"endpoint": "tcp://*:1"} for rank in range(MAX_RANKS + 1)}),
        orjson.dumps({"255": {"endpoint": "tcp://*:65535"}, "0": {"endpoint": "tcp://*:65535"}}),
    ],
)
def test_answers_that_are_not_understood_are_refused(body: bytes) -> None:
    """Wrong shapes, ranks that are none or too many, ports that do not exist."""
    with pytest.raises(DiscoveryError):
        parse_sources(body, ENGINE, AT, {})


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(0, 2**63) | st.floats(allow_nan=False) | st.text(max_size=9),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["0", "1", "endpoint", "topic", "replay_endpoint"]), inner)
        ),
        max_leaves=10,
    )
)
def test_any_answer_is_understood_or_refused(value: Any) -> None:
    """Nothing but the documented error comes out."""
    with suppress(DiscoveryError):
        parse_sources(orjson.dumps(value), ENGINE, AT, {})


def test_configured_addresses_are_checked() -> None:
    """What an operator writes may be wrong as well; it may name another host, such as a relay."""
    assert configured(ENGINE, AT, "tcp://10.0.0.6:5557")[0].events_address == "tcp://10.0.0.6:5557"
    assert configured(ENGINE, AT, "tcp://*:5557", bind=True)[0].events_address == "tcp://*:5557"
    assert with_port_offset("ipc:///run/x", 0) == "ipc:///run/x"
    for events, ranks in (("5557", 1), ("tcp://*:5557", 0), ("tcp://*:65535", 2), ("udp://*:1", 1)):
        with pytest.raises(ValueError):
            configured(ENGINE, AT, events, ranks=ranks)
    with pytest.raises(ValueError):
        configured(ENGINE, LOOPBACK, "ipc:///run/x", ranks=2)
