"""A replica with a real tokenizer: completions in its tokens, `/tokenize`, its ids in the cache events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio
from tokenizers import Tokenizer

from testbed.tokenizer_folder import write_tokenizer
from tokenway.simulator.__main__ import parse_settings
from tokenway.simulator.server.app import SimulatorServer, running
from tokenway.simulator.server.kv_events import EventBatch
from tokenway.simulator.server.settings import KvEventsConfig, ServerSettings
from tokenway.simulator.server.text import encode_chat, generate
from tokenway.simulator.server.tokenizer import BpeTokenizer

PROMPT = "def walk(tree):\n    for leaf in tree:\n        yield leaf  # don't, 日本 \U0001f600\n" * 4
MESSAGES = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tokenizer.json` of a byte-level BPE."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
async def server(file: Path) -> AsyncIterator[SimulatorServer]:
    """A replica with that tokenizer that publishes its events."""
    events = KvEventsConfig("tcp://127.0.0.1:*", "tcp://127.0.0.1:*")
    settings = ServerSettings(models=("tiny",), time_scale=0.05, kv_events=events, tokenizer=file)
    async with running(settings) as started:
        yield started


async def _post(server: SimulatorServer, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}{path}", json={"model": "tiny", **body}) as answer,
    ):
        return answer.status, await answer.json()


async def test_tokenize_answers_as_the_tokenizer_does(server: SimulatorServer, file: Path) -> None:
    """A prompt has the ids of tokenizer.json; messages keep the simulator's own."""
    ids = Tokenizer.from_file(str(file)).encode(PROMPT).ids
    assert await _post(server, "/tokenize", prompt=PROMPT) == (
        200,
        {
            "count": len(ids),
            "max_model_len": server.settings.max_model_len,
            "tokens": ids,
            "token_strs": None,
        },
    )
    _, chat = await _post(server, "/tokenize", messages=MESSAGES)
    assert chat["tokens"] == encode_chat(MESSAGES).tolist()


@pytest.mark.parametrize(
    ("body", "status"), [({}, 400), ({"prompt": ""}, 400), ({"prompt": "a", "model": "other"}, 404)]
)
async def test_what_cannot_be_tokenized_is_refused(
    server: SimulatorServer, body: dict[str, Any], status: int
) -> None:
    """No prompt is a 400, an unknown model a 404."""
    assert (await _post(server, "/tokenize", **body))[0] == status


async def test_completions_count_speak_and_announce_real_tokens(server: SimulatorServer, file: Path) -> None:
    """Usage counts the tokenizer's tokens, and the events spell the prompt and what was generated."""
    tokenizer = Tokenizer.from_file(str(file))
    status, answer = await _post(server, "/v1/completions", prompt=PROMPT, max_tokens=40, ignore_eos=True)
    assert (status, answer["usage"]["prompt_tokens"]) == (200, len(tokenizer.encode(PROMPT).ids))
    assert answer["usage"]["completion_tokens"] == 40
    announced = [
        token for batch in await _replayed(server) for event in batch.events for token in _tokens(event)
    ]
    text = tokenizer.decode(announced, skip_special_tokens=False)
    assert text.startswith(PROMPT)
    assert (PROMPT + answer["choices"][0]["text"]).startswith(text)


async def test_token_ids_and_chats_are_as_without_a_tokenizer(server: SimulatorServer) -> None:
    """A prompt of token ids is taken as it is, a chat is cut into pieces of four bytes."""
    _, ids = await _post(server, "/v1/completions", prompt=[5] * 50)
    _, chat = await _post(server, "/v1/chat/completions", messages=MESSAGES)
    assert ids["usage"]["prompt_tokens"] == 50
    assert chat["usage"]["prompt_tokens"] == len(encode_chat(MESSAGES))


def test_what_is_generated_is_of_the_vocabulary(file: Path) -> None:
    """Each piece is the text of its id, plain ASCII; special tokens are never said."""
    tokenizer = Tokenizer.from_file(str(file))
    output = generate(np.arange(9, dtype=np.uint32), 300, True, BpeTokenizer(file).words)
    assert [word.decode() for word in output.words] == [
        tokenizer.decode([int(index)], skip_special_tokens=False) for index in output.token_ids
    ]
    assert all(word.isascii() and word not in b'"\\' and not word.startswith(b"<|") for word in output.words)
    assert len(set(output.words)) > 100


@pytest.mark.parametrize("content", [None, "{}", "no JSON"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    """A missing or foreign file is a ValueError that names it, before anything is served."""
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        SimulatorServer(replace(ServerSettings(), tokenizer=path))


def test_the_command_line_names_the_file(file: Path) -> None:
    """`--tokenizer FILE` becomes the setting; without it there is none."""
    assert parse_settings(["--tokenizer", str(file)]).tokenizer == file
    assert parse_settings([]).tokenizer is None


def _tokens(event: object) -> list[int]:
    found: list[int] = getattr(event, "token_ids", [])
    return found


async def _replayed(server: SimulatorServer) -> list[EventBatch]:
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/kv_event_sources") as answer:
        address = (await answer.json())["0"]["replay_endpoint"]
    batches: list[EventBatch] = []
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(address)
        await dealer.send_multipart((b"", bytes(8)))
        while (frames := await dealer.recv_multipart())[-1]:
            batches.append(msgspec.msgpack.decode(frames[-1], type=EventBatch))
    return batches
