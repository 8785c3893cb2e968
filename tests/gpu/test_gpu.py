"""What only a CUDA GPU can show: the same promises with its kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MistralConfig

from tests import tiny
from tests.inference.test_answering import DRAWN, GREEDY, prompt, said
from tests.inference.test_merging import export, trained
from tests.training.driving import (
    Entry,
    assert_lost_in_rounding,
    assignment,
    curve,
    drive,
    ended,
    loss_difference,
    run_loop,
    update_difference,
    worker_state,
)
from tuner.adapters import Base, load_base
from tuner.inference import Answerer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA GPU: torch.cuda.is_available() is False"
    ),
]

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("models") / "llama", tiny.config("llama", **tiny.WIDE))


def on_gpu(path: Path, dtype: str, quantization: str = "none") -> Base:
    spec = tiny.model_spec(path, dtype=dtype, quantization=quantization)
    return load_base(spec, device="cuda:0", max_length=tiny.MAX_LENGTH)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_packed_is_the_trial_alone(path: Path, quantization: str) -> None:
    """In bfloat16, within a tolerance that is measured: what bfloat16 itself changes."""
    rounded, exact = (on_gpu(path, dtype, quantization) for dtype in ("bfloat16", "float32"))
    assert_lost_in_rounding(rounded, exact)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_loop(path: Path, tmp_path: Path, optimizer: str) -> None:
    """A stopped trial goes on from its checkpoint, with its moments back on the GPU."""
    trial = tiny.hyperparameters(optimizer=optimizer, lora_r=32, learning_rate=1e-3, lora_dropout=0.1)
    base = on_gpu(path, "bfloat16")
    first = assignment(tmp_path, hyperparameters=trial)
    with worker_state(base, [trial]) as state:
        stopped = run_loop(state, [first], stop_at_micro_step=5)
        assert ended(stopped).outcome == "stopped"
        last = tmp_path / "trial-0000" / "last" / f"step-{ended(stopped).step:06d}.a1"
        again = run_loop(
            state, [assignment(tmp_path, hyperparameters=trial, attempt=2, resume_from=str(last))]
        )
    assert ended(again).outcome == "complete"
    assert [evaluation.step for evaluation in curve(again)] == [0, 3, 6, 9, 10]
    assert curve(again)[-1].eval_loss < curve(again)[0].eval_loss


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_answers_and_so_does_the_merged_model(
    path: Path, tmp_path: Path, quantization: str
) -> None:
    """`trial generate` on the GPU, and of a model that was merged on the host."""
    spec = tiny.model_spec(path, dtype="float32", quantization=quantization)
    merged = export(tmp_path, spec, trained(spec), "float32").to(DEVICE)
    tokenizer = tiny.byte_level()
    answering = Answerer(spec, tokenizer, adapter=tmp_path / "adapter")
    asked = [prompt(range(4, 12 + number), number) for number in range(3)]
    for decoding in (GREEDY, DRAWN):
        together = said(answering, asked, decoding)
        assert together == [text for each in asked for text in said(answering, [each], decoding)]
    assert said(answering, asked, GREEDY, of_base=True) != said(answering, asked, GREEDY)
    ids = torch.arange(4, 20, device=DEVICE)[None]
    with torch.no_grad():
        one, other = (model(input_ids=ids).logits for model in (merged, answering._model))
    # In 4 bits, the host may round a weight to the neighbour of the code that the GPU takes.
    assert float((one - other).norm() / one.norm()) < (1e-4 if quantization == "none" else 0.02)


@pytest.mark.parametrize("window", [None, 5])
def test_varlen_is_torchs_attention(tmp_path: Path, window: int | None) -> None:
    """Nobody has run this yet: it was written without a GPU. Loading compares each layer's gradients, too."""
    config = MistralConfig(**tiny.config("llama", **tiny.WIDE).to_dict(), sliding_window=window)
    spec = tiny.model_spec(tiny.save_model(tmp_path, config), dtype="bfloat16", attention="varlen")
    trials = [tiny.hyperparameters(training_seed=n, lora_r=4 + n, lora_dropout=0.1 * n) for n in range(3)]
    trials[1]["learning_rate"] = 1e30  # what it comes to reaches no neighbour
    entries = [Entry(0, 0), Entry(1, 1), Entry(2, 3)]  # with a hole
    found = []
    for attention in ("torch", spec.attention):
        base = load_base(spec, device=DEVICE, max_length=tiny.MAX_LENGTH, attention=attention)
        with worker_state(base, trials, slots=4) as state:
            assert state.joins_rows
            found.append(drive(state, trials, entries, max_train_steps=5))
    pairs = [(found[1][n], found[0][n]) for n in (0, 2)]
    losses = max(loss_difference(*pair) for pair in pairs)
    updates = max(update_difference(*pair) for pair in pairs)
    print(f"window {window}: losses differ by {losses:.1e}, updates by {updates:.1e}")
    assert losses < 0.02
    assert updates < 0.5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_base_on_two_gpus(path: Path, quantization: str) -> None:
    """Nobody has run this yet: it was written without two GPUs."""
    spec = tiny.model_spec(path, dtype="bfloat16", quantization=quantization)
    second = torch.device("cuda:1")
    trials = [tiny.hyperparameters(training_seed=n, lora_dropout=0.1) for n in range(2)]
    found = []
    for others in ((), (second,)):
        base = load_base(spec, device="cuda:0", max_length=tiny.MAX_LENGTH, others=others)
        with worker_state(base, trials, slots=2) as state:
            found.append(drive(state, trials, [Entry(0, 0), Entry(1, 1)], max_train_steps=5))
    assert second in base.devices
    assert max(loss_difference(found[0][n], found[1][n]) for n in range(2)) < 0.02


def test_unsloth_gives_the_same_losses(path: Path) -> None:
    """Its kernels round otherwise; weights, head and loss are the same."""
    pytest.importorskip("unsloth", reason="unsloth is not installed")
    ids = torch.arange(2 * tiny.MAX_LENGTH, device="cuda").reshape(2, -1) % tiny.VOCABULARY
    rows, columns = torch.tensor([0, 0, 1], device="cuda"), torch.tensor([1, 9, 20], device="cuda")
    losses = [
        load_base(
            tiny.model_spec(path, dtype="bfloat16", loader=loader),
            device="cuda:0",
            max_length=tiny.MAX_LENGTH,
        ).token_nll(ids, rows, columns)
        for loader in ("transformers", "unsloth")
    ]
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)
