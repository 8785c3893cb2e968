"""Where the assistant's turns lie in a conversation that a chat template rendered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from tuner.data.segments import Row, Segment, kind_of
from tuner.data.templates import TEMPLATES
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = dict[str, str]
"""With `role` and `content`."""

_NOT_RENDERED = ("tool_calls", "function_call")
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

    def segments(self, messages: Sequence[Message], place: str) -> tuple[Segment, ...]:
        """The conversation: each assistant turn a target, but one that opens it. Raises DataError."""
        whole = self._render(messages, place)
        segments: list[Segment] = []
        position = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index == 0:
                continue
            before = self._render(messages[:index], place, ask=True)
            after = whole if index + 1 == len(messages) else self._render(messages[: index + 1], place)
            if not (len(before) >= position and after.startswith(before) and whole.startswith(after)):
                raise DataError(f"{place}: message {index + 1}: {self._inconsistent()}")
            end = len(before) + self._length_of_turn(after[len(before) :])
            segments.append(Segment(whole[position : len(before)], is_target=False))
            segments.append(Segment(whole[len(before) : end], is_target=True))
            position = end
        if whole[position:].strip():
            segments.append(Segment(whole[position:], is_target=False))
        return tuple(segments)

    def question(self, messages: Sequence[Message], place: str) -> tuple[Segment, ...]:
        """A conversation up to where the assistant answers its last message. Raises DataError."""
        answered = self.segments([*messages, {"role": "assistant", "content": "-"}], place)
        last = max(index for index, segment in enumerate(answered) if segment.is_target)
        return answered[:last]

    def prompt(self, instruction: str, input: str) -> str:
        """A conversation of one user's message, up to where the assistant begins."""
        return self._render([asked(instruction, input)], "the prompt", ask=True)

    def _render(self, messages: Sequence[Message], place: str, *, ask: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
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
    return {"role": "user", "content": f"{instruction}\n\n{input}" if input else instruction}


def read_messages(row: Row, column: str) -> list[Message]:
    """The messages of a row of format messages. Raises DataError."""
    messages = [_message(row, index, message) for index, message in enumerate(listed(row, column), start=1)]
    if messages[0]["role"] == "assistant":
        raise DataError(
            f"{row.place}: the conversation begins with the assistant, so nothing asks for that turn; "
            "begin with a user's message, or take the turn out"
        )
    return messages


def listed(row: Row, column: str) -> list[Any]:
    """A column's list, which is not empty. Raises DataError."""
    messages = row.values[column]
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if isinstance(messages, list) else kind_of(messages)
        raise DataError(f"{row.place}: column {column!r} is {found}; it must be a list of messages")
    return messages


def _message(row: Row, index: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise DataError(
            f"{row.place}: message {index} is {kind_of(message)}; it must be an object with role and content"
        )
    refuse_calls(row, index, message)
    return {key: text_of(row, index, message, key) for key in ("role", "content")}


def refuse_calls(row: Row, index: int, message: dict[str, Any]) -> None:
    """Raises DataError for a message that calls a function: what it says would be lost."""
    if refused := [key for key in _NOT_RENDERED if message.get(key)]:
        raise DataError(f"{row.place}: message {index} has {refused[0]!r}; only role and content are read")


def text_of(row: Row, index: int, message: dict[str, Any], key: str) -> str:
    """The text that a message has under a key. Raises DataError."""
    value = message.get(key)
    if not isinstance(value, str):
        found = kind_of(value) if key in message else "missing"
        raise DataError(f"{row.place}: message {index}: {key!r} is {found}; it must be text")
    return value
