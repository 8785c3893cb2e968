"""Chat templates, and the positions of the assistant's turns in rendered conversations."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from tuner.data.examples import Segment, agreeing
from tuner.data.messages import Conversation, Message
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)

TEMPLATES: Mapping[str, str] = {
    "alpaca": (
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
        f"{{% else %}}{{{{ '{_ALPACA_PREAMBLE}' }}}}{{% endif %}}"
        "{{ '\n\n' }}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
        "{% elif m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}"
        "{% elif not loop.first %}{{ raise_exception(m.role + ' has no place after the beginning') }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ eos_token if m.role == 'assistant' else '<|im_end|>' }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content|trim }}{{ eos_token if m.role == 'assistant' else '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}
"""Jinja, as tokenizers have it. An assistant's turn ends with the tokenizer's own EOS, whatever mark the
template has elsewhere, so that generation stops there; the tokenizer's own BOS is put before the text."""

_DAY = {
    **{"%Y": "2024", "%y": "24", "%m": "07", "%-m": "7", "%d": "26", "%-d": "26", "%e": "26", "%j": "208"},
    **{"%B": "July", "%b": "Jul", "%h": "Jul", "%A": "Friday", "%a": "Fri"},
    **{"%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM"},
    **{"%F": "2024-07-26", "%D": "07/26/24", "%T": "00:00:00"},
}
"""What templates that write the date are told: the day that Llama 3's have where there is no clock."""


_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{directive}', '{text}')" for directive, text in _DAY.items())
    + " }}{% endmacro +%}"
)


@functools.cache
def with_fixed_date(template: str) -> str:
    """Return the template with its clock, `strftime_now`, replaced by a macro with a fixed date.

    With a clock, a run that is resumed tomorrow would train on other tokens, and inference would send others
    than were trained. A template that takes a date, as Llama 3's take `date_string`, still takes it.
    """
    if "strftime_now" not in template or template.startswith(_CLOCK):
        return template
    return f"{_CLOCK}{template}"


_Spot: TypeAlias = tuple[int, str]
"""The index of a message, and the key of a text in it; -1 and `tools` for what the messages may call."""
_SHOWN_CHARACTERS = 80


class Chat:
    """A chat template: the tokenizer's own, or one by name.

    A turn is what rendering one message more adds, counted from the generation prompt: exactly the
    text that the model has to write when it is asked in the same way. White space that a template
    puts after the EOS of a turn is no part of the turn, since generation has stopped by then.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        if template is None and not tokenizer.chat_template:
            raise DataError(
                "conversations require a chat template, but this model's tokenizer has none; set one in the "
                f"source, as `template: chatml` (or {' or '.join(sorted(TEMPLATES.keys() - {'chatml'}))}), "
                "use an instruction-tuned model, or use format alpaca, completion or text"
            )
        self.is_named = template is not None
        """Whether it is not the tokenizer's own, and so has no BOS of its own."""
        self._tokenizer = tokenizer
        self._name = "the tokenizer's chat template" if template is None else f"the template {template}"
        self._named = None if template is None else TEMPLATES[template]
        """Jinja."""
        self._rendered_whole: set[tuple[Any, ...]] = set()
        """Kinds of conversation of which nothing is lost."""

    def segments(self, conversation: Conversation, place: str) -> tuple[Segment, ...]:
        """Return the conversation; each assistant turn is a target, except one that opens it.

        A turn that is empty or that the row says not to learn is rendered, and no loss sees it. Raises
        DataError, also where the template leaves a text of the row out.
        """
        messages = conversation.messages
        whole = self._render(conversation, place)
        segments: list[Segment] = []
        first, position, hides = 0, 0, messages[0].role == "assistant" and not messages[0].is_learned
        for index, message in enumerate(messages):
            if message.role != "assistant" or index == 0:
                continue
            is_target = message.is_learned and not self._is_empty(message)
            begin, end = self._turn(conversation, index, whole, place)
            if begin < position:
                if is_target:
                    raise self._untold(conversation, index, place)
                # What is not learned need not be told apart, but from what is.
                hides = True
                continue
            between = range(position, begin)
            segments += self._between(conversation, range(first, index), whole, between, hides=hides)
            segments.append(Segment(whole[begin:end], is_target=is_target, is_masked=not is_target))
            first, position, hides = index + 1, end, False
        if whole[position:].strip():
            rest = range(position, len(whole))
            segments += self._between(conversation, range(first, len(messages)), whole, rest, hides=hides)
        self._refuse_lost(conversation, place)
        return tuple(segments)

    def question(self, conversation: Conversation, place: str) -> tuple[Segment, ...]:
        """Return a conversation up to the assistant's answer to its last message. Raises DataError.

        The turns before are told apart where they can be, as in training. The answer may begin with a
        thought, where the template asks for one.
        """
        said = replace(
            conversation, messages=tuple(replace(m, is_learned=False) for m in conversation.messages)
        )
        thought = Message("assistant", "-", {"reasoning_content": "-"})
        asked = (conversation.answered("-"), conversation.followed_by(thought))
        first_error: DataError | None = None
        for each in (*asked, said.answered("-"), said.followed_by(thought)):
            try:
                answered = self.segments(each, place)
            except DataError as error:
                first_error = first_error or error
                continue
            last = max(index for index, segment in enumerate(answered) if segment.is_target)
            return answered[:last]
        assert first_error is not None
        raise first_error

    def _turn(self, conversation: Conversation, index: int, whole: str, place: str) -> tuple[int, int]:
        """Return where a turn begins and ends; (-1, -1) if the template does more than append."""
        upto = conversation.messages[: index + 1]
        before = self._render(replace(conversation, messages=upto[:-1]), place, ask=True)
        end = self._end_of(conversation, index, whole)
        if end < len(before) or not whole.startswith(before):
            return -1, -1
        return len(before), len(before) + self._length_of_turn(whole[len(before) : end])

    def _between(
        self, conversation: Conversation, indices: range, whole: str, span: range, *, hides: bool
    ) -> Iterator[Segment]:
        """Return the messages between two turns, without loss on those that the row excludes."""
        masked = [index for index in indices if not conversation.messages[index].is_learned]
        ends = {index: self._end_of(conversation, index, whole) for i in masked for index in (i - 1, i)}
        hides = hides or any(end < span.start and index >= indices.start for index, end in ends.items())
        position = span.start
        for index in () if hides else masked:
            begin, end = (min(max(ends[i], position), span.stop) for i in (index - 1, index))
            if position < begin:
                yield Segment(whole[position:begin], is_target=False)
            yield Segment(whole[begin:end], is_target=False, is_masked=True)
            position = end
        if position < span.stop or not masked:
            yield Segment(whole[position : span.stop], is_target=False, is_masked=hides)

    def _end_of(self, conversation: Conversation, index: int, whole: str) -> int:
        """Return where a message ends; -1 if it is rendered differently when others follow."""
        messages = conversation.messages
        if index in (-1, len(messages) - 1):
            return len(whole) if index >= 0 else 0
        try:
            text = self._render(replace(conversation, messages=messages[: index + 1]), "")
            if whole.startswith(text):
                return len(text)
            # Phi 3 puts an EOS after a conversation, whatever its last message.
            end = self._before_token(text, agreeing(text, whole))
            without = self._render(replace(conversation, messages=messages[:index]), "")
        except DataError:  # some templates do not render conversations that end early
            return -1
        return end if whole.endswith(text[end:]) and without.endswith(text[end:]) else -1

    def _before_token(self, text: str, position: int) -> int:
        """Return the position, or the start of the token that contains it."""
        for token in self._tokenizer.get_added_vocab():
            if (at := text.find(token, max(0, position - len(token) + 1))) != -1 and at < position:
                return at
        return position

    def _refuse_lost(self, conversation: Conversation, place: str) -> None:
        """Raise DataError if the template leaves out a text of the row.

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
        """Return the spots whose text is not rendered."""
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
        upto = replace(conversation, messages=conversation.messages[: index + 1])
        if index + 1 < len(conversation.messages) and not self._lost(upto, [spot]):
            return (
                f"message {index + 1} has {key!r}, and {self._name} renders it in the last turn alone; let "
                "a row end with this turn, and where others follow it, take it out and give the turn "
                "`weight: 0`"
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
                chat_template=self._template(conversation),
                tokenize=False,
                add_generation_prompt=ask,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(f"{place}: {self._name} cannot render this conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def _template(self, conversation: Conversation) -> str:
        """Return the Jinja template; some tokenizers have a separate one for conversations with tools."""
        if self._named is not None:
            return self._named
        return with_fixed_date(self._tokenizer.get_chat_template(tools=conversation.tools))

    def _untold(self, conversation: Conversation, index: int, place: str) -> DataError:
        """Return the error for a turn that cannot be told apart from its surroundings."""
        upto = replace(conversation, messages=conversation.messages[: index + 1])
        asked, asking = self._opening(upto, place)
        if asked == asking:
            self._refuse_lost(conversation, place)
            return DataError(
                f"{place}: message {index + 1}: {self._name} renders this assistant turn differently with "
                "and without what surrounds it, so its tokens cannot be told apart; let the conversation end "
                "with the turn that is learned, with `weight: 0` on the assistant's turns before it, or take "
                "a model or a `template` that only appends"
            )
        turn = upto.messages[-1]
        other = replace(turn, reasoning={} if turn.reasoning else {"reasoning_content": "-"})
        remedy = "take its reasoning out" if turn.reasoning else "give the turn a `reasoning_content`"
        try:
            agrees = len(set(self._opening(replace(upto, messages=(*upto.messages[:-1], other)), ""))) == 1
        except DataError:
            agrees = False
        return DataError(
            f"{place}: message {index + 1}: {self._name} asks for an answer with "
            f"{asking[:_SHOWN_CHARACTERS]!r} and renders this assistant turn as "
            f"{asked[:_SHOWN_CHARACTERS]!r}, so the model would be asked otherwise than it was trained; "
            f"{f'{remedy}, ' if agrees else ''}name another `template` in the source "
            f"({', '.join(sorted(TEMPLATES))}), take a model that is asked as its turns begin, or make the "
            "two agree in the chat template of a copy of the model"
        )

    def _opening(self, upto: Conversation, place: str) -> tuple[str, str]:
        """Return the beginning of the last turn, and the generation prompt; equal if the turn continues
        it."""
        before = replace(upto, messages=upto.messages[:-1])
        asking, answered = self._render(before, place, ask=True), self._render(upto, place)
        told = min(agreeing(self._render(before, place), text) for text in (asking, answered))
        return answered[told : len(asking)], asking[told:]

    def _length_of_turn(self, text: str) -> int:
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self._tokenizer.eos_token) else len(text)


def asked(instruction: str, input: str) -> Message:
    """Return the user's message for an instruction and its input."""
    return Message("user", f"{instruction}\n\n{input}" if input else instruction)


def _spots(conversation: Conversation) -> Iterator[_Spot]:
    """Return every text that a template may leave out, besides the assistant's, which are its turns."""
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
    """Return a word that does not occur in rows and has no white space to trim."""
    index, key = spot
    return f"Marker{index + 1}of{key.replace('_', '')}OmqVbz"


def _named(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a tool's description under another name."""
    inner = tool.get("function")
    return (
        {**tool, "function": {**inner, "name": name}} if isinstance(inner, dict) else {**tool, "name": name}
    )
