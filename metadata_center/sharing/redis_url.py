"""Redis URLs: one server, Sentinel or Cluster, with or without TLS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from metadata_center.addresses import Address
from metadata_center.errors import MetadataError

_DEFAULT_PORT: Final = 6379
_DEFAULT_SENTINEL_PORT: Final = 26379
_TLS_OPTIONS: Final = ("ca_certs", "certfile", "keyfile", "check_hostname")
_ENCODED: Final = "a user or password has / as %2F, ? as %3F, # as %23, % as %25"
_OPTIONS: Final = (*_TLS_OPTIONS, "sentinel_username", "sentinel_password")


class UrlError(MetadataError):
    """A Redis URL that cannot be used; the text quotes nothing of it, as it may hold a password."""


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """Where Redis is.

    Attributes:
        kind: `redis`, `sentinel` or `cluster`.
        nodes: Host and port each: the server, the sentinels, or some nodes of the cluster.
        service: What the sentinels call the master.
        database: Number; 0 on a Cluster.
        username: For the servers (ACL).
        password: Likewise.
        sentinel_username: For the sentinels.
        sentinel_password: Likewise.
        tls: Settings of `redis-py`, None without TLS.
    """

    kind: str
    nodes: tuple[tuple[str, int], ...]
    service: str = ""
    database: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: Mapping[str, Any] | None = None


def parse_url(
    url: str,
    *,
    username: str | None = None,
    password: str | None = None,
    sentinel_password: str | None = None,
) -> RedisUrl:
    """Read a URL.

    Args:
        url: `redis://[user:password@]host[:port][/database]`, `redis+sentinel://host[:port],.../service
            [/database]`, or `redis+cluster://host[:port],...`; `rediss` for TLS. IPv6 in brackets. Query:
            `ca_certs`, `certfile`, `keyfile` (paths), `check_hostname` (`true`, `false`),
            `sentinel_username`, `sentinel_password`.
        username: Instead of the one in the URL.
        password: Instead of the one in the URL, as from the environment.
        sentinel_password: Likewise, of the sentinels.

    Raises:
        UrlError: It has another form.
    """
    try:
        parts, servers = _split(url)
        query = parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError as exc:
        raise UrlError("no URL") from exc
    scheme, _, kind = parts.scheme.partition("+")
    kind = kind or "redis"
    if scheme not in ("redis", "rediss") or kind not in ("redis", "sentinel", "cluster"):
        raise UrlError(
            "the scheme is none of redis, rediss, redis+sentinel, redis+cluster (or rediss+...); "
            "Unix sockets are not supported"
        )
    if parts.fragment:
        raise UrlError(f"it has no part after a #; {_ENCODED}")
    unknown = [name for name in query if name not in _OPTIONS]
    if unknown or any(len(values) != 1 for values in query.values()):
        raise UrlError(f"options are, each once: {', '.join(_OPTIONS)}; {_ENCODED}")
    options = {name: values[0] for name, values in query.items()}
    login, _, hosts = servers.rpartition("@")
    user, _, secret = login.partition(":")
    port = _DEFAULT_SENTINEL_PORT if kind == "sentinel" else _DEFAULT_PORT
    nodes = tuple(_node(host, port) for host in hosts.split(","))
    if kind == "redis" and len(nodes) != 1:
        raise UrlError("one server; several are redis+sentinel or redis+cluster")
    service, database = _path(kind, parts.path)
    return RedisUrl(
        kind,
        nodes,
        service,
        database,
        username or unquote(user) or None,
        password or unquote(secret) or None,
        options.get("sentinel_username"),
        sentinel_password or options.get("sentinel_password"),
        _tls(options, secured=scheme == "rediss"),
    )


def _split(url: str) -> tuple[SplitResult, str]:
    """The URL with one host in place of its servers, and these: several with a bracket are no URL to Python.

    Raises:
        ValueError: It is none otherwise.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        raise ValueError("it has no servers")
    servers = re.split("[/?#]", rest, maxsplit=1)[0]
    return urlsplit(f"{scheme}://host{rest[len(servers) :]}"), servers


def _path(kind: str, text: str) -> tuple[str, int]:
    """The service that sentinels watch, empty without them, and the number of the database."""
    path = text.strip("/").split("/") if text.strip("/") else []
    service = ""
    if kind == "sentinel":
        if not path:
            raise UrlError("the path names the service that the sentinels watch")
        service = unquote(path.pop(0))
    if len(path) > 1 or (path and (kind == "cluster" or not (path[0].isascii() and path[0].isdigit()))):
        raise UrlError(f"the path ends with the number of a database, which a cluster has not; {_ENCODED}")
    return service, int(path[0]) if path else 0


def _tls(options: Mapping[str, str], *, secured: bool) -> dict[str, Any] | None:
    """Settings of `redis-py`."""
    if not secured:
        if any(name in options for name in _TLS_OPTIONS):
            raise UrlError("options of TLS go with rediss")
        return None
    if "keyfile" in options and "certfile" not in options:
        raise UrlError("keyfile goes with certfile, the certificate whose key it is")
    check_hostname = options.get("check_hostname", "true")
    if check_hostname not in ("true", "false"):
        raise UrlError("check_hostname is true or false")
    return {
        "ssl_ca_certs": options.get("ca_certs"),
        "ssl_certfile": options.get("certfile"),
        "ssl_keyfile": options.get("keyfile"),
        "ssl_check_hostname": check_hostname == "true",
    }


def _node(address: str, default_port: int) -> tuple[str, int]:
    """Host and port of `host`, `host:port`, `[ipv6]` or `[ipv6]:port`."""
    try:
        return Address.parse(address, lowest_port=1, default_port=default_port)
    except ValueError:  # which quotes what was written, and that may be a secret in the wrong place
        raise UrlError(
            f"a server is host or host:port, an IPv6 address in brackets, the port 1..65535; {_ENCODED}"
        ) from None
