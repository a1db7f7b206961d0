"""`POST /v1/responses/compact`: a conversation made shorter, as OpenAI answers it; vLLM has none as yet."""

from __future__ import annotations

from typing import Any

from tokenway.simulator.server.dialects import Responses
from tokenway.simulator.server.driver import Generation
from tokenway.simulator.server.stored import items_of


class Compaction(Responses):
    """The user's messages and one item that stands for all the rest; never streamed, and not kept."""

    def __init__(self, reply_id: str, created_s: int, generation: Generation, body: dict[str, Any]) -> None:
        super().__init__(reply_id, created_s, generation, body)
        self._said = [item for item in items_of(body.get("input")) if item.get("role") == "user"]

    def whole(self) -> dict[str, Any]:
        """See `Dialect.whole`."""
        made = super().whole()
        users = [
            {"id": f"msg_{number}_{made['id']}", "type": "message", "status": "completed", **item}
            for number, item in enumerate(self._said)
        ]
        summary = {
            "id": f"cmp_{made['id'].removeprefix(self.id_prefix)}",
            "type": "compaction",
            "encrypted_content": self._generation.text,
        }
        return {
            "id": made["id"],
            "object": "response.compaction",
            "created_at": made["created_at"],
            "output": [*users, summary],
            "usage": made["usage"],
        }
