"""Chat templates that a round file can name, and what makes those of tokenizers the same on every day."""

from __future__ import annotations

import functools
from collections.abc import Mapping

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
    """The template with its only clock, `strftime_now`, hidden by a macro that knows one day.

    With a clock, a run that is resumed tomorrow would train on other tokens, and inference would send others
    than were trained. A template that takes a date, as Llama 3's take `date_string`, still takes it.
    """
    if "strftime_now" not in template or template.startswith(_CLOCK):
        return template
    return f"{_CLOCK}{template}"
