"""Where the assistant's turns lie in a conversation that a chat template rendered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tuner.data.messages import Conversation, Message
from tuner.data.segments import Segment
from tuner.data.templates import TEMPLATES
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Spot: TypeAlias = tuple[int, str]
"""The index of a message, and the key of a text in it; -1 and `tools` for what the messages may call."""
_TODAY = {
    "%Y": "2024",
    "%y": "24",
    "%m": "07",
    "%d": "26",
    "%B": "July",
    "%b": "Jul",
    "%A": "Friday",
    "%a": "Fri",
}
"""What templates that write the date are told, or a run resumed tomorrow would train on other tokens."""


class Chat:
    """A chat template: the tokenizer's own, or one by name.

    A turn is what rendering one message more adds, counted from the generation prompt: exactly the
    text that the model has to write when it is asked in the same way. White space that a template
    puts after the EOS of a turn is no part of the turn, since generation has stopped by then.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        if template is None and not tokenizer.chat_template:
            raise DataError(
                "conversations need a chat template, and this model's tokenizer has none; name one in the "
                f"source, as `template: chatml` (or {' or '.join(sorted(TEMPLATES.keys() - {'chatml'}))}), "
                "use an instruction-tuned model, or format alpaca, completion or text"
            )
        self.is_named = template is not None
        """Whether it is not the tokenizer's own, and so has no BOS of its own."""
        self._tokenizer = tokenizer
        self._name = "the tokenizer's chat template" if template is None else f"the template {template}"
        self.template = (
            _with_fixed_date(tokenizer.get_chat_template()) if template is None else TEMPLATES[template]
        )
        """Jinja."""
        self._rendered_whole: set[tuple[Any, ...]] = set()
        """Kinds of conversation of which nothing is lost."""

    def segments(self, conversation: Conversation, place: str) -> tuple[Segment, ...]:
        """The conversation: a target for each assistant turn but one that opens it.

        A turn that is empty or that the row says not to learn is rendered, and no loss sees it. Raises
        DataError, also where the template leaves a text of the row out.
        """
        messages = conversation.messages
        whole = self._render(conversation, place)
        segments: list[Segment] = []
        position, hides = 0, messages[0].role == "assistant" and not messages[0].is_learned
        for index, message in enumerate(messages):
            if message.role != "assistant" or index == 0:
                continue
            is_target = message.is_learned and not self._is_empty(message)
            begin, end = self._turn(conversation, index, whole, place)
            if begin < position:
                if is_target:
                    self._refuse_lost(conversation, place)
                    raise DataError(f"{place}: message {index + 1}: {self._inconsistent()}")
                # What is not learned need not be told apart, but from what is.
                hides = True
                continue
            segments.append(Segment(whole[position:begin], is_target=False, is_masked=hides))
            segments.append(Segment(whole[begin:end], is_target=is_target, is_masked=not is_target))
            position, hides = end, False
        if whole[position:].strip():
            segments.append(Segment(whole[position:], is_target=False, is_masked=hides))
        self._refuse_lost(conversation, place)
        return tuple(segments)

    def question(self, conversation: Conversation, place: str) -> tuple[Segment, ...]:
        """A conversation up to where the assistant answers its last message. Raises DataError."""
        answered = self.segments(conversation.answered("-"), place)
        last = max(index for index, segment in enumerate(answered) if segment.is_target)
        return answered[:last]

    def _turn(self, conversation: Conversation, index: int, whole: str, place: str) -> tuple[int, int]:
        """Where a turn begins and ends; (-1, -1) where the template does not only append."""
        upto = conversation.messages[: index + 1]
        before = self._render(replace(conversation, messages=upto[:-1]), place, ask=True)
        is_last = len(upto) == len(conversation.messages)
        after = whole if is_last else self._render(replace(conversation, messages=upto), place)
        if not (after.startswith(before) and whole.startswith(after)):
            return -1, -1
        return len(before), len(before) + self._length_of_turn(after[len(before) :])

    def _refuse_lost(self, conversation: Conversation, place: str) -> None:
        """Raises DataError where the template leaves out what the row says.

        A marker in the place of each text tells, not the text: templates trim, and short texts stand in
        others. Which texts are left out depends on the kinds of messages, so each kind is tried once.
        """
        kind = (
            tuple((m.role, *m.reasoning, bool(m.content.strip())) for m in conversation.messages),
            conversation.tools is not None,
        )
        if kind in self._rendered_whole:
            return
        spots = list(_spots(conversation))
        if lost := self._lost(conversation, spots):
            for spot in lost:
                # Alone, since a marker elsewhere may have changed what the template does here.
                if self._lost(conversation, [spot]):
                    raise DataError(f"{place}: {self._explained(conversation, spot)}")
            return
        self._rendered_whole.add(kind)

    def _lost(self, conversation: Conversation, spots: Sequence[_Spot]) -> list[_Spot]:
        """Those of the spots whose text is not rendered."""
        marked = conversation
        for spot in spots:
            marked = _with_marker(marked, spot)
        try:
            text = self._render(marked, "")
        except DataError:
            # A template that looks at a text has a place for it.
            return list(spots) if len(spots) > 1 else []
        return [spot for spot in spots if _marker(spot) not in text]

    def _explained(self, conversation: Conversation, spot: _Spot) -> str:
        index, key = spot
        if key == "tools":
            return (
                f"{self._name} does not render tools, so the model would not see them; take a model or a "
                "template that does, or take the tools out of the rows"
            )
        message = conversation.messages[index]
        if key == "content":
            return (
                f"message {index + 1}: {self._name} leaves out this message of role {message.role!r}; take "
                "a model or a `template` that renders it, or give it a role that it renders, such as user"
            )
        return (
            f"message {index + 1} has {key!r}, and {self._name} leaves it out here; write it into the "
            "content as the model is to say it, or take it out"
        )

    def _is_empty(self, message: Message) -> bool:
        eos = str(self._tokenizer.eos_token)
        return message.is_empty or replace(message, content=message.content.replace(eos, "")).is_empty

    def _render(self, conversation: Conversation, place: str, *, ask: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                [message.rendered for message in conversation.messages],
                tools=conversation.tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=ask,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"{place}: {self._name} cannot render this conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def _inconsistent(self) -> str:
        return (
            f"{self._name} renders this assistant turn differently with and without what surrounds it, so "
            "its tokens cannot be told apart; use conversations with one assistant turn, or a model or a "
            "`template` that only appends"
        )

    def _length_of_turn(self, text: str) -> int:
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self._tokenizer.eos_token) else len(text)


def _with_fixed_date(template: str) -> str:
    """The template with its only clock, `strftime_now`, hidden by a macro that knows one day."""
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace('{directive}', '{text}')" for directive, text in _TODAY.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro +%}}{template}"


def asked(instruction: str, input: str) -> Message:
    """A user's message of an instruction and what it is about."""
    return Message("user", f"{instruction}\n\n{input}" if input else instruction)


def _spots(conversation: Conversation) -> Iterator[_Spot]:
    """Every text that a template may leave out; the assistant's contents are looked for as turns."""
    if conversation.tools is not None:
        yield -1, "tools"
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant" and message.content.strip():
            yield index, "content"
        for key, text in message.reasoning.items():
            if text.strip():
                yield index, key


def _with_marker(conversation: Conversation, spot: _Spot) -> Conversation:
    index, key = spot
    if key == "tools":
        assert conversation.tools is not None
        return replace(conversation, tools=[_named(tool, _marker(spot)) for tool in conversation.tools])
    message = conversation.messages[index]
    if key == "content":
        marked = replace(message, content=_marker(spot))
    else:
        marked = replace(message, reasoning={**message.reasoning, key: _marker(spot)})
    before, after = conversation.messages[:index], conversation.messages[index + 1 :]
    return replace(conversation, messages=(*before, marked, *after))


def _marker(spot: _Spot) -> str:
    """A word that no row has, with no white space to trim."""
    index, key = spot
    return f"Marker{index + 1}of{key.replace('_', '')}OmqVbz"


def _named(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A function's description under another name."""
    inner = tool.get("function")
    return (
        {**tool, "function": {**inner, "name": name}} if isinstance(inner, dict) else {**tool, "name": name}
    )
