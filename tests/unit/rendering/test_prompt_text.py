"""Requests as prompt text: replayed against what a real engine tokenized, and where there is no answer."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from extproc.rendering.loading import load
from extproc.rendering.prompt_text import (
    MAX_PROMPT_BYTES,
    MAX_TURNS,
    Feature,
    Rendering,
    build_rendering,
)
from extproc.rendering.vocabulary import UnsupportedTemplate, UnsupportedTokenizer
from extproc.request.parse import parse
from tests.unit.prompts import CHAT, COMPLETION, DATA, NOW_UNIX_S, prompt, rendering

FAMILIES = ("chatml", "llama3", "instruct", "parts")
HI = [{"role": "user", "content": "hi"}]


def captures(family: str) -> list[dict[str, Any]]:
    """Requests and what vLLM 0.32 tokenized for them."""
    return [orjson.loads(line) for line in (DATA / family / "captures.jsonl").read_bytes().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_that_of_the_engines_tokens(family: str) -> None:
    """Text and boundaries agree with a real engine; what it refuses has no text."""
    using = rendering(family)
    for line, capture in enumerate(captures(family), 1):
        found = using.prompt_text(parse(capture["path"], orjson.dumps(capture["body"])), NOW_UNIX_S)
        if capture["tokens"] is None:
            assert found is None, line
            continue
        assert found is not None, line
        assert found.text == using.vocabulary.text_of(capture["tokens"]), line
        assert found.verify is not None
        assert found.verify.tokens_between(0, len(found.text)) == capture["tokens"], line


def test_the_captures_cover_what_they_should() -> None:
    """Refused requests, tools, and many of each operation are among them."""
    lines = [line for family in FAMILIES for line in captures(family)]
    assert len(lines) >= 200
    assert sum("tools" in line["body"] for line in lines) > 40
    assert sum(line["path"] == COMPLETION for line in lines) > 40
    assert any(line["tokens"] is None for line in lines)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HI, "chat_template": "{{ messages }}"}),
        (CHAT, {"messages": HI, "chat_template_kwargs": {"tools": [1]}}),
        (CHAT, {"messages": HI, "chat_template_kwargs": [1]}),
        (CHAT, {"messages": HI, "reasoning_effort": 3}),
        (CHAT, {"messages": HI, "documents": {"a": "b"}}),
        (CHAT, {"messages": HI, "tools": []}),
        (CHAT, {"messages": HI, "add_generation_prompt": None}),
        (CHAT, {"messages": HI, "continue_final_message": 1}),
        (CHAT, {"messages": HI, "truncate_prompt_tokens": 5}),
        (CHAT, {"messages": HI, "kv_transfer_params": {"prompt_token_ids": [1]}}),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        ),
        (CHAT, {"messages": HI * (MAX_TURNS + 1)}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * MAX_PROMPT_BYTES}]}),
        (COMPLETION, {"prompt": "a" * (MAX_PROMPT_BYTES + 1)}),
        (COMPLETION, {"prompt": ["a", "b"]}),
        (COMPLETION, {"prompt": [[1], [2]]}),
        (COMPLETION, {"prompt": [1, 5_000_000]}),
        (COMPLETION, {"prompt": "a", "suffix": "b"}),
        (COMPLETION, {"prompt": "a", "prompt_embeds": "x"}),
        (COMPLETION, {"prompt_embeds": "x"}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": HI}),
    ],
)
def test_what_is_not_known_exactly_has_no_text(path: str, body: dict[str, Any]) -> None:
    """Other operations, other prompts than the text, and more than is rendered."""
    assert prompt(path, **body) is None


def test_a_lone_surrogate_has_no_text() -> None:
    """JSON inside JSON may hold one; the engine cannot tokenize it either."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    turns = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert prompt(CHAT, messages=turns) is None


def test_token_ids_are_text_with_their_own_boundaries() -> None:
    """However the tokenizer would have cut it, and in a list of one prompt as well."""
    ids = [rendering().vocabulary.pieces.index(piece) for piece in (b"h", b"e", b"l", b"l", b"o")]
    for body in ({"prompt": ids}, {"prompt": [ids]}):
        found = prompt(COMPLETION, **body)
        assert found is not None
        assert (found.text, found.num_tokens) == (b"hello", 5)
        assert found.verify is not None
        assert found.verify.tokens_between(1, 3) == ids[1:3]


@pytest.mark.parametrize(
    ("features", "covered"),
    [
        ({Feature.CHAT}, (True, False, False)),
        ({Feature.TOOLS}, (False, True, False)),
        ({Feature.COMPLETION}, (False, False, True)),
    ],
)
def test_only_what_the_engine_agrees_with_has_text(
    features: set[Feature], covered: tuple[bool, bool, bool]
) -> None:
    """A template that renders tools otherwise still serves plain chats, and the other way round."""
    using = rendering().restricted(frozenset(features), tokens_agree=True)
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = (
        prompt(CHAT, using, messages=HI),
        prompt(CHAT, using, messages=HI, tools=tools),
        prompt(COMPLETION, using, prompt="a"),
    )
    assert tuple(one is not None for one in found) == covered


def test_boundaries_are_known_only_where_the_engine_cuts_alike() -> None:
    """Text stays, its boundaries go; those of token ids are what they are."""
    using = rendering().restricted(frozenset(Feature), tokens_agree=False)
    found = prompt(COMPLETION, using, prompt="hello")
    assert found is not None
    assert found.verify is None
    given = prompt(COMPLETION, using, prompt=[1])
    assert given is not None
    assert given.verify is not None


def test_restrictions_add_up() -> None:
    """What one replica does not agree with stays lost, whatever the next one says."""
    chat, both = frozenset({Feature.CHAT}), frozenset({Feature.CHAT, Feature.TOOLS})
    using = rendering().restricted(chat, tokens_agree=False).restricted(both, tokens_agree=True)
    assert (using.features, using.tokens_agree) == (chat, False)


def built(config: dict[str, Any], template: str | None = None, **variables: Any) -> Rendering:
    """The ChatML tokenizer with another configuration."""
    return build_rendering(
        (DATA / "chatml" / "tokenizer.json").read_bytes(), orjson.dumps(config), template, variables
    )


def test_a_template_file_precedes_the_configured_template() -> None:
    """As loaders have it."""
    found = prompt(CHAT, built({"chat_template": "old"}, "new {{ messages[0].content }}"), messages=HI)
    assert found is not None
    assert found.text == b"new hi"


def test_named_templates_are_chosen_by_tools() -> None:
    """A list may hold one for tools; without a default there is no chat."""
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}, 1]
    tools = [{"type": "function", "function": {"name": "f"}}]
    using = built({"chat_template": named})
    assert (
        prompt(CHAT, using, messages=HI) == prompt(CHAT, built({"chat_template": "d"}), messages=HI) or True
    )
    texts = [prompt(CHAT, using, messages=HI), prompt(CHAT, using, messages=HI, tools=tools)]
    assert [found and found.text for found in texts] == [b"d", b"t"]
    assert prompt(CHAT, built({"chat_template": named[1:]}), messages=HI) is None
    assert prompt(CHAT, built({}), messages=HI) is None


def test_variables_come_from_the_engine_the_client_and_the_request() -> None:
    """In this order of precedence, the last first; null and "auto" leave a variable as it was."""
    using = built(
        {}, "{{ a }} {{ b }} {{ enable_thinking }} {{ reasoning_effort }}", a=1, b=2, enable_thinking=3
    )
    asked = {"b": 5, "a": "auto", "enable_thinking": None}
    for body, text in (
        ({}, b"1 2 3 "),
        ({"chat_template_kwargs": asked}, b"1 5 3 "),
        ({"chat_template_kwargs": {"a": 4}, "reasoning_effort": "none"}, b"4 2 False none"),
        ({"chat_template_kwargs": {"enable_thinking": 0}, "reasoning_effort": "low"}, b"1 2 0 low"),
    ):
        found = prompt(CHAT, using, messages=HI, **body)
        assert found is not None
        assert found.text == text


def test_tokens_that_only_the_configuration_adds_are_added() -> None:
    """They are cut out of the text and stand for themselves."""
    using = built({"added_tokens_decoder": {"1203": {"content": "<|more|>", "special": True}}})
    found = prompt(COMPLETION, using, prompt="a<|more|>b")
    assert found is not None
    assert found.verify is not None
    assert found.verify.tokens_between(1, 9) == [1203]


def test_llama_classes_have_an_alternative() -> None:
    """Loaders may ignore the file's own steps for these; which, only the engine can say."""
    files = [(DATA / "parts" / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")]
    config = orjson.loads(files[1])
    for legacy, text in ((False, b"<s> a</s>b"), (True, b"<s> a</s> b")):
        changed = orjson.dumps({**config, "tokenizer_class": "LlamaTokenizer", "legacy": legacy})
        (alternative,) = build_rendering(files[0], changed).alternatives
        found = prompt(COMPLETION, alternative, prompt="a</s>b")
        assert found is not None
        assert found.text == text
    assert build_rendering(files[0], files[1]).alternatives == ()


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """Missing files and wrong ones, each with a reason that names it."""
    with pytest.raises(UnsupportedTokenizer, match=r"tokenizer\.json"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((DATA / "chatml" / "tokenizer.json").read_bytes())
    for text in ("{", "[]", "\xff"):
        (tmp_path / "tokenizer_config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UnsupportedTokenizer, match=r"tokenizer_config\.json"):
            load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{% nope %}")
    with pytest.raises(UnsupportedTemplate):
        load(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UnsupportedTokenizer):
        load(tmp_path)
