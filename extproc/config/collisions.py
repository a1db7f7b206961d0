"""Addresses of our own that exclude each other: one process cannot listen twice at one place.

Rules:
    1. Pure. Names in addresses are not resolved, but for `localhost`; a link in a path is not followed.
    2. What collides is what the kernel refuses, and what it does not see: a Unix socket that takes another's
       path, or ports that several workers share, between which it would give connections out by turns.
    3. Port 0 is any port that is free: it collides with nothing.
    4. The gRPC sockets at `::` take IPv4 as well; the HTTP ports (admin, metrics) at `::` take IPv6 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from posixpath import normpath
from typing import Final

from extproc.config.document import Location, dotted
from extproc.config.schema import Config
from extproc.config.sections.listening import Server, Transport
from metadata_center.addresses import Address, ip_or_none, is_unspecified

RUN_DIR: Final[Location] = ("server", "run_dir")

_UNIX: Final = "unix:"
_IPC: Final = "ipc://"
_TCP: Final = "tcp://"
_ANY: Final = "*"
"""What ZeroMQ calls all addresses of a machine, IPv4 and IPv6."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where something of ours listens.

    Attributes:
        location: The key that says so.
        text: As it is written.
        path: Of a Unix socket, without detours; None over TCP.
        host: IP address or a name; "" for a Unix socket.
        port: 1..65535; 0 for a Unix socket.
        families: 4, 6 or both: what connections it takes.
        shares: Others of the same value are the same socket, not a second one.
    """

    location: Location
    text: str
    path: str | None = None
    host: str = ""
    port: int = 0
    families: frozenset[int] = frozenset()
    shares: bool = False

    def collides(self, other: _Place) -> bool:
        """True if not both can be listened to."""
        if self.shares and other.shares and self.text == other.text:
            return False
        if self.path is not None and other.path is not None:
            return self.path == other.path or _is_in(self.path, other.path) or _is_in(other.path, self.path)
        if self.path is not None or other.path is not None or self.port != other.port:
            return False
        if self.host == other.host:
            return True
        is_any = is_unspecified(self.host) or is_unspecified(other.host)
        return is_any and not self.families.isdisjoint(other.families)


def collisions(config: Config) -> list[tuple[Location, str]]:
    """Each key that asks for a place which another one has, with what is wrong; the later one is named.

    Files in `server.run_dir` are looked at if that is said in full; else ask `in_folder` with the folder.
    """
    places = list(_places(config))
    found: list[tuple[Location, str]] = []
    for i, place in enumerate(places):
        other = next((other for other in places[:i] if place.collides(other)), None)
        if other is not None:
            found.append((place.location, _taken(place, other)))
    folder = config.server.run_dir
    if folder is not None and folder.startswith("/"):
        found += in_folder(config, folder)
    return found


def in_folder(config: Config, folder: str) -> list[tuple[Location, str]]:
    """Each key that asks for a Unix socket at the place of a file in the folder where the gateway lives.

    Args:
        config: The configuration.
        folder: Its path in full.
    """
    root = normpath(folder)
    own = {f"{root.rstrip('/')}/{name}": name for name in run_dir_files(config)}
    found: list[tuple[Location, str]] = []
    for place in _places(config):
        path = place.path
        if path is None:
            continue
        taken = next((name for file, name in own.items() if path == file or _is_in(path, file)), None)
        if taken is not None:
            text = f"{place.text} is a file of the gateway's own, `{taken}` in {dotted(RUN_DIR)} ({folder})"
            found.append((place.location, f"{text}; accepted: another path"))
        elif path == root or _is_in(root, path):
            text = f"{place.text} is where the folder {dotted(RUN_DIR)} ({folder}) is to be"
            found.append((place.location, f"{text}; accepted: another path"))
    return found


def run_dir_files(config: Config) -> list[str]:
    """Names of the files that this gateway makes in its folder."""
    workers = range(config.server.workers)
    names = ["lock", *(f"gw{index}.sock" for index in workers)]
    if len(workers) > 1:
        names += ["load.counters"]
        names += [f"{kind}{index}.sock" for kind in ("admin", "bus") for index in workers]
    if config.endpoint_picker is not None and config.endpoint_picker.self_signed:
        names += [f"picker{index}.{kind}" for index in workers for kind in ("crt", "key")]
    return names


def _places(config: Config) -> Iterator[_Place]:
    server, picker = config.server, config.endpoint_picker
    found = [_of_http(("server", "admin", "port"), server.admin.address, server.admin.port)]
    found += [_of_grpc(server, ("server", "listen", i), text) for i, text in enumerate(server.listen)]
    if picker is not None:
        for key, texts in (("listen", picker.listen), ("health_listen", picker.health_listen)):
            found += [_of_grpc(server, ("endpoint_picker", key, i), text) for i, text in enumerate(texts)]
        for i, text in enumerate(picker.metrics_listen):
            found.append(_of_http(("endpoint_picker", "metrics_listen", i), *Address.parse(text)))
    if config.cache.kv_events.enabled:
        for name, text in config.cache.kv_events.listen.items():
            found.append(_of_events(("cache", "kv_events", "listen", name), text))
    return (place for place in found if place is not None and (place.path is not None or place.port))


def _of_http(location: Location, host: str, port: int) -> _Place | None:
    address = Address.of(host, port)
    return _Place(location, str(address), None, address.host, port, _families(address.host))


def _of_grpc(server: Server, location: Location, text: str) -> _Place | None:
    if text.startswith(_UNIX):
        return _Place(location, text, normpath(text.removeprefix(_UNIX)))
    host, port = Address.parse(text)
    is_dual = host == "::" or (is_unspecified(host) and server.transport is Transport.GRPCIO)
    return _Place(location, text, None, host, port, _BOTH if is_dual else _families(host))


def _of_events(location: Location, text: str) -> _Place | None:
    """Of ZeroMQ, which binds a text once however many engines name it; None for what it will refuse."""
    if text.startswith(_IPC):
        path = text.removeprefix(_IPC)
        if not path.startswith("/"):  # in the working directory, or in a namespace of its own
            return None
        return _Place(location, text, normpath(path), shares=True)
    host, _, _ = text.removeprefix(_TCP).rpartition(":")
    is_any = host in (_ANY, "[::]", "::")
    try:
        host, port = Address.parse(f"[::]:{text.rpartition(':')[2]}" if is_any else text.removeprefix(_TCP))
    except ValueError:
        return None
    host = "127.0.0.1" if host == "localhost" else host
    return _Place(location, text, None, host, port, _BOTH if is_any else _families(host), shares=True)


_BOTH: Final = frozenset((4, 6))


def _families(host: str) -> frozenset[int]:
    """Of a name it is not known: none that it may be is left out."""
    ip = ip_or_none(host)
    return _BOTH if ip is None else frozenset((ip_address(ip).version,))


def _is_in(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _taken(place: _Place, other: _Place) -> str:
    what = "port" if place.path is None else "path"
    return (
        f"{place.text} collides with {dotted(other.location)} ({other.text}); accepted: a {what} of its own"
    )
