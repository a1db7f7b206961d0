"""An understood request → the text whose tokens the engine computes, where that is known exactly.

Rules:
    1. Exact or nothing: None wherever the engine's text could differ. The request is then judged by what
       was seen before.
    2. Bounded: what is larger than `MAX_PROMPT_BYTES` or has more turns than `MAX_TURNS` is not rendered, nor
       what its template would make too much of.
    3. The request is not edited, and nothing is raised for any body that `extproc.request.parse` took.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import orjson

from extproc.rendering.canonical import Canonical
from extproc.rendering.messages import conversation
from extproc.rendering.vocabulary import SPACE_MARK, UnsupportedTokenizer, Vocabulary, read_vocabulary
from extproc.rendering.window import Encoder, GivenTokens, TokenCuts, Window
from extproc.request.turns import function_tools, template_variables
from extproc.values.requests import InferenceRequest, Operation
from metadata_center.types import value

if TYPE_CHECKING:
    from extproc.rendering.template import ChatTemplate

MAX_PROMPT_BYTES: Final = 4 * 1024 * 1024
"""About a million tokens, as `extproc.request.blocks.MAX_BLOCKS`."""

MAX_TURNS: Final = 4096
"""Templates that look at the turns before or after each turn are quadratic in them."""

_OWN_PARAMETERS: Final = frozenset(
    (
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents"),
        *("max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict"),
        *("return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
    )
)
"""`chat_template_kwargs` that would change more than variables of the template."""

_LLAMA_CLASSES: Final = ("LlamaTokenizer", "LlamaTokenizerFast")
"""Values of `tokenizer_class` with which the file's own steps may be ignored."""

_TOKENIZED_OTHERWISE: Final = ("truncate_prompt_tokens", "kv_transfer_params", "prompt_embeds")
"""Body fields with which the engine's prompt is not, or not all of, the request's text."""


class Feature(StrEnum):
    """What of the API a rendering may be exact for, each found out on its own."""

    COMPLETION = "completion"
    CHAT = "chat"
    TOOLS = "tools"


@value
class PromptText:
    """A prompt as the engine will compute it.

    Attributes:
        text: Canonical text: the concatenated bytes of the prompt's tokens. Never logged.
        verify: Its token boundaries; None if the engine cuts otherwise than we do.
        num_tokens: Length in tokens, if the client sent token ids, else None.
    """

    text: bytes
    verify: TokenCuts | None
    num_tokens: int | None


@dataclass(frozen=True, slots=True)
class Rendering:
    """All that is known of one model's prompts.

    Attributes:
        vocabulary: Bytes by token id.
        canonical: Makes text canonical.
        encoder: Cuts canonical text.
        template: The chat template; None if the model has none.
        tool_template: The one for chats with tools, mostly the same.
        before: Text of the tokens that the tokenizer puts before a completion, `b"<s>"` for one.
        after: Text of those behind it.
        variables: Template variables that the engine was started with.
        features: What may be relied on.
        tokens_agree: The engine cuts text as `encoder` does.
        alternatives: What the engine may have made of the same files instead; only asking it shows which.
    """

    vocabulary: Vocabulary
    canonical: Canonical
    encoder: Encoder
    template: ChatTemplate | None
    tool_template: ChatTemplate | None
    before: bytes
    after: bytes
    variables: Mapping[str, Any] = field(default_factory=dict)
    features: frozenset[Feature] = frozenset(Feature)
    tokens_agree: bool = True
    alternatives: tuple[Rendering, ...] = ()

    def restricted(self, features: frozenset[Feature], *, tokens_agree: bool) -> Rendering:
        """The same for an engine that was found to agree in `features` only; restrictions add up."""
        return replace(
            self,
            features=self.features & features,
            tokens_agree=self.tokens_agree and tokens_agree,
            alternatives=(),
        )

    def prompt_text(self, request: InferenceRequest, now_unix_s: float) -> PromptText | None:
        """What the engine will compute for `request`; None if that is not known exactly.

        Args:
            request: Understood and not multimodal, or the answer is None.
            now_unix_s: The time, for templates that print the date.
        """
        body = request.body
        if request.is_multimodal or not request.has_body or request.prompt_bytes > MAX_PROMPT_BYTES:
            return None
        if any(body.get(name) is not None for name in _TOKENIZED_OTHERWISE):
            return None
        try:
            if request.operation is Operation.CHAT:
                return self._chat(body, now_unix_s, request.prompt_bytes)
            if request.operation is Operation.TEXT_COMPLETION:
                return self._completion(request)
        except UnicodeEncodeError:  # a lone surrogate, unescaped from a tool call's arguments
            return None
        return None

    def chat_text(
        self, body: Mapping[str, Any], now_unix_s: float, num_bytes: int = MAX_PROMPT_BYTES
    ) -> str | None:
        """A chat as its template renders it, before it is made canonical; None if not covered.

        Args:
            body: Decoded; `messages` is a list that is not empty.
            now_unix_s: The time, for templates that print the date.
            num_bytes: Of the canonical prompt: what rendering it may cost is a multiple of that.
        """
        tools, messages = body.get("tools"), body["messages"]
        template = self.template if tools is None else self.tool_template
        if template is None or len(messages) > MAX_TURNS or body.get("chat_template") is not None:
            return None
        add_generation_prompt = body.get("add_generation_prompt", True)
        continue_final_message = body.get("continue_final_message", False)
        documents = body.get("documents")
        if type(add_generation_prompt) is not bool or type(continue_final_message) is not bool:
            return None
        if documents is not None and type(documents) is not list:
            return None
        if tools is not None:
            tools = function_tools(tools)
            if tools is None:
                return None
        variables = _variables(body, self.variables)
        turns = conversation(
            messages, wants_parts=template.wants_parts, knows_developer=template.knows_developer
        )
        if variables is None or turns is None:
            return None
        return template.render(
            turns,
            now_unix_s,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
            num_bytes=num_bytes,
        )

    def _chat(self, body: Mapping[str, Any], now_unix_s: float, num_bytes: int) -> PromptText | None:
        needed = Feature.CHAT if body.get("tools") is None else Feature.TOOLS
        if needed not in self.features:
            return None
        text = self.chat_text(body, now_unix_s, num_bytes)
        if text is None:
            return None
        return self._from_text(text, with_specials=body.get("add_special_tokens") is True)

    def _completion(self, request: InferenceRequest) -> PromptText | None:
        body = request.body
        prompt = body.get("prompt")
        if Feature.COMPLETION not in self.features or body.get("suffix") is not None:
            return None
        if type(prompt) is list and len(prompt) == 1 and type(prompt[0]) is not int:
            prompt = prompt[0]
        if type(prompt) is str:
            return self._from_text(prompt, with_specials=body.get("add_special_tokens") is not False)
        if type(prompt) is not list or len(prompt) != request.prompt_tokens:
            return None  # several prompts, or none
        return self._from_ids(prompt)

    def _from_text(self, text: str, *, with_specials: bool) -> PromptText:
        canonical = self.canonical.of(text)
        if with_specials:
            canonical = self.before + canonical + self.after
        return PromptText(canonical, Window(self.encoder, canonical) if self.tokens_agree else None, None)

    def _from_ids(self, ids: Sequence[int]) -> PromptText | None:
        text = self.vocabulary.text_of(ids)
        if text is None:
            return None
        return PromptText(text, GivenTokens(ids, self.encoder.lengths), len(ids))


def build_rendering(
    tokenizer_json: bytes,
    tokenizer_config_json: bytes,
    chat_template: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Rendering:
    """Understand a tokenizer folder's files. 0.8 s of processor time measured for a vocabulary of 150,000.

    Args:
        tokenizer_json: `tokenizer.json`.
        tokenizer_config_json: `tokenizer_config.json`.
        chat_template: The text of `chat_template.jinja`, which precedes the one in the configuration.
        variables: What the engine was started with (vLLM `--default-chat-template-kwargs`).

    Raises:
        UnsupportedTokenizer: The text of this tokenizer's tokens cannot be known.
        UnsupportedTemplate: The chat template does not compile.
    """
    document = _object(tokenizer_json, "tokenizer.json")
    config = _object(tokenizer_config_json, "tokenizer_config.json")
    document["added_tokens"] = _all_added(document, config)
    templates = _templates(
        chat_template if chat_template is not None else config.get("chat_template"), config
    )
    rebuilt = _as_llama_class(document, config)
    alternatives = () if rebuilt is None else (_rendering(rebuilt, templates, variables or {}),)
    return _rendering(document, templates, variables or {}, alternatives)


def _templates(source: Any, config: Mapping[str, Any]) -> tuple[ChatTemplate | None, ChatTemplate | None]:
    """The template for chats and the one for chats with tools, of one text or of a list of named ones."""
    from extproc.rendering.template import ChatTemplate  # Jinja's 5 MiB are for gateways that render

    named = _named_tokens(config)
    if type(source) is str:
        only = ChatTemplate(source, named)
        return only, only
    members = source if type(source) is list else []
    texts = {one.get("name"): one.get("template") for one in members if type(one) is dict}
    compiled = {
        name: ChatTemplate(text, named)
        for name, text in texts.items()
        if name in ("default", "tool_use") and type(text) is str
    }
    default = compiled.get("default")
    return default, compiled.get("tool_use", default)


def _rendering(
    document: Mapping[str, Any],
    templates: tuple[ChatTemplate | None, ChatTemplate | None],
    variables: Mapping[str, Any],
    alternatives: tuple[Rendering, ...] = (),
) -> Rendering:
    vocabulary = read_vocabulary(document)
    encoder = Encoder(document, vocabulary)
    before, after = encoder.specials()
    return Rendering(
        vocabulary=vocabulary,
        canonical=Canonical(document, vocabulary),
        encoder=encoder,
        template=templates[0],
        tool_template=templates[1],
        before=vocabulary.text_of(before) or b"",
        after=vocabulary.text_of(after) or b"",
        variables=dict(variables),
        alternatives=alternatives,
    )


def _as_llama_class(document: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tokenizer that transformers 5 builds if it goes by the class, and not by the file's own steps.

    Which of the two it does depends on the model's type; None for other classes than Llama's.
    """
    if config.get("tokenizer_class") not in _LLAMA_CLASSES:
        return None
    scheme = "always" if config.get("legacy") else "first"
    metaspace = {
        "type": "Metaspace",
        "replacement": SPACE_MARK,
        "prepend_scheme": "never" if config.get("add_prefix_space") is False else scheme,
        "split": False,
    }
    return {**document, "normalizer": None, "pre_tokenizer": metaspace}


def _variables(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any] | None:
    """Template variables of a request: the engine's defaults, the client's, those of its own fields."""
    named = template_variables(body)
    if named is None or not _OWN_PARAMETERS.isdisjoint(body.get("chat_template_kwargs") or ()):
        return None
    return {**defaults, **named}


def _object(text: bytes, name: str) -> dict[str, Any]:
    try:
        decoded = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise UnsupportedTokenizer(f"{name} is not JSON: {error}") from None
    if type(decoded) is not dict:
        raise UnsupportedTokenizer(f"{name} is not an object")
    return decoded


def _all_added(document: Mapping[str, Any], config: Mapping[str, Any]) -> list[Any]:
    """Added tokens of both files: loaders take those that only the configuration has as well."""
    added = list(document.get("added_tokens") or ())
    known = {token.get("id") for token in added if type(token) is dict}
    more = config.get("added_tokens_decoder")
    for token_id, token in (more if type(more) is dict else {}).items():
        if token_id.isdecimal() and int(token_id) not in known and type(token) is dict:
            plain = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}
            added.append({**plain, "normalized": not token.get("special"), **token, "id": int(token_id)})
    return sorted(added, key=lambda token: token["id"]) if len(added) > len(known) else added


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Template variables for the tokens that the configuration names, as text."""
    named = {}
    for name, token in config.items():
        said = token.get("content") if type(token) is dict else token
        if name.endswith("_token") and not name.startswith("add_") and type(said) is str:
            named[name] = said
    return named
