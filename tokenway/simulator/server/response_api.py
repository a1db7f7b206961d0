"""Stored responses over HTTP: what a conversation builds on, and what can be asked of it afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from tokenway.simulator.server.answers import ApiError, json_response
from tokenway.simulator.server.dialects import Responses
from tokenway.simulator.server.driver import Generation
from tokenway.simulator.server.stored import RUNNING, EngineResponses, Stored, input_items, items_of


class ResponseApi:
    """The responses that one replica keeps.

    Args:
        kept: Where.
        abort: Ends a generation.
    """

    def __init__(self, kept: EngineResponses, abort: Callable[[Generation], None]) -> None:
        self._kept = kept
        self._abort = abort

    def routes(self) -> list[web.RouteDef]:
        """What is asked of a stored response."""
        return [
            web.get("/v1/responses/{id}", self._retrieve),
            web.delete("/v1/responses/{id}", self._delete),
            web.post("/v1/responses/{id}/cancel", self._cancel),
            web.get("/v1/responses/{id}/input_items", self._input_items),
        ]

    def continued(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a new response with the conversation that it builds on before its input."""
        previous = body.get("previous_response_id")
        if previous is None:
            return body
        return {**body, "input": [*self._stored(previous).conversation(), *items_of(body.get("input"))]}

    def keep(self, body: dict[str, Any], asked: dict[str, Any], response: dict[str, Any]) -> Stored | None:
        """Remember a response unless its request said not to.

        Args:
            body: The request with all that it builds on.
            asked: The request.
            response: As it is now.
        """
        if asked.get("store") is False:
            return None
        stored = Stored(response, items_of(body.get("input")), items_of(asked.get("input")))
        self._kept.add(stored)
        return stored

    async def finish_in_background(self, stored: Stored, reply: Responses, generation: Generation) -> None:
        """See a response to its end that is not waited for."""
        stored.response = reply.pending("in_progress")
        await generation.done
        stored.generation = None
        if stored.response["status"] != "cancelled":
            stored.response = reply.whole()

    async def _retrieve(self, request: web.Request) -> web.Response:
        return json_response(self._stored(request.match_info["id"]).response)

    async def _input_items(self, request: web.Request) -> web.Response:
        return json_response(input_items(self._stored(request.match_info["id"])))

    async def _delete(self, request: web.Request) -> web.Response:
        response_id = request.match_info["id"]
        self._stored(response_id)
        self._kept.remove(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    async def _cancel(self, request: web.Request) -> web.Response:
        stored = self._stored(request.match_info["id"])
        if stored.generation is None or stored.response["status"] not in RUNNING:
            raise ApiError(
                400, "invalid_request_error", "Cannot cancel a synchronous response.", "response_id"
            )
        stored.response = {**stored.response, "status": "cancelled"}
        self._abort(stored.generation)
        return json_response(stored.response)

    def _stored(self, response_id: Any) -> Stored:
        if not isinstance(response_id, str) or not response_id.startswith("resp_"):
            message = f"Invalid 'response_id': '{response_id}'. Expected an ID that begins with 'resp'."
            raise ApiError(400, "invalid_request_error", message, "response_id")
        stored = self._kept.get(response_id)
        if stored is None:
            message = f"Response with id '{response_id}' not found."
            raise ApiError(404, "invalid_request_error", message, "response_id")
        return stored
