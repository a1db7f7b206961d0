"""What Redis, or a library on the way to it, says of a fault, with what to do about it."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from errno import ECONNREFUSED
from typing import Final

from metadata_center.sharing.redis_url import RedisUrl

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
_PAIR: Final = "certfile and keyfile in metadata_center.url"
_UNTRUSTED: Final = f"the server wants a client certificate that it trusts: {_PAIR}"
_NOBODY: Final = "nobody listens there: is the server up, and metadata_center.url right?"

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
    ("ALERT_CERTIFICATE_REQUIRED", f"the server wants a client certificate: {_PAIR}"),
    ("ALERT_CERTIFICATE_EXPIRED", f"the server says that the client certificate is out of date: {_PAIR}"),
    ("ALERT_UNKNOWN_CA", _UNTRUSTED),
    ("ALERT_BAD_CERTIFICATE", _UNTRUSTED),
    ("ALERT_CERTIFICATE_", _UNTRUSTED),
    ("ALERT_UNSUPPORTED_CERTIFICATE", _UNTRUSTED),
    ("ALERT_ACCESS_DENIED", _UNTRUSTED),
    (
        "ALERT_HANDSHAKE_FAILURE",
        f"the server wants a client certificate ({_PAIR}), or none of the ciphers that are known here",
    ),
    ("ALERT_PROTOCOL_VERSION", "the server speaks no TLS 1.2 or newer"),
    ("UNSUPPORTED_PROTOCOL", "the server speaks no TLS 1.2 or newer"),
    ("KEY_VALUES_MISMATCH", f"the key is another certificate's: {_PAIR}"),
    ("PEM lib", f"no certificate and its key, in PEM, without a passphrase: {_PAIR}"),
    ("NO_CERTIFICATE_OR_CRL_FOUND", "ca_certs in metadata_center.url has no certificate, in PEM"),
    ("No such file", "ca_certs, certfile and keyfile in metadata_center.url are paths here"),
    ("max number of clients", "raise the server's maxclients"),
    (f"Error {ECONNREFUSED} connecting", _NOBODY),
    (f"[Errno {ECONNREFUSED}]", _NOBODY),
)
"""A part of the text, and what is said beside it; the first that is found."""

_CLOSED: Final = ("Connection closed", "reset by peer", "Broken pipe", "EOF occurred")
"""What libraries say of a peer that goes without a word."""

NO_TLS_THERE: Final = (
    "a server that speaks no TLS gives no answer either: metadata_center.url with redis, not rediss"
)
"""Of a TLS handshake that takes too long."""


def explained(
    fault: Exception, secrets: Sequence[str], *, by_sentinel: bool = False, unanswered: RedisUrl | None = None
) -> str:
    """One line about a fault: its kind, its words, what to do; none of `secrets`, and of bounded length.

    Args:
        fault: What was raised.
        secrets: What no text may have.
        by_sentinel: A sentinel said it, which has a login of its own.
        unanswered: What was connected to, if nothing was heard over the connection yet.
    """
    text = f"{type(fault).__name__}: {fault}"
    for secret in secrets:
        text = text.replace(secret, "***")
    text = text[:_MAX_CHARS]
    hint = next((hint for part, hint in _HINTS if part in text), "")
    if not hint and unanswered is not None:
        hint = _hint_of_silence(fault, text, has_tls=unanswered.tls is not None)
    if by_sentinel:
        hint = hint.replace(_LOGIN, _SENTINELS_LOGIN).replace("the server", "the sentinel")
    return f"{text} ({hint})" if hint else text


def _hint_of_silence(fault: Exception, text: str, *, has_tls: bool) -> str:
    """What may be the matter with a peer that accepts a connection and answers nothing on it."""
    cause = fault.__context__
    if has_tls and "Timeout connecting" in text:
        return NO_TLS_THERE
    is_cut = isinstance(cause, ConnectionAbortedError | ConnectionResetError | ssl.SSLEOFError)
    if not is_cut and not any(part in text for part in _CLOSED):
        return ""
    if has_tls:
        return (
            f"the server closed before it answered: it may want another client certificate, or one ({_PAIR}),"
            " or be a relay whose server is gone"
        )
    return (
        "the server closed before it answered: it may speak TLS there (metadata_center.url with rediss),"
        " or be a relay whose server is gone"
    )
