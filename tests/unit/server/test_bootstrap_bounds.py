"""Bounds of the bootstrap that hold each other: of what a client may leave half done."""

from __future__ import annotations

from typing import Any

import pytest

from extproc.config.sections.edge import Edge, EdgeTls
from extproc.server.envoys.bootstrap import PROCESSOR, fill, template


def _document(edge: Edge) -> dict[str, Any]:
    document = template()
    fill(document, listen=("127.0.0.1", 1), admin_port=2, sockets=["/s"], edge=edge)
    return document


def _listener(edge: Edge) -> dict[str, Any]:
    (listener,) = _document(edge)["static_resources"]["listeners"]
    return dict(listener)


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def test_who_stops_sending_waits_shorter_than_who_is_served() -> None:
    """Before its decision a request may be silent for longer than a decision takes; then as all others."""
    manager = _listener(Edge())["filter_chains"][0]["filters"][0]["typed_config"]
    (processor,) = [each["typed_config"] for each in manager["http_filters"] if each["name"] == PROCESSOR]
    *served, nowhere = manager["route_config"]["virtual_hosts"][0]["routes"]
    assert {route["route"]["idle_timeout"] for route in served} == {manager["stream_idle_timeout"]}
    before = _seconds(nowhere["route"]["idle_timeout"])
    assert _seconds(processor["max_message_timeout"]) < before < _seconds(manager["request_timeout"])


@pytest.mark.parametrize("tls", [None, EdgeTls(cert_file="c", key_file="k")])
def test_a_connection_that_says_nothing_is_bounded_as_headers_are(tls: EdgeTls | None) -> None:
    """Its first line, or its first word of TLS and then the handshake."""
    listener = _listener(Edge(headers_timeout_s=3, tls=tls))
    (inspector,) = listener["listener_filters"]
    assert inspector["name"].endswith(".tls_inspector")
    assert listener["listener_filters_timeout"] == "3s"
    handshake = listener["filter_chains"][0].get("transport_socket_connect_timeout")
    assert handshake == (None if tls is None else "3s")


@pytest.mark.parametrize(
    ("edge", "least"),
    [(Edge(), 10), (Edge(headers_timeout_s=3), 3), (Edge(headers_timeout_s=3, idle_timeout_s=2), 2)],
)
def test_idle_connections_end_sooner_the_more_there_are(edge: Edge, least: float) -> None:
    """Down to what half a request has, and never later than they would without."""
    overload = _document(edge)["overload_manager"]
    (action,) = [each for each in overload["actions"] if each["name"].endswith(".reduce_timeouts")]
    (trigger,) = action["triggers"]
    assert trigger["name"] in {monitor["name"] for monitor in overload["resource_monitors"]}
    assert trigger["name"].endswith(".global_downstream_max_connections")
    assert trigger["scaled"] == {"scaling_threshold": 0.5, "saturation_threshold": 0.9}
    (factor,) = action["typed_config"]["timer_scale_factors"]
    assert factor["timer"] == "HTTP_DOWNSTREAM_CONNECTION_IDLE"
    assert _seconds(factor["min_timeout"]) == least


def test_an_idle_connection_drains_sooner_than_others_time_out() -> None:
    """It has its place meanwhile, which is to be little beside the time that half a request has."""
    manager = _listener(Edge())["filter_chains"][0]["filters"][0]["typed_config"]
    assert 0 < _seconds(manager["drain_timeout"]) < _seconds(manager["request_headers_timeout"]) / 2
