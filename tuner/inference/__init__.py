"""Use a trial's adapter: answer prompts in its template, merge, export, compute a final score."""

import tuner.adapters.quiet  # noqa: F401
from tuner.adapters.decoding import Decoding, batches
from tuner.inference.answer_file import Answer, AnswerFile
from tuner.inference.export import convert_to_gguf, export_adapter, export_merged, push
from tuner.inference.generation import Answerer
from tuner.inference.score import score

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
