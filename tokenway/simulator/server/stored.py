"""Responses that one replica keeps: in its own memory, for as long as it lives, unknown to any other.

Rules:
    1. As vLLM with `VLLM_ENABLE_RESPONSES_API_STORE=1`; `DELETE` and `input_items`, which that lacks, as
       OpenAI's.
    2. Bounded, unlike vLLM's: the oldest goes first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenway.simulator.server.driver import Generation

MAX_STORED = 10_000
RUNNING = ("queued", "in_progress")


@dataclass(slots=True)
class Stored:
    """One response.

    Attributes:
        response: The response object as it is now.
        turns: The conversation up to this response, which is not in it.
        items: What this request's own input added to it.
        generation: What runs in the background, or None.
    """

    response: dict[str, Any]
    turns: list[dict[str, Any]]
    items: list[dict[str, Any]]
    generation: Generation | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """What the next turn is appended to."""
        said = [
            {"role": item["role"], "content": item["content"]}
            for item in self.response["output"]
            if item["type"] == "message"
        ]
        return [*self.turns, *said]


class EngineResponses:
    """A replica's responses by id."""

    def __init__(self, max_stored: int = MAX_STORED) -> None:
        self._max_stored = max_stored
        self._by_id: dict[str, Stored] = {}

    def add(self, stored: Stored) -> None:
        """Keep a response."""
        self._by_id[stored.response["id"]] = stored
        while len(self._by_id) > self._max_stored:
            del self._by_id[next(iter(self._by_id))]

    def get(self, response_id: str) -> Stored | None:
        """The response, or None."""
        return self._by_id.get(response_id)

    def remove(self, response_id: str) -> bool:
        """Forget a response; False if there is none."""
        return self._by_id.pop(response_id, None) is not None


def items_of(given: Any) -> list[dict[str, Any]]:
    """The `input` of a request as a list of items."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else list(given or ())


def input_items(stored: Stored) -> dict[str, Any]:
    """The answer to `GET /v1/responses/{id}/input_items`, newest first."""
    data = [
        {
            "id": f"msg_{number}_{stored.response['id']}",
            "type": "message",
            "status": "completed",
            "role": item.get("role", "user"),
            "content": [{"type": "input_text", "text": item["content"]}]
            if isinstance(item.get("content"), str)
            else item.get("content"),
        }
        for number, item in enumerate(stored.items)
    ][::-1]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return {"object": "list", "data": data, "has_more": False, **ends}
