"""Where this gateway meets others, as configured: who it is there, and by which transport."""

from __future__ import annotations

import os
import re
import socket
from typing import Final

from extproc.config.schema import Config, MetadataCenter
from extproc.errors import ConfigError
from extproc.routing.router import Reserve
from extproc.server.background import Background
from metadata_center.errors import MetadataError
from metadata_center.sharing.http_transport import HttpTransport
from metadata_center.sharing.messages import MAX_NAME_CHARS, MemberId, member_id
from metadata_center.sharing.redis_transport import RedisTransport
from metadata_center.sharing.redis_url import parse_url
from metadata_center.sharing.sync import Sync
from metadata_center.sharing.transport import Transport

_NOT_IN_NAMES: Final = re.compile(r"[^0-9A-Za-z_.-]")


def gateway_name(config: Config) -> str:
    """The configured name, or one that no other gateway has: host and admin port."""
    named = config.metadata_center.gateway
    if named is not None:
        return named
    suffix = f"-{config.server.admin.port}"
    return _NOT_IN_NAMES.sub("-", socket.gethostname())[: MAX_NAME_CHARS - len(suffix)] + suffix


def member_of(config: Config, worker: int, incarnation: str) -> MemberId:
    """Who a worker process is among all members."""
    return member_id(gateway_name(config), worker, incarnation)


def transport_of(section: MetadataCenter, path: str) -> Transport:
    """The way to the other gateways; `section.url` is set. Nothing is connected yet.

    Raises:
        ConfigError: The URL cannot be used; `path` names the file.
    """
    assert section.url is not None
    secret = None if section.password_env is None else os.environ.get(section.password_env)
    try:
        if section.url.startswith("http"):
            return HttpTransport(section.url, token=secret, timeout_s=section.timeout_s)
        url = parse_url(section.url, username=section.username, password=secret)
        return RedisTransport(url, prefix=section.key_prefix)
    except MetadataError as error:
        raise ConfigError(path, [f"metadata_center.url: {error}"]) from None


def reserve_by(sync: Sync) -> Reserve:
    """Compare and set, its answer told by callback."""
    background = Background()
    return lambda request_id, candidates: background.begin(sync.reserve(request_id, candidates))
