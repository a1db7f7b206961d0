"""An answer of an admin port, read within bounds; not with its address, which all verbs import."""

from __future__ import annotations

import time
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import OpenerDirector, ProxyHandler, build_opener

import orjson

from extproc.observing.printable import printable
from metadata_center.addresses import is_loopback

TIMEOUT_S: Final = 5.0
"""The answer is a table or a few records from memory; a gateway that needs longer is not answering."""

MAX_BYTES: Final = 256 * 1024 * 1024
"""A hundred thousand endpoints are some 100 MB."""

_PIECE_BYTES: Final = 1024 * 1024


def fetch(url: str) -> Any:
    """The JSON that an admin port answers, within `TIMEOUT_S` twice over and `MAX_BYTES`.

    Loopback is asked directly: a proxy of the environment has a loopback of its own.

    Raises:
        OSError: No answer (`urllib.error.HTTPError`: another one than 200), or one without end.
        http.client.HTTPException: What answers does not speak HTTP.
        ValueError: The URL is none, or the answer is no JSON.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError("the admin URL must begin with http:// or https://")
    host = urlsplit(url).hostname or ""
    direct = (ProxyHandler({}),) if is_loopback(host) or host == "localhost" else ()
    until_s = time.monotonic() + TIMEOUT_S
    answer = bytearray()
    with _opened(build_opener(*direct), url) as response:
        while piece := response.read1(_PIECE_BYTES):
            answer += piece
            if time.monotonic() > until_s or len(answer) > MAX_BYTES:
                raise TimeoutError(f"no end of the answer within {TIMEOUT_S:g} s and {MAX_BYTES} bytes")
    return orjson.loads(bytes(answer))


def _opened(opener: OpenerDirector, url: str) -> Any:
    """The answer; why there is none in the system's own words, without the library's around them.

    What answers in a gateway's place may say anything: nothing of it reaches a terminal as it came.
    """
    try:
        return opener.open(url, timeout=TIMEOUT_S)
    except HTTPError as error:
        error.msg = printable(error.msg)
        raise
    except URLError as error:
        reason = error.reason
        raise OSError(getattr(reason, "strerror", None) or printable(str(reason))) from error
    except HTTPException as error:
        raise HTTPException(printable(str(error)) or type(error).__name__) from error
