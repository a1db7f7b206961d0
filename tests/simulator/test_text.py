"""The tokenizer, the model that needs no weights, and block keys."""

from __future__ import annotations

import numpy as np
import orjson
from hypothesis import given
from hypothesis import strategies as st

from tokenway.simulator.engine.keys import block_keys
from tokenway.simulator.server.text import encode, encode_chat, generate


@given(text=st.text(max_size=60), more=st.text(max_size=60))
def test_a_longer_text_keeps_the_tokens_of_its_start(text: str, more: str) -> None:
    """Only a last partial piece may change when text is appended."""
    whole_pieces = len(text.encode()) // 4
    np.testing.assert_array_equal(encode(text)[:whole_pieces], encode(text + more)[:whole_pieces])


@given(turns=st.lists(st.text(max_size=30), min_size=1, max_size=4), reply=st.text(max_size=20))
def test_the_next_turn_extends_the_conversation(turns: list[str], reply: str) -> None:
    """A conversation is a token prefix of itself with the reply and another turn."""
    messages = [{"role": "user", "content": turn} for turn in turns]
    now = encode_chat(messages)
    later = encode_chat(
        [*messages, {"role": "assistant", "content": reply}, {"role": "user", "content": "more"}]
    )
    np.testing.assert_array_equal(later[: len(now)], now)


def test_a_reply_fed_back_has_the_tokens_it_was_generated_with() -> None:
    """Generated KV blocks are found again in the next turn."""
    messages = [{"role": "user", "content": "hello"}]
    prompt = encode_chat(messages)
    output = generate(prompt, 40, ignore_eos=True)
    reply = b"".join(output.words).decode()
    later = encode_chat([*messages, {"role": "assistant", "content": reply}])
    np.testing.assert_array_equal(later[: len(prompt) + 40], np.concatenate((prompt, output.token_ids)))


def test_roles_parts_and_tools_all_change_the_prompt() -> None:
    """Whatever a chat template would show the model is in the tokens."""
    text = [{"type": "text", "text": "hi"}]
    variants = [
        encode_chat([{"role": "user", "content": "hi"}]),
        encode_chat([{"role": "system", "content": "hi"}]),
        encode_chat([{"role": "user", "content": [*text, {"type": "image_url", "image_url": {"url": "u"}}]}]),
        encode_chat([{"role": "user", "content": "hi"}], [{"type": "function"}]),
        encode_chat([{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]),
    ]
    assert len({variant.tobytes() for variant in variants}) == len(variants)
    np.testing.assert_array_equal(variants[0], encode_chat([{"role": "user", "content": text}]))


def test_output_is_bounded_deterministic_and_json_safe() -> None:
    """Equal prompts say the same, other prompts something else, and no piece needs escaping."""
    prompt = encode("a prompt")
    output = generate(prompt, 300, ignore_eos=True)
    assert len(output.words) == len(output.token_ids) == 300
    assert generate(prompt, 300, ignore_eos=True).words == output.words
    assert generate(encode("another"), 300, ignore_eos=True).words != output.words
    assert generate(prompt, 100, ignore_eos=True).words == output.words[:100]
    assert all(orjson.dumps(word.decode()) == b'"' + word + b'"' for word in output.words)


def test_an_unbounded_answer_ends_by_itself_unless_asked_not_to() -> None:
    """The hidden end is honoured without `ignore_eos` only."""
    prompt = encode("a prompt")
    ended = generate(prompt, 5000, ignore_eos=False)
    assert ended.stops
    assert 512 <= len(ended.words) < 1536
    assert len(generate(prompt, 5000, ignore_eos=True).words) == 5000
    assert not generate(prompt, 100, ignore_eos=False).stops


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=40),
    position=st.integers(0, 39),
    size=st.integers(1, 9),
)
def test_a_key_depends_on_every_token_up_to_its_block(tokens: list[int], position: int, size: int) -> None:
    """Changing one token changes its block's key and all later ones, and none before."""
    keys = block_keys(np.array(tokens, dtype=np.uint32), size)
    assert len(keys) == len(tokens) // size
    if position < len(tokens):
        changed = list(tokens)
        changed[position] ^= 1
        other = block_keys(np.array(changed, dtype=np.uint32), size)
        same = [left == right for left, right in zip(keys, other, strict=True)]
        assert same == [index < position // size for index in range(len(keys))]


def test_namespaces_share_no_keys() -> None:
    """A cache salt separates equal prompts."""
    tokens = np.arange(64, dtype=np.uint32)
    assert not set(block_keys(tokens, 16)) & set(block_keys(tokens, 16, "tenant"))
