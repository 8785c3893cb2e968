"""A trial's adapter in use: answering prompts in its template, merging, export, a last score."""

import tuner.adapters.quiet  # noqa: F401
from tuner.adapters.batches import batches
from tuner.adapters.decoding import Decoding
from tuner.inference.answer_file import Answer, AnswerFile
from tuner.inference.answering import Answerer
from tuner.inference.exporting import export_adapter, export_merged
from tuner.inference.gguf import convert_to_gguf
from tuner.inference.hub import push
from tuner.inference.scoring import score

__all__ = [
    "Answer",
    "AnswerFile",
    "Answerer",
    "Decoding",
    "batches",
    "convert_to_gguf",
    "export_adapter",
    "export_merged",
    "push",
    "score",
]
