"""Rules on headers, through the real Envoy: what a configuration may match arrives and is matched."""

from __future__ import annotations

import json

import pytest

from tests.e2e.harness import chat, cluster, exchange, recording, running_stack, send

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

SENT = {
    "user-agent": "batch-job/1",
    "accept-language": "de",
    "x-forwarded-host": "a.example",
    "x-stainless-lang": "python",
    "content-language": "fr",
    "x-tier": "gold",
}
"""What a client sends, a header at a time."""


async def test_rules_match_headers_that_envoy_withholds_otherwise() -> None:
    """Each rule names one header; requests with it, and no others, go by that rule."""
    rules = [{"cluster": "c", "headers": {name: value}, "model": name} for name, value in SENT.items()]
    pseudo = {":scheme": "http", ":path": "/v1/completions"}
    rules.append({"cluster": "c", "headers": pseudo, "model": ":scheme"})
    rules.append({"cluster": "c", "model": "default"})
    async with (
        recording() as engine,
        running_stack([cluster("c", [engine.key])], {"models": {"m": {"rules": rules}}}) as stack,
    ):
        for name, value in SENT.items():
            reply = await send(stack, "POST", "/v1/chat/completions", chat("m", "hi"), {name: value})
            assert reply.status == 200
            assert json.loads(engine.received[-1].body)["model"] == name
        await send(stack, "POST", "/v1/completions", {"model": "m", "prompt": "hi"})
        assert json.loads(engine.received[-1].body)["model"] == ":scheme"
        await send(stack, "POST", "/v1/chat/completions", chat("m", "hi"))
        assert json.loads(engine.received[-1].body)["model"] == "default"

        known = len(stack.gateway_log())
        rules[0]["headers"] = {"accept-encoding": "gzip"}
        stack.write_config({"models": {"m": {"rules": rules}}})
        await stack.logged("new rules match what Envoy may not forward", since=known)


async def test_rules_match_the_address_that_envoy_saw() -> None:
    """Whatever a client says of itself: the header to match is the one that Envoy makes."""
    rules = [
        {"cluster": "c", "headers": {"x-envoy-external-address": "127.0.0.1"}, "model": "here"},
        {"cluster": "c", "model": "elsewhere"},
    ]
    async with (
        recording() as engine,
        running_stack([cluster("c", [engine.key])], {"models": {"m": {"rules": rules}}}) as stack,
    ):
        for claim in ({}, {"x-forwarded-for": "6.6.6.6"}, {"x-envoy-external-address": "6.6.6.6"}):
            assert (await send(stack, "POST", "/v1/chat/completions", chat("m", "hi"), claim)).status == 200
            assert json.loads(engine.received[-1].body)["model"] == "here"


async def test_what_check_says_never_arrives_never_does() -> None:
    """Blanks at a value's ends are gone, controls and underscores refused, certificates taken away."""
    rules = [{"cluster": "c", "headers": {"x-a": "gold"}, "model": "gold"}, {"cluster": "c"}]
    async with (
        recording() as engine,
        running_stack([cluster("c", [engine.key])], {"models": {"m": {"rules": rules}}}) as stack,
    ):
        body = json.dumps(chat("m", "hi")).encode()

        async def sent(header: bytes) -> int:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n" % len(body)
            return (await exchange(stack.port, head + header + b"\r\n\r\n" + body)).status

        assert await sent(b"x-a: \t gold \t") == 200
        assert json.loads(engine.received[-1].body)["model"] == "gold"
        assert await sent(b"x-forwarded-client-cert: Hash=1") == 200
        assert "x-forwarded-client-cert" not in engine.received[-1].headers
        count = len(engine.received)
        for header in (b"x_a: gold", b"x-a: go\x7fld", b"x-a: go\x01ld"):
            assert await sent(header) == 400
        assert len(engine.received) == count
