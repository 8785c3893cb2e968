"""Where the assistant's turns lie in a conversation that the tokenizer's chat template rendered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tuner.data.segments import Row, Segment, kind_of
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """A tokenizer's chat template.

    A turn is what rendering one message more adds, counted from the generation prompt: exactly the
    text that the model has to write when it is asked in the same way. White space that a template
    puts after the EOS of a turn is no part of the turn, since generation has stopped by then.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "format messages needs a tokenizer with a chat template, and this model's has none; "
                "use an instruction-tuned model, or format alpaca, completion or text"
            )
        self._tokenizer = tokenizer
        self._template = _with_fixed_date(tokenizer.get_chat_template())

    def segments(self, row: Row) -> tuple[Segment, ...]:
        """The conversation, each assistant turn a target. Raises DataError."""
        messages = _messages(row)
        if messages[0]["role"] == "assistant":
            raise DataError(
                f"{row.place}: the conversation begins with the assistant, so nothing asks for that turn; "
                "begin with a user's message, or take the turn out"
            )
        whole = self._render(messages, row.place)
        segments: list[Segment] = []
        position = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], row.place, ask=True)
            after = whole if index + 1 == len(messages) else self._render(messages[: index + 1], row.place)
            if not (len(before) >= position and after.startswith(before) and whole.startswith(after)):
                raise DataError(_inconsistent(row, index))
            end = len(before) + self._length_of_turn(after[len(before) :])
            segments.append(Segment(whole[position : len(before)], is_target=False))
            segments.append(Segment(whole[len(before) : end], is_target=True))
            position = end
        if whole[position:].strip():
            segments.append(Segment(whole[position:], is_target=False))
        return tuple(segments)

    def prompt(self, instruction: str, input: str) -> str:
        """A conversation of one user's message, up to where the assistant begins."""
        content = f"{instruction}\n\n{input}" if input else instruction
        return self._render([{"role": "user", "content": content}], "the prompt", ask=True)

    def _render(self, messages: Sequence[dict[str, str]], place: str, *, ask: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=ask,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"{place}: the tokenizer's chat template cannot render this conversation: {error}"
            ) from error
        assert isinstance(text, str)
        return text

    def _length_of_turn(self, text: str) -> int:
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self._tokenizer.eos_token) else len(text)


def _with_fixed_date(template: str) -> str:
    """The template with its only clock, `strftime_now`, hidden by a macro that knows one day."""
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace('{directive}', '{text}')" for directive, text in _TODAY.items())
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro +%}}{template}"


def _messages(row: Row) -> list[dict[str, str]]:
    messages = row.values["messages"]
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if isinstance(messages, list) else kind_of(messages)
        raise DataError(f"{row.place}: column 'messages' is {found}; it must be a list of messages")
    return [_message(row, index, message) for index, message in enumerate(messages, start=1)]


def _message(row: Row, index: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(
            f"{row.place}: message {index} is {kind_of(message)}; it must be an object with role and content"
        )
    if refused := [key for key in _NOT_RENDERED if message.get(key)]:
        raise DataError(f"{row.place}: message {index} has {refused[0]!r}; only role and content are read")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            found = kind_of(message[key]) if key in message else "missing"
            raise DataError(f"{row.place}: message {index}: {key!r} is {found}; it must be text")
    return {"role": message["role"], "content": message["content"]}


def _inconsistent(row: Row, index: int) -> str:
    return (
        f"{row.place}: message {index + 1}: the tokenizer's chat template renders this assistant turn "
        "differently with and without what surrounds it, so its tokens cannot be told apart; use "
        "conversations with one assistant turn, or a model whose template only appends"
    )
