"""Makes the tokenizer folders beside it; the captures beside them belong to exactly these files.

`python tests/data/rendering/make.py` trains four small tokenizers on the repository's documentation and a
few sentences: a Qwen2-like and a Llama-3-like byte-level BPE, a Llama-2-like and a Mistral-like BPE with byte
fallback. Templates are in the style of those families, in words of our own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

HERE = Path(__file__).parent
ENTRIES = 1200

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}| ", r"|\p{N}{1,3}| ")

SENTENCES = (
    "今天的天气很好，我们去公园散步。你觉得怎么样？据说那里新开了一家咖啡馆，味道不错。",
    "Сегодня хорошая погода, и мы идём гулять в парк. Говорят, там открылось новое кафе.",
    "Heute ist schönes Wetter, und wir gehen im Park spazieren. Übrigens: das Café ist größer geworden.",
    "今日は天気がいいので、公園を散歩します。新しい喫茶店ができたそうです。",
    "It's what they've said: we'll see, I'd think; you're right, I'm sure -- 3.14159, 2024-06-30.",
)

CHATML = """\
{%- macro call(item) %}
    {%- if item.function %}{%- set item = item.function %}{%- endif %}
    {{- '\\n<tool_call>\\n{"name": ' + item.name | tojson + ', "arguments": ' + item.arguments | tojson }}
    {{- '}\\n</tool_call>' }}
{%- endmacro %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'You may call these functions:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set said = message.content or '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if message.reasoning_content is string and loop.index0 > ns.last %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- said.lstrip('\\n') }}
        {%- for item in message.tool_calls or [] %}{{- call(item) }}{%- endfor %}
        {%- endgeneration %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- elif message.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{%- if system or tools is not none %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
    {{- 'Knowledge until: ' + ('December 2023' if not cutoff is defined else cutoff) + '\\n\\n' }}
    {%- if tools is not none %}
        {{- 'Functions:\\n' }}
        {%- for tool in tools %}{{- tool | tojson(indent=2) }}{{- '\\n\\n' }}{%- endfor %}
    {%- endif %}
    {{- system + '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('tool', 'ipython') %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {{- (message.content if message.content is string else message.content | tojson) + '<|eot_id|>' }}
    {%- elif message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

INSTRUCT = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if turn.role == 'user' %}
        {%- if tools is not none and loop.last %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.first and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + turn.content + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + turn.content + '[/INST]' }}
        {%- endif %}
    {%- elif turn.role == 'assistant' and turn.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in turn.tool_calls %}
            {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif turn.role == 'assistant' %}
        {{- ' ' + turn.content | trim + eos_token }}
    {%- elif turn.role == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + turn.content | tojson + '}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('no such role: ' + turn.role) }}
    {%- endif %}
{%- endfor %}
"""

PARTS = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'text' %}{{- part.text }}{%- else %}{{- '<|' + part.type + '|>' }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
"""


def lines() -> list[str]:
    """What is trained on."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(HERE.parents[2].glob("docs/adr/000*.md"))]
    return [*"".join(texts).splitlines(keepends=True), *SENTENCES * 20]


def byte_level(split: str, specials: list[str], *, nfc: bool) -> Tokenizer:
    """A byte-level BPE that splits as `split` says."""
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines(),
        BpeTrainer(
            vocab_size=ENTRIES,
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in specials],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def byte_fallback(tokens: list[AddedToken], *, metaspace: bool) -> Tokenizer:
    """A SentencePiece-like BPE: marks for spaces, bytes for what is not covered."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.UnicodeScripts()]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trained.train_from_iterator(
        lines(),
        BpeTrainer(
            vocab_size=ENTRIES, special_tokens=["<unk>", "<s>", "</s>", *fallback], show_progress=False
        ),
    )
    state = json.loads(trained.to_str())
    model = models.BPE(
        vocab=state["model"]["vocab"],
        merges=[tuple(merge) for merge in state["model"]["merges"]],
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.add_tokens(tokens)
    return tokenizer


def put_first(tokenizer: Tokenizer, bos: str) -> None:
    """Make the tokenizer begin every text with `bos`."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def save(name: str, tokenizer: Tokenizer, model_type: str, template: str, **config: Any) -> None:
    """Write a folder that engines can be started with, weights aside."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))
    own_file = config.pop("own_file", False)
    if own_file:
        (folder / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    config = {"clean_up_tokenization_spaces": False, "model_max_length": 8192, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1))
    shape = {
        "architectures": ["Qwen2ForCausalLM" if model_type == "qwen2" else "LlamaForCausalLM"],
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(shape, indent=1))


def main() -> None:
    """Write all folders."""
    chatml = byte_level(QWEN2, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], nfc=True)
    chatml.add_tokens([AddedToken(name, normalized=False) for name in ("<think>", "</think>", "<tool_call>")])
    save(
        "chatml",
        chatml,
        "qwen2",
        CHATML,
        tokenizer_class="Qwen2Tokenizer",
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        add_bos_token=False,
        add_prefix_space=False,
        errors="replace",
    )
    headers = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    llama = byte_level(LLAMA3, headers, nfc=False)
    put_first(llama, "<|begin_of_text|>")
    save(
        "llama3",
        llama,
        "llama",
        LLAMA,
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        own_file=True,
    )
    marks = [
        f"[{slash}{name}]" for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS") for slash in ("", "/")
    ]
    instruct = byte_fallback(
        [AddedToken(name, special=True, normalized=False) for name in ("[TOOL_CALLS]", *marks)],
        metaspace=True,
    )
    put_first(instruct, "<s>")
    save(
        "instruct",
        instruct,
        "llama",
        INSTRUCT,
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    turns = [
        AddedToken(name, special=True, normalized=False, rstrip=True)
        for name in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    ]
    parts = byte_fallback(turns, metaspace=False)
    put_first(parts, "<s>")
    save(
        "parts",
        parts,
        "llama",
        PARTS,
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


if __name__ == "__main__":
    main()
