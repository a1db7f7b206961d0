"""Block hashes: what they are, what they depend on, and what they never share."""

from __future__ import annotations

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from extproc.request.blocks import BLOCK_BYTES, MAX_BLOCKS, block_hashes
from metadata_center.roots import root

PROMPT = bytes(range(256)) * 5  # 1,280 bytes: two full blocks and half of one

names = st.text(max_size=8)
optional_names = st.none() | names
seeds = st.integers(0, 2**64 - 1)


def test_known_answers() -> None:
    """Hashes are the same for ever: an index may outlive the process that filled it."""
    assert root("tiny", None, None) == 2294013691713853846
    assert root("tiny", "ad1", None) == 1406889811070110975
    assert root("tiny", "ad1", "salt") == 12410819512067954592
    assert list(block_hashes(PROMPT, 0)) == [1177990759783856649, 578458272979759251]
    with_root = block_hashes(PROMPT, root("tiny", None, None))
    assert list(with_root) == [1555665736588026415, 13120741019552539674]


def test_the_chain_is_xxh3_seeded_with_the_previous_hash() -> None:
    """Each block is hashed with its predecessor as the seed, the first with the root."""
    first = xxhash.xxh3_64(PROMPT[:512], seed=7).intdigest()
    second = xxhash.xxh3_64(PROMPT[512:1024], seed=first).intdigest()
    assert list(block_hashes(PROMPT, 7)) == [first, second]


def test_a_partial_tail_has_no_hash() -> None:
    """Only full blocks count, to the byte."""
    assert [len(block_hashes(bytes(n), 0)) for n in (0, 1, 511, 512, 1023, 1024)] == [0, 0, 0, 1, 1, 2]


def test_the_number_of_blocks_is_bounded() -> None:
    """A prompt beyond the bound is known by its first blocks only."""
    assert len(block_hashes(bytes((MAX_BLOCKS + 2) * BLOCK_BYTES), 0)) == MAX_BLOCKS
    assert block_hashes(PROMPT, 0, max_blocks=1) == block_hashes(PROMPT, 0)[:1]
    assert list(block_hashes(PROMPT, 0, max_blocks=0)) == []


def test_hashes_take_8_bytes_each() -> None:
    """With widths and without: a list of integers would take 56 for each."""
    for hashes in (block_hashes(PROMPT, 0), block_hashes(PROMPT, 0, widths=((1, 512),))):
        assert len(memoryview(hashes).tobytes()) == 8 * len(hashes) > 0


@given(st.binary(max_size=200), st.binary(max_size=100), seeds, st.integers(1, 32))
def test_more_prompt_keeps_the_hashes_of_its_prefix(
    prompt: bytes, more: bytes, seed: int, block_bytes: int
) -> None:
    """The hashes of a prompt begin the hashes of everything that begins with it."""
    hashes = block_hashes(prompt, seed, block_bytes)
    assert block_hashes(prompt + more, seed, block_bytes)[: len(hashes)] == hashes
    assert len(hashes) == len(prompt) // block_bytes


@given(st.binary(max_size=200), seeds, st.integers(1, 32), st.data())
def test_hashing_in_pieces_is_hashing_at_once(
    prompt: bytes, seed: int, block_bytes: int, data: st.DataObject
) -> None:
    """Hashing may stop at any block boundary and go on from the last hash."""
    hashes = block_hashes(prompt, seed, block_bytes)
    done = data.draw(st.integers(0, len(hashes)))
    previous = hashes[done - 1] if done else seed
    assert hashes[:done] + block_hashes(prompt[done * block_bytes :], previous, block_bytes) == hashes


@given(st.binary(min_size=64, max_size=256), st.data())
def test_a_changed_byte_changes_its_block_and_all_after(prompt: bytes, data: st.DataObject) -> None:
    """Hashes agree before the block that differs and nowhere from it on."""
    at = data.draw(st.integers(0, len(prompt) // 32 * 32 - 1))
    changed = prompt[:at] + bytes([prompt[at] ^ 1]) + prompt[at + 1 :]
    before, after = block_hashes(prompt, 1, 32), block_hashes(changed, 1, 32)
    assert [a == b for a, b in zip(before, after, strict=True)] == [
        block < at // 32 for block in range(len(before))
    ]


@given(
    st.tuples(names, optional_names, optional_names),
    st.tuples(names, optional_names, optional_names),
    st.binary(min_size=64, max_size=128),
)
def test_different_roots_never_share(
    one: tuple[str, str | None, str | None], other: tuple[str, str | None, str | None], prompt: bytes
) -> None:
    """The same prompt under another model, adapter or salt has no hash in common."""
    shared = set(block_hashes(prompt, root(*one), 32)) & set(block_hashes(prompt, root(*other), 32))
    assert bool(shared) == (one == other)


def test_roots_cannot_be_imitated_by_quoting() -> None:
    """Separators inside a name, empty names and absent names all make different roots."""
    triples: list[tuple[str, str | None, str | None]] = [
        ("a", "b", None), ("a", None, "b"), ("ab", None, None), ("a", "", None), ("a", None, None),
        ('a","b', None, None), ("a", '","', "b"), ("a", "null", None), ("a\0b", None, None),
    ]  # fmt: skip
    assert len({root(*triple) for triple in triples}) == len(triples)
