"""A trial's adapter in use: answering prompts in the template it was trained on."""

import tuner.adapters.quiet  # noqa: F401
from tuner.inference.generate import generate

__all__ = ["generate"]
