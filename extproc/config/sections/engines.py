"""What is known of engines: whether they are well, what they cache, how to reach them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from extproc.config.sections.fields import FileName, Seconds, Section
from extproc.health.settings import HealthSettings

_HEALTH = HealthSettings()

EventsAddress = Annotated[str, Field(pattern=r"^(tcp|ipc)://.+$", max_length=256, examples=["tcp://*:5557"])]


class Health(Section):
    """Which endpoints may be chosen: active probes, passive signals, ejection and recovery."""

    path: str = Field(default=_HEALTH.path, pattern=r"^/[!-~]*$", max_length=1_024, examples=["/health"])
    """Probed by GET; any 2xx is a success."""
    interval_s: Seconds = _HEALTH.interval_s
    """Between probes of a healthy endpoint, in seconds."""
    recovery_interval_s: Seconds = _HEALTH.recovery_interval_s
    """Between probes of an ejected endpoint, in seconds."""
    timeout_s: Seconds = _HEALTH.timeout_s
    """Bound on one probe, in seconds; each that times out doubles the next one's, up to eight times this."""
    unhealthy_threshold: int = Field(default=_HEALTH.unhealthy_threshold, ge=1, le=1_000)
    """Consecutive failed probes that eject."""
    passive_threshold: int = Field(default=_HEALTH.passive_threshold, ge=1, le=1_000)
    """Failures in a row, in real traffic, with which an endpoint that is alone in failing is ejected."""
    ejection_s: Seconds = _HEALTH.ejection_s
    """Shortest time out, in seconds; doubles with each ejection in a row."""
    max_ejection_s: Seconds = _HEALTH.max_ejection_s
    """Longest time out, in seconds; not below `ejection_s`."""
    min_available_ratio: float = Field(default=_HEALTH.min_available_ratio, ge=0, le=1)
    """Share of a cluster's endpoints that stay available, one at least, unless they refuse connections."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_ejection_s < self.ejection_s:
            raise PydanticCustomError(
                "ejection_order",
                "max_ejection_s is below ejection_s; accepted: max_ejection_s >= {least}",
                {"least": self.ejection_s},
            )
        return self

    def settings(self) -> HealthSettings:
        """The values as the health tracker takes them."""
        return HealthSettings(**self.model_dump())


class KvEvents(Section):
    """KV events of vLLM and SGLang: what engines say that they cache."""

    enabled: bool = True
    """Ask every engine at `/kv_event_sources`; those that publish are followed."""
    listen: Mapping[EventsAddress, EventsAddress] = Field(default_factory=dict)
    """For engines that connect to the gateway: the address they name -> the address to bind for it."""
    discovery_interval_s: Seconds = 30.0
    """Engines that do not publish are asked again this often, in seconds."""
    max_blocks: int = Field(default=20_000_000, ge=1_000, le=1_000_000_000)
    """Bound on distinct engine blocks remembered, about 120 bytes each; one endpoint takes half at most."""
    slow_medium_weight: float = Field(default=0.5, ge=0, le=1)
    """Worth of a token cached in host memory or storage, against one on the GPU."""


class Cache(Section):
    """The estimate of what engines hold in their prefix caches."""

    max_blocks_per_endpoint: int = Field(default=200_000, ge=1, le=100_000_000)
    """Bound on remembered blocks per endpoint, whatever the engine's cache size."""
    default_kv_tokens: int = Field(default=100_000, ge=1, le=1_000_000_000)
    """Cache size in tokens assumed until the engine's own cache_config_info is known."""
    kv_events: KvEvents = KvEvents()
    """Engines' own KV events, where there are any and the model's tokenizer is known."""


class EngineTls(Section):
    """TLS to the engines of one cluster, for Envoy and for Tokenway's own probes."""

    ca_file: FileName
    """PEM file of the CA that signed the engines' certificates; the same path at Envoy and Tokenway, which
    has Envoy read it again when it changes."""
    server_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,253}$", examples=["engine.internal"])]
    """DNS name in the engines' certificates, also sent as SNI."""
    cert_file: FileName | None = None
    """PEM file of a certificate to show to the engines; with key_file."""
    key_file: FileName | None = None
    """PEM file of its private key."""
    _contents: str = PrivateAttr(default="")

    @property
    def contents(self) -> str:
        """Of CA and certificate, as they were read last, in short; empty if Tokenway cannot read them.

        Settings whose files have changed are others: they compare as different.
        """
        return self._contents

    def with_contents(self, contents: str) -> Self:
        """The same settings with files of these contents."""
        made = self.model_copy()
        made._contents = contents  # noqa: SLF001 - our own
        return made

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise PydanticCustomError("half_tls", "accepted: both cert_file and key_file, or neither")
        return self
