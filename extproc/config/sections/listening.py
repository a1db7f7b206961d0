"""Where the gateway's processes listen, for which clients, and how Envoy finds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Final, Self

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from extproc.config.sections.fields import DAY_S, FileName, Name, Seconds, Section
from extproc.values.standing import OBJECTIVE_NAME
from metadata_center.addresses import Address, ip_or_none, is_loopback

MAX_SOCKET_BYTES: Final = 107
"""Of the path of a Unix socket: unix(7) has 108 with the NUL that ends it."""

MAX_RUN_DIR_BYTES: Final = MAX_SOCKET_BYTES - len("/admin63.sock")
"""The longest name of a socket in it: there are up to 64 workers."""


def _run_dir(text: str) -> str:
    if len(text.encode(errors="surrogatepass")) > MAX_RUN_DIR_BYTES:
        raise PydanticCustomError(
            "run_dir",
            "too long for the sockets in it; accepted: {bytes} bytes",
            {"bytes": MAX_RUN_DIR_BYTES},
        )
    return text


def _listen_address(text: str) -> str:
    """`unix:/path` or `ip:port`, IPv6 in brackets."""
    if text.startswith("unix:/"):
        if len(text.removeprefix("unix:").encode(errors="surrogatepass")) > MAX_SOCKET_BYTES:
            raise PydanticCustomError(
                "listen",
                "too long for a Unix socket; accepted: a path of {bytes} bytes",
                {"bytes": MAX_SOCKET_BYTES},
            )
        return text
    try:
        usable = ip_or_none(Address.parse(text).host) is not None
    except ValueError:
        usable = False
    if not usable:
        raise PydanticCustomError(
            "listen",
            "not an address; accepted: text like `unix:/run/tokenway.sock`, `127.0.0.1:9000`, `[::]:9000`",
        )
    return text


def _is_local(address: str) -> bool:
    """True if a listen address is a Unix socket or on loopback."""
    if address.startswith("unix:"):
        return True
    return is_loopback(Address.parse(address).host)


Listen = Annotated[str, AfterValidator(_listen_address)]

Port = Annotated[int, Field(ge=0, le=65_535)]


def _metrics_address(text: str) -> str:
    """`ip:port`, IPv6 in brackets."""
    if text.startswith("unix:"):
        raise PydanticCustomError("listen", "no socket serves metrics; accepted: text like `0.0.0.0:9090`")
    return _listen_address(text)


MetricsAddress = Annotated[str, AfterValidator(_metrics_address)]


class Admin(Section):
    """The operator's HTTP port: metrics, explain, endpoints, readiness."""

    address: str = Field(default="127.0.0.1", examples=["127.0.0.1", "::"])
    """IP address to listen on; keep it off the public network."""
    port: Port = 10080
    """TCP port; 0 picks a free one."""

    @field_validator("address")
    @classmethod
    def _is_ip(cls, address: str) -> str:
        ip = ip_or_none(address)
        if ip is None:
            raise PydanticCustomError(
                "address", "not an IP address; accepted: text like `127.0.0.1`, `0.0.0.0`, `::`"
            )
        return ip


class PickerTls(Section):
    """TLS for the endpoint picker."""

    cert_file: FileName
    """PEM file of the certificate, with its chain; read again when it changes."""
    key_file: FileName
    """PEM file of its private key."""
    client_ca_file: FileName | None = None
    """PEM file of a CA; gateways must then show a certificate of it."""


class ListenTls(Section):
    """Mutual TLS for `listen`: a client that cannot show a certificate of this CA is not answered."""

    cert_file: FileName
    """PEM file of the gateway's certificate, with its chain."""
    key_file: FileName
    """PEM file of its private key."""
    client_ca_file: FileName
    """PEM file of the CA that signed the certificates of the clients that may connect: the Envoys."""


class Transport(StrEnum):
    """What speaks gRPC with Envoy."""

    GRPCIO = "grpcio"
    NATIVE = "native"


class Server(Section):
    """The processes and where they listen. Changes need a restart."""

    workers: int = Field(default=1, ge=1, le=64)
    """Worker processes sharing one load table; one serves about a core of Envoy traffic."""
    run_dir: (
        Annotated[
            str, Field(min_length=1, max_length=256, examples=["/run/tokenway"]), AfterValidator(_run_dir)
        ]
        | None
    ) = None
    """Directory of the Unix sockets, made at start, closed to others; null takes the user's own place."""
    listen: Annotated[tuple[Listen, ...], Field(strict=False)] = ()
    """Further gRPC addresses beside the socket in `run_dir`: `unix:/path` or `ip:port`."""
    listen_tls: ListenTls | None = None
    """Mutual TLS for the `ip:port` of `listen`; without it only loopback is listened to."""
    listen_insecure: bool = False
    """True listens in clear text beyond loopback: hosts that reach it steer traffic and read prompts."""
    admin: Admin = Admin()
    """The operator's HTTP port."""
    transport: Annotated[Transport, Field(strict=False)] = Transport.NATIVE
    """`native` is Tokenway's own HTTP/2; `grpcio` is Google's library, at twice the CPU for a request."""
    drain_s: float = Field(default=30.0, ge=0, le=DAY_S)
    """How long streams may take to finish after SIGTERM, in seconds."""

    @model_validator(mode="after")
    def _is_not_exposed(self) -> Self:
        _refuse_exposed(self.listen, is_safe=self.listen_tls is not None or self.listen_insecure)
        return self


def _said_by_headers(name: str) -> str:
    if re.fullmatch(OBJECTIVE_NAME, name) is None:
        raise PydanticCustomError(
            "objective_name",
            "no request can name the objective `{name}`; accepted: lower-case letters, digits, `-` and `.`, "
            "a letter or digit first and last",
            {"name": name},
        )
    return name


ObjectiveName = Annotated[Name, AfterValidator(_said_by_headers)]


class EndpointPicker(Section):
    """The endpoint-picker protocol, for gateways that are not our Envoy. Changes need a restart."""

    listen: Annotated[tuple[Listen, ...], Field(strict=False, min_length=1, examples=[["127.0.0.1:9002"]])]
    """gRPC addresses, `unix:/path` or `ip:port`; 9002 is the port that gateways expect."""
    listen_tls: PickerTls | None = None
    """TLS for the `ip:port` of `listen`; without it only loopback is listened to."""
    self_signed: bool = False
    """TLS by a certificate made at each start, for gateways that verify none; llm-d's default."""
    listen_insecure: bool = False
    """True listens in clear text beyond loopback, as Istio expects it: hosts that reach it take up load."""
    health_listen: Annotated[tuple[Listen, ...], Field(strict=False, examples=[["0.0.0.0:9003"]])] = ()
    """Addresses for gRPC health alone, in clear text; `listen` answers it as well."""
    metrics_listen: Annotated[
        tuple[MetricsAddress, ...], Field(strict=False, examples=[["0.0.0.0:9090"]])
    ] = ()
    """Addresses for the page `/metrics` alone, in clear text; the admin port has it as well."""
    fallbacks: int = Field(default=1, ge=0, le=15)
    """Endpoints named after the first; 0 for gateways that take the header for one address."""
    upload_timeout_s: Seconds = 300.0
    """Bound on the arrival of a whole request, in seconds."""
    leave_s: float = Field(default=5.0, ge=0, le=DAY_S)
    """How long requests are still taken after health said NOT_SERVING, in seconds."""
    leave_early: bool = False
    """Leave a stream as soon as nothing of it is needed, where the gateway does not want its answer back; its
    access log (docs/endpoint-picker.md) then tells the end."""
    objectives: Mapping[ObjectiveName, Annotated[int, Field(ge=-1_000_000, le=1_000_000)]] = Field(
        default_factory=dict
    )
    """Priorities by the name of an InferenceObjective; below 0 a request is refused rather than held."""
    conformance: bool = False
    """Obey the test headers of the Gateway API's conformance suite; clients then choose endpoints."""

    @model_validator(mode="after")
    def _is_not_exposed(self) -> Self:
        if self.self_signed and self.listen_tls is not None:
            raise PydanticCustomError("two_certificates", "accepted: listen_tls or self_signed, not both")
        is_tls = self.self_signed or self.listen_tls is not None
        _refuse_exposed(self.listen, is_safe=is_tls or self.listen_insecure)
        return self


def _refuse_exposed(listen: Iterable[str], *, is_safe: bool) -> None:
    """Raise PydanticCustomError for addresses that others can reach in clear text, unless allowed."""
    exposed = [address for address in listen if not _is_local(address)]
    if exposed and not is_safe:
        raise PydanticCustomError(
            "exposed",
            "listen has {address}, which others can reach in clear text: they could steer traffic "
            "and read prompts; accepted: loopback, listen_tls, or listen_insecure: true",
            {"address": exposed[0]},
        )


class GatewayAddress(Section):
    """Where Envoy finds Tokenway if they share no host: `server.listen`, as Envoy reaches it."""

    addresses: Annotated[tuple[Listen, ...], Field(strict=False, min_length=1)]
    """`ip:port` of each gateway process."""
    cert_file: FileName | None = None
    """PEM file at Envoy of the certificate that it shows; with key_file, ca_file and server_name. It
    reads all of them once unless `tokenway bootstrap --sds`."""
    key_file: FileName | None = None
    """PEM file of its private key."""
    ca_file: FileName | None = None
    """PEM file of the CA that signed the gateway's certificate."""
    server_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,253}$")] | None = None
    """DNS name in the gateway's certificate."""

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        given = [self.cert_file, self.key_file, self.ca_file, self.server_name]
        if any(given) and not all(given):
            raise PydanticCustomError(
                "half_tls", "accepted: all of cert_file, key_file, ca_file and server_name, or none of them"
            )
        return self
