"""Use a trial's adapter: answer prompts in its template, merge, export, compute a final score."""

from tuner.adapters.generation import Decoding, batches
from tuner.inference.export import convert_to_gguf, export_adapter, export_merged, merge_checkpoint, push
from tuner.inference.generation import Answer, Answerer, AnswerFile, score

__all__ = [
    "Answer",
    "AnswerFile",
    "Answerer",
    "Decoding",
    "batches",
    "convert_to_gguf",
    "export_adapter",
    "export_merged",
    "merge_checkpoint",
    "push",
    "score",
]
