"""PEM files of TLS that a configuration names: are they what they should be?

Rules:
    1. Nothing but regular files is opened, and no passphrase is asked for: either would stop the event loop.
    2. A certificate that is out of date is one: clocks are for those who meet it.
"""

from __future__ import annotations

import ssl
from collections.abc import Collection
from dataclasses import dataclass

from metadata_center.files import require_regular


@dataclass(frozen=True, slots=True)
class FileProblem:
    """What is wrong with a file of TLS.

    Attributes:
        key: The setting that names it.
        text: The file and what is wrong.
        is_unreadable: It is missing or closed to us; else it was read and is not what it should be.
    """

    key: str
    text: str
    is_unreadable: bool


def find_problems(
    authorities: Collection[tuple[str, str | None]], cert_file: str | None, key_file: str | None
) -> list[FileProblem]:
    """What is wrong with the files of one place that speaks TLS; of a pair, one problem.

    Args:
        authorities: Setting and file of each CA; None is no file.
        cert_file: Of a certificate, or None.
        key_file: Of its private key; with `cert_file`.
    """
    pair = (("cert_file", cert_file), ("key_file", key_file))
    named = [(key, file) for key, file in (*authorities, *pair) if file is not None]
    found = [problem for key, file in named if (problem := unreadable(key, file)) is not None]
    unread = {problem.key for problem in found}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for key, file in authorities:
        if file is not None and key not in unread:
            try:
                context.load_verify_locations(file)
            except OSError as error:
                text = f"{file}: no certificate of a CA, in PEM: {_words(error)}"
                found.append(FileProblem(key, text, is_unreadable=False))
    if cert_file is not None and key_file is not None and unread.isdisjoint(("cert_file", "key_file")):
        try:
            context.load_cert_chain(cert_file, key_file, password="")  # none, and no question for one
        except OSError as error:
            text = f"{cert_file}, {key_file}: no certificate and its key, without a passphrase: "
            found.append(FileProblem("cert_file", text + _words(error), is_unreadable=False))
    return found


def unreadable(key: str, file: str) -> FileProblem | None:
    """Why a file that a setting names cannot be read; None if it can."""
    try:
        require_regular(file)
    except OSError as error:
        return FileProblem(key, f"{file}: {error.strerror}", is_unreadable=True)
    except ValueError as error:  # a NUL in the name
        return FileProblem(key, f"{file}: {error}", is_unreadable=True)
    return None


def _words(error: OSError) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return reason or str(error)
