"""Turns in their hashed form: media at fixed width, markers dropped, everything else as it was."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import orjson
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import Reason, RouterError
from extproc.request.blocks import block_hashes
from extproc.request.media import MAX_WIDTH_BYTES, WIDTH_BYTES, compact_parts, compact_turns, widths_of

BASE64 = "iVBORw0KGgo="


def token(kind: str, payload: str) -> orjson.Fragment:
    """What stands for `payload`, computed apart from the code under test."""
    mark = {"image": b"i", "audio": b"a", "video": b"v"}[kind]
    return orjson.Fragment(b'"\xff' + mark + xxhash.xxh3_128(payload.encode()).hexdigest().encode() + b'"')


def same(one: object, other: object) -> bool:
    """Equal but for the order of keys, tokens included."""
    return orjson.dumps(one, option=orjson.OPT_SORT_KEYS) == orjson.dumps(other, option=orjson.OPT_SORT_KEYS)


def widths(turns: object) -> tuple[tuple[int, int], ...]:
    """Of encoded turns."""
    return widths_of(orjson.dumps(turns))


def data_url(media_type: str) -> str:
    """A data URL of that type."""
    return f"data:{media_type};base64,{BASE64}"


PNG, MP4, MP3, PDF = map(data_url, ("image/png", "video/mp4", "audio/mpeg", "application/pdf"))
WEB = "https://example.org/cat.png"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (
            {"type": "image_url", "image_url": {"url": PNG, "detail": "low"}},
            {"type": "image_url", "image_url": {"url": token("image", PNG), "detail": "low"}},
        ),
        (
            {"type": "image_url", "image_url": {"url": WEB}, "uuid": "u"},
            {"type": "image_url", "image_url": {"url": token("image", WEB)}, "uuid": "u"},
        ),
        (
            {"type": "input_image", "image_url": PNG, "detail": "auto"},
            {"type": "input_image", "image_url": token("image", PNG), "detail": "auto"},
        ),
        (
            {"type": "input_image", "file_id": "f-1"},
            {"type": "input_image", "file_id": token("image", "f-1")},
        ),
        (
            {"type": "input_audio", "input_audio": {"data": BASE64, "format": "wav"}},
            {"type": "input_audio", "input_audio": {"data": token("audio", BASE64), "format": "wav"}},
        ),
        (
            {"type": "audio_url", "audio_url": {"url": MP3}},
            {"type": "audio_url", "audio_url": {"url": token("audio", MP3)}},
        ),
        (
            {"type": "video_url", "video_url": {"url": WEB}},
            {"type": "video_url", "video_url": {"url": token("video", WEB)}},
        ),
        (
            {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
            {"type": "file", "file": {"filename": "a.pdf", "file_data": token("image", PDF)}},
        ),
        (
            {"type": "file", "file": {"file_data": MP4}},
            {"type": "file", "file": {"file_data": token("video", MP4)}},
        ),
        (
            {"type": "input_file", "filename": "a.mp3", "file_data": MP3},
            {"type": "input_file", "filename": "a.mp3", "file_data": token("audio", MP3)},
        ),
        (
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": token("image", BASE64)},
            },
        ),
        (
            {"type": "document", "source": {"type": "base64", "media_type": "video/mp4", "data": BASE64}},
            {
                "type": "document",
                "source": {"type": "base64", "media_type": "video/mp4", "data": token("video", BASE64)},
            },
        ),
        (
            {"type": "image", "source": {"type": "url", "url": WEB}},
            {"type": "image", "source": {"type": "url", "url": token("image", WEB)}},
        ),
        (
            {"type": "image_embeds", "image_embeds": BASE64},
            {"type": "image_embeds", "image_embeds": token("image", BASE64)},
        ),
    ],
)
def test_a_medium_counts_by_content_hash_at_its_kinds_width(
    part: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Every known form of image, audio, video and file has its payload, and only that, replaced."""
    original = copy.deepcopy(part)
    compacted, is_multimodal = compact_parts([part])
    assert is_multimodal is True
    assert same(compacted, [expected])
    assert part == original


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "see image_url", "own": []},
        {"type": "tool_use", "id": "t", "name": "read", "input": {"file": "a.txt", "source": {"data": "x"}}},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}},
        {"type": "document", "source": {"type": "content", "content": "words"}},
        {"type": "search_result", "source": WEB, "content": [{"type": "text", "text": "x", "n": 1}]},
        "a bare string",
        {"type": "tool_result", "tool_use_id": "t", "content": "done"},
        None,
        7,
    ],
)
def test_what_is_not_media_stays(part: object) -> None:
    """Text, tool calls with suggestive argument names, text documents and oddities are not media."""
    compacted, is_multimodal = compact_parts([part, part])
    assert compacted == [part, part]
    assert is_multimodal is False


def test_a_medium_known_by_uuid_only_is_media() -> None:
    """An image left out because vLLM has it under that uuid still makes the request multimodal."""
    part = {"type": "image_url", "image_url": None, "uuid": "u"}
    assert compact_parts([part]) == ([part], True)


def test_different_media_differ_and_equal_media_agree() -> None:
    """Content decides, not the part that carries it; length does not show."""

    def payload(image_url: Any) -> bytes:
        compacted, _ = compact_parts([{"image_url": image_url}])
        value: Any = compacted[0]["image_url"]  # type: ignore[index]
        return orjson.dumps(value["url"] if isinstance(value, dict) else value)

    assert payload(PNG) == payload({"url": PNG, "detail": "high"})
    assert payload(PNG) != payload(PNG + "A")
    assert len(payload(PNG)) == len(payload(PNG * 1000)) == 36


@pytest.mark.parametrize(
    ("field", "kind"), [("image_url", "image"), ("audio_url", "audio"), ("video_url", "video")]
)
def test_a_medium_counts_for_its_width(field: str, kind: str) -> None:
    """So many bytes more than its token has, from where the token begins."""
    turns, _ = compact_turns([{"role": "user", "content": [{field: WEB}]}], "messages")
    encoded = orjson.dumps(turns)
    ((offset, more),) = widths_of(encoded)
    assert encoded[offset : offset + 1] == b"\xff"
    assert more + 36 == WIDTH_BYTES[kind]


@pytest.mark.parametrize("field", ["image_url", "input_audio", "audio_url", "video_url", "file", "source"])
def test_the_width_of_a_request_is_bounded(field: str) -> None:
    """Thousands of media without content count for no more than a context, and are no bytes at all."""
    one = [{"role": "user", "content": [{field: {"url": ""}}] * 5000}]
    many = [{"role": "user", "content": [{"type": "tool_result", "content": [{field: {"url": ""}}]}]}] * 5000
    for turns in (one, many):
        compacted, _ = compact_turns(turns, "messages")
        encoded = orjson.dumps(compacted)
        assert sum(more for _, more in widths_of(encoded)) == MAX_WIDTH_BYTES
        assert len(encoded) <= 3 * len(orjson.dumps(turns))
        assert (
            len(block_hashes(encoded, 1, widths=widths_of(encoded)))
            == (len(encoded) + MAX_WIDTH_BYTES) // 512
        )


def test_no_text_imitates_a_token() -> None:
    """What a client writes has no width, be it the very characters of a token."""
    said = orjson.dumps("x").decode() + "\u00ffi" + xxhash.xxh3_128(b"").hexdigest() + "\\xffi\xff"
    assert widths([{"role": "user", "content": said}]) == ()


@given(
    st.lists(st.sampled_from(["a" * 40, "b" * 700, PNG, MP3]), max_size=6),
    st.lists(st.sampled_from(["c" * 90, PNG, MP4]), max_size=4),
)
def test_a_prefix_with_media_has_the_hashes_of_a_prefix(before: list[str], after: list[str]) -> None:
    """What follows changes no block before it, widths included."""

    def hashes(said: list[str]) -> Sequence[int]:
        turns = [
            {"role": "user", "content": [{"image_url": one} if one.startswith("data:") else one]}
            for one in said
        ]
        encoded = orjson.dumps(compact_turns(turns, "messages")[0])[:-1]
        return block_hashes(encoded, 1, widths=widths_of(encoded))

    begun = hashes(before)
    assert hashes([*before, *after])[: len(begun)] == begun


def test_media_in_a_tool_result_count_too() -> None:
    """A screenshot returned by a tool is replaced; deeper nesting is left as it came."""
    image = {"type": "image", "source": {"type": "url", "url": WEB}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image, {"content": [image]}]}
    compacted, is_multimodal = compact_parts([result])
    assert is_multimodal is True
    assert isinstance(compacted, list)
    assert same(
        compacted[0]["content"],
        [
            {"type": "image", "source": {"type": "url", "url": token("image", WEB)}},
            {"content": [image]},
        ],
    )


def test_a_function_output_counts_too() -> None:
    """Responses: an image in what a function returned is replaced, a text output stays."""
    text = {"type": "function_call_output", "call_id": "c", "output": "text"}
    image = {"type": "function_call_output", "output": [{"type": "input_image", "image_url": PNG}]}
    compacted, is_multimodal = compact_turns([text, image], "input", as_chat=False)
    assert is_multimodal is True
    assert compacted[0] == text
    assert same(compacted[1]["output"][0]["image_url"], token("image", PNG))


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}],
        [{"type": "text", "text": "hi"}],
        [{"text": "hi", "type": "text", "cache_control": None}],
        [{"type": "input_text", "text": "hi"}],
    ],
)
def test_a_lone_text_part_is_its_string(content: list[Any]) -> None:
    """However a client dresses one text, with or without cache marker, it counts as the text."""
    turns = [{"role": "user", "content": content}]
    original = copy.deepcopy(turns)
    assert compact_turns(turns, "messages") == ([{"role": "user", "content": "hi"}], False)
    assert turns == original


def test_cache_markers_are_dropped_among_several_parts() -> None:
    """Markers do not count; parts stay apart because engines join them."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {}}]
    assert compact_parts(parts) == (["a", "b"], False)


def test_nothing_to_change_means_nothing_copied() -> None:
    """Plain conversations pass as the very objects that were decoded."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    compacted, is_multimodal = compact_turns(turns, "messages")
    assert compacted is turns
    assert is_multimodal is False


@pytest.mark.parametrize(
    ("turns", "param"),
    [
        (["hi"], "messages[0]"),
        ([{"content": "a"}, None], "messages[1]"),
        ([{"content": "a"}, {"content": {"text": "b"}}], "messages[1].content"),
        ([{"content": 7}], "messages[0].content"),
    ],
)
def test_a_turn_of_the_wrong_shape_is_named(turns: list[Any], param: str) -> None:
    """The client learns which message to look at."""
    with pytest.raises(RouterError) as raised:
        compact_turns(turns, "messages")
    assert (raised.value.reason, raised.value.param) == (Reason.INVALID_REQUEST, param)
