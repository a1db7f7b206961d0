"""The lines that the product logs of requests, as text."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from extproc.observing.request_log import REQUEST_LOGGER, JsonFormatter


@contextmanager
def request_lines() -> Iterator[io.StringIO]:
    """What the request logger writes, formatted as in production."""
    logger, stream = logging.getLogger(REQUEST_LOGGER), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield stream
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
