"""Chat templates that a round file can name, for tokenizers that have none or another one."""

from __future__ import annotations

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
