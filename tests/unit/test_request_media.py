"""Turns in their hashed form: media at fixed width, markers dropped, everything else as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import xxhash

from extproc.errors import Reason, RouterError
from extproc.request.media import compact_parts, compact_turns

BASE64 = "iVBORw0KGgo="


def token(kind: str, payload: str) -> str:
    """What stands for `payload`, computed apart from the code under test."""
    digest = xxhash.xxh3_128(payload.encode()).hexdigest()
    return (digest * 2000)[: {"image": 4096, "audio": 40960, "video": 8192}[kind]]


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
    assert compact_parts([part]) == ([expected], True)
    assert part == original


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "see image_url", "citations": []},
        {"type": "tool_use", "id": "t", "name": "read", "input": {"file": "a.txt", "source": {"data": "x"}}},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "words"}},
        {"type": "document", "source": {"type": "content", "content": "words"}},
        {"type": "search_result", "source": WEB, "content": [{"type": "text", "text": "x", "n": 1}]},
        {"type": "tool_result", "tool_use_id": "t", "content": "done"},
        "a bare string",
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

    def payload(image_url: Any) -> str:
        compacted, _ = compact_parts([{"image_url": image_url}])
        value: Any = compacted[0]["image_url"]  # type: ignore[index]
        return str(value["url"] if isinstance(value, dict) else value)

    assert payload(PNG) == payload({"url": PNG, "detail": "high"})
    assert payload(PNG) != payload(PNG + "A")
    assert len(payload(PNG)) == len(payload(PNG * 1000)) == 4096


def test_media_in_a_tool_result_count_too() -> None:
    """A screenshot returned by a tool is replaced; deeper nesting is left as it came."""
    image = {"type": "image", "source": {"type": "url", "url": WEB}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image, {"content": [image]}]}
    compacted, is_multimodal = compact_parts([result])
    assert is_multimodal is True
    assert isinstance(compacted, list)
    assert compacted[0]["content"] == [
        {"type": "image", "source": {"type": "url", "url": token("image", WEB)}},
        {"content": [image]},
    ]


def test_a_function_output_counts_too() -> None:
    """Responses: an image in what a function returned is replaced, a text output stays."""
    text = {"type": "function_call_output", "call_id": "c", "output": "text"}
    image = {"type": "function_call_output", "output": [{"type": "input_image", "image_url": PNG}]}
    compacted, is_multimodal = compact_turns([text, image], "input")
    assert is_multimodal is True
    assert compacted[0] is text
    assert compacted[1]["output"][0]["image_url"] == token("image", PNG)


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
    assert compact_parts(parts) == ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], False)


def test_nothing_to_change_means_nothing_copied() -> None:
    """Plain conversations pass as the very objects that were decoded."""
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"type": "reasoning", "summary": []},
    ]
    compacted, is_multimodal = compact_turns(turns, "input")
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
