"""Log lines as JSON objects, and the one line each ended request leaves.

A line is a constant event and keys. The request line's keys are a closed list of numbers, names and
addresses: prompt text, header values and credentials have no way in. `JsonFormatter` holds every other
logger of the process to the same: values under names of secrets are withheld, and an exception shows its type
and its stack, but its message only where the type is known not to quote its input.

`logging.prompt_blocks` adds what a replay needs to know of a prompt: its length and hashes of its blocks,
keyed by a secret of the installation. Without the secret no reader can find out whether a guessed text was
asked; with one for all, the logs of several gateways fit together. That two prompts begin alike stays
visible: this is what the hashes are for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from extproc.errors import ConfigError, RouterError
from extproc.observing.printable import escaped_json
from extproc.values.decisions import DecisionRecord
from extproc.values.endings import Ending
from extproc.values.outcomes import Outcome

REQUEST_LOGGER = "tokenway.request"
WITHHELD = "[withheld]"
MIN_KEY_CHARS = 16
"""Of an installation's secret: 64 bits in hexadecimal, too many to try."""

_LOGGER = logging.getLogger(REQUEST_LOGGER)
_EVENT = "request ended"
# A client chooses the model name and may make Envoy quote a certificate: OpenAI's longest fine-tune names and
# Envoy's longest fixed `response_code_details` stay under 100 characters.
_MAX_CHARS = 256
# A line of 35 kB at most: 1 MiB of prompt, about 260,000 tokens. What is longer loses its tail in a replay.
_MAX_BLOCKS = 2048
# JSON's numbers are exact up to here for every reader; odds that any of a million blocks collide: 1 : 18,000.
_HASH_BITS = 53
# What a LogRecord carries of itself; anything else in it came by `extra=`.
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {
    "message",
    "asctime",
    "taskName",
}
_SECRET_NAMES = frozenset(
    {
        "api_key",
        "authorization",
        "body",
        "cookie",
        "header",
        "headers",
        "password",
        "prompt",
        "secret",
        "token",
    }
)
# Deep enough for any honest chain; a bound because a chain may be a circle.
_MAX_CAUSES = 8
# The system's messages name paths and addresses; ours follow rule 3 of `extproc.errors`.
_QUOTABLE = (OSError, RouterError, ConfigError)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `time`, `level`, `logger`, `event`, the `extra=` keys, `error` if any."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline; a value JSON cannot hold is shown by its type."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
        }
        for key, value in vars(record).items():
            if key not in _STANDARD:
                line[key] = WITHHELD if key.lower() in _SECRET_NAMES else value
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = _error(record.exc_info[1])
        try:
            encoded = orjson.dumps(line, default=_type_name, option=orjson.OPT_NON_STR_KEYS)
        except orjson.JSONEncodeError:  # a lone surrogate, or an integer beyond 64 bits
            return json.dumps(line, default=_type_name, skipkeys=True)
        return escaped_json(encoded)


def block_key(secret: str) -> bytes:
    """The key of the block hashes from an installation's secret of any length."""
    return hashlib.blake2b(secret.encode(), digest_size=32, person=b"tokenway.blocks").digest()


def keyed_blocks(blocks: Sequence[int], key: bytes) -> list[int]:
    """Block hashes as logs show them.

    Args:
        blocks: Unsigned 64-bit chained hashes, in prompt order.
        key: From `block_key`.

    Returns:
        As many numbers of 53 bits, up to 2,048; equal where the hashes are.
    """
    keyed = hashlib.blake2b(key=key, digest_size=8)
    hashes = []
    for block in blocks[:_MAX_BLOCKS]:
        one = keyed.copy()
        one.update(block.to_bytes(8, "little"))
        hashes.append(int.from_bytes(one.digest(), "little") >> (64 - _HASH_BITS))
    return hashes


class RequestLog:
    """Leaves one line at INFO on `tokenway.request` for each ended request; listens to endings."""

    def __init__(self) -> None:
        self._is_on = True
        self._key: bytes | None = None

    def configure(self, *, is_on: bool, key: bytes | None) -> None:
        """Go by these from now on.

        Args:
            is_on: Leave lines at all.
            key: From `block_key`, to log hashes of prompts' blocks under; None leaves out all about them.
        """
        self._is_on = is_on
        self._key = key

    def ended(self, ending: Ending) -> None:
        """Leave the line of one ended request; near free when that is off."""
        if self._is_on:
            blocks = () if ending.request is None else ending.request.blocks
            log_request_end(ending.record, ending.outcome, blocks, self._key)


def log_request_end(
    record: DecisionRecord, outcome: Outcome, blocks: Sequence[int] = (), key: bytes | None = None
) -> None:
    """Leave the line of one ended request at INFO on `tokenway.request`; near free when that is off.

    Args:
        record: Its decision.
        outcome: Its end.
        blocks: Hashes of its prompt's blocks.
        key: From `block_key`, to log `blocks` under; None leaves out all about the prompt's blocks.
    """
    if not _LOGGER.isEnabledFor(logging.INFO):
        return
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "operation": record.operation,
        "model": record.model[:_MAX_CHARS],
        "upstream_model": record.upstream_model,
        "cluster": record.cluster,
        "route": record.route_name,
        "algorithm": None if record.settings is None else record.settings.algorithm,
        "stream": record.stream,
        "chosen": record.chosen,
        "endpoint": outcome.endpoint,
        "attempts": outcome.attempts,
        "outcome": outcome.ended,
        "status": outcome.status,
        "rejected": record.rejected,
        "flags": ",".join(outcome.response_flags),
        "details": outcome.details[:_MAX_CHARS],
        "duration_ms": _ms(outcome.duration_s),
        "ttft_ms": _ms(outcome.ttft_s),
        "predicted_ttft_ms": _ms(outcome.predicted_ttft_s),
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "cached_tokens": outcome.cached_tokens,
        "predicted_cached_tokens": outcome.predicted_cached_tokens,
        "request_bytes": outcome.request_bytes,
        "response_bytes": outcome.response_bytes,
        "decision_us": round(record.decision_us, 1),
        "held_ms": _ms(record.held_s),
        "held_for": None if record.hold is None else record.hold.reason,
    }
    if key is not None:
        fields |= {
            "prompt_bytes": record.prompt_bytes,
            "block_bytes": record.block_bytes,
            "prompt_blocks": keyed_blocks(blocks, key),
        }
    # `Logger.info` would walk the stack for a caller that is always this function.
    _LOGGER.handle(_LOGGER.makeRecord(REQUEST_LOGGER, logging.INFO, "", 0, _EVENT, (), None, extra=fields))


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else round(value_s * 1e3, 3)


def _type_name(value: object) -> str:
    return f"<{type(value).__name__}>"


def _error(error: BaseException) -> dict[str, Any]:
    """Types along the chain of causes, the outermost error's frames as `file:line function`."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and len(chain) < _MAX_CAUSES:
        chain.append(cause)
    return {
        "types": [type(link).__qualname__ for link in chain],
        "messages": [str(link) for link in chain if isinstance(link, _QUOTABLE)],
        "stack": [
            f"{frame.f_code.co_filename}:{line} {frame.f_code.co_qualname}"
            for frame, line in traceback.walk_tb(error.__traceback__)
        ],
    }
