"""Asking an engine over a real socket whether it renders and tokenizes as the files say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from tokenizers import Tokenizer

from extproc.rendering.check import SAMPLES, CheckedRendering, check_engine
from extproc.rendering.loading import load
from extproc.rendering.prompt_text import Feature, Rendering, build_rendering

DATA = Path(__file__).parents[2] / "data" / "rendering"
NOW_UNIX_S = 1_782_777_600.0
ALL = frozenset(Feature)

Answer = Callable[[dict[str, Any]], web.StreamResponse]


@contextlib.asynccontextmanager
async def engine(answer: Answer) -> AsyncIterator[str]:
    """Serves /tokenize; gives its base URL."""

    async def tokenize(request: web.Request) -> web.StreamResponse:
        return answer(orjson.loads(await request.read()))

    application = web.Application()
    application.router.add_post("/tokenize", tokenize)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


async def verdict(answer: Answer, rendering: Rendering, timeout_s: float = 5.0) -> CheckedRendering:
    """What the check says of an engine that answers so."""
    async with engine(answer) as url, aiohttp.ClientSession() as session:
        return await check_engine(session, url, "m", rendering, NOW_UNIX_S, timeout_s)


def tokenizing(rendering: Rendering, document: dict[str, Any]) -> Answer:
    """An engine that renders as `rendering` does and tokenizes as the package reads `document`."""
    tokenizer = Tokenizer.from_str(orjson.dumps(document).decode())

    def answer(body: dict[str, Any]) -> web.StreamResponse:
        assert body["model"] == "m"
        is_chat = "messages" in body
        text = rendering.chat_text(body, NOW_UNIX_S) if is_chat else body["prompt"]
        if text is None:
            return web.json_response({"error": {"message": "refused"}}, status=400)
        return web.json_response({"tokens": tokenizer.encode(text, add_special_tokens=not is_chat).ids})

    return answer


def document(family: str) -> dict[str, Any]:
    """A decoded tokenizer.json."""
    decoded: dict[str, Any] = orjson.loads((DATA / family / "tokenizer.json").read_bytes())
    return decoded


@pytest.mark.parametrize("family", ["chatml", "llama3", "instruct", "parts"])
async def test_an_engine_with_the_same_files_agrees_with_all(family: str) -> None:
    """Every feature, boundaries included."""
    rendering = load(DATA / family)
    found = await verdict(tokenizing(rendering, document(family)), rendering)
    assert (found.ok, found.reasons) == (True, ())
    assert (found.rendering.features, found.rendering.tokens_agree) == (ALL, True)


async def test_an_engine_that_cuts_otherwise_still_has_the_same_text() -> None:
    """As when a loader replaces the splitting rule of the file: no boundaries, but all texts."""
    rendering = load(DATA / "chatml")
    other = document("chatml")
    other["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    found = await verdict(tokenizing(rendering, other), rendering)
    assert (found.rendering.features, found.rendering.tokens_agree) == (ALL, False)
    assert all("other tokens" in reason for reason in found.reasons)


async def test_an_engine_with_another_template_agrees_with_completions_only() -> None:
    """Chats and tools are given up with the sample and the place that showed it."""
    rendering = load(DATA / "chatml")
    config = orjson.dumps({"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    other = build_rendering((DATA / "chatml" / "tokenizer.json").read_bytes(), config)
    found = await verdict(tokenizing(other, document("chatml")), rendering)
    assert found.ok
    assert found.rendering.features == {Feature.COMPLETION}
    assert "chat sample 0: the text differs from byte 0 on" in found.reasons


async def test_an_engine_that_renders_tools_otherwise_still_agrees_with_chats() -> None:
    """Each feature is found out on its own."""
    rendering = load(DATA / "chatml")
    template = orjson.loads((DATA / "chatml" / "tokenizer_config.json").read_bytes())["chat_template"]
    other = orjson.dumps({"chat_template": template.replace("You may call", "You must call")})
    asked = build_rendering((DATA / "chatml" / "tokenizer.json").read_bytes(), other)
    found = await verdict(tokenizing(asked, document("chatml")), rendering)
    assert found.rendering.features == {Feature.COMPLETION, Feature.CHAT}
    assert found.rendering.tokens_agree


async def test_an_alternative_is_taken_if_the_engine_agrees_with_it() -> None:
    """A loader that goes by the tokenizer's class and ignores the file's own steps."""
    config = orjson.loads((DATA / "parts" / "tokenizer_config.json").read_bytes())
    files = (
        (DATA / "parts" / "tokenizer.json").read_bytes(),
        orjson.dumps({**config, "tokenizer_class": "LlamaTokenizer"}),
    )
    rendering = build_rendering(*files)
    rebuilt = document("parts")
    rebuilt["normalizer"] = None
    rebuilt["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "first",
        "split": False,
    }
    found = await verdict(tokenizing(rendering, rebuilt), rendering)
    assert (found.rendering.features, found.rendering.tokens_agree, found.reasons) == (ALL, True, ())
    assert found.rendering.canonical is rendering.alternatives[0].canonical
    as_filed = await verdict(tokenizing(rendering, document("parts")), rendering)
    assert (as_filed.rendering.features, as_filed.reasons) == (ALL, ())
    assert as_filed.rendering.canonical is rendering.canonical


async def test_a_model_without_a_template_agrees_with_completions_only() -> None:
    """Both refuse every chat, which says nothing for it."""
    rendering = build_rendering((DATA / "chatml" / "tokenizer.json").read_bytes(), b"{}")
    found = await verdict(tokenizing(rendering, document("chatml")), rendering)
    assert found.rendering.features == {Feature.COMPLETION}
    assert found.reasons == ("chat: both refuse all samples", "tools: both refuse all samples")


async def test_an_engine_that_refuses_what_we_render_does_not_agree() -> None:
    """Its template is another one."""
    rendering = load(DATA / "chatml")
    bare = build_rendering((DATA / "chatml" / "tokenizer.json").read_bytes(), b"{}")
    found = await verdict(tokenizing(bare, document("chatml")), rendering)
    assert found.rendering.features == {Feature.COMPLETION}
    assert "chat sample 0: the engine refuses it" in found.reasons
    assert (
        "chat sample 0: we refuse it, the engine does not"
        in (await verdict(tokenizing(rendering, document("chatml")), bare)).reasons
    )


async def test_an_engine_with_a_larger_vocabulary_does_not_agree() -> None:
    """Ids that the file does not have stand for nothing known."""
    rendering = load(DATA / "chatml")
    found = await verdict(lambda _: web.json_response({"tokens": [1, 999_999]}), rendering)
    assert not found.ok
    assert "completion sample 0: the engine has token ids that tokenizer.json has not" in found.reasons


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda _: web.Response(status=404), "/tokenize answers 404"),
        (lambda _: web.Response(status=503), "/tokenize answers 503"),
        (lambda _: web.Response(body=b"{"), "/tokenize answers without tokens"),
        (lambda _: web.json_response([1]), "/tokenize answers without tokens"),
        (lambda _: web.json_response({"tokens": None}), "/tokenize answers without tokens"),
        (lambda _: web.json_response({"tokens": ["a"]}), "/tokenize answers without tokens"),
        (
            lambda _: web.Response(body=b" " * 1_000_000 + b'{"tokens": [1]}'),
            "/tokenize answers without tokens",
        ),
    ],
)
async def test_an_engine_that_does_not_say_agrees_with_nothing(answer: Answer, reason: str) -> None:
    """It is asked once, and the reason is its answer."""
    asked: list[dict[str, Any]] = []

    def counted(body: dict[str, Any]) -> web.StreamResponse:
        asked.append(body)
        return answer(body)

    found = await verdict(counted, load(DATA / "chatml"))
    assert (found.ok, found.reasons, len(asked)) == (False, (reason,), 1)
    assert not found.rendering.features
    assert not found.rendering.tokens_agree


async def test_an_engine_that_is_gone_or_silent_agrees_with_nothing() -> None:
    """Neither a refused connection nor one that is never answered is an exception or lasts."""
    rendering = load(DATA / "chatml")
    done = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with aiohttp.ClientSession() as session:
        found = await check_engine(session, f"http://127.0.0.1:{port}", "m", rendering, NOW_UNIX_S, 0.05)
        assert found.reasons == ("/tokenize: TimeoutError",)
        done.set()
        server.close()
        await server.wait_closed()
        gone = await check_engine(session, f"http://127.0.0.1:{port}", "m", rendering, NOW_UNIX_S, 5.0)
    assert gone.reasons == ("/tokenize: ClientConnectorError",)


def test_the_samples_try_every_feature() -> None:
    """A feature without samples would never be covered."""
    assert set(SAMPLES) == set(Feature)
    assert all(SAMPLES.values())
