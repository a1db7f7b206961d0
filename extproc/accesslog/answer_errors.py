"""An error in an answer, as Envoy's filters leave it in the metadata of the request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from extproc.values.evidence import EMPTY, TRUNCATED, UNLIKE

ERROR_NAMESPACE: Final = "llm.error"
"""Where Envoy's filters leave what they saw of an error in an answer, see `error_seen`."""

_MAX_WORD: Final = 64
_WORD: Final = re.compile(r"[A-Za-z0-9_.-]+")

_ERROR_EVENTS: Final = frozenset({"error", "response.failed"})
_LAST_EVENTS: Final = frozenset(
    {"message_stop", "response.completed", "response.incomplete", "response.cancelled"}
)
_EARLIER_EVENTS: Final = frozenset(
    {
        *("message_start", "content_block_start", "content_block_delta", "content_block_stop"),
        *("ping", "chat.completion.chunk", "text_completion"),
    }
)
"""Types of events that end a stream, or do not, where the API gives each event one. After `message_delta`,
which has the stop reason, nothing is missing; a chunk of a chat is reported if the stream ends with it and it
has no finish reason."""

_NO_ANSWER: Final = {"none": EMPTY, "unlike": UNLIKE}
"""What Envoy's filter reports in place of a last event: there is no token, or nothing that is known."""


def error_seen(fields: Mapping[str, Any]) -> str | None:
    """An error in an answer, in words that are safe to log: its type and code; None if there was none.

    Args:
        fields: Of `ERROR_NAMESPACE`: `type` and `code` of the error object; `event`, the type of the last
            event of a stream that was seen, whatever it was, or one of `_NO_ANSWER`, and `event_code`, which
            is one of an error if the event is; whatever else says that there was an error. A text of an
            error (a message may repeat the prompt) is never among them.
    """
    event = fields.get("event")
    if event not in _ERROR_EVENTS and fields.keys() <= {"event", "event_code"}:
        if event in _NO_ANSWER:
            return _NO_ANSWER[event]
        earlier = event in _EARLIER_EVENTS or (
            str(event).startswith("response.") and event not in _LAST_EVENTS
        )
        return TRUNCATED if earlier else None
    words = []
    for name in ("type", "code", "event_code"):
        found = fields.get(name)
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        word = str(found)
        if found is not None and len(word) <= _MAX_WORD and _WORD.fullmatch(word):
            words.append(word)
    return " ".join(words) or "error"
