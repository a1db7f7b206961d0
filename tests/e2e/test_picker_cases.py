"""Every case of an endpoint picker against the real Envoy as Istio configures it, with and without TLS."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from testbed.processes import REPOSITORY
from tests.e2e import picker_answer_cases, picker_cases  # noqa: F401 - they add their cases to the table
from tests.e2e.harness import FAST_HEALTH, cluster, key_of, recording, simulators
from tests.e2e.picker import Picked, running_picker
from tests.e2e.picker_table import CASES, Case, table

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=["plain", "tls"])
async def stack(request: pytest.FixtureRequest) -> AsyncIterator[Picked]:
    """One picker for all cases but those that bring their own."""
    async with AsyncExitStack() as stack:
        engines = await stack.enter_async_context(simulators(3, time_scale=0.02))
        recorder, *three = [await stack.enter_async_context(recording()) for _ in range(4)]
        of_three = cluster("three", [each.key for each in three])
        of_three["endpoints"][0]["labels"] = {"adapter": "polite"}
        clusters = [cluster("sim", map(key_of, engines)), cluster("recorded", [recorder.key]), of_three]
        config = {
            "models": {
                "sim": {"rules": [{"cluster": "sim"}]},
                "recorded": {"rules": [{"cluster": "recorded"}]},
                "tuned": {"rules": [{"cluster": "recorded", "model": "base"}]},
                "three": {"rules": [{"cluster": "three"}]},
                "adapted": {
                    "rules": [{"cluster": "three", "subset": {"adapter": "polite"}, "lora": "polite"}]
                },
            },
            "health": FAST_HEALTH,
            "default_cluster": "three",
        }
        is_tls = request.param == "tls"
        picker = await stack.enter_async_context(
            running_picker(clusters, config, is_tls=is_tls, fallbacks=2, objectives={"batch": -1})
        )
        yield Picked(picker, engines, recorder, three)


@pytest_asyncio.fixture(loop_scope="session")
async def picked(stack: Picked) -> AsyncIterator[Picked]:
    """The same with clean recorders; afterwards nothing may be charged."""
    stack.reset()
    yield stack
    stack.reset()
    await stack.picker.tokenway.settled()


@pytest.mark.parametrize("case", CASES, ids=[f"{case.number:02}" for case in CASES])
async def test_case(picked: Picked, case: Case) -> None:
    """As the table says."""
    await case.check(picked)


async def test_the_document_has_the_table() -> None:
    """All 27, each with its words."""
    assert [case.number for case in CASES] == list(range(1, 28))
    assert table() in (REPOSITORY / "docs/endpoint-picker.md").read_text(encoding="utf-8")
