"""Token ids as bytes."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from extproc.rendering.vocabulary import Spelling, UnsupportedTokenizer, Vocabulary, read_vocabulary

DATA = Path(__file__).parents[2] / "data" / "rendering"
FAMILIES = ("chatml", "llama3", "instruct", "parts")


def document(family: str) -> dict[str, Any]:
    """A decoded tokenizer.json."""
    decoded: dict[str, Any] = orjson.loads((DATA / family / "tokenizer.json").read_bytes())
    return decoded


def byte_level(**changes: Any) -> dict[str, Any]:
    """The smallest byte-level tokenizer."""
    return {
        "model": {"type": "BPE", "vocab": {"a": 0, "Ġb": 1, "ÃŃ": 2, "a b": 3}, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [],
        **changes,
    }


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """The smallest tokenizer with byte fallback."""
    return {
        "model": {
            "type": "Unigram",
            "vocab": [["<unk>", 0], ["▁a", -1], ["<0xC3>", -2]],
            "byte_fallback": True,
        },
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace"}, {"type": "ByteFallback"}]},
        "added_tokens": [],
        **changes,
    }


def added(**changes: Any) -> dict[str, Any]:
    """An added token."""
    return {"id": 7, "content": "<|▁x|>", "special": True, "normalized": False, **changes}


def test_every_character_of_the_byte_alphabet_is_its_byte() -> None:
    """GPT-2's table, as the tokenizers package has it: 256 characters, 256 different bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = {"type": "BPE", "vocab": {one: index for index, one in enumerate(alphabet)}, "merges": []}
    vocabulary = read_vocabulary(byte_level(model=model))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("a é\n\x00\x7f", "日本", "\u00ad\u00a0"):
        ((written, _),) = split.pre_tokenize_str(text)
        assert vocabulary.text_of([alphabet.index(one) for one in written]) == text.encode()
    assert sorted(vocabulary.pieces) == [bytes((byte,)) for byte in range(256)]


def test_byte_level_pieces_are_bytes() -> None:
    """A piece outside the byte alphabet stands for its own spelling, ids without an entry for nothing."""
    vocabulary = read_vocabulary(byte_level(added_tokens=[added()]))
    assert vocabulary.pieces == (b"a", b" b", b"\xc3\xad", b"a b", b"", b"", b"", "<|▁x|>".encode())
    assert vocabulary.spelling is Spelling.BYTE_LEVEL


def test_sentencepiece_pieces_are_text_with_spaces_and_single_bytes() -> None:
    """Marks are spaces, in added tokens as well; byte pieces are bytes."""
    vocabulary = read_vocabulary(sentencepiece(added_tokens=[added(id=3)]))
    assert vocabulary.pieces == (b"<unk>", b" a", b"\xc3", b"<| x|>")
    assert vocabulary.spelling is Spelling.SENTENCEPIECE


@pytest.mark.parametrize("ids", [[4], [8], [-1], [True, None], [2**70]])
def test_ids_outside_the_vocabulary_have_no_text(ids: list[Any]) -> None:
    """Neither those behind the last, nor those without an entry, nor things that are no ids."""
    assert read_vocabulary(byte_level(added_tokens=[added()])).text_of(ids) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_are_what_the_tokenizer_decodes(family: str) -> None:
    """Pieces joined are the text, for text that no normalizer changes."""
    tokenizer = Tokenizer.from_file(str(DATA / family / "tokenizer.json"))
    vocabulary = read_vocabulary(document(family))
    text = "def f(x):\n    return {'é': x}  # 日本 😀\n"
    joined = vocabulary.text_of(tokenizer.encode(text, add_special_tokens=False).ids)
    assert joined is not None
    assert joined.removeprefix(b" ") == text.encode()


@pytest.mark.parametrize(
    ("reason", "broken"),
    [
        ("model type WordPiece", byte_level(model={"type": "WordPiece", "vocab": {}})),
        ("dropout", byte_level(model={"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.1})),
        ("end_of_word", byte_level(model={"type": "BPE", "vocab": {}, "end_of_word_suffix": "</w>"})),
        ("single_word", byte_level(added_tokens=[added(single_word=True)])),
        ("prefix space", byte_level(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True})),
        ("without its decoder", byte_level(decoder=None)),
        ("pre-tokenizer Whitespace", sentencepiece(pre_tokenizer={"type": "Whitespace"})),
        ("pre-tokenizer Split", byte_level(pre_tokenizer={"type": "Split", "behavior": "Removed"})),
        ("mark of its own", sentencepiece(pre_tokenizer={"type": "Metaspace", "replacement": "_"})),
        ("byte fallback", sentencepiece(model={"type": "BPE", "vocab": {}, "merges": []})),
        ("decoder of SentencePiece", sentencepiece(decoder={"type": "Fuse"})),
        ("token ids", byte_level(added_tokens=[added(id=2**40)])),
        ("negative", byte_level(model={"type": "BPE", "vocab": {"a": -1}, "merges": []})),
        ("without content", byte_level(added_tokens=[added(content="")])),
        ("malformed", byte_level(model={"type": "BPE", "vocab": {"a": "b"}, "merges": []})),
        ("malformed", {}),
    ],
)
def test_tokenizers_that_are_not_understood_are_refused_with_the_reason(
    reason: str, broken: dict[str, Any]
) -> None:
    """What is refused says why, to the operator."""
    with pytest.raises(UnsupportedTokenizer, match=reason):
        read_vocabulary(broken)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.sampled_from(["BPE", "ByteLevel", "Sequence", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "vocab", "merges", "id", "content"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(["model", "added_tokens", "pre_tokenizer", "decoder"]), json_values))
def test_any_document_is_understood_or_refused(changes: dict[str, Any]) -> None:
    """Nothing but the documented error comes out of a wrong file."""
    with suppress(UnsupportedTokenizer):
        assert isinstance(read_vocabulary(byte_level(**changes)), Vocabulary)
