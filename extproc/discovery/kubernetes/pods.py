"""A Pod object → what is kept of it, and the endpoints that it is.

Rules:
    1. A pod is ready iff it runs, its condition `Ready` is true, it has an address, and its deletion has not
       begun. One that is being deleted is terminating. One that has run to its end is not there.
    2. Each port that serves is an endpoint of its own, known by the pod's uid and its address and port: an
       address that another pod takes over is another endpoint, and so is the other rank of one pod.
    3. `active-ports` says which of the ports serve; without it all do.

Source: core/v1 `PodStatus`; llm-d router, `active-ports`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_64_hexdigest

from extproc.discovery.kubernetes.fields import Object, labels_at, list_at, mapping_at, port_of, text_at
from extproc.discovery.kubernetes.kinds import INFERENCE, LLM_D
from extproc.discovery.listed import Listed
from metadata_center.addresses import Address, ip_or_none

ACTIVE_PORTS: Final = (f"{LLM_D}/active-ports", f"{INFERENCE}/active-ports")
"""Annotations; the first that is there counts."""

MAX_PORTS: Final = 8
"""Of one pod, as InferencePool has it."""

_ZONES: Final = ("topology.kubernetes.io/region", "topology.kubernetes.io/zone")
_OVER: Final = frozenset({"Succeeded", "Failed"})


@dataclass(frozen=True, slots=True)
class Pod:
    """What is kept of a pod.

    Attributes:
        name: In its namespace.
        uid: Of this very pod.
        namespace: Its own.
        addresses: Its IP addresses, the preferred family first.
        labels: Its labels.
        active_ports: Ports that serve; None means all.
        is_ready: It serves.
        is_terminating: Its deletion has begun.
    """

    name: str
    uid: str
    namespace: str
    addresses: tuple[str, ...]
    labels: Mapping[str, str]
    active_ports: frozenset[int] | None
    is_ready: bool
    is_terminating: bool

    def has(self, labels: Iterable[tuple[str, str]]) -> bool:
        """True if it has all of these labels."""
        return all(self.labels.get(key) == value for key, value in labels)


def read_pod(said: Object) -> Pod | None:
    """What is kept of a pod; None if it has run to its end, or is none."""
    name, uid = text_at(said, "metadata", "name"), text_at(said, "metadata", "uid")
    phase = text_at(said, "status", "phase")
    if not name or not uid or phase in _OVER:
        return None
    terminating = bool(text_at(said, "metadata", "deletionTimestamp"))
    return Pod(
        name,
        uid,
        text_at(said, "metadata", "namespace"),
        _addresses(said),
        labels_at(said, "metadata", "labels"),
        _active_ports(mapping_at(said, "metadata", "annotations")),
        is_ready=phase == "Running" and not terminating and _is_ready(said),
        is_terminating=terminating,
    )


def endpoints_of(pod: Pod, ports: Iterable[int], *, is_ipv6: bool) -> list[Listed]:
    """The endpoints that a pod is; none if it has no address of that family."""
    host = next((host for host in pod.addresses if (":" in host) == is_ipv6), None)
    if host is None:
        return []
    locality = "/".join(filter(None, (pod.labels.get(label, "") for label in _ZONES)))
    return [
        Listed(
            key_of(pod.uid, address),
            address,
            labels=pod.labels,
            metadata={"namespace": pod.namespace, "pod": pod.name},
            draining=pod.is_terminating,
            locality=locality,
            ready=pod.is_ready or pod.is_terminating,
        )
        for port in ports
        if pod.active_ports is None or port in pod.active_ports
        for address in (Address(host, port),)
    ]


def key_of(uid: str, address: Address) -> str:
    """How an endpoint of a pod is known: short enough for an identity, and readable where it is."""
    return f"{address}/{xxh3_64_hexdigest(uid.encode())}"


def host_of(text: str) -> str | None:
    """The one spelling of an address that an engine can have; None for any other text."""
    host = ip_or_none(text)
    return None if host in ("0.0.0.0", "::") else host  # noqa: S104 - recognised, not bound


def _addresses(said: Object) -> tuple[str, ...]:
    texts = [text_at(said, "status", "podIP")]
    texts += [text_at(one, "ip") for one in list_at(said, "status", "podIPs")[:MAX_PORTS]]
    hosts = (host_of(text) for text in texts)
    return tuple(dict.fromkeys(host for host in hosts if host is not None))


def _is_ready(said: Object) -> bool:
    return any(
        text_at(one, "type") == "Ready" and text_at(one, "status") == "True"
        for one in list_at(said, "status", "conditions")
    )


def _active_ports(annotations: Object) -> frozenset[int] | None:
    text = next((annotations[name] for name in ACTIVE_PORTS if name in annotations), None)
    if text is None:
        return None
    if not isinstance(text, str):
        return frozenset()
    words = [word.strip() for word in text[: 16 * MAX_PORTS].split(",")]
    ports = [port_of(int(word)) for word in words if word.isascii() and word.isdigit() and len(word) <= 5]
    return frozenset(port for port in ports if port is not None)
