"""Rows to tokens: formats, templates, loss masks, splitting, mixing, the cache and the data order."""

from tuner.data.answer_metrics import AnswerMetric, EvalPrompt, load_metric, try_metric
from tuner.data.examples import Example, Examples, batch_rows
from tuner.data.metric_source import refuse_unlike_metric
from tuner.data.prepared import (
    DataReport,
    PreparedData,
    SplitReport,
    prepare,
    refuse_tokens_beyond,
    share_for_evaluation,
)
from tuner.data.pretrained import load_tokenizer
from tuner.data.preview import ShownRow, printable, show_rows
from tuner.data.prompts import Prompt, read_prompts, refuse_prompt_beyond, render_prompt
from tuner.data.rows import TABLE_VERSION

__all__ = [
    "TABLE_VERSION",
    "AnswerMetric",
    "DataReport",
    "EvalPrompt",
    "Example",
    "Examples",
    "PreparedData",
    "Prompt",
    "ShownRow",
    "SplitReport",
    "batch_rows",
    "load_metric",
    "load_tokenizer",
    "prepare",
    "printable",
    "read_prompts",
    "refuse_prompt_beyond",
    "refuse_tokens_beyond",
    "refuse_unlike_metric",
    "render_prompt",
    "share_for_evaluation",
    "show_rows",
    "try_metric",
]
