"""A certificate made at the start, for gateways that encrypt and verify nothing: by openssl's own program."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from extproc.transport.listen_tls import TlsFiles

_COMMAND: Final = (
    *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
    *("-days", "3650", "-subj", "/CN=tokenway", "-addext", "subjectAltName=DNS:tokenway"),
)
_TIMEOUT_S: Final = 30.0
_FOR_US_ALONE: Final = 0o077


def self_signed_files(folder: Path, index: int) -> TlsFiles:
    """Where the certificate of worker `index` and its key are, in the folder of the sockets."""
    return TlsFiles(folder / f"picker{index}.crt", folder / f"picker{index}.key")


def remove(files: TlsFiles) -> None:
    """Take both away, if they are there."""
    files.cert_file.unlink(missing_ok=True)
    files.key_file.unlink(missing_ok=True)


def make_self_signed(files: TlsFiles) -> None:
    """Make a certificate that says nothing but a name, and its key, readable by this user alone.

    Raises:
        OSError: There is no openssl, or it fails; says what else is accepted.
    """
    remove(files)
    where = ("-keyout", str(files.key_file), "-out", str(files.cert_file))
    try:
        subprocess.run(  # noqa: S603 - a constant command
            (*_COMMAND, *where), check=True, capture_output=True, timeout=_TIMEOUT_S, umask=_FOR_US_ALONE
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise OSError(
            f"endpoint_picker.self_signed: openssl makes no certificate ({type(error).__name__}); "
            "accepted: openssl in PATH, or endpoint_picker.listen_tls"
        ) from error
