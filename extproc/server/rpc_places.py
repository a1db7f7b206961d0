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
    """

    socket: Path | None
    others: tuple[str, ...] = ()
    tls: TlsFiles | None = None


def places_of(server: Server, socket: Path, index: int) -> Places:
    """Where worker `index` listens: the first one has the further addresses."""
    return Places(socket, server.listen, _files(server.listen_tls)) if index == 0 else Places(socket)


def picker_places(picker: EndpointPicker) -> Places:
    """Where the endpoint picker listens."""
    return Places(None, picker.listen, _files(picker.listen_tls))


def _files(tls: ListenTls | PickerTls | None) -> TlsFiles | None:
    if tls is None:
        return None
    authority = None if tls.client_ca_file is None else Path(tls.client_ca_file)
    return TlsFiles(Path(tls.cert_file), Path(tls.key_file), authority)


def take_away(path: Path | None) -> None:
    """Remove the socket of a server that is closed."""
    if path is not None:
        path.unlink(missing_ok=True)
