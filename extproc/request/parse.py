"""Request path and body bytes → `InferenceRequest`.

Rules:
    1. Any bytes give an `InferenceRequest` or a `RouterError`; nothing else escapes.
    2. Validates what is used here and nothing more: the engine judges the rest and answers for it.
    3. Reads JSON as vLLM does where it accepts it at all: the last of duplicate keys wins. Stricter
       otherwise (RFC 8259): no NaN, no lone surrogates, no byte order mark.
    4. Equal conversation prefixes give equal byte prefixes: the prompt begins with what a chat template
       renders first (instructions, tools), then come the turns as a JSON array never closed, so that
       turn k's bytes begin turn k+1's.
    5. Leaves the decoded body as it was read.
    6. What is not rendered into a prompt (to count, to translate) has none: nothing is matched by it, and
       nothing is believed cached after it.
"""

from __future__ import annotations

import re
import struct
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable
from typing import Any, NamedTuple

import orjson

from extproc.errors import Reason, RouterError
from extproc.request.choices import choices_of
from extproc.request.media import compact_parts, compact_turns, widths_of
from extproc.request.multipart import Form, Upload
from extproc.request.paths import as_engines_read
from extproc.request.sanitize import encode
from extproc.request.turns import function_tools, system_text, template_variables, without_billing_header
from extproc.values.exchange import Body
from extproc.values.requests import InferenceRequest, Operation

_TRUE_IN_FORMS = frozenset(("true", "1", "on", "yes", "t", "y"))
"""How forms say it (pydantic's words)."""

_AUDIO_BYTES_PER_TOKEN = 320
"""Whisper has 50 positions a second (1,500 in 30 s); a second of 128 kbit/s is 16,000 bytes."""

_SIDES = ("query", "queries", "text_1", "data_1", "documents", "items", "text_2", "data_2")
"""vLLM's names of what is compared in rerank and score requests, SGLang's `query` and `items` among them."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_BETWEEN_TEXTS = b"\xff"  # in no UTF-8 text
_NO_ID = 0xFFFFFFFF  # in no vocabulary: before each list of ids, the first as well, for ids are no text
_WITHOUT_SPECIALS = b"\xff\xff"  # before a text that the request wants no special token before


class _Prompt(NamedTuple):
    """What an operation's body says to the model."""

    canonical: bytes
    num_tokens: int | None = None
    is_multimodal: bool = False


def operation_of(path: str) -> Operation | None:
    """The operation that an engine would see in a request path, if any."""
    api = _api_of(path)
    return None if api is None else api.operation


def is_form(path: str) -> bool:
    """True if requests at this path have `multipart/form-data` bodies, of which little is looked at."""
    api = _api_of(path)
    return api is not None and api.is_form


def path_at_engines(path: str) -> str | None:
    """What engines call the path of an inference request, its query string kept; None if it is that already.

    They have no other spelling of it: vLLM answers a slash at the end with a redirection, others with 404.
    """
    if path in _BY_PATH:
        return None
    bare, mark, query = path.partition("?")
    return None if bare in _BY_PATH else f"{as_engines_read(bare)}{mark}{query}"


def _api_of(path: str) -> _Api | None:
    return _BY_PATH.get(path) or _BY_PATH.get(as_engines_read(path))


def parse(path: str, body: Body) -> InferenceRequest:
    """Understand one request.

    One pass to decode, one over the turns, one to encode them: 8 us measured for a 4 KB chat, 170 us for
    220 KB, 16 ms for 12 MB; orjson is half of the first and nine tenths of the others.

    Args:
        path: The request's `:path`.
        body: The whole request body.

    Raises:
        RouterError: UNKNOWN_PATH, INVALID_JSON, INVALID_REQUEST, MISSING_MODEL or EMPTY_MESSAGES.
    """
    api = _api_of(path)
    if api is None:
        raise RouterError(
            Reason.UNKNOWN_PATH, f"unknown path; inference requests go to {', '.join(INFERENCE_PATHS)}"
        )
    form = None
    if api.is_form:
        form = Form(bytes(body))
        fields = form.fields()
    else:
        fields = _decode(body)
    model = fields.get("model")
    if type(model) is not str or not model:
        raise RouterError(Reason.MISSING_MODEL, "model must be a non-empty string", param="model")
    stream = fields.get("stream")
    if form is not None:
        stream = type(stream) is str and stream.lower() in _TRUE_IN_FORMS
    elif stream is not None and type(stream) is not bool:
        raise RouterError(Reason.INVALID_REQUEST, "stream must be true or false", param="stream")
    prompt = api.read(fields)
    widths = widths_of(prompt.canonical) if prompt.is_multimodal else ()
    cache_salt = fields.get("cache_salt")
    return InferenceRequest(
        operation=api.operation,
        model=model,
        stream=stream is True and api.can_stream,
        prompt=prompt.canonical,
        prompt_tokens=prompt.num_tokens,
        max_tokens=_max_tokens(fields, api.max_tokens),
        cache_salt=cache_salt if type(cache_salt) is str and cache_salt else None,
        body=fields if form is None else {},
        is_multimodal=prompt.is_multimodal,
        form=form,
        widths=widths,
        more_bytes=sum([width for _, width in widths]) if widths else 0,
        choices=1 if form is not None else choices_of(api.operation, fields),
    )


def _decode(body: Body) -> dict[str, Any]:
    if not body:
        raise RouterError(Reason.INVALID_JSON, "the request body is empty", param="body")
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # Not chained: the decode error carries the body.
        raise RouterError(Reason.INVALID_JSON, _complaint(bytes(body), error), param="body") from None
    if type(fields) is not dict:
        raise RouterError(Reason.INVALID_REQUEST, "the request body must be a JSON object", param="body")
    return fields


def _complaint(body: bytes, error: orjson.JSONDecodeError) -> str:
    if body.startswith((BOM_UTF8, BOM_UTF16_LE, BOM_UTF16_BE)):  # Windows shells write files with one
        return "the request body begins with a byte order mark; accepted: UTF-8 without it"
    if b"\0" in body[:4]:
        return "the request body is UTF-16 or UTF-32; accepted: UTF-8"
    try:
        text = body.decode()
    except UnicodeDecodeError as undecodable:  # orjson places these at the start of the body
        before = body[: undecodable.start].decode()
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        return f"the request body is not UTF-8 at line {line} column {column}"
    place = f"at line {error.lineno} column {error.colno}"
    if _SURROGATE.match(text, error.pos):  # which JavaScript leaves where it cuts a text
        return f"the request body has half of a character, a lone surrogate, {place}"
    if error.msg.startswith("depth limit"):
        return f"the request body is nested too deeply {place}"
    if error.msg.startswith("number is infinity"):
        return f"the request body has a number {place} that no double-precision float can hold"
    return f"the request body is not valid JSON {place}"


def _max_tokens(fields: dict[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of `names` that holds a positive integer; anything else is the engine's to refuse."""
    for name in names:
        value = fields.get(name)
        if type(value) is int and value > 0:
            return value
    return None


def _chat(fields: dict[str, Any]) -> _Prompt:
    # A template of the client's own renders everything; tools and documents precede the messages.
    head = {name: said for name in ("chat_template", "tools", "documents") if (said := fields.get(name))}
    if "tools" in head:
        head["tools"] = function_tools(head["tools"]) or head["tools"]
    if fields.get("chat_template_kwargs") or fields.get("reasoning_effort") is not None:
        variables = template_variables(fields)
        if variables is None:  # the engine refuses it
            variables = {name: fields.get(name) for name in ("chat_template_kwargs", "reasoning_effort")}
        if variables:
            head["variables"] = dict(sorted(variables.items()))
    if fields.get("add_special_tokens") is True:
        head["add_special_tokens"] = True
    prompt = _conversation(head, _messages(fields), "messages", as_chat=True)
    if fields.get("add_generation_prompt") is False or fields.get("continue_final_message") is True:
        ending = (fields.get("add_generation_prompt"), fields.get("continue_final_message"))
        prompt = prompt._replace(canonical=prompt.canonical + b"]" + encode(ending))
    return prompt


def _anthropic(fields: dict[str, Any]) -> _Prompt:
    head: dict[str, Any] = {}
    system = fields.get("system")
    if type(system) is str:
        system = system_text(system)
    elif type(system) is list:
        said = [
            part
            for part in without_billing_header(system)
            if type(part) is not dict or part.get("text") != ""
        ]
        system, _ = compact_parts(said, as_chat=False)
    if system:
        head["system"] = system
    if fields.get("tools"):
        head["tools"] = _flat_tools(fields["tools"], "input_schema")
    return _conversation(head, _messages(fields), "messages")


def _responses(fields: dict[str, Any]) -> _Prompt:
    head: dict[str, Any] = {}
    instructions = fields.get("instructions")
    if type(instructions) is str:
        instructions = system_text(instructions)
    if instructions:
        head["instructions"] = instructions
    if fields.get("tools"):
        head["tools"] = _flat_tools(fields["tools"], "parameters")
    reasoning = fields.get("reasoning")
    if type(reasoning) is dict and reasoning.get("effort") is not None:
        head["effort"] = reasoning["effort"]
    turns = fields.get("input")
    if type(turns) is str and turns:
        turns = [{"role": "user", "content": turns}]  # what clients send it as from the second turn on
    if type(turns) is not list or not turns:
        raise RouterError(Reason.INVALID_REQUEST, "input must be a non-empty string or list", param="input")
    return _conversation(head, turns, "input")


def _compacted(fields: dict[str, Any]) -> _Prompt:
    """A conversation that is made shorter; all of it may be in the stored response that it builds on."""
    return _responses(fields) if fields.get("input") else _Prompt(b"")


def _flat_tools(tools: Any, schema: str) -> Any:
    """Tools of Anthropic's or of Responses: name, description and schema first, as engines render them."""
    if type(tools) is not list:
        return tools
    return [
        {
            **{name: tool[name] for name in ("name", "description", schema) if tool.get(name) is not None},
            **{
                name: tool[name]
                for name in sorted(tool)
                if tool[name] is not None
                and name not in ("cache_control", "name", "description", schema)
                and not (name == "type" and tool[name] in ("custom", "function"))
            },
        }
        if type(tool) is dict
        else tool
        for tool in tools
    ]


def _completion(fields: dict[str, Any]) -> _Prompt:
    if fields.get("prompt") is None and fields.get("prompt_embeds") is not None:
        return _Prompt(b"")  # tensors only: no text, hence no prefix to match
    prompt = _flat(fields.get("prompt"), "prompt")
    if fields.get("add_special_tokens") is False and prompt.num_tokens is None:
        return prompt._replace(canonical=_WITHOUT_SPECIALS + prompt.canonical)
    return prompt


def _embedding(fields: dict[str, Any]) -> _Prompt:
    if fields.get("input") is None and "messages" in fields:
        return _chat(fields)  # vLLM embeds conversations too
    said = fields.get("input")
    if type(said) is list and said and all(type(one) is dict and one for one in said):  # SGLang: text, image
        parts, is_multimodal = compact_parts(said, inside_part=True, as_chat=False)
        return _Prompt(encode(parts, "input")[:-1], None, is_multimodal)
    return _flat(said, "input")


def _either(fields: dict[str, Any]) -> _Prompt:
    """Pooling: what is embedded, or a plugin's own form, whose text cannot be known."""
    if fields.get("input") is None and fields.get("data") is not None:
        return _Prompt(b"")
    return _embedding(fields)


def _pairs(fields: dict[str, Any]) -> _Prompt:
    """What is compared, the side that all comparisons share first: they have it as their common prefix."""
    said: list[Any] = []
    is_multimodal = False
    for name in _SIDES:
        values = fields.get(name)
        if values is None:
            continue
        values = values if type(values) is list else [values]
        # Texts stay what they are: made objects of, a body of empty ones would be ten times as long.
        turns = [
            value if type(value) is dict else {"content": value}
            for value in values
            if type(value) is not str and type(value) is not int and value is not None  # SGLang: token ids
        ]
        if not turns:
            said += [value for value in values if value is not None]
            continue
        compacted, has_media = compact_turns(turns, name, as_chat=False)
        is_multimodal |= has_media
        others = iter(compacted)
        for value in values:
            if type(value) is str or type(value) is int:
                said.append(value)
            elif value is not None:
                turn = next(others)
                # What came in no object goes into none.
                said.append(turn if type(value) is dict else turn.get("content"))
    if not said:
        raise RouterError(Reason.INVALID_REQUEST, "there is nothing to compare", param="query")
    return _Prompt(encode(said, "documents")[:-1], is_multimodal=is_multimodal)


def _counted(fields: dict[str, Any]) -> _Prompt:
    """A conversation of which the tokens are counted: nothing is computed, nothing cached."""
    _messages(fields)
    return _UNREAD


def _unread(_fields: dict[str, Any]) -> _Prompt:
    """What is translated into tokens, or back, or counted: likewise, and the engine judges the fields."""
    return _UNREAD


def _audio(fields: dict[str, Any]) -> _Prompt:
    upload = fields.get("file")
    num_bytes = upload.num_bytes if type(upload) is Upload else 0
    return _Prompt(b"", num_bytes // _AUDIO_BYTES_PER_TOKEN, is_multimodal=True)


def _messages(fields: dict[str, Any]) -> list[Any]:
    messages = fields.get("messages")
    if type(messages) is list and messages:
        return messages
    if messages is None or messages == []:
        raise RouterError(Reason.EMPTY_MESSAGES, "messages must hold at least one message", param="messages")
    raise RouterError(Reason.INVALID_REQUEST, "messages must be a list", param="messages")


def _conversation(head: dict[str, Any], turns: list[Any], param: str, *, as_chat: bool = False) -> _Prompt:
    compacted, is_multimodal = compact_turns(turns, param, as_chat=as_chat)
    canonical = encode(compacted, param)[:-1]
    if head:
        canonical = encode(head) + canonical
    return _Prompt(canonical, None, is_multimodal)


def _flat(value: Any, param: str) -> _Prompt:
    """A prompt that is not a conversation: text, token ids, or a list of either."""
    if type(value) is str:
        return _Prompt(value.encode())
    if type(value) is list and value:
        kind = type(value[0])
        try:
            if kind is int:
                return _Prompt(_pack([_NO_ID, *value]), len(value))
            if kind is str:
                return _Prompt(_BETWEEN_TEXTS.join(map(str.encode, value)))
            if kind is list:
                flat: list[int] = []
                for ids in value:  # packed at once: of short lists there may be many
                    flat.append(_NO_ID)
                    flat += ids
                return _Prompt(_pack(flat), len(flat) - len(value))
        except (struct.error, TypeError):
            pass  # mixed kinds, or ids that are none
    raise RouterError(
        Reason.INVALID_REQUEST,
        f"{param} must be a string, a list of token ids, or a non-empty list of those",
        param=param,
    )


def _pack(ids: list[int]) -> bytes:
    """Token ids as unsigned 32-bit little-endian; raises struct.error or TypeError for other things."""
    return struct.pack(f"<{len(ids)}I", *ids)


class _Api(NamedTuple):
    """One operation as clients ask for it.

    Attributes:
        operation: What it is called in metrics and records.
        paths: Where it is asked for.
        read: What its fields say to the model; all that a prefix can be matched by.
        max_tokens: Names of its output bound, in order of precedence.
        can_stream: It answers by server-sent events where `stream` is true.
        is_form: Its body is `multipart/form-data`, not JSON.
    """

    operation: Operation
    paths: tuple[str, ...]
    read: Callable[[dict[str, Any]], _Prompt]
    max_tokens: tuple[str, ...] = ()
    can_stream: bool = False
    is_form: bool = False


_UNREAD = _Prompt(b"", 0)

_APIS = (
    _Api(
        Operation.CHAT,
        ("/v1/chat/completions",),
        _chat,
        ("max_completion_tokens", "max_tokens"),
        can_stream=True,
    ),
    _Api(Operation.TEXT_COMPLETION, ("/v1/completions",), _completion, ("max_tokens",), can_stream=True),
    _Api(Operation.RESPONSES, ("/v1/responses",), _responses, ("max_output_tokens",), can_stream=True),
    _Api(Operation.COMPACT, ("/v1/responses/compact",), _compacted),
    _Api(Operation.INPUT_TOKENS, ("/v1/responses/input_tokens",), _unread),
    _Api(Operation.MESSAGES, ("/v1/messages",), _anthropic, ("max_tokens",), can_stream=True),
    _Api(Operation.EMBEDDINGS, ("/v1/embeddings",), _embedding),
    _Api(Operation.COUNT_TOKENS, ("/v1/messages/count_tokens",), _counted),
    _Api(Operation.TOKENIZE, ("/tokenize", "/v1/tokenize"), _unread),
    _Api(Operation.DETOKENIZE, ("/detokenize", "/v1/detokenize"), _unread),
    _Api(Operation.RERANK, ("/rerank", "/v1/rerank", "/v2/rerank"), _pairs),
    _Api(Operation.SCORE, ("/score", "/v1/score"), _pairs),
    _Api(Operation.CLASSIFY, ("/classify", "/v1/classify"), _embedding),
    _Api(Operation.POOLING, ("/pooling",), _either),
    _Api(Operation.TRANSCRIPTION, ("/v1/audio/transcriptions",), _audio, can_stream=True, is_form=True),
    _Api(Operation.TRANSLATION, ("/v1/audio/translations",), _audio, can_stream=True, is_form=True),
)
"""Every operation there is: another one is another entry. The shape of errors goes by path: `Shape.of`."""

_BY_PATH = {path: api for api in _APIS for path in api.paths}

INFERENCE_PATHS = tuple(_BY_PATH)
"""All paths of POST requests that are served; while Tokenway is away, Envoy serves no more than these."""
