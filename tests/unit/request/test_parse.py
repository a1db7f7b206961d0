"""Bodies in, requests or refusals out: fields, canonical prompts, and no surprise from any bytes."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import Reason, RouterError
from extproc.request.blocks import block_hashes
from extproc.request.parse import INFERENCE_PATHS, operation_of, parse, path_at_engines
from extproc.values.requests import InferenceRequest, Operation

PATHS = {
    Operation.CHAT: "/v1/chat/completions",
    Operation.TEXT_COMPLETION: "/v1/completions",
    Operation.RESPONSES: "/v1/responses",
    Operation.MESSAGES: "/v1/messages",
    Operation.EMBEDDINGS: "/v1/embeddings",
}
OTHER_PATHS = {
    "/v1/responses/compact": Operation.COMPACT,
    "/v1/responses/input_tokens": Operation.INPUT_TOKENS,
    "/v1/messages/count_tokens": Operation.COUNT_TOKENS,
    "/tokenize": Operation.TOKENIZE,
    "/v1/tokenize": Operation.TOKENIZE,
    "/detokenize": Operation.DETOKENIZE,
    "/v1/detokenize": Operation.DETOKENIZE,
    "/rerank": Operation.RERANK,
    "/v1/rerank": Operation.RERANK,
    "/v2/rerank": Operation.RERANK,
    "/score": Operation.SCORE,
    "/v1/score": Operation.SCORE,
    "/classify": Operation.CLASSIFY,
    "/v1/classify": Operation.CLASSIFY,
    "/pooling": Operation.POOLING,
    "/v1/audio/transcriptions": Operation.TRANSCRIPTION,
    "/v1/audio/translations": Operation.TRANSLATION,
}
EVERY_PATH = {path: operation for operation, path in PATHS.items()} | OTHER_PATHS
CHAT = PATHS[Operation.CHAT]
HI: list[Any] = [{"role": "user", "content": "hi"}]
TURNS_FIELD = {Operation.CHAT: "messages", Operation.MESSAGES: "messages", Operation.RESPONSES: "input"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
texts = st.text(max_size=20)
parts = st.lists(
    st.one_of(
        st.builds(lambda text: {"type": "text", "text": text}, texts),
        st.builds(lambda url: {"type": "image_url", "image_url": {"url": url}}, texts),
        st.builds(lambda data: {"type": "image", "source": {"type": "base64", "data": data}}, texts),
    ),
    min_size=1,
    max_size=3,
)
turns_lists = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(("system", "user", "assistant")),
        texts | parts,
    ),
    min_size=2,
    max_size=6,
)

few_turns = st.lists(  # from few contents, so that two draws are often equal
    st.sampled_from(
        ("", "a", '"', '"},{"content":"a', [{"image_url": "a"}], [{"image_url": "b"}], [{"file_url": "a"}])
    ).map(lambda content: {"content": content}),
    min_size=1,
    max_size=3,
)


def ask(operation: Operation, **fields: Any) -> InferenceRequest:
    """Parse a body with these fields, for model "m" unless said otherwise."""
    return parse(PATHS[operation], json.dumps({"model": "m", **fields}).encode())


def refusal(path: str, body: bytes) -> tuple[Reason, str | None, str]:
    """Why these bytes are refused: reason, param, message."""
    with pytest.raises(RouterError) as raised:
        parse(path, body)
    return raised.value.reason, raised.value.param, raised.value.message


def outcome(path: str, body: bytes | memoryview) -> InferenceRequest | RouterError:
    """What comes of these bytes; anything but these two escapes and fails the test."""
    try:
        return parse(path, body)
    except RouterError as refused:
        return refused


@pytest.mark.parametrize(("path", "operation"), EVERY_PATH.items())
def test_each_path_has_its_operation(path: str, operation: Operation) -> None:
    """Query strings and one trailing slash do not matter, anything else does."""
    assert operation_of(path) is operation
    assert operation_of(path + "?api-version=1/") is operation
    assert operation_of(path + "/?x") is operation
    for other in (path + "//", path + "/x", path[1:], path.upper(), "/x" + path, ""):
        assert operation_of(other) is None


@pytest.mark.parametrize("path", EVERY_PATH)
def test_engines_are_asked_by_their_own_path(path: str) -> None:
    """Whatever spelling an operation is asked by, and the query string as it came."""
    for query in ("", "?", "?api-version=1/"):
        assert path_at_engines(path + query) is None
        for spelled in (path + "/", f"{path[:-1]}%{ord(path[-1]):x}", path.replace("/", "%2F") + "%2f"):
            assert operation_of(spelled + query) is operation_of(path)
            assert path_at_engines(spelled + query) == path + query


def test_the_published_paths_are_all() -> None:
    """What is served is what the list of inference paths says, and every operation has one."""
    assert sorted(INFERENCE_PATHS) == sorted(EVERY_PATH)
    assert set(EVERY_PATH.values()) == set(Operation)


def test_an_unknown_path_is_refused_before_the_body_is_read() -> None:
    """The path decides what a body means, so without one there is nothing to say about the body."""
    assert refusal("/v1/models", b"not json")[:2] == (Reason.UNKNOWN_PATH, None)


def test_a_chat_request_is_understood() -> None:
    """Every field the gateway uses arrives as the type says."""
    request = ask(
        Operation.CHAT, messages=HI, stream=True, max_tokens=5, max_completion_tokens=7, cache_salt="s"
    )
    assert request == InferenceRequest(
        operation=Operation.CHAT,
        model="m",
        stream=True,
        prompt=b'[{"role":"user","content":"hi"}',
        prompt_tokens=None,
        max_tokens=7,
        cache_salt="s",
        body={
            "model": "m", "messages": HI, "stream": True, "max_tokens": 5,
            "max_completion_tokens": 7, "cache_salt": "s",
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "fields", "prompt"),
    [
        (
            Operation.CHAT,
            {
                "messages": HI,
                "documents": [{"text": "d"}],
                "tools": [{"type": "function"}],
                "chat_template": "t",
            },
            b'{"chat_template":"t","tools":[{"type":"function"}],"documents":[{"text":"d"}]}[{"role":"user","content":"hi"}',
        ),
        (
            Operation.CHAT,
            {"messages": HI, "tools": [], "documents": None},
            b'[{"role":"user","content":"hi"}',
        ),
        (
            Operation.MESSAGES,
            {"messages": HI, "tools": [{"name": "t"}], "system": "be brief"},
            b'{"system":"be brief","tools":[{"name":"t"}]}[{"role":"user","content":"hi"}',
        ),
        (
            Operation.MESSAGES,
            {"messages": HI, "system": [{"type": "text", "text": "be brief", "cache_control": {}}]},
            b'{"system":"be brief"}[{"role":"user","content":"hi"}',
        ),
        (
            Operation.RESPONSES,
            {"input": "hi", "tools": [{"name": "t"}], "instructions": "be brief"},
            b'{"instructions":"be brief","tools":[{"name":"t"}]}[{"role":"user","content":"hi"}',
        ),
        (Operation.RESPONSES, {"input": HI}, b'[{"role":"user","content":"hi"}'),
        (Operation.TEXT_COMPLETION, {"prompt": "h\u00e9\n"}, "h\u00e9\n".encode()),
        (Operation.TEXT_COMPLETION, {"prompt": ["a", "b"]}, b"a\xffb"),
        (Operation.TEXT_COMPLETION, {"prompt_embeds": "AAAA"}, b""),
        (Operation.EMBEDDINGS, {"input": ["a"]}, b"a"),
        (Operation.EMBEDDINGS, {"messages": HI}, b'[{"role":"user","content":"hi"}'),
    ],
)
def test_the_canonical_prompt(operation: Operation, fields: dict[str, Any], prompt: bytes) -> None:
    """What engines render first comes first, then the turns, never closed."""
    request = ask(operation, **fields)
    assert request.prompt == prompt
    assert request.prompt_tokens is None


@pytest.mark.parametrize("operation", [Operation.TEXT_COMPLETION, Operation.EMBEDDINGS])
def test_token_ids_are_counted_exactly(operation: Operation) -> None:
    """Ids are four little-endian bytes each; several prompts are kept apart, from text as well."""
    field = "prompt" if operation is Operation.TEXT_COMPLETION else "input"
    one = ask(operation, **{field: [1, 258, 2**32 - 1]})
    between = b"\xff\xff\xff\xff"
    assert one.prompt == between + b"\x01\0\0\0\x02\x01\0\0\xff\xff\xff\xff"
    assert one.prompt_tokens == 3
    many = ask(operation, **{field: [[1, 2], [3]]})
    assert many.prompt == between + b"\x01\0\0\0\x02\0\0\0" + between + b"\x03\0\0\0"
    assert many.prompt_tokens == 3
    assert many.prompt != ask(operation, **{field: [[1], [2, 3]]}).prompt


@pytest.mark.parametrize(
    "prompt",
    [None, [], {}, 7, True, [-1], [2**32], [1.5], [1, "a"], ["a", 1], [[1], 2], [["a"]], [None], [{}]],
)
@pytest.mark.parametrize("operation", [Operation.TEXT_COMPLETION, Operation.EMBEDDINGS])
def test_a_prompt_of_the_wrong_type_is_refused(operation: Operation, prompt: object) -> None:
    """Neither text nor token ids: the field is named."""
    field = "prompt" if operation is Operation.TEXT_COMPLETION else "input"
    body = orjson.dumps({"model": "m", field: prompt})
    assert refusal(PATHS[operation], body)[:2] == (Reason.INVALID_REQUEST, field)


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (CHAT, b"", (Reason.INVALID_JSON, "body", "the request body is empty")),
        (
            CHAT,
            b'{"model":"m",\n  "a" 1}',
            (Reason.INVALID_JSON, "body", "the request body is not valid JSON at line 2 column 7"),
        ),
        (
            CHAT,
            '{"é":\n"éé'.encode() + b'\xff"}',
            (Reason.INVALID_JSON, "body", "the request body is not UTF-8 at line 2 column 4"),
        ),
        (
            CHAT,
            b'\xef\xbb\xbf{"model":"m"}',
            (
                Reason.INVALID_JSON,
                "body",
                "the request body begins with a byte order mark; accepted: UTF-8 without it",
            ),
        ),
        (
            CHAT,
            '{"model":"m"}'.encode("utf-16"),
            (
                Reason.INVALID_JSON,
                "body",
                "the request body begins with a byte order mark; accepted: UTF-8 without it",
            ),
        ),
        (
            CHAT,
            '{"é":\n"é\\ud83d"}'.encode(),
            (
                Reason.INVALID_JSON,
                "body",
                "the request body has half of a character, a lone surrogate, at line 2 column 3",
            ),
        ),
        (
            CHAT,
            b'{"a":"\\uDC00"}',
            (
                Reason.INVALID_JSON,
                "body",
                "the request body has half of a character, a lone surrogate, at line 1 column 7",
            ),
        ),
        (
            CHAT,
            '{"model":"m"}'.encode("utf-16-le"),
            (Reason.INVALID_JSON, "body", "the request body is UTF-16 or UTF-32; accepted: UTF-8"),
        ),
        (
            CHAT,
            '{"model":"m"}'.encode("utf-32-be"),
            (Reason.INVALID_JSON, "body", "the request body is UTF-16 or UTF-32; accepted: UTF-8"),
        ),
        (
            CHAT,
            b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}",
            (Reason.INVALID_JSON, "body", "the request body is nested too deeply at line 1 column 1030"),
        ),
        (
            CHAT,
            b'{"seed":\n' + b"9" * 400 + b"}",
            (
                Reason.INVALID_JSON,
                "body",
                "the request body has a number at line 2 column 1 that no double-precision float can hold",
            ),
        ),
        (CHAT, b"[]", (Reason.INVALID_REQUEST, "body", "the request body must be a JSON object")),
        (CHAT, b"{}", (Reason.MISSING_MODEL, "model", "model must be a non-empty string")),
        (CHAT, b'{"model":""}', (Reason.MISSING_MODEL, "model", "model must be a non-empty string")),
        (CHAT, b'{"model":7}', (Reason.MISSING_MODEL, "model", "model must be a non-empty string")),
        (
            CHAT,
            b'{"model":"m"}',
            (Reason.EMPTY_MESSAGES, "messages", "messages must hold at least one message"),
        ),
        (
            "/v1/messages",
            b'{"model":"m","messages":[]}',
            (Reason.EMPTY_MESSAGES, "messages", "messages must hold at least one message"),
        ),
        (
            CHAT,
            b'{"model":"m","messages":"hi"}',
            (Reason.INVALID_REQUEST, "messages", "messages must be a list"),
        ),
        (
            CHAT,
            b'{"model":"m","messages":["hi"]}',
            (Reason.INVALID_REQUEST, "messages[0]", "messages[0] must be an object"),
        ),
        (
            "/v1/responses",
            b'{"model":"m","input":[]}',
            (Reason.INVALID_REQUEST, "input", "input must be a non-empty string or list"),
        ),
        (
            CHAT,
            b'{"model":"m","stream":"true","messages":[{"content":"hi"}]}',
            (Reason.INVALID_REQUEST, "stream", "stream must be true or false"),
        ),
    ],
)
def test_refusals_name_the_place(path: str, body: bytes, expected: tuple[Reason, str | None, str]) -> None:
    """Each mistake has its code, its field and a sentence a client can act on."""
    assert refusal(path, body) == expected


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","messages":[{"content":"hush"} "hush"]}',
        b'{"model":"m","messages":["hush"]}',
        b'{"model":"m","messages":"hush"}',
        b'{"model":["hush"],"messages":[]}',
        b'"hush"',
        b'{"hush": hush}',
        b'{"hush":"\xff"}',
    ],
)
def test_refusals_never_quote_the_body(body: bytes) -> None:
    """Neither the answer nor the exception a log might render holds what the client wrote."""
    with pytest.raises(RouterError) as raised:
        parse(CHAT, body)
    assert b"hush" not in raised.value.body()
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__ or raised.value.__context__ is None


@pytest.mark.parametrize(
    ("levels", "reason"),
    [(255, Reason.INVALID_REQUEST), (1000, Reason.INVALID_REQUEST), (5000, Reason.INVALID_JSON)],
)
@pytest.mark.parametrize("field", ["tools", "messages"])
def test_deep_nesting_is_refused(field: str, levels: int, reason: Reason) -> None:
    """Nesting that cannot be read or hashed is a bad request, wherever it is."""
    deep = b'[{"content":"hi","x":' + b"[" * levels + b"]" * levels + b"}]"
    other = b"" if field == "messages" else b',"messages":[{"content":"hi"}]'
    assert refusal(CHAT, b'{"model":"m","' + field.encode() + b'":' + deep + other + b"}")[0] is reason


def test_the_last_of_duplicate_keys_wins() -> None:
    """As in vLLM, so that the gateway judges the body that is served."""
    body = b'{"model":"a","model":"b","prompt":"x","prompt":"y"}'
    request = parse("/v1/completions", body)
    assert (request.model, request.prompt) == ("b", b"y")


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "9", None, [], 10**30])
def test_a_nonsensical_bound_is_ignored(value: object) -> None:
    """The engine refuses it or not; the next name in line still counts."""
    request = ask(Operation.CHAT, messages=HI, max_completion_tokens=value, max_tokens=3)
    assert request.max_tokens == 3


@pytest.mark.parametrize(
    ("operation", "fields", "bound"),
    [
        (Operation.TEXT_COMPLETION, {"prompt": "x", "max_tokens": 4, "max_completion_tokens": 5}, 4),
        (Operation.RESPONSES, {"input": "x", "max_output_tokens": 6, "max_tokens": 5}, 6),
        (Operation.MESSAGES, {"messages": HI, "max_tokens": 7}, 7),
        (Operation.EMBEDDINGS, {"input": "x", "max_tokens": 8}, None),
        (Operation.CHAT, {"messages": HI}, None),
    ],
)
def test_the_output_bound_goes_by_the_operations_name(
    operation: Operation, fields: dict[str, Any], bound: int | None
) -> None:
    """Each API has its own word for it."""
    assert ask(operation, **fields).max_tokens == bound


@pytest.mark.parametrize("value", ["", None, 7, ["s"]])
def test_a_salt_that_is_none_is_no_salt(value: object) -> None:
    """Only a non-empty string separates caches."""
    assert ask(Operation.CHAT, messages=HI, cache_salt=value).cache_salt is None


@given(st.sampled_from(sorted(TURNS_FIELD)), turns_lists, st.data())
def test_a_turn_begins_the_next(operation: Operation, turns: list[Any], data: st.DataObject) -> None:
    """A conversation's bytes begin the bytes of every continuation of it, media included."""
    field = TURNS_FIELD[operation]
    k = data.draw(st.integers(1, len(turns) - 1))
    earlier = ask(operation, **{field: turns[:k]})
    later = ask(operation, **{field: turns})
    assert later.prompt.startswith(earlier.prompt)
    hashes = block_hashes(earlier.prompt, 1, 16)
    assert block_hashes(later.prompt, 1, 16)[: len(hashes)] == hashes


@given(few_turns, few_turns)
def test_different_conversations_have_different_bytes(one: list[Any], other: list[Any]) -> None:
    """Equal bytes mean equal turns: neither quoting nor a medium's token makes two alike."""
    same_bytes = ask(Operation.CHAT, messages=one).prompt == ask(Operation.CHAT, messages=other).prompt
    assert same_bytes == (one == other)


@given(turns_lists)
def test_spelling_does_not_count(turns: list[Any]) -> None:
    """Whitespace and escapes of the JSON leave the bytes the same."""
    body = {"model": "m", "messages": turns}
    spellings = {
        parse(CHAT, json.dumps(body, indent=indent, ensure_ascii=ascii_only).encode()).prompt
        for indent in (None, 2)
        for ascii_only in (True, False)
    }
    assert len(spellings) == 1


def test_a_moving_cache_marker_keeps_the_prefix() -> None:
    """Anthropic clients mark the newest turn; the turn's bytes stay when the mark has moved on."""

    def marked(text: str) -> dict[str, Any]:
        return {
            "role": "user",
            "content": [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}],
        }

    first = ask(Operation.MESSAGES, messages=[marked("a")])
    second = ask(
        Operation.MESSAGES,
        messages=[
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
            marked("c"),
        ],
    )
    assert second.prompt.startswith(first.prompt)


def test_a_responses_input_keeps_its_prefix_when_it_becomes_a_list() -> None:
    """The first turn is often a bare string and from the second on an item of a list."""
    first = ask(Operation.RESPONSES, input="hi")
    second = ask(Operation.RESPONSES, input=[*HI, {"role": "assistant", "content": "yes"}])
    assert second.prompt.startswith(first.prompt)


def test_media_do_not_touch_the_body_that_is_forwarded() -> None:
    """The hash is for the index; the engine gets the picture."""
    url = "data:image/png;base64," + "A" * 9000
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    request = ask(Operation.CHAT, messages=messages)
    assert request.is_multimodal is True
    assert request.body == {"model": "m", "messages": messages}
    assert 4096 < request.prompt_bytes < 4300
    assert len(request.prompt) < 200


@given(st.sampled_from(sorted(PATHS.values())), st.binary(max_size=60))
def test_any_bytes_give_a_request_or_a_refusal(path: str, body: bytes) -> None:
    """No byte string makes anything else happen, and a view of it means the same."""
    result, by_view = outcome(path, body), outcome(path, memoryview(body))
    assert isinstance(result, InferenceRequest) or result.status == 400
    if isinstance(result, RouterError):
        assert isinstance(by_view, RouterError)
        assert (by_view.reason, by_view.message) == (result.reason, result.message)
    else:
        assert isinstance(by_view, InferenceRequest)
        assert (by_view.prompt, by_view.body) == (result.prompt, result.body)


@given(
    st.sampled_from(sorted(PATHS.values())),
    st.dictionaries(
        st.sampled_from(
            ("messages", "input", "prompt", "prompt_embeds", "system", "tools", "instructions", "stream",
             "max_tokens", "max_completion_tokens", "max_output_tokens", "cache_salt", "documents")
        ),
        json_values,
    ),
)  # fmt: skip
def test_any_types_give_a_request_or_a_refusal(path: str, fields: dict[str, Any]) -> None:
    """No JSON value in any field that is read makes anything else happen, nor changes what is forwarded."""
    body = json.dumps({"model": "m", **fields}).encode()
    result = outcome(path, body)
    if isinstance(result, InferenceRequest):
        assert result.body == orjson.loads(body)
    else:
        assert result.status == 400


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(
                ("type", "text", "image_url", "input_audio", "video_url", "file", "file_data", "source",
                 "content", "cache_control", "image_embeds")
            ),
            json_values | st.dictionaries(
                st.sampled_from(("type", "url", "data", "media_type", "file_data", "file_id")), json_values
            ),
        ),
        max_size=4,
    )
)  # fmt: skip
def test_any_parts_give_a_request(content: list[Any]) -> None:
    """Content parts of any shape are hashed somehow and forwarded as they are."""
    body = orjson.dumps({"model": "m", "messages": [{"content": content}]})
    assert parse(CHAT, body).body == orjson.loads(body)


def of(path: str, **fields: Any) -> InferenceRequest:
    """Parse a body for one of the smaller operations."""
    return parse(path, orjson.dumps({"model": "m", **fields}))


COMPARISONS = {
    "/rerank": {"query": "which?", "documents": ["one", "two"]},
    "/v2/rerank": {"query": "which?", "documents": [{"text": "one"}, {"text": "two"}]},
    "/v1/rerank": {"query": {"content": [{"type": "text", "text": "which?"}]}, "documents": ["one"]},
    "/score": {"text_1": "which?", "text_2": ["one", "two"]},
    "/v1/score": {"queries": ["which?"], "documents": ["one", "two"]},
}


@pytest.mark.parametrize(("path", "fields"), COMPARISONS.items())
def test_comparisons_begin_with_what_they_share(path: str, fields: dict[str, Any]) -> None:
    """The query comes first, so that equal ones are a common prefix, whatever the order of fields."""
    first, second = fields
    shorter = of(path, **fields)
    longer = of(path, **{first: fields[first], second: [*fields[second], "three"]})
    assert longer.prompt.startswith(shorter.prompt)
    assert of(path, **{second: fields[second], first: fields[first]}).prompt == shorter.prompt
    assert len(shorter.prompt) > 15
    assert (shorter.stream, shorter.max_tokens, shorter.is_multimodal) == (False, None, False)


def test_an_image_to_be_ranked_counts_as_one() -> None:
    """A medium in a document counts by its kind, not by its bytes."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
    request = of("/rerank", query="which?", documents=[{"content": [image]}])
    assert request.is_multimodal
    assert len(request.prompt) < 10_000


def test_token_ids_are_compared_as_well() -> None:
    """SGLang scores ids after a query of ids: what they share comes first."""
    one = of("/v1/score", query=[1, 2, 3], items=[[4], [5, 6]], label_token_ids=[9])
    other = of("/v1/score", query=[1, 2, 3], items=[[7]], label_token_ids=[9])
    assert one.prompt == b"[1,2,3,[4],[5,6]"
    assert other.prompt == b"[1,2,3,[7]"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/classify", "/pooling"])
def test_an_image_to_be_embedded_counts_as_one(path: str) -> None:
    """SGLang embeds objects of a text, an image and a video; the image's bytes are not a prompt's."""
    image = "data:image/png;base64," + "A" * 100_000
    request = of(path, input=[{"text": "a cat"}, {"text": None, "image": image}])
    assert request.is_multimodal
    assert len(request.prompt) < 200
    assert request.more_bytes > 4_000
    assert of(path, input=[{"text": "a cat"}]).prompt == b'[{"text":"a cat"}'


@pytest.mark.parametrize("path", ["/rerank", "/v1/score"])
def test_nothing_to_compare_is_refused(path: str) -> None:
    """There is no prompt without either side."""
    assert refusal(path, b'{"model": "m"}')[0] is Reason.INVALID_REQUEST


@pytest.mark.parametrize("path", ["/classify", "/pooling"])
def test_what_is_pooled_is_what_is_embedded(path: str) -> None:
    """Text, token ids and conversations."""
    for fields in ({"input": "text"}, {"input": ["a", "b"]}, {"input": [1, 2]}, {"messages": HI}):
        assert of(path, **fields).prompt == of("/v1/embeddings", **fields).prompt != b""


def test_the_data_of_a_plugin_has_no_prompt() -> None:
    """Pooling takes what a plugin of the engine reads; no text can be known of it."""
    assert of("/pooling", data={"image": "x"}).prompt == b""


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/messages/count_tokens", {"messages": HI, "system": "x" * 1000}),
        ("/v1/responses/input_tokens", {"input": "x" * 1000, "instructions": "y"}),
        ("/v1/responses/input_tokens", {"previous_response_id": "resp_1"}),
        ("/tokenize", {"prompt": "x" * 1000}),
        ("/tokenize", {"messages": HI}),
        ("/detokenize", {"tokens": [1, 2, 3]}),
    ],
)
def test_what_is_not_computed_has_no_prompt(path: str, fields: dict[str, Any]) -> None:
    """It is charged no tokens, and nothing is believed cached after it."""
    request = of(path, **fields)
    assert (request.prompt, request.prompt_tokens) == (b"", 0)


@pytest.mark.parametrize(
    "path", sorted(set(OTHER_PATHS) - {"/v1/audio/transcriptions", "/v1/audio/translations"})
)
def test_every_operation_names_a_model(path: str) -> None:
    """Without one there is no endpoint to serve it."""
    assert refusal(path, b'{"query": "q", "documents": [], "input": "x", "messages": [{}]}')[0] is (
        Reason.MISSING_MODEL
    )


def form(*fields: tuple[str, bytes], boundary: bytes = b"b") -> bytes:
    """A form of text fields."""
    return (
        b"".join(
            b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
            % (boundary, name.encode(), value)
            for name, value in fields
        )
        + b"--%b--\r\n" % boundary
    )


AUDIO = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    + b"x" * 32_000
    + b"\r\n"
)


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
def test_audio_is_counted_by_its_length(path: str) -> None:
    """Two seconds of 128 kbit/s are 100 positions; there is no prefix to match."""
    request = parse(path, AUDIO + form(("model", b"whisper"), ("stream", b"true")))
    assert (request.model, request.prompt, request.prompt_tokens, request.stream) == (
        "whisper",
        b"",
        100,
        True,
    )
    assert request.is_multimodal
    assert request.body == {}


@pytest.mark.parametrize("said", [b"false", b"0", b"", b"truly"])
def test_a_form_says_stream_in_words(said: bytes) -> None:
    """What is not true is false, or the engine's to refuse."""
    assert parse("/v1/audio/translations", form(("model", b"m"), ("stream", said))).stream is False


@given(st.binary(max_size=300), st.sampled_from([b"", b"--b\r\n", AUDIO[:90], form(("model", b"m"))]))
def test_any_form_is_understood_or_refused(tail: bytes, start: bytes) -> None:
    """Nothing else escapes."""
    result = outcome("/v1/audio/transcriptions", start + tail)
    assert isinstance(result, InferenceRequest | RouterError)
