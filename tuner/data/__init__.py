"""Rows to tokens: formats, templates, loss masks, splitting, mixing, the cache and the data order."""

from tuner.data.examples import Example, Examples
from tuner.data.order import batch_rows
from tuner.data.prepared import DataReport, PreparedData, SplitReport, prepare
from tuner.data.pretrained import load_tokenizer
from tuner.data.preview import ShownRow, printable, show_rows
from tuner.data.prompts import Prompt, read_prompts, render_prompt

__all__ = [
    "DataReport",
    "Example",
    "Examples",
    "PreparedData",
    "Prompt",
    "ShownRow",
    "SplitReport",
    "batch_rows",
    "load_tokenizer",
    "prepare",
    "printable",
    "read_prompts",
    "render_prompt",
    "show_rows",
]
