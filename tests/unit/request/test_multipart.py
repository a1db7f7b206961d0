"""Forms: read within bounds, edited byte for byte."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import Reason, RouterError
from extproc.request.multipart import (
    MAX_FIELD_BYTES,
    MAX_LOOKALIKES,
    MAX_PARAMETERS,
    MAX_PART_HEADER_BYTES,
    MAX_PART_HEADERS,
    MAX_PARTS,
    Form,
    Upload,
    check_type,
)
from extproc.request.sanitize import STEERING_FIELDS

NONE: frozenset[str] = frozenset()
HEAD = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n'
AUDIO = (
    b'--b\r\ncontent-disposition: form-data; name="file"; filename="m\\"x.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\n"
)


def part(name: bytes, value: bytes) -> bytes:
    """One text field."""
    return HEAD % name + value + b"\r\n"


def body(*parts: bytes) -> bytes:
    """A form of these parts."""
    return b"".join(parts) + b"--b--\r\n"


def file(content: bytes) -> bytes:
    """One file, whose name has a quote in it."""
    return AUDIO + content + b"\r\n"


def refusal(sent: bytes) -> str:
    """Why a body is refused."""
    with pytest.raises(RouterError) as raised:
        Form(sent).fields()
    assert raised.value.reason is Reason.INVALID_REQUEST
    return raised.value.message


def test_fields_are_read_and_files_are_not() -> None:
    """Text as text, of a file its size, of several the last, and nothing of what is too large."""
    sent = body(
        file(b"RIFF\r\n--bb\r\n--\x00"),
        part(b"model", "größer".encode()),
        part(b"language", b"de"),
        part(b"language", b"en"),
        part(b"empty", b""),
        part(b"prompt", b"x" * (MAX_FIELD_BYTES + 1)),
    )
    assert Form(sent).fields() == {
        "file": Upload(15),
        "model": "größer",
        "language": "en",
        "empty": "",
    }


@pytest.mark.parametrize("after", [b"", b"epilogue", b"\r\n--b\r\nanything"])
def test_what_follows_the_end_is_left(after: bytes) -> None:
    """An epilogue has no meaning, and passes as it came."""
    sent = body(part(b"model", b"m")) + after
    assert Form(sent).fields() == {"model": "m"}
    assert Form(sent).rewritten("other", NONE) == body(part(b"model", b"other")) + after


@pytest.mark.parametrize("position", range(3))
def test_the_model_alone_is_replaced(position: int) -> None:
    """Wherever it stands, every other byte stays."""
    parts = [file(bytes(range(256)) * 4), part(b"temperature", b"0.5")]

    def with_model(name: bytes) -> bytes:
        return body(*parts[:position], part(b"model", name), *parts[position:])

    form = Form(with_model(b"alias"))
    assert form.rewritten(None, NONE) is None
    assert form.rewritten("the/model-itself", NONE) == with_model(b"the/model-itself")


@pytest.mark.parametrize("name", [*STEERING_FIELDS, "vllm_xargs[kv_transfer_params]"])
@pytest.mark.parametrize("position", range(3))
def test_steering_fields_are_taken_out(name: str, position: int) -> None:
    """The first, one between, the last, each with its delimiter; and stay where the operator allows them."""
    parts = [part(b"model", b"m"), file(b"RIFF")]
    sent = body(*parts[:position], part(name.encode(), b"1"), *parts[position:])
    assert Form(sent).rewritten(None, NONE) == body(*parts)
    allowed = name.replace("[", ".").removesuffix("]")
    assert Form(sent).rewritten(None, frozenset([allowed])) is None


def test_steering_within_a_field_is_taken_out() -> None:
    """`vllm_xargs` is JSON inside a field; what of it does not steer stays, and what is no JSON passes."""
    sent = body(part(b"model", b"m"), part(b"vllm_xargs", b'{"a": 1, "kv_transfer_params": {}}'))
    assert Form(sent).rewritten(None, NONE) == body(part(b"model", b"m"), part(b"vllm_xargs", b'{"a":1}'))
    assert Form(body(part(b"model", b"m"), part(b"vllm_xargs", b"{"))).rewritten(None, NONE) is None


def test_a_form_of_steering_alone_is_empty() -> None:
    """Nothing is left but the closing delimiter."""
    assert Form(body(part(b"priority", b"1"), part(b"rid", b"2"))).rewritten(None, NONE) == body()


REFUSED = {
    "empty": b"",
    "json": b'{"model": "m"}',
    "preamble": b"hello\r\n" + body(part(b"model", b"m")),
    "no_boundary": b"--\r\n" + body(part(b"model", b"m")),
    "endless_boundary": b"--" + b"b" * 100 + b"\r\n",
    "no_end": part(b"model", b"m"),
    "cut_in_headers": HEAD[:30],
    "no_parts": b"--b--\r\n",
    "too_many_parts": body(*[part(b"x", b"")] * (MAX_PARTS + 1)),
    "long_headers": body(b"--b\r\nx: " + b"y" * MAX_PART_HEADER_BYTES + b"\r\n\r\n\r\n"),
    "two_models": body(part(b"model", b"a"), part(b"model", b"b")),
    "model_file": body(AUDIO.replace(b'"file"', b'"model"') + b"m\r\n"),
    "model_huge": body(part(b"model", b"m" * (MAX_FIELD_BYTES + 1))),
    "model_not_utf8": body(part(b"model", b"\xff")),
    "no_name": body(b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n"),
    "no_disposition": body(b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n"),
    "other_disposition": body(b'--b\r\nContent-Disposition: file; name="model"\r\n\r\nm\r\n'),
    "two_dispositions": body(HEAD[:-2] % b"a" + HEAD[5:] % b"model" + b"m\r\n"),
    "two_names": body(b'--b\r\nContent-Disposition: form-data; name="a"; name="model"\r\n\r\nm\r\n'),
    "encoded_name": body(b"--b\r\nContent-Disposition: form-data; name*=utf-8''model\r\n\r\nm\r\n"),
    "escaped_name": body(b'--b\r\nContent-Disposition: form-data; name="mo\\del"\r\n\r\nm\r\n'),
    "name_two_ways": body(b"--b\r\nContent-Disposition: form-data; name=a; name*=utf-8''model\r\n\r\nm\r\n"),
    "name_in_pieces": body(b"--b\r\nContent-Disposition: form-data; name*0=mo; name*1=del\r\n\r\nm\r\n"),
    "open_quote": body(b'--b\r\nContent-Disposition: form-data; name="model\r\n\r\nm\r\n'),
    "behind_the_quote": body(b'--b\r\nContent-Disposition: form-data; name="mo"del\r\n\r\nm\r\n'),
    "in_angles": body(b"--b\r\nContent-Disposition: form-data; name=<model>\r\n\r\nm\r\n"),
    "many_parameters": body(
        b"--b\r\nContent-Disposition: form-data; name=a"
        + b"".join(b"; p%d=1" % number for number in range(MAX_PARAMETERS))
        + b"\r\n\r\nm\r\n"
    ),
    "many_headers": body(b"--b\r\n" + b"a: b\r\n" * MAX_PART_HEADERS + HEAD[5:] % b"model" + b"m\r\n"),
    "two_xargs": body(part(b"vllm_xargs", b"{}"), part(b"vllm_xargs", b"{}")),
    "xargs_huge": body(part(b"vllm_xargs", b'{"a": "' + b"x" * MAX_FIELD_BYTES + b'"}')),
    "folded": body(b'--b\r\nContent-Disposition: form-data;\r\n name="model"\r\n\r\nm\r\n'),
    "charset_of_a_part": body(
        b'--b\r\nContent-Disposition: form-data; name="+AHAAcgBpAG8AcgBpAHQAeQ-"\r\n'
        b"Content-Type: text/plain; charset=utf-7\r\n\r\n1\r\n"
    ),
    "second_charset_of_a_part": body(
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n'
        b'Content-Type: text/plain; charset=utf-8; charset="utf-16"\r\n\r\nm\r\n'
    ),
    "charset_of_all": body(part(b"_charset_", b"utf-7"), part(b"model", b"m")),
    "base64": body(
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n'
        b"Content-Transfer-Encoding: base64\r\n\r\nbQ==\r\n"
    ),
}


@pytest.mark.parametrize("sent", REFUSED.values(), ids=REFUSED.keys())
def test_what_parsers_might_read_otherwise_is_refused(sent: bytes) -> None:
    """A sentence that says what is wrong and quotes nothing."""
    message = refusal(sent)
    assert message
    assert "\r" not in message


PLAIN_CHARSETS = ("utf-8", "UTF8", "us-ascii", "ISO-8859-1", "latin1", "windows-1252")


@pytest.mark.parametrize("charset", PLAIN_CHARSETS)
def test_encodings_in_which_ascii_is_ascii_are_fine(charset: str) -> None:
    """Java's clients name one with each part."""
    kind = f"text/plain; charset={charset}\r\n\r\nm\r\n".encode()
    sent = body(
        part(b"_charset_", charset.encode()),
        b'--b\r\nContent-Disposition: form-data; name="model"\r\nContent-Type: ' + kind,
        AUDIO.replace(b"audio/wav", b"audio/wav; charset=binary") + b"RIFF\r\n",
    )
    assert Form(sent).fields()["model"] == "m"
    check_type(f"multipart/form-data; boundary=b; charset={charset}", sent)


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "multipart/form-data; boundary=b",
        'Multipart/Form-Data ; Boundary = "b"',
        "multipart/form-data;boundary=b;x=y",
        'multipart/form-data; charset="UTF-8"; boundary=b',
    ],
)
def test_a_type_that_says_what_the_body_is_passes(content_type: str | None) -> None:
    """As clients write it."""
    check_type(content_type, memoryview(body(part(b"model", b"m"))))


@pytest.mark.parametrize("boundary", ["----WebKitFormBoundary7MA4YWxk", "=_Part_1:2/3?(4)+,5", "a b"])
def test_boundaries_are_as_the_standard_has_them(boundary: str) -> None:
    """With quotes; without them where clients forget them."""
    sent = body(part(b"model", b"m")).replace(b"--b", b"--" + boundary.encode())
    check_type(f'multipart/form-data; boundary="{boundary}"', sent)
    if " " not in boundary:
        check_type(f"multipart/form-data; boundary={boundary}", sent)


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=b",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=x",
        "multipart/form-data; boundary=bb",
        "multipart/form-data; boundary=b; boundary=x",
        "multipart/form-data; boundary=b,multipart/form-data; boundary=x",
        "multipart/form-data; boundary*=utf-8''b",
        "multipart/form-data; boundary=b; boundary*0=x",
        'multipart/form-data; boundary="\\b"',
        "multipart/form-data; boundary=b; charset=utf-7",
        'multipart/form-data; boundary=b; charset="UTF-16"',
        "multipart/form-data; boundary=b; charset=cp037",
        "multipart/form-data; boundary=b; charset=utf-8-sig",
        "multipart/form-data; boundary=b; charset*=utf-8''utf-7",
        "multipart/form-data; boundary=b; charset=utf-8; charset=utf-7",
    ],
)
def test_a_type_by_which_engines_would_read_other_fields_is_refused(content_type: str) -> None:
    """Another boundary, or an encoding by which other names are what steers."""
    with pytest.raises(RouterError) as raised:
        check_type(content_type, body(part(b"model", b"m")))
    assert raised.value.reason is Reason.INVALID_REQUEST


@pytest.mark.parametrize(
    "disposition",
    [
        b'FORM-DATA; NAME="model"',
        b"form-data; name=model",
        b'form-data ; name = "model"',
    ],
)
def test_a_name_is_read_as_engines_read_it(disposition: bytes) -> None:
    """In any case, with or without quotes: none of these hides a field."""
    sent = body(b"--b\r\nCONTENT-DISPOSITION: " + disposition + b"\r\n\r\nm\r\n")
    assert Form(sent).fields() == {"model": "m"}


@given(
    fields=st.lists(st.tuples(st.sampled_from(["a", "b", "model"]), st.binary(max_size=40)), max_size=4),
    tail=st.binary(max_size=40),
)
def test_any_bytes_are_a_form_or_refused(fields: list[tuple[str, bytes]], tail: bytes) -> None:
    """And where a form is edited, a second look at it finds what was asked for."""
    sent = b"".join(part(name.encode(), value) for name, value in fields) + b"--b--" + tail
    try:
        form = Form(sent)
        before = form.fields()
    except RouterError:
        return
    if "model" in before:
        edited = form.rewritten("other", NONE)
        assert edited is not None
        assert Form(edited).fields() == before | {"model": "other"}


@pytest.mark.parametrize("model_first", [True, False])
def test_a_large_file_is_passed_over(model_first: bool) -> None:
    """25 MB, OpenAI's limit, before or behind the model, with the delimiter's first bytes all over it."""
    parts = [part(b"model", b"alias"), file(b"\r\n--a" * 5_000_000)]
    if not model_first:
        parts.reverse()
    form = Form(body(*parts))
    assert form.fields() == {"model": "alias", "file": Upload(25_000_000)}
    edited = form.rewritten("m", NONE)
    assert edited is not None
    assert len(edited) == len(body(*parts)) - len("alia")


def test_a_file_of_delimiters_costs_no_search_each() -> None:
    """What looks like the end again and again is refused after a few: 30 MB of it would take 12 s."""
    few = file(b"\r\n--bx" * MAX_LOOKALIKES)
    assert Form(body(few, part(b"model", b"m"))).fields()["model"] == "m"
    assert "looks like an end" in refusal(body(file(b"\r\n--bx" * 5_000_000)))


@pytest.mark.parametrize(
    "disposition",
    [
        b'form-data; name="' + b";" * 4000 + b'"',
        b'form-data; name="' + b";" * 4000,
        b'form-data; name="' + b'\\";' * 1300 + b'"',
        b'form-data; name="a"' + b"".join(b"; p*%d=1" % number for number in range(400)),
        b"form-data" + b" ;" * 2000,
        b"form-data; name" + b" " * 4000 + b"=a",
    ],
    ids=["quoted", "open", "escapes", "pieces", "empty", "spaces"],
)
def test_headers_are_read_in_one_pass(disposition: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """email.message takes 18 s for a megabyte of the first, and is not asked."""
    monkeypatch.delattr("email.message.Message.get_params")
    parts = body(
        part(b"model", b"m"),
        *[b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\nx\r\n"] * (MAX_PARTS - 1),
    )
    with suppress(RouterError):
        assert Form(parts).fields()["model"] == "m"


def test_clients_forms_are_read() -> None:
    """As aiohttp writes them."""

    async def written() -> bytes:
        data = aiohttp.FormData()
        data.add_field("model", "whisper")
        data.add_field("file", b"RIFF" * 100, filename="größe.wav", content_type="audio/wav")
        data.add_field("timestamp_granularities[]", "word")
        payload: Any = data()
        chunks: list[bytes] = []

        class Writer:
            async def write(self, chunk: bytes) -> None:
                chunks.append(bytes(chunk))

        await payload.write(Writer())
        return b"".join(chunks)

    assert Form(asyncio.run(written())).fields() == {
        "model": "whisper",
        "file": Upload(400),
        "timestamp_granularities[]": "word",
    }
