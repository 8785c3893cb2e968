"""A trial's adapter in use: answering prompts in the template it was trained on, merging, export."""

import tuner.adapters.quiet  # noqa: F401
from tuner.inference.exporting import export_adapter, export_merged
from tuner.inference.generate import generate
from tuner.inference.gguf import convert_to_gguf
from tuner.inference.hub import push

__all__ = ["convert_to_gguf", "export_adapter", "export_merged", "generate", "push"]
