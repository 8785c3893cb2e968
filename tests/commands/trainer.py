"""A script with transformers' Trainer that nobody prepared for tuner: a small model with dropout."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import HfArgumentParser, Trainer, TrainingArguments


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = self.layers(x)
        return {"loss": nn.functional.mse_loss(found, labels), "logits": found}


def rows(seed: int, count: int) -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=made)
    y = x.sum(dim=1, keepdim=True) + 0.1 * torch.randn(count, 1, generator=made)
    return [{"x": a, "labels": b} for a, b in TensorDataset(x, y)]


options = [each for each in sys.argv[1:] if each not in ("--no_final", "--no_rows")]
(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(options)
torch.manual_seed(arguments.seed)
trainer = Trainer(
    Net(),
    arguments,
    train_dataset=rows(1, 40),
    eval_dataset=None if "--no_rows" in sys.argv else rows(2, 30),
    compute_metrics=lambda found: {"error": float(abs(found.predictions - found.label_ids).mean())},
)
trainer.train()
if "--no_final" not in sys.argv:
    print(trainer.evaluate())
if torch.distributed.is_initialized():
    # A thread of gloo that lets go of its last tensors while Python ends aborts the process: pytorch#179291.
    sys.stdout.flush()
    os._exit(0)
