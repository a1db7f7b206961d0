"""What is neither chat nor completion: to the right engine, by its name, unsteered (fixture `plain`)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from aiohttp import web
from openai import AsyncOpenAI

from extproc.request.parse import INFERENCE_PATHS
from tests.e2e.conftest import Shared
from tests.e2e.harness import Reply, check, exchange, send
from tests.e2e.small_api_bodies import BODIES, MESSAGES

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

AUDIO_PATHS = ("/v1/audio/transcriptions", "/v1/audio/translations")


def form(model: str, audio: bytes, *extra: tuple[str, str], boundary: str = "gateway") -> bytes:
    """An audio request's body; `extra` fields come after the file."""
    parts = [f'Content-Disposition: form-data; name="model"\r\n\r\n{model}'.encode()]
    parts.append(b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + audio)
    parts += [
        f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in extra
    ]
    return b"".join(f"--{boundary}\r\n".encode() + part + b"\r\n" for part in parts) + (
        f"--{boundary}--\r\n".encode()
    )


async def upload(plain: Shared, path: str, body: bytes) -> Reply:
    """POST a form."""
    return await send(
        plain.stack, "POST", path, body, {"content-type": "multipart/form-data; boundary=gateway"}
    )


async def test_every_path_is_tried() -> None:
    """A new operation is not forgotten here."""
    chat = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings"}
    assert {*BODIES, *AUDIO_PATHS, *chat} == set(INFERENCE_PATHS)


@pytest.mark.parametrize(("path", "body"), BODIES.items())
async def test_an_engine_answers(plain: Shared, path: str, body: dict[str, Any]) -> None:
    """By an alias of its model, and the decision's record says which operation it was."""
    reply = await send(plain.stack, "POST", path, {"model": "simulated", **body})
    assert reply.status == 200, reply
    await plain.stack.settled()
    (record,) = await plain.stack.last(1)
    assert (record["outcome"]["status"], record["model"]) == (200, "sim")
    assert path.rpartition("/")[2] in (record["operation"], record["operation"] + "s")


@pytest.mark.parametrize(("path", "body"), BODIES.items())
async def test_the_engine_is_asked_by_its_own_name(plain: Shared, path: str, body: dict[str, Any]) -> None:
    """An adapter's name is written into the body, what steers is taken out, the rest stays."""
    sent = {"model": "tuned", **body, "priority": -5, "truncate_prompt_tokens": 7}
    assert (await send(plain.stack, "POST", path + "?x=1", sent)).status == 200
    (received,) = plain.recorder.received
    assert received.path == path + "?x=1"
    assert json.loads(received.body) == {"model": "polite", **body, "truncate_prompt_tokens": 7}


@pytest.mark.parametrize("end", ["/", "%2F", "/?x=1"])
@pytest.mark.parametrize("path", [path for path in INFERENCE_PATHS if path not in AUDIO_PATHS])
async def test_a_slash_at_the_end_of_a_path_is_no_matter(plain: Shared, path: str, end: str) -> None:
    """Engines have none there: they would answer 404, or a redirection, and look as if they failed."""
    body = json.dumps({"messages": MESSAGES, "prompt": "hi", **BODIES.get(path, {"input": "hi"})})
    for model in ("sim", "tuned"):
        sent = json.dumps({"model": model, "max_tokens": 3, **json.loads(body)}).encode()
        head = f"POST {path}{end} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
        framed = f"{head}content-length: {len(sent)}\r\n\r\n".encode() + sent
        assert (await exchange(plain.stack.port, framed)).status == 200
    (received,) = plain.recorder.received
    assert received.path == path + "".join(end.partition("?")[1:])
    assert json.loads(received.body)["model"] == "polite"


@pytest.mark.parametrize("path", AUDIO_PATHS)
async def test_nor_is_it_where_forms_go(plain: Shared, path: str) -> None:
    """Likewise."""
    assert (await upload(plain, f"{path}/", form("recorded", b"RIFF"))).status == 200
    assert plain.recorder.received[0].path == path


@pytest.mark.parametrize("path", [*BODIES, *AUDIO_PATHS])
async def test_an_unknown_model_reaches_no_engine(plain: Shared, path: str) -> None:
    """404 in the shape of the API."""
    if path in AUDIO_PATHS:
        check(await upload(plain, path, form("nope", b"RIFF")), 404, "model_not_found")
        return
    reply = await send(plain.stack, "POST", path, {"model": "nope", **BODIES[path]})
    assert reply.status == 404
    assert ("type" in reply.json) is path.startswith("/v1/messages")


@pytest.mark.parametrize("path", [*BODIES, *AUDIO_PATHS])
async def test_they_take_post_alone(plain: Shared, path: str) -> None:
    """Any other method is 405."""
    assert (await send(plain.stack, "GET", path)).status == 405


@pytest.mark.parametrize("path", AUDIO_PATHS)
async def test_a_form_arrives_byte_for_byte(plain: Shared, path: str) -> None:
    """Unchanged under the engine's own name; else only the model's part is another, and steering is gone."""
    audio = bytes(range(256)) * 100
    sent = form("recorded", audio, ("language", "de"))
    assert (await upload(plain, path, sent)).status == 200
    steered = form("tuned", audio, ("priority", "-5"), ("language", "de"), ("request_id", "mine"))
    assert (await upload(plain, path, steered)).status == 200
    first, second = plain.recorder.received
    assert first.body == sent
    assert second.body == form("polite", audio, ("language", "de"))
    assert second.headers["content-length"] == str(len(second.body))
    assert second.headers["content-type"] == "multipart/form-data; boundary=gateway"


@pytest.mark.parametrize("model", ["recorded", "tuned"])
async def test_ten_megabytes_of_audio_pass(plain: Shared, model: str) -> None:
    """As large as the largest JSON that is tried, rewritten or not."""
    audio = bytes(range(250)) * 40_000
    assert (await upload(plain, AUDIO_PATHS[0], form(model, audio))).status == 200
    (received,) = plain.recorder.received
    assert received.body == form("polite" if model == "tuned" else "recorded", audio)


async def test_no_form_is_refused(plain: Shared) -> None:
    """JSON where audio is expected, a form that is cut short, one whose model is not clear."""
    for body in (
        b'{"model": "recorded"}',
        form("recorded", b"RIFF")[:-20],
        form("recorded", b"RIFF", ("model", "sim")),
    ):
        check(await upload(plain, AUDIO_PATHS[0], body), 400, "invalid_request")
    assert plain.recorder.received == []


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data; boundary=gateway; charset=utf-7",
        "multipart/form-data; boundary=other",
        "application/x-www-form-urlencoded",
    ],
)
@pytest.mark.parametrize("padding", [0, 3_000_000])
async def test_a_form_that_engines_would_read_otherwise_reaches_none(
    plain: Shared, content_type: str, padding: int
) -> None:
    """By its content type: Starlette, and with it vLLM, decodes the names of fields as that says."""
    hidden = form("recorded", b"RIFF" + b"x" * padding, ("+AHAAcgBpAG8AcgBpAHQAeQ-", "-5"))
    reply = await send(plain.stack, "POST", AUDIO_PATHS[0], hidden, {"content-type": content_type})
    check(reply, 400, "invalid_request")
    assert plain.recorder.received == []


async def test_a_chunked_form_is_a_form(plain: Shared) -> None:
    """Uploaded in pieces, without a length."""
    body = form("tuned", b"RIFF")
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n"
    head += b"content-type: multipart/form-data; boundary=gateway\r\n\r\n"
    chunks = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:50], body[50:])]
    reply = await exchange(plain.stack.port, head, *chunks, b"0\r\n\r\n")
    assert reply.status == 200
    (received,) = plain.recorder.received
    assert received.body == form("polite", b"RIFF")


@pytest.mark.parametrize("text", ["", "ok"])
async def test_the_text_of_silence_is_an_answer(plain: Shared, text: str) -> None:
    """Where the client asked for text alone nothing, or next to nothing, is the whole answer."""

    async def say(_: web.Request) -> web.Response:
        return web.Response(text=text)

    plain.recorder.behaviour = say
    reply = await upload(plain, AUDIO_PATHS[0], form("recorded", b"RIFF", ("response_format", "text")))
    assert (reply.status, reply.body) == (200, text.encode())
    await plain.stack.settled()
    (record,) = await plain.stack.last(1)
    assert (record["operation"], record["outcome"]["ended"]) == ("transcription", "completed")


async def test_the_official_client_is_heard(client: AsyncOpenAI, plain: Shared) -> None:
    """Whole and streamed."""
    audio = ("speech.wav", b"RIFF" * 10_000)
    heard = await client.audio.transcriptions.create(model="simulated", file=audio)
    assert heard.text
    raw = await client.audio.transcriptions.with_raw_response.create(model="sim", file=audio, stream=True)
    assert (await raw.http_response.aread()).endswith(b"data: [DONE]\n\n")
    await plain.stack.settled()
    streamed, *_ = await plain.stack.last(1)
    assert (streamed["operation"], streamed["stream"]) == ("transcription", True)
