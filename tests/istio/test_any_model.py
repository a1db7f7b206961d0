"""A name that only the rule of `*` serves, at a gateway of a real istiod's, with Tokenway and without."""

from __future__ import annotations

import pytest

from tests.e2e.assembled_stack import cluster_of
from tests.e2e.harness import chat, post
from tests.e2e.istio_scenarios import CONFIG, MODELS
from tests.istio.gateway import behind_istio

pytestmark = [pytest.mark.istio, pytest.mark.asyncio(loop_scope="session")]

ANY = {"*": {"rules": [{"cluster": cluster_of("recorder")}]}}


async def test_istios_clusters_serve_what_tokenway_would() -> None:
    """Such a name goes to the host of `*`; one that is configured but closed to none, nor one too long."""
    models = {**MODELS, **ANY, "pair": {**MODELS["pair"], "aliases": ["two"]}}
    async with behind_istio({**CONFIG, "models": models}) as behind:
        stack, under = behind.stack, behind.under
        assert behind.proxy.refused() == ""

        async def status(model: str) -> int:
            return (await post(stack, chat(model, "hello"))).status

        for is_away in (False, True):
            if is_away:
                await stack.gateway.kill()
            under.reset()
            assert [await status(model) for model in ("an/adapter", "*", "n" * 200)] == [200] * 3
            assert len(under.recorder.received) == 3
            assert b"an/adapter" in under.recorder.received[0].body
            under.reset()
            assert await status("gated") == 404
            assert not under.recorder.received
        assert await status("part") == 404
        assert await status("n" * 201) == 404
        assert not under.recorder.received
        assert await status("two") == 200
        assert len(under.recorder.received) + len(under.decoy.received) == 1
        assert (await post(stack, {**chat("an/adapter", "hello"), "priority": 1})).status == 503
