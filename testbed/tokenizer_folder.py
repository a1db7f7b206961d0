"""A small real tokenizer, trained on the spot: what a model's folder has beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY: Final = 768
"""The 256 bytes, one special token and about 500 merges: trained in half a second."""

END_OF_TEXT: Final = "<|endoftext|>"

_SOURCES: Final = Path(__file__).parents[1] / "extproc"


def write_tokenizer(folder: Path) -> Path:
    """Train a byte-level BPE on this repository's sources and write it, without a chat template.

    Returns:
        The `tokenizer.json` in `folder`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(_SOURCES.rglob("*.py"))], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return path
