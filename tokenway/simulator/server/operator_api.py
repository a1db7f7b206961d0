"""What an operator asks of an engine, and what a test does to it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

from aiohttp import web

from tokenway.simulator.server.answers import decode_object, json_response
from tokenway.simulator.server.dialects import BadRequestError
from tokenway.simulator.server.faults import FaultKind, parse_fault
from tokenway.simulator.server.replica import Replica

VERSION: Final = "0.32.0"


class OperatorApi:
    """Health, facts, sleep, pause and faults of one replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def routes(self) -> list[web.RouteDef]:
        """All of it."""
        return [
            web.get("/health", self._health),
            web.route("*", "/ping", self._health),
            web.get("/v1/models", self._models),
            web.get("/version", self._version),
            web.get("/load", self._load),
            web.get("/metrics", self._metrics),
            web.get("/kv_event_sources", self._kv_event_sources),
            web.post("/sleep", self._sleep),
            web.post("/wake_up", self._wake_up),
            web.get("/is_sleeping", self._is_sleeping),
            web.post("/pause", self._pause),
            web.post("/resume", self._resume),
            web.get("/is_paused", self._is_paused),
            web.post("/reset_prefix_cache", self._reset_prefix_cache),
            web.post("/sim/fault", self._set_fault),
            web.get("/sim/state", self._state),
        ]

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response(status=503 if self._replica.driver.is_dead else self._replica.faults.fault.health)

    async def _models(self, _: web.Request) -> web.Response:
        return json_response(
            {
                "object": "list",
                "data": [
                    {
                        "id": model,
                        "object": "model",
                        "created": self._replica.started_s,
                        "owned_by": "vllm",
                        "root": model,
                        "parent": None,
                        "max_model_len": self._replica.settings.max_model_len,
                        "permission": [],
                    }
                    for model in self._replica.settings.models
                ],
            }
        )

    async def _version(self, _: web.Request) -> web.Response:
        return json_response({"version": VERSION})

    async def _load(self, _: web.Request) -> web.Response:
        return json_response({"server_load": self._replica.http_requests})

    async def _metrics(self, _: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=1.0.0; charset=utf-8"}
        return web.Response(body=self._replica.metrics.render(), headers=headers)

    async def _kv_event_sources(self, _: web.Request) -> web.Response:
        publisher = self._replica.publisher
        engine_id = str(self._replica.settings.engine_id)
        return json_response({} if publisher is None else {engine_id: publisher.describe()})

    async def _sleep(self, request: web.Request) -> web.Response:
        level = request.query.get("level", "1")
        if level not in ("1", "2"):
            raise BadRequestError("level must be 1 or 2", "level")
        self._replica.driver.abort_all()
        self._replica.engine.reset_prefix_cache()
        self._replica.driver.pause()
        self._replica.metrics.sleep_level = int(level)
        return json_response({"status": "sleeping", "level": int(level)})

    async def _wake_up(self, _: web.Request) -> web.Response:
        self._replica.metrics.sleep_level = 0
        self._replica.driver.resume()
        return json_response({"status": "awake", "tags": None})

    async def _is_sleeping(self, _: web.Request) -> web.Response:
        return json_response({"is_sleeping": self._replica.metrics.sleep_level > 0})

    async def _pause(self, request: web.Request) -> web.Response:
        mode = request.query.get("mode", "abort")
        if mode not in ("abort", "keep"):
            raise BadRequestError("mode must be abort or keep", "mode")
        if mode == "abort":
            self._replica.driver.abort_all()
        self._replica.driver.pause()
        return json_response({"status": "paused"})

    async def _resume(self, _: web.Request) -> web.Response:
        self._replica.driver.resume()
        return json_response({"status": "resumed"})

    async def _is_paused(self, _: web.Request) -> web.Response:
        return json_response({"is_paused": self._replica.driver.is_paused})

    async def _reset_prefix_cache(self, _: web.Request) -> web.Response:
        return json_response({"success": self._replica.engine.reset_prefix_cache()})

    async def _set_fault(self, request: web.Request) -> web.Response:
        try:
            fault = parse_fault(decode_object(await request.read()))
        except ValueError as error:
            raise BadRequestError(str(error)) from None
        self._replica.faults.set(fault)
        self._replica.driver.slowdown = fault.factor if fault.kind is FaultKind.SLOW else 1.0
        return json_response(asdict(fault))

    async def _state(self, _: web.Request) -> web.Response:
        engine, cache = self._replica.engine, self._replica.engine.cache
        return json_response(
            {
                "running": engine.num_running,
                "waiting": engine.num_waiting,
                "http_requests": self._replica.http_requests,
                "served": list(self._replica.served),
                "prefix_cache": {
                    "block_size": engine.profile.block_size,
                    "blocks": cache.num_blocks,
                    "used_blocks": cache.num_blocks - cache.num_unreferenced,
                    "cached_blocks": cache.num_keys,
                    "queries_tokens": self._replica.metrics.prefix_queries_tokens,
                    "hits_tokens": self._replica.metrics.prefix_hits_tokens,
                },
            }
        )
