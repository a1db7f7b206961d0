"""What Redis, or a library on the way to it, says of a fault, with what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_MAX_CHARS: Final = 400

_LOGIN: Final = (
    "metadata_center.username and what metadata_center.password_env names, or the login in the URL"
)
_SENTINELS_LOGIN: Final = (
    "sentinel_username in metadata_center.url and what metadata_center.sentinel_password_env names,"
    " or sentinel_password in the URL"
)
_MOVES: Final = "the cluster moves the slot: sharing goes on when it is done"
_RIGHTS: Final = "the rights that docs/metadata-center.md lists, for metadata_center.username"

_HINTS: Final = (
    ("unauthenticated", f"the server wants a login: {_LOGIN}"),
    ("NOAUTH", f"the server wants a login: {_LOGIN}"),
    ("Authentication required", f"the server wants a login: {_LOGIN}"),
    ("invalid username-password", f"see {_LOGIN}"),
    ("WRONGPASS", f"see {_LOGIN}"),
    ("without any password configured", f"the server has no password: see {_LOGIN}"),
    ("NOPERM", f"give {_RIGHTS}"),
    ("no permissions", f"give {_RIGHTS}"),
    ("can't run this command", f"give {_RIGHTS}"),
    (
        "DB index is out of range",
        "the server has no database of the number at the end of metadata_center.url",
    ),
    ("unknown command `SENTINEL`", "metadata_center.url names a server where a sentinel should be"),
    ("unknown command 'SENTINEL'", "metadata_center.url names a server where a sentinel should be"),
    ("unknown command", "metadata_center.url names what is no Redis server, or one before 6.2"),
    ("maxmemory", "the server's memory is full: raise maxmemory"),
    ("READONLY", "the server is a replica: metadata_center.url is for the master, or for sentinels"),
    ("AskError", _MOVES),
    ("non local key", _MOVES),
    (
        "ClusterDownError",
        "a master is gone, or slots are nobody's: sharing goes on when the cluster is whole",
    ),
    (
        "mismatch, certificate is not valid",
        "the server's certificate is for other names than metadata_center.url has",
    ),
    ("certificate has expired", "the server needs a new certificate, or this machine the right time"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the server's certificate is checked against ca_certs in metadata_center.url",
    ),
    ("WRONG_VERSION_NUMBER", "the server speaks no TLS there: metadata_center.url with redis, not rediss"),
    ("No such file", "ca_certs, certfile and keyfile in metadata_center.url are paths here"),
    ("max number of clients", "raise the server's maxclients"),
)
"""A part of the text, and what is said beside it; the first that is found."""


def explained(fault: Exception, secrets: Sequence[str], *, by_sentinel: bool = False) -> str:
    """One line about a fault: its kind, its words, what to do; none of `secrets`, and of bounded length.

    Args:
        fault: What was raised.
        secrets: What no text may have.
        by_sentinel: A sentinel said it, which has a login of its own.
    """
    text = f"{type(fault).__name__}: {fault}"
    for secret in secrets:
        text = text.replace(secret, "***")
    text = text[:_MAX_CHARS]
    hint = next((hint for part, hint in _HINTS if part in text), "")
    if by_sentinel:
        hint = hint.replace(_LOGIN, _SENTINELS_LOGIN).replace("the server", "the sentinel")
    return f"{text} ({hint})" if hint else text
