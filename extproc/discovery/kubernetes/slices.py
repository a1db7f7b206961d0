"""An EndpointSlice object → the endpoints that it lists, of one port of its Service.

Rules:
    1. A slice has one family of addresses and its own numbers for the Service's ports, known by name.
    2. `ready` that is not said is true. One that terminates drains, whether it still serves or not.
    3. An endpoint may stand in two slices while it moves: equal addresses and ports are one, and what says
       that it serves counts.

Source: discovery/v1 `EndpointSlice`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from extproc.discovery.kubernetes.fields import Object, is_true_at, list_at, port_of, text_at
from extproc.discovery.kubernetes.pods import host_of, key_of
from extproc.discovery.listed import Listed
from metadata_center.addresses import Address

MAX_ENDPOINTS = 1000
"""Of one slice, as the API has it."""

MAX_PORTS = 100
"""Likewise."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One endpoint of a slice.

    Attributes:
        host: Its address.
        uid: Of the pod behind it; empty if none is named.
        pod: Its name; likewise.
        namespace: Likewise.
        zone: Where it is; empty if that is not said.
        is_ready: It serves.
        is_terminating: It goes away.
    """

    host: str
    uid: str
    pod: str
    namespace: str
    zone: str
    is_ready: bool
    is_terminating: bool


@dataclass(frozen=True, slots=True)
class Slice:
    """What is kept of a slice.

    Attributes:
        is_ipv6: The family of its addresses.
        ports: Numbers by name; the name may be empty.
        backends: Its endpoints.
    """

    is_ipv6: bool
    ports: Mapping[str, int]
    backends: tuple[Backend, ...]


def read_slice(said: Object) -> Slice | None:
    """What is kept of a slice; None if its addresses are names, or it is none."""
    family = text_at(said, "addressType")
    if family not in ("IPv4", "IPv6"):
        return None
    ports = {}
    for one in list_at(said, "ports")[:MAX_PORTS]:
        number = port_of(one.get("port")) if isinstance(one, dict) else None
        if number is not None and text_at(one, "protocol") in ("", "TCP"):
            ports[text_at(one, "name")] = number
    is_ipv6 = family == "IPv6"
    backends = (_backend(one, is_ipv6=is_ipv6) for one in list_at(said, "endpoints")[:MAX_ENDPOINTS])
    return Slice(is_ipv6, ports, tuple(one for one in backends if one is not None))


def endpoints_of(slices: Iterable[Slice], port: str | None, *, is_ipv6: bool) -> list[Listed]:
    """The endpoints of a Service, in the order of the slices.

    Args:
        slices: All of the Service.
        port: Its name or, of a slice that has none of that name, its number; None for the only one.
        is_ipv6: The family that is wanted.
    """
    found: dict[Address, Listed] = {}
    for one in slices:
        number = _number(one.ports, port)
        if number is None or one.is_ipv6 != is_ipv6:
            continue
        for backend in one.backends:
            listed = _listed(backend, number)
            other = found.get(listed.address)
            if other is None or _serves(listed) > _serves(other):
                found[listed.address] = listed
    return list(found.values())


def _number(ports: Mapping[str, int], port: str | None) -> int | None:
    if port is None:
        return next(iter(ports.values())) if len(ports) == 1 else None
    if port in ports:
        return ports[port]
    return next((number for number in ports.values() if str(number) == port), None)


def _serves(listed: Listed) -> int:
    """What says more for an endpoint is larger."""
    return 2 * (listed.ready and not listed.draining) + listed.ready


def _listed(backend: Backend, port: int) -> Listed:
    address = Address(backend.host, port)
    return Listed(
        key_of(backend.uid, address) if backend.uid else str(address),
        address,
        metadata={"namespace": backend.namespace, "pod": backend.pod} if backend.pod else {},
        draining=backend.is_terminating,
        locality=backend.zone,
        ready=backend.is_ready or backend.is_terminating,
    )


def _backend(said: object, *, is_ipv6: bool) -> Backend | None:
    addresses = list_at(said, "addresses")
    host = host_of(addresses[0]) if addresses and isinstance(addresses[0], str) else None
    if host is None or (":" in host) != is_ipv6:
        return None
    terminating = is_true_at(said, "conditions", "terminating") is True
    is_pod = text_at(said, "targetRef", "kind") == "Pod"
    return Backend(
        host,
        text_at(said, "targetRef", "uid") if is_pod else "",
        text_at(said, "targetRef", "name") if is_pod else "",
        text_at(said, "targetRef", "namespace") if is_pod else "",
        text_at(said, "zone"),
        is_ready=is_true_at(said, "conditions", "ready") is not False and not terminating,
        is_terminating=terminating,
    )
