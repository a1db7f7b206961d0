"""An Istio gateway in the place of our own Envoy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from extproc.config.sections.fields import Section

Namespace = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]

LabelName = Annotated[
    str, Field(pattern=r"^([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")
]

LabelValue = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$")]

HostPattern = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*)$", max_length=253)]

TcpPort = Annotated[int, Field(ge=1, le=65_535)]


def _service(text: str) -> str:
    host, _, port = text.rpartition(":")
    if "." not in host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise PydanticCustomError(
            "service", "not a service; accepted: text like `tokenway.tokenway.svc.cluster.local:9000`"
        )
    return text


class IstioGateway(Section):
    """Envoy is an Istio gateway: `tokenway render istio` prints its configuration. Changes need a restart."""

    namespace: Namespace = "istio-system"
    """Namespace of the gateway's pods, and of all that is rendered."""
    selector: Annotated[Mapping[LabelName, LabelValue], Field(min_length=1)] = {"istio": "ingressgateway"}
    """Labels of the gateway's pods."""
    port: TcpPort = 80
    """Port for clients, as the Gateway has it: no other Gateway on these pods may use it."""
    pod_port: TcpPort | None = None
    """Port that the pods listen on, if their Service maps `port` to another; null means the same."""
    hosts: Annotated[tuple[HostPattern, ...], Field(strict=False, min_length=1)] = ("*",)
    """Host names that clients ask for."""
    credential: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$")] | None = None
    """Kubernetes secret with the certificate for clients; null takes the files of `edge.tls`, if given."""
    service: Annotated[str, AfterValidator(_service)] | None = None
    """Tokenway's own Service as `host:port`; null makes a ServiceEntry of `edge.gateway`, or the sockets."""
