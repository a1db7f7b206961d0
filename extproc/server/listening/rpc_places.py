"""Where a worker's gRPC server listens, and by which certificates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from extproc.config.sections.listening import EndpointPicker, ListenTls, PickerTls, Server
from extproc.transport.listen_tls import TlsFiles


@dataclass(frozen=True, slots=True)
class Places:
    """Where a worker listens.

    Attributes:
        socket: The Unix socket that Envoy on this host knows; made anew, and closed to others. None has none.
        others: Further addresses, `unix:/path` or `ip:port`.
        tls: For the `ip:port` among them; None for clear text.
        is_shared: Other workers listen at the same `ip:port`.
    """

    socket: Path | None
    others: tuple[str, ...] = ()
    tls: TlsFiles | None = None
    is_shared: bool = False

    @property
    def sockets(self) -> tuple[Path, ...]:
        """The Unix sockets among them."""
        own = () if self.socket is None else (self.socket,)
        further = (each.removeprefix("unix:") for each in self.others if each.startswith("unix:"))
        return (*own, *map(Path, further))


def places_of(server: Server, socket: Path, index: int) -> Places:
    """Where worker `index` listens: the first one has the further addresses."""
    return Places(socket, server.listen, _files(server.listen_tls)) if index == 0 else Places(socket)


def picker_places(picker: EndpointPicker, made: TlsFiles, index: int, workers: int) -> Places:
    """Where the endpoint picker of worker `index` of so many listens.

    Args:
        picker: The settings.
        made: Where the certificate is that `self_signed` asks for.
        index: Which worker; the first one alone has the Unix sockets.
        workers: How many there are.
    """
    tls = made if picker.self_signed else _files(picker.listen_tls)
    return Places(None, _of_worker(picker.listen, index), tls, is_shared=workers > 1)


def health_places(picker: EndpointPicker, index: int, workers: int) -> Places:
    """Where it answers for its health alone."""
    return Places(None, _of_worker(picker.health_listen, index), is_shared=workers > 1)


def _of_worker(addresses: tuple[str, ...], index: int) -> tuple[str, ...]:
    return tuple(each for each in addresses if index == 0 or not each.startswith("unix:"))


def _files(tls: ListenTls | PickerTls | None) -> TlsFiles | None:
    if tls is None:
        return None
    authority = None if tls.client_ca_file is None else Path(tls.client_ca_file)
    return TlsFiles(Path(tls.cert_file), Path(tls.key_file), authority)


def take_away(path: Path | None) -> None:
    """Remove the socket of a server that is closed."""
    if path is not None:
        path.unlink(missing_ok=True)
