"""Runs the metadata-center service until a signal stops it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from functools import partial
from math import isfinite

from metadata_center import signals
from metadata_center.addresses import Address, is_loopback
from metadata_center.errors import MetadataError
from metadata_center.service.cluster_loads import Limits
from metadata_center.service.http_server import HttpServer
from metadata_center.tokens import bearer

_LOGGER = logging.getLogger("metadata_center")


class SettingError(MetadataError):
    """A setting of the service that cannot be used; the message names it."""


def serve(listen: str, *, token_env: str | None, request_expiry_s: float, cache_expiry_s: float) -> int:
    """Run until SIGTERM or SIGINT; SIGHUP, which reloads a gateway, has nothing to reload here.

    Args:
        listen: `ip:port` or `name:port`, IPv6 in brackets; port 0 picks one.
        token_env: Name of the environment variable that holds the bearer token; None requires none.
        request_expiry_s: See `Limits`; > 0.
        cache_expiry_s: See `Limits`; > 0.

    Returns:
        Exit code 0.

    Raises:
        SettingError: One of these cannot be used.
        OSError: The address cannot be bound.
    """
    try:
        host, port = Address.parse(listen)
    except ValueError as error:
        raise SettingError(f"listen: {error}") from error
    for name, seconds in (("request expiry", request_expiry_s), ("cache expiry", cache_expiry_s)):
        if not (isfinite(seconds) and seconds > 0):
            raise SettingError(f"{name}: {seconds}; accepted: seconds > 0")
    token = None if token_env is None else os.environ.get(token_env)
    if token_env is not None and not token:
        raise SettingError(f"environment variable {token_env} holds no token")
    if token is not None:
        try:
            token = bearer(token)
        except ValueError as error:
            raise SettingError(f"environment variable {token_env} holds {error}") from error
    if token is None and not (host == "localhost" or is_loopback(host)):
        _LOGGER.warning("open to the network without a token", extra={"host": host})
    limits = Limits(request_expiry_s=request_expiry_s, cache_expiry_s=cache_expiry_s)
    with asyncio.Runner() as runner:
        try:
            runner.run(_until_signalled(HttpServer(limits, token=token), host, port))
        finally:
            signals.hold_back()  # the handlers go with the loop
    return 0


async def _until_signalled(server: HttpServer, host: str, port: int) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, _LOGGER.info, "nothing to reload: settings are those of the start")
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # a process without a handler ends by them without a word
        loop.add_signal_handler(
            number, partial(_LOGGER.warning, "signal ignored", extra={"signal": number.name})
        )
    signals.release()
    await server.start(host, port)
    await stopping.wait()
    await server.stop()
