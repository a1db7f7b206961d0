"""Where gateways meet."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from extproc.config.sections.fields import EnvironmentVariable, Name, Seconds, Section
from metadata_center.errors import MetadataError
from metadata_center.sharing.http_url import checked_http_url
from metadata_center.sharing.redis_url import parse_url

_STORE_URL = r"^(rediss?(\+sentinel|\+cluster)?|https?)://.+$"
_NO_STORE = (
    "no store's URL; accepted: redis://, rediss://, redis+sentinel://, redis+cluster:// (or rediss+...), "
    "http://, https://, in 2048 characters; Unix sockets are not supported"
)
"""Which quotes nothing: there may be a password in it."""


_MAX_CHARS = 2_048


def _of_a_store(url: str) -> str:
    if len(url) > _MAX_CHARS or not re.match(_STORE_URL, url):
        raise PydanticCustomError("store_url", _NO_STORE)
    try:
        if url.startswith("http"):
            checked_http_url(url)
        else:
            parse_url(url)
    except MetadataError as error:
        raise PydanticCustomError("store_url", "{why}", {"why": str(error)}) from None  # quotes no password
    return url


class MetadataCenter(Section):
    """Load and caches, shared with other gateways. Changes need a restart."""

    url: (
        Annotated[
            str,
            Field(
                examples=["redis://10.0.0.5:6379/0", "http://10.0.0.5:8080"],
                json_schema_extra={"pattern": _STORE_URL, "maxLength": _MAX_CHARS},
            ),
            AfterValidator(_of_a_store),
        ]
        | None
    ) = None
    """Where gateways meet: Redis (TLS by rediss, +sentinel, +cluster) or http(s); null shares nothing."""
    username: Name | None = None
    """Redis ACL user."""
    password_env: EnvironmentVariable | None = None
    """Environment variable with the Redis password, or the bearer token of the HTTP service."""
    sentinel_password_env: EnvironmentVariable | None = None
    """Environment variable with the password of the sentinels; their user stands in the URL."""
    gateway: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$", examples=["gw-1"])] | None = None
    """This gateway's name, distinct among those that share; null takes the host name and the admin port."""
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,64}$", examples=["tokenway"])] = "tokenway"
    """Prefix of every key and channel; gateways of one prefix share."""
    lease_s: Seconds = 6.0
    """The load of a gateway not heard of for this long no longer counts, in seconds."""
    timeout_s: Seconds = 1.0
    """Bound on one exchange with the store, in seconds; no decision waits for one unless `reserve` is on."""
    reserve: bool = False
    """Charge by compare-and-set at the store: one round trip per request, no two gateways choose alike."""
    reserve_timeout_s: Annotated[float, Field(gt=0, le=0.4)] = 0.02
    """Bound on that round trip, in seconds; after it the choice is charged here alone.

    At most 0.4: Envoy waits 0.5 s for the gateway (`message_timeout`) and then routes without it.
    """
