"""Whether packed trials are alone over every causal architecture of transformers that can be made small.

    OMP_NUM_THREADS=1 python benchmarks/architectures.py                 all of them: some minutes
    OMP_NUM_THREADS=1 python benchmarks/architectures.py llama mixtral
    OMP_NUM_THREADS=1 python benchmarks/architectures.py --targets q_proj v_proj -- mixtral olmoe

A model has two narrow layers with random weights. Two adapters in two slots, two rows each, are compared
with each of them alone: losses, absolute, and gradients, by norm. A line says what came of it: the
differences, why tuner refuses the model, or why it could not be made.
"""

from __future__ import annotations

import argparse
import logging
import signal
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tuner.adapters import Adapter, Base, Pack, PackedRows, initial_adapter
from tuner.adapters.base import freeze
from tuner.adapters.initial import lora_config, meta_copy
from tuner.adapters.linear_layers import refuse_unlike_linear
from tuner.errors import TunerError

VOCABULARY, LENGTH = 100, 12
SECONDS, PARAMETERS = 20, 30_000_000
"""The most that a model may take."""
_SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(
        ("decoder_attention_heads", "encoder_attention_heads", "num_local_experts", "num_experts"), 4
    ),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "rotary_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "sliding_window"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("n_group", "topk_group", "first_k_dense_replace", "decoder_sparse_step", "eos_token_id"), 1
    ),
    **dict.fromkeys(("num_experts_per_tok", "time_step_rank", "mamba_dt_rank", "mamba_expand"), 2),
    **dict.fromkeys(("state_size", "mamba_d_state", "n_routed_experts"), 4),
    "initializer_range": 0.2,
    "is_decoder": True,
    "pad_token_id": 3,
    "bos_token_id": 0,
}
"""Values of whatever attributes of these names a configuration has."""


def main() -> None:
    """Print a line for each architecture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="ARCHITECTURE")
    parser.add_argument("--targets", nargs="+", help="names of layers instead of all-linear")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _out_of_time)
    for kind in arguments.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        print(f"{kind:30}", said_of(kind, arguments.targets or "all-linear"), flush=True)


def said_of(kind: str, targets: str | Sequence[str]) -> str:
    """What came of one architecture, with heads of the width that it has by default, or of eight."""
    said = ""
    for head in ({}, {"head_dim": 8}):
        signal.alarm(SECONDS)
        try:
            return _compared(small_config(kind, head), targets)
        except TunerError as error:
            return f"refused: {error}"
        except Exception as error:  # noqa: BLE001  # a line says whatever it is
            said = said or f"not made: {type(error).__name__}: {str(error).splitlines()[:1]}"
        finally:
            signal.alarm(0)
    return said


def _compared(config: Any, targets: str | Sequence[str]) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if sum(parameter.numel() for parameter in model.parameters()) > PARAMETERS:
        return "not made: too large"
    base = freeze(model, dtype=torch.float32)
    losses, gradients = differences(base, adapters(base, targets))
    verdict = "alone" if max(losses, gradients) < 1e-4 else "DIFFERENT"
    return f"{verdict}: losses {losses:.1e}, gradients {gradients:.1e}"


def small_config(kind: str, more: Mapping[str, Any]) -> Any:
    """Its configuration with small numbers where it has any of those names."""
    made = CONFIG_MAPPING[kind]
    standard = made()
    small = {**_SMALL, **more}
    return made(**{name: value for name, value in small.items() if hasattr(standard, name)})


def adapters(base: Base, targets: str | Sequence[str]) -> list[Adapter]:
    """Two of different ranks, as after some training: B is not zero."""
    meta_model = meta_copy(base, base_path="x")
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(2):
        trial = {"target_modules": targets, "lora_alpha": 8, "lora_r": 3 + number}
        start = initial_adapter(meta_model, lora_config(trial, base_path="x"), seed=number)  # type: ignore[arg-type]
        weights = {
            name: (a, torch.randn(b.shape, generator=generator) * 0.2)
            for name, (a, b) in start.weights.items()
        }
        found.append(Adapter(start.config, weights))
    refuse_unlike_linear(base, found[0].weights)
    return found


def differences(base: Base, both: Sequence[Adapter]) -> tuple[float, float]:
    """Of losses and of gradients, packed and alone."""
    ids = torch.randint(2, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    pack = Pack(base, num_slots=2, max_rank=4, modules=both[0].weights)
    for slot, adapter in enumerate(both):
        pack.occupy(slot, adapter)
    packed, gradients = _pass(pack, ids, dict(enumerate(both)))
    of_losses = of_gradients = 0.0
    for slot, adapter in enumerate(both):
        alone, expected = _pass(pack, ids[2 * slot : 2 * slot + 2], {slot: adapter})
        of_losses = max(of_losses, float((packed.view(2, -1)[slot] - alone).abs().max()))
        apart = float((gradients[slot] - expected[slot]).norm() / expected[slot].norm())
        of_gradients = max(of_gradients, apart)
    return of_losses, of_gradients


def _pass(pack: Pack, ids: Tensor, adapters: Mapping[int, Adapter]) -> tuple[Tensor, dict[int, Tensor]]:
    rows = torch.arange(len(ids)).repeat_interleave(LENGTH - 1)
    columns = torch.arange(1, LENGTH).repeat(len(ids))
    pack.zero_gradients()
    with pack.holding(PackedRows(tuple(adapters))):
        nll = pack.base.token_nll(ids, rows, columns)
        torch.autograd.backward(nll.sum())
    made = {
        slot: {
            name: tuple(torch.zeros_like(part) for part in parts) for name, parts in adapter.weights.items()
        }
        for slot, adapter in adapters.items()
    }
    pack.collect(made)
    flat = {
        slot: torch.cat([part.reshape(-1) for parts in named.values() for part in parts])
        for slot, named in made.items()
    }
    return nll.detach(), flat


def _out_of_time(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


if __name__ == "__main__":
    main()
