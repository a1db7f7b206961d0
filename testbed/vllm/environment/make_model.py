"""A small random Qwen2 model with a real tokenizer and two LoRA adapters, made without network or torch.

Rules:
    1. The same Python and the same seed give the same bytes; nothing is downloaded.
    2. The tokenizer splits and normalises exactly as Qwen2's does: loaders of `model_type: qwen2` replace the
       splitting rule of tokenizer.json by Qwen2's own, so any other rule would count tokens differently.
    3. The adapters change the attention inputs strongly enough for their answers to differ from the model's.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCABULARY: Final = 4096
HIDDEN: Final = 256
FEED_FORWARD: Final = 688
LAYERS: Final = 4
HEADS: Final = 4
KV_HEADS: Final = 2
HEAD_SIZE: Final = HIDDEN // HEADS
"""64: the CPU attention kernel takes multiples of 32. KV costs 2,048 bytes per token in bfloat16."""
MAX_TOKENS: Final = 8192
SEED: Final = 20261121
ADAPTERS: Final = ("ad1", "ad2")
"""Folders made under `adapters/`; their names are the adapters' names at the engine."""
ADAPTER_RANK: Final = 8

TRAINING_FILES: Final = 150
"""Of the standard library, by name: about 3 MB of text, trained on in three seconds."""

SPECIALS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer, as published with its tokenizers."""

CHAT_TEMPLATE: Final = Path(__file__).with_name("chat_template.jinja")

Tensors = Mapping[str, NDArray[np.float32]]


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of `VOCABULARY` entries, trained on the standard library's sources."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:TRAINING_FILES]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sources], trainer)
    return tokenizer


def model_tensors(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Weights of the model by Hugging Face's names; the embedding is also the output head."""

    def normal(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * 0.02).astype(np.float32)

    ones = np.ones(HIDDEN, np.float32)
    kv_size = KV_HEADS * HEAD_SIZE
    tensors = {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN), "model.norm.weight": ones}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = ones
        tensors[f"{prefix}.post_attention_layernorm.weight"] = ones
        for name, rows in (("q", HIDDEN), ("k", kv_size), ("v", kv_size)):
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = normal(rows, HIDDEN)
            tensors[f"{prefix}.self_attn.{name}_proj.bias"] = np.zeros(rows, np.float32)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = normal(HIDDEN, HIDDEN)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = normal(FEED_FORWARD, HIDDEN)
        tensors[f"{prefix}.mlp.up_proj.weight"] = normal(FEED_FORWARD, HIDDEN)
        tensors[f"{prefix}.mlp.down_proj.weight"] = normal(HIDDEN, FEED_FORWARD)
    return tensors


def adapter_tensors(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Weights of one adapter of the query and value projections."""
    tensors = {}
    for layer in range(LAYERS):
        for name, rows in (("q", HIDDEN), ("v", KV_HEADS * HEAD_SIZE)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj"
            first = rng.standard_normal((ADAPTER_RANK, HIDDEN)) * 0.2
            second = rng.standard_normal((rows, ADAPTER_RANK)) * 0.2
            tensors[f"{prefix}.lora_A.weight"] = first.astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = second.astype(np.float32)
    return tensors


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file of bfloat16: header length, JSON header, then the tensors in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, offset = [], 0
    for name, tensor in tensors.items():
        part = _bfloat16(tensor).tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(part)],
        }
        parts.append(part)
        offset += len(part)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"".join(parts))


def _bfloat16(tensor: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of the floats, rounded to nearest even."""
    bits = np.ascontiguousarray(tensor).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(name)): {
                "content": name,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for name in SPECIALS
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": MAX_TOKENS,
        "chat_template": CHAT_TEMPLATE.read_text(),
    }


def _model_config(end: int | None, pad: int | None) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": MAX_TOKENS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
    }


def write_model(folder: Path) -> None:
    """Write tokenizer, configuration, weights and adapters into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    pad = tokenizer.token_to_id("<|endoftext|>")
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer))
    _write_json(folder / "config.json", _model_config(end, pad))
    _write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": pad})
    write_safetensors(folder / "model.safetensors", model_tensors(np.random.default_rng(SEED)))
    for number, name in enumerate(ADAPTERS, 1):
        adapter = folder / "adapters" / name
        adapter.mkdir(parents=True, exist_ok=True)
        _write_json(
            adapter / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": "small",
                "r": ADAPTER_RANK,
                "lora_alpha": 2 * ADAPTER_RANK,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": ["q_proj", "v_proj"],
            },
        )
        weights = adapter_tensors(np.random.default_rng(SEED + number))
        write_safetensors(adapter / "adapter_model.safetensors", weights)


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Write the model into the folder named on the command line."""
    parser = argparse.ArgumentParser(description="Make a small random model that vLLM serves on a CPU.")
    parser.add_argument("folder", type=Path)
    write_model(parser.parse_args().folder)


if __name__ == "__main__":
    main()
