"""TLS of a listener whose certificates are rotated while it serves."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from metadata_center.files import require_regular

_log = logging.getLogger("tokenway.transport")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where the certificates of a listener are, PEM each.

    Attributes:
        cert_file: The chain that is shown.
        key_file: Its key.
        client_ca_file: Whose clients are answered; None answers all.
    """

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None


class ListenTls:
    """The context for the next connection; connections keep the one they began with.

    Args:
        files: Read now, and again by `context` whenever one of them has changed.

    Raises:
        OSError: A file cannot be read; `ssl.SSLError`, which is one, if it is not what it should be.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = self._stamps()
        self._context = _context(files)
        self._problem: str | None = None

    def context(self) -> ssl.SSLContext:
        """What the files say; what they said before while they are being replaced."""
        try:
            stamps = self._stamps()
            if stamps != self._seen:
                self._context = _context(self._files)
                self._seen = stamps
                self._problem = None
                _log.info("certificates read again", extra={"file": str(self._files.cert_file)})
        except OSError as error:
            self._report(str(error))
        return self._context

    def _report(self, problem: str) -> None:
        """Say what is wrong once, not with each connection."""
        if problem != self._problem:
            files = [str(path) for path in self._paths()]
            _log.warning("certificates cannot be read", extra={"files": files, "error": problem})
            self._problem = problem

    def _paths(self) -> list[Path]:
        named = (self._files.cert_file, self._files.key_file, self._files.client_ca_file)
        return [path for path in named if path is not None]

    def _stamps(self) -> list[tuple[int, int, int]]:
        stats = [path.stat() for path in self._paths()]
        return [(stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in stats]


def _context(files: TlsFiles) -> ssl.SSLContext:
    """TLS 1.2 or newer with ALPN `h2`. Source: RFC 9113, 3.2 and 9.2."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    require_regular(files.cert_file, files.key_file, files.client_ca_file)
    context.load_cert_chain(files.cert_file, files.key_file, password="")  # none, and no question for one
    if files.client_ca_file is not None:
        context.load_verify_locations(files.client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
