"""What tokenway.yaml may say: every key with its type, range, default and meaning.

Rules:
    1. Models are frozen; an unknown key, a wrong type or a value out of range is an error.
    2. A key left out, or given as null, has its default: never 0, never empty by accident.
    3. Attribute docstrings are the descriptions in the published JSON schema.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from extproc.health.settings import HealthSettings
from extproc.request.rules import Backend, ModelRules, Rule
from extproc.values.balancing import Algorithm, LoadBalancing

_LB = LoadBalancing()
_AIGW_KEYS = {
    "load_aware_enable",
    "cache_aware_enable",
    "candidate_percent",
    "request_load_weight",
    "prefill_load_weight",
    "cache_ratio_weight",
}
"""They say something about `inference_lb` alone, but for the first two, which `prefix_cache` has as well."""
_HEALTH = HealthSettings()

_DAY_S = 86_400
"""Upper bound of all times: what is longer is a mistake of unit."""

_MAX_HOLD_S = 55
"""Envoy's bootstrap lets a decision take 60 s (`max_message_timeout`); a margin for its way."""

_STORE_URL = r"^(rediss?(\+sentinel|\+cluster)?|https?)://.+$"

_MISSPELT = "cache_radio_weight"
"""AIGW's spelling of `cache_ratio_weight` in its wire schema; accepted so that its files can be kept."""


def _lower(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.lower() for name in names)


def _lower_names(headers: Mapping[str, str]) -> Mapping[str, str]:
    lowered = {name.lower(): value for name, value in headers.items()}
    if len(lowered) < len(headers):
        raise PydanticCustomError(
            "header_twice", "two header names differ in letter case only; accepted: distinct names"
        )
    return lowered


def _listen_address(text: str) -> str:
    """`unix:/path` or `ip:port`, IPv6 in brackets."""
    if text.startswith("unix:/"):
        return text
    host, _, port = text.rpartition(":")
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]") if host.startswith("[") else host)
        usable = port.isascii() and port.isdigit() and int(port) <= 65_535
    except ValueError:
        usable = False
    if not usable or (":" in host) != host.startswith("["):
        raise PydanticCustomError(
            "listen",
            "not an address; accepted: text like `unix:/run/tokenway.sock`, `127.0.0.1:9000`, `[::]:9000`",
        )
    return text


Name = Annotated[str, Field(min_length=1, max_length=256)]
"""AIGW bounds cluster and backend names to 1..256 as well."""

HeaderName = Annotated[
    str,
    Field(pattern=r"^:?[0-9A-Za-z!#$%&'*+.^_`|~-]+$", max_length=256, examples=["x-tier"]),
]
"""RFC 9110 token; a leading colon is for pseudo-headers such as `:authority`."""


def _is_local(address: str) -> bool:
    """True if a listen address is a Unix socket or on loopback."""
    if address.startswith("unix:"):
        return True
    return ipaddress.ip_address(address.rpartition(":")[0].strip("[]")).is_loopback


Listen = Annotated[str, AfterValidator(_listen_address)]
FileName = Annotated[str, Field(min_length=1, max_length=4_096, examples=["/etc/tokenway/tls.pem"])]
AdminPath = Annotated[str, Field(pattern=r"^/[!-~]*$", max_length=1_024, examples=["/metrics"])]
Origin = Annotated[
    str,
    Field(
        pattern=r"^(\*|[a-z][a-z0-9+.-]*://[!-.0-~]+)$", max_length=256, examples=["https://chat.example.com"]
    ),
]
EventsAddress = Annotated[str, Field(pattern=r"^(tcp|ipc)://.+$", max_length=256, examples=["tcp://*:5557"])]
EnvironmentVariable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", examples=["TOKENWAY_SECRET"])]
Port = Annotated[int, Field(ge=0, le=65_535)]
Seconds = Annotated[float, Field(gt=0, le=_DAY_S)]
Weight = Annotated[float, Field(ge=0)]
Labels = Mapping[Name, Annotated[str, Field(max_length=256)]]
HeaderValue = Annotated[str, Field(max_length=16_384)]
"""AIGW's bound on header values of a rule."""


class Section(BaseModel):
    """A mapping in the file."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields.keys() | {_MISSPELT}
        return {key: value for key, value in data.items() if value is not None or key not in known}


class Admin(Section):
    """The operator's HTTP port: metrics, explain, endpoints, readiness."""

    address: str = Field(default="127.0.0.1", examples=["127.0.0.1", "::"])
    """IP address to listen on; keep it off the public network."""
    port: Port = 10080
    """TCP port; 0 picks a free one."""

    @field_validator("address")
    @classmethod
    def _is_ip(cls, address: str) -> str:
        try:
            return str(ipaddress.ip_address(address))
        except ValueError:
            raise PydanticCustomError(
                "address", "not an IP address; accepted: text like `127.0.0.1`, `0.0.0.0`, `::`"
            ) from None


class ListenTls(Section):
    """Mutual TLS for `listen`: who cannot show a certificate of this CA is not answered."""

    cert_file: FileName
    """PEM file of the gateway's certificate, with its chain."""
    key_file: FileName
    """PEM file of its private key."""
    client_ca_file: FileName
    """PEM file of the CA that signed the certificates of those who may connect: the Envoys."""


class Transport(StrEnum):
    """Who speaks gRPC with Envoy."""

    GRPCIO = "grpcio"
    NATIVE = "native"


class Server(Section):
    """The processes and where they listen. Changes need a restart."""

    workers: int = Field(default=1, ge=1, le=64)
    """Worker processes sharing one load table; one serves about a core of Envoy traffic."""
    run_dir: Annotated[str, Field(min_length=1, max_length=256, examples=["/run/tokenway"])] | None = None
    """Directory of the Unix sockets, made at start, closed to others; null takes the user's own place."""
    listen: Annotated[tuple[Listen, ...], Field(strict=False)] = ()
    """Further gRPC addresses beside the socket in `run_dir`: `unix:/path` or `ip:port`."""
    listen_tls: ListenTls | None = None
    """Mutual TLS for the `ip:port` of `listen`; without it only loopback is listened to."""
    listen_insecure: bool = False
    """True listens in clear text beyond loopback: who reaches the port steers traffic and reads prompts."""
    admin: Admin = Admin()
    """The operator's HTTP port."""
    transport: Annotated[Transport, Field(strict=False)] = Transport.GRPCIO
    """`native` is Tokenway's own HTTP/2, for a fraction of the CPU; `grpcio` is Google's library."""
    drain_s: float = Field(default=30.0, ge=0, le=_DAY_S)
    """How long streams may take to finish after SIGTERM, in seconds."""

    @model_validator(mode="after")
    def _nobody_else_listens_in(self) -> Self:
        exposed = [address for address in self.listen if not _is_local(address)]
        if exposed and self.listen_tls is None and not self.listen_insecure:
            raise PydanticCustomError(
                "exposed",
                "listen has {address}, which others can reach in clear text: they could steer traffic "
                "and read prompts; accepted: loopback, listen_tls, or listen_insecure: true",
                {"address": exposed[0]},
            )
        return self


class Request(Section):
    """What a client may send."""

    max_body_bytes: int = Field(default=33_554_432, ge=1_024, le=1_073_741_824)
    """Larger bodies are refused with 413. 32 MiB holds a 24 MiB image in base64."""
    allow_fields: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Body fields that steer the engine and are kept; all others of that kind are removed."""
    allow_headers: Annotated[tuple[HeaderName, ...], Field(strict=False), AfterValidator(_lower)] = ()
    """Request headers that steer routing or the engine and are kept."""
    forward_credentials: bool = False
    """Engines see the client's `authorization`, `x-api-key`, `api-key`, `cookie`, `proxy-authorization`."""
    usage_injection: bool = False
    """Ask engines for token usage in streams whose client did not; the client then sees it too."""
    block_bytes: int = Field(default=512, ge=64, le=65_536)
    """Prompt bytes per block of the prefix index; AIGW's step is 512."""


class Signals(Section):
    """When a request counts as answered, and when it is given up."""

    first_chunk: bool = True
    """Take a stream's first chunk as first token; false ends its prefill at 1.2 times its predicted TTFT."""
    timeout_s: Seconds = 600.0
    """Bound on an answer that is not streamed, in seconds."""
    first_byte_timeout_s: Seconds = 60.0
    """Bound on the response headers of a stream, in seconds."""


class Load(Section):
    """The table of in-flight requests."""

    lease_s: Seconds = 180.0
    """A request not heard of for this long no longer counts as load, in seconds."""
    tombstone_s: Seconds = 60.0
    """How long an end that came before its beginning is remembered, in seconds."""
    max_requests: int = Field(default=200_000, ge=1, le=10_000_000)
    """Bound on requests in the table."""
    max_tombstones: int = Field(default=100_000, ge=1, le=10_000_000)
    """Bound on remembered early ends."""


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


class Explain(Section):
    """Decision records kept for `tokenway explain`."""

    ring_size: int = Field(default=2_000, ge=1, le=1_000_000)
    """Latest decisions kept per worker."""
    debug_token_env: EnvironmentVariable | None = None
    """Environment variable that holds the operator token for the debug header; unset turns it off."""


class MetadataCenter(Section):
    """Load and caches, shared with other gateways. Changes need a restart."""

    url: (
        Annotated[
            str,
            Field(
                pattern=_STORE_URL,
                max_length=2_048,
                examples=["redis://10.0.0.5:6379/0", "http://10.0.0.5:8080"],
            ),
        ]
        | None
    ) = None
    """Where gateways meet: Redis (TLS by rediss, +sentinel, +cluster) or http(s); null shares nothing."""
    username: Name | None = None
    """Redis ACL user."""
    password_env: EnvironmentVariable | None = None
    """Environment variable with the Redis password, or the bearer token of the HTTP service."""
    gateway: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$", examples=["gw-1"])] | None = None
    """This gateway's name, distinct among those that share; null takes the host name and the admin port."""
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$", examples=["tokenway"])] = "tokenway"
    """Prefix of every key and channel; gateways of one prefix share."""
    lease_s: Seconds = 6.0
    """The load of a gateway not heard of for this long no longer counts, in seconds."""
    timeout_s: Seconds = 1.0
    """Bound on one exchange with the store, in seconds; no decision waits for one unless `reserve` is on."""
    reserve: bool = False
    """Charge by compare-and-set at the store: one round trip per request, no two gateways choose alike."""
    reserve_timeout_s: Annotated[float, Field(gt=0, le=0.4)] = 0.02
    """Bound on that round trip, in seconds; after it the choice is charged here alone.

    At most 0.4: Envoy waits 0.5 s for the gateway (`message_timeout`) and then routes without it.
    """


class KvEvents(Section):
    """Engines' announcements of what they cache (vLLM and SGLang KV events)."""

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
    """Engines' own announcements, where there are any and the model's tokenizer is known."""


class Responses(Section):
    """Stored responses (`previous_response_id`, `/v1/responses/{id}`): each lives at one engine alone."""

    max_remembered: int = Field(default=100_000, ge=1, le=10_000_000)
    """Responses and conversations whose endpoint is remembered per worker, about 250 bytes each."""
    expiry_s: float = Field(default=30 * 86_400.0, gt=0, le=366 * 86_400.0)
    """One not asked for in this long is forgotten, in seconds; OpenAI keeps a response for 30 days."""


class Holding(Section):
    """Late binding: requests wait here while their endpoint is full (`least_completion` only)."""

    enabled: bool = False
    """False sends every request at once; it then waits at its engine, first come first served."""
    max_requests: int = Field(default=1_000, ge=1, le=100_000)
    """Most that wait per set of endpoints and worker; one more is refused with 429 and Retry-After."""
    max_s: float = Field(default=30.0, gt=0, le=_MAX_HOLD_S)
    """Longest wait, in seconds; who cannot be served in that time is refused at once with 429."""


class Logging(Section):
    """Logs on standard error, one JSON object per line."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level that is written."""
    requests: bool = True
    """One line per request."""
    prompt_blocks: bool = False
    """Add keyed hashes of the prompt's blocks to it, for `tokenway replay`; needs the key."""
    prompt_blocks_key_env: EnvironmentVariable = "TOKENWAY_LOG_KEY"
    """Environment variable with their key: a secret of 16 characters or more, the same for all gateways."""


class RuleSection(Section):
    """One way to serve a model."""

    cluster: Name
    """Cluster in clusters_file that serves it."""
    backend: Annotated[Backend, Field(strict=False)] = Backend.VLLM
    """Engine behind the cluster."""
    headers: Annotated[Mapping[HeaderName, HeaderValue], AfterValidator(_lower_names)] = Field(
        default_factory=dict
    )
    """Request headers that must all have exactly these values; none makes this the default rule."""
    subset: Labels = Field(default_factory=dict)
    """Labels an endpoint must carry to be chosen."""
    weight: int = Field(default=1, ge=0, le=1_000_000)
    """Share of traffic among equally specific rules; 0 switches the rule off."""
    lora: Name | None = None
    """LoRA adapter that answers."""
    model: Name | None = None
    """Name of the model at the engine, if it differs from the client's."""
    route_name: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    """Shown in decision records."""
    endpoint_group: Name | None = None
    """Endpoints that perform alike share one latency model; null means the cluster."""


def _add_misspelling(schema: dict[str, Any]) -> None:
    schema["properties"][_MISSPELT] = {
        **schema["properties"]["cache_ratio_weight"],
        "deprecated": True,
        "description": "AIGW's spelling of cache_ratio_weight; give one of the two.",
    }


class LoadBalancingSection(Section):
    """How one model's endpoints are chosen. Names and defaults follow AIGW's `LBConfig`; not `algorithm`."""

    model_config = ConfigDict(json_schema_extra=_add_misspelling)

    algorithm: Annotated[Algorithm, Field(strict=False)] = _LB.algorithm
    """The policy; where it is left out and one of the keys of AIGW's score below is not, inference_lb."""
    load_aware_enable: bool = _LB.load_aware_enable
    """False leaves in-flight requests and prefill out of the score."""
    cache_aware_enable: bool = _LB.cache_aware_enable
    """False leaves the prefix match out of the score."""
    candidate_percent: int = Field(default=_LB.candidate_percent, ge=0, le=100)
    """The pick is uniform among this share of the best endpoints, at least one."""
    request_load_weight: Weight = _LB.request_load_weight
    """Weight of in-flight requests."""
    prefill_load_weight: Weight = _LB.prefill_load_weight
    """Weight of pending prefill."""
    cache_ratio_weight: Weight = Field(
        default=_LB.cache_ratio_weight, validation_alias=AliasChoices("cache_ratio_weight", _MISSPELT)
    )
    """Weight of the cache hit ratio."""
    fallbacks: int = Field(default=_LB.fallbacks, ge=0, le=8)
    """Further endpoints named to Envoy: the first that is there gets the one retry before the first byte."""

    def settings(self) -> LoadBalancing:
        """The values as the policies take them."""
        values = self.model_dump()
        if "algorithm" not in self.model_fields_set and self.model_fields_set & _AIGW_KEYS:
            values["algorithm"] = Algorithm.INFERENCE_LB
        return LoadBalancing(**values)


class Model(Section):
    """A model that clients can ask for."""

    aliases: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Other names clients may use; distinct over all models."""
    rules: Annotated[tuple[RuleSection, ...], Field(strict=False, min_length=1)]
    """Where it is served: the matching rule with the most headers wins."""
    load_balancing: LoadBalancingSection = LoadBalancingSection()
    """How an endpoint is chosen."""
    tokenizer: Annotated[str, Field(min_length=1, max_length=4_096)] | None = None
    """Folder of tokenizer.json and chat template, relative to this file; null leaves it to history."""
    chat_template_kwargs: Mapping[Name, Any] = Field(default_factory=dict)
    """Template variables that the engines were started with (vLLM --default-chat-template-kwargs)."""

    @field_validator("rules")
    @classmethod
    def _one_is_on(cls, rules: tuple[RuleSection, ...]) -> tuple[RuleSection, ...]:
        if all(rule.weight == 0 for rule in rules):
            raise PydanticCustomError(
                "all_off", "every rule has weight 0; accepted: at least one rule above 0"
            )
        return rules


class Away(Section):
    """What Envoy does with a request that Tokenway did not answer. In Envoy's bootstrap: render it again."""

    gone: Literal["open", "refuse"] = "open"
    """Nobody was there to ask: open serves inference for models open to all; refuse is 503."""
    late: Literal["open", "refuse"] = "open"
    """A worker was asked and did not answer within `after_s`: the same choice."""
    after_s: float = Field(default=0.5, ge=0.5, le=60)
    """How long Envoy waits for an answer, in seconds."""
    max_requests_per_endpoint: int = Field(default=1_024, ge=1, le=100_000)
    """Bound on what Envoy alone sends to one endpoint at a time; the rest is 503. Applies at once."""


class EdgeTls(Section):
    """TLS for clients. The files are read by Envoy, on its host."""

    cert_file: FileName
    """PEM file of the certificate, with its chain."""
    key_file: FileName
    """PEM file of its private key."""
    client_ca_file: FileName | None = None
    """PEM file of a CA; clients must then show a certificate of it."""


class Cors(Section):
    """What web pages of other origins may do, answered by Envoy's own filter."""

    origins: Annotated[tuple[Origin, ...], Field(strict=False, min_length=1)]
    """Origins whose pages may call, as browsers write them; `*` is every page."""
    headers: Annotated[tuple[HeaderName, ...], Field(strict=False), AfterValidator(_lower)] = (
        "authorization",
        "content-type",
        "x-api-key",
        "x-request-id",
        "anthropic-version",
        "anthropic-beta",
        "anthropic-dangerous-direct-browser-access",
        "openai-organization",
        "openai-project",
        "x-stainless-arch",
        "x-stainless-lang",
        "x-stainless-os",
        "x-stainless-package-version",
        "x-stainless-retry-count",
        "x-stainless-runtime",
        "x-stainless-runtime-version",
        "x-stainless-timeout",
        "x-stainless-helper-method",
    )
    """Request headers such a page may send; what the official clients send in a browser."""
    expose_headers: Annotated[tuple[HeaderName, ...], Field(strict=False), AfterValidator(_lower)] = (
        "x-request-id",
        "retry-after",
    )
    """Response headers such a page may read."""
    max_age_s: int = Field(default=600, ge=0, le=_DAY_S)
    """How long a browser may remember the answer, in seconds."""


class GatewayAddress(Section):
    """Where Envoy finds Tokenway if they share no host: `server.listen`, as Envoy reaches it."""

    addresses: Annotated[tuple[Listen, ...], Field(strict=False, min_length=1)]
    """`ip:port` of each gateway process."""
    cert_file: FileName | None = None
    """PEM file at Envoy of the certificate that it shows; with key_file, ca_file and server_name."""
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


class Edge(Section):
    """Envoy towards clients. In Envoy's bootstrap: render it again after a change."""

    max_connections: int = Field(default=10_000, ge=1, le=10_000_000)
    """Bound on clients' connections; more are closed at once."""
    max_heap_bytes: int = Field(default=2_147_483_648, ge=67_108_864)
    """Envoy's memory: at 95 % of it new requests are refused, from 90 % on the largest are reset."""
    headers_timeout_s: Seconds = 10.0
    """Bound on the arrival of a request's headers, in seconds."""
    upload_timeout_s: Seconds = 300.0
    """Bound on the arrival of a whole request, in seconds; waiting for the answer does not count."""
    idle_timeout_s: Seconds = 600.0
    """A connection without a request is closed after this, in seconds."""
    max_connection_s: Seconds = 3_600.0
    """A connection is drained after this, in seconds; requests that run on it end by themselves."""
    max_streams: int = Field(default=100, ge=1, le=100_000)
    """Bound on requests at a time of one HTTP/2 connection."""
    trusted_hops: int = Field(default=0, ge=0, le=16)
    """Proxies of yours in front of Envoy: that many entries of x-forwarded-for are believed."""
    keep_request_id: bool = False
    """Keep a client's x-request-id; false replaces it. Tokenway's own id is another header."""
    admin_paths: Annotated[tuple[AdminPath, ...], Field(strict=False)] = ()
    """Paths of Envoy's admin port to open beside those that only read, for instance /drain_listeners."""
    tls: EdgeTls | None = None
    """TLS for clients; null is clear text."""
    cors: Cors | None = None
    """Cross-origin calls from browsers; null answers no preflight."""
    gateway: GatewayAddress | None = None
    """Where Envoy finds Tokenway over TCP; null means the Unix sockets in `server.run_dir`."""


class EngineTls(Section):
    """TLS to the engines of one cluster, for Envoy and for Tokenway's own probes."""

    ca_file: FileName
    """PEM file of the CA that signed the engines' certificates; the same path at Envoy and Tokenway."""
    server_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,253}$", examples=["engine.internal"])]
    """DNS name in the engines' certificates, also sent as SNI."""
    cert_file: FileName | None = None
    """PEM file of a certificate to show to the engines; with key_file."""
    key_file: FileName | None = None
    """PEM file of its private key."""

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise PydanticCustomError("half_tls", "accepted: both cert_file and key_file, or neither")
        return self


class Config(Section):
    """Configuration of a Tokenway gateway (tokenway.yaml)."""

    version: Literal[1] = 1
    """Version of this format."""
    server: Server = Server()
    """The processes and where they listen."""
    clusters_file: Name = "clusters.json"
    """Clusters and their endpoints; relative to this file."""
    default_cluster: Name | None = None
    """Cluster for paths that are no inference API; null answers 404."""
    default_cluster_admin_paths: Annotated[tuple[AdminPath, ...], Field(strict=False)] = ()
    """Paths by which engines are administered (docs/security.md) that may pass to it after all."""
    request: Request = Request()
    """What a client may send."""
    signals: Signals = Signals()
    """When a request counts as answered, and when it is given up."""
    load: Load = Load()
    """The table of in-flight requests."""
    health: Health = Health()
    """Which endpoints may be chosen."""
    explain: Explain = Explain()
    """Decision records."""
    metadata_center: MetadataCenter = MetadataCenter()
    """Load and caches, shared with other gateways."""
    cache: Cache = Cache()
    """The estimate of prefix caches."""
    responses: Responses = Responses()
    """Stored responses."""
    holding: Holding = Holding()
    """Late binding."""
    away: Away = Away()
    """What goes on without Tokenway."""
    edge: Edge = Edge()
    """Envoy towards clients."""
    engine_tls: Mapping[Name, EngineTls] = Field(default_factory=dict)
    """TLS to engines, by cluster; clusters left out are reached in clear text."""
    logging: Logging = Logging()
    """Logs."""
    reasoning_split: Literal[False] = False
    """Not done here: tokens do not pass through Tokenway; use the engine flag (vLLM: --reasoning-parser)."""
    models: Mapping[Name, Model] = Field(default_factory=dict)
    """Models by name; none at all means one model per cluster of clusters_file."""

    @field_validator("reasoning_split", mode="before")
    @classmethod
    def _engines_split_reasoning(cls, value: Any) -> Any:
        if value is True:
            raise PydanticCustomError(
                "reasoning_split",
                "tokens do not pass through Tokenway, so it cannot split reasoning from the answer: "
                "start the engine with its own flag instead (vLLM: --reasoning-parser); accepted: false",
            )
        return value

    def rule_headers(self) -> frozenset[str]:
        """Request headers that some rule matches, lower case."""
        return frozenset(
            name for model in self.models.values() for rule in model.rules for name in rule.headers
        )

    def rules(self) -> tuple[ModelRules, ...]:
        """All models as `RuleTable` takes them."""
        return tuple(
            ModelRules(
                name=name,
                aliases=model.aliases,
                rules=tuple(Rule(**rule.model_dump()) for rule in model.rules),
                load_balancing=model.load_balancing.settings(),
            )
            for name, model in self.models.items()
        )
