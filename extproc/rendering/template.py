"""A model's chat template: Jinja as the engine's tokenizer library compiles it.

Rules:
    1. Written against vLLM 0.32 with transformers 5; `check.py` finds out whether a running engine agrees.
    2. The template is the operator's file, the variables are the client's: it runs in Jinja's immutable
       sandbox, over inputs that the caller bounded, and no further than `metering` lets it.
    3. `render` returns text or None, whatever the template does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from extproc.rendering.metering import Meter, Metering, TooMuch, filters, finalize, sandbox
from extproc.rendering.vocabulary import UnsupportedTemplate

_CONTINUED: Final = "tokenway-continues-here "
"""Marks where a message to be continued ends. The space at its end shows whether the template strips."""


MAX_OUTPUT: Final = 4 * 1024 * 1024
"""Characters of a text that are of use, as `extproc.request.blocks.MAX_BLOCKS`."""

_DICT_ATTRIBUTES: Final = frozenset(dir(dict))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's text for training; its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        """Replace the block by its body, which is a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, which looks fields of messages up at once."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As inherited: a dict's own methods first, then its items; without raising for every item."""
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)


class ChatTemplate:
    """One compiled template.

    Args:
        source: Its text.
        special_tokens: The tokenizer's named tokens (`bos_token` and so on), variables of the template.

    Attributes:
        wants_parts: It loops over a message's content, so it is given lists of parts ("openai" format of
            vLLM); else text.
        knows_developer: It names the role `developer`; else such messages become system messages.

    Raises:
        UnsupportedTemplate: It does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._meter = meter = Meter()
        environment = sandbox(meter, _Sandbox)(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=finalize(meter),
        )
        environment.filters = filters(meter, environment.filters)
        del environment.globals["lipsum"]
        environment.globals["raise_exception"] = _raise_exception
        try:
            tree = environment.parse(source)
            metered = Metering(meter).visit(environment.parse(source))
            self._template = jinja2.Template.from_code(
                environment, environment.compile(metered), environment.make_globals(None)
            )
            self._variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
            self.wants_parts = _loops_over_content(tree)
        except Exception as error:  # a template may break the compiler in any way
            raise UnsupportedTemplate(f"chat template: {type(error).__name__}: {error}") from error
        self.knows_developer = '"developer"' in source or "'developer'" in source
        self._reads_content = "content" in source
        self._special_tokens = dict(special_tokens)
        self._is_dated = "strftime_now" in self._variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        now_unix_s: float,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        num_bytes: int = MAX_OUTPUT,
    ) -> str | None:
        """The conversation as text.

        Args:
            messages: Not empty, in the form that `wants_parts` says; not edited.
            now_unix_s: For templates that print the date; engines are taken to be set to UTC.
            tools: Function tools, or None.
            documents: For retrieval templates, or None.
            add_generation_prompt: End with the beginning of the assistant's turn.
            continue_final_message: Leave the last message open instead; not both.
            variables: Further ones; those that the template does not read have no effect.
            num_bytes: Of the request; a multiple of it is what rendering it may cost.

        Returns:
            The text; None if the template fails, refuses the conversation, or would make too much of it.
        """
        if continue_final_message:
            if add_generation_prompt or not self._reads_content:
                return None
            opened = _opened(messages)
            if opened is None:
                return None
            messages = opened
        named: dict[str, Any] = {**self._special_tokens}
        if self._is_dated:
            named["strftime_now"] = datetime.fromtimestamp(now_unix_s, UTC).strftime
        named |= {name: said for name, said in (variables or {}).items() if name in self._variables}
        named["messages"] = messages
        named["tools"] = tools
        named["documents"] = documents
        named["add_generation_prompt"] = add_generation_prompt
        meter = self._meter
        meter.begin(num_bytes, MAX_OUTPUT)
        pieces: list[str] = []
        left = meter.output
        try:
            for piece in self._template.root_render_func(self._template.new_context(named)):
                left -= len(piece)
                if left < 0:
                    raise TooMuch
                pieces.append(piece)
            text = "".join(pieces)
        except Exception:  # whatever the template does: the engine refuses the request as well
            return None
        return _closed(text) if continue_final_message else text


def _raise_exception(message: str) -> NoReturn:
    """Called by templates that refuse a conversation."""
    raise jinja2.TemplateError(message)


def _opened(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """The messages with the mark behind the last one's text; None if it has no text."""
    last = dict(messages[-1])
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + _CONTINUED
        return [*messages[:-1], last]
    if not isinstance(content, list):
        return None
    for index in reversed(range(len(content))):
        part = content[index]
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            marked = {**part, "text": part["text"] + _CONTINUED}
            last["content"] = [*content[:index], marked, *content[index + 1 :]]
            return [*messages[:-1], last]
    return None


def _closed(text: str) -> str | None:
    """What was rendered before the mark; without spaces at its end if the template stripped the mark's."""
    before, mark, after = text.rpartition(_CONTINUED.rstrip())
    if not mark:
        return None
    return before if after.startswith(" ") else before.rstrip()


def _loops_over_content(tree: jinja2.nodes.Template) -> bool:
    """Whether the template iterates over a message's content, by vLLM's rules of finding that out.

    It follows names that `messages` is assigned to, the loops over those, and macro parameters that are
    given a message's content; a loop over a plain `content` outside macros counts as well.
    """
    items = _message_names(tree)
    loops_in_macros: set[int] = set()
    for macro in tree.find_all(jinja2.nodes.Macro):
        given = _content_parameters(tree, macro, items)
        for loop in macro.find_all(jinja2.nodes.For):
            loops_in_macros.add(id(loop))
            if isinstance(loop.iter, jinja2.nodes.Name) and loop.iter.name in given:
                return True
    return any(
        _is_content_of(loop.iter, items)
        or (
            isinstance(loop.iter, jinja2.nodes.Name)
            and loop.iter.name == "content"
            and id(loop) not in loops_in_macros
        )
        for loop in tree.find_all(jinja2.nodes.For)
    )


def _message_names(tree: jinja2.nodes.Template) -> set[str]:
    """Names of single messages: targets of loops over `messages` or over a name it was assigned to."""
    lists, todo = {"messages"}, ["messages"]
    while todo:
        name = todo.pop()
        for assignment in tree.find_all(jinja2.nodes.Assign):
            target = assignment.target
            if (
                isinstance(target, jinja2.nodes.Name)
                and target.name not in lists
                and _is_name(assignment.node, name)
            ):
                lists.add(target.name)
                todo.append(target.name)
    return {
        loop.target.name
        for loop in tree.find_all(jinja2.nodes.For)
        if isinstance(loop.target, jinja2.nodes.Name) and any(_is_name(loop.iter, name) for name in lists)
    }


def _content_parameters(tree: jinja2.nodes.Template, macro: jinja2.nodes.Macro, items: set[str]) -> set[str]:
    """Parameters of a macro that some call gives a message's content."""
    given: set[str] = set()
    for call in tree.find_all(jinja2.nodes.Call):
        if isinstance(call.node, jinja2.nodes.Name) and call.node.name == macro.name:
            given |= {
                parameter.name
                for parameter, argument in zip(macro.args, call.args, strict=False)
                if _is_content_of(argument, items)
            }
            given |= {word.key for word in call.kwargs if _is_content_of(word.value, items)}
    return given


def _without_filters(node: jinja2.nodes.Node | None) -> jinja2.nodes.Node | None:
    """What is under filters, tests and slices."""
    while isinstance(node, jinja2.nodes.Filter | jinja2.nodes.Test) or (
        isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Slice)
    ):
        node = node.node
    return node


def _is_name(node: jinja2.nodes.Node | None, name: str) -> bool:
    bare = _without_filters(node)
    return isinstance(bare, jinja2.nodes.Name) and bare.ctx == "load" and bare.name == name


def _is_content_of(node: jinja2.nodes.Node | None, items: set[str]) -> bool:
    bare = _without_filters(node)
    if isinstance(bare, jinja2.nodes.Getattr):
        is_content = bare.attr == "content"
    elif isinstance(bare, jinja2.nodes.Getitem):
        is_content = isinstance(bare.arg, jinja2.nodes.Const) and bare.arg.value == "content"
    else:
        return False
    owner = bare.node
    return is_content and isinstance(owner, jinja2.nodes.Name) and owner.ctx == "load" and owner.name in items
