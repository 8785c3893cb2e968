"""The frozen base model: loading it, refusing models that mix rows, and its loss at chosen positions."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.logging import disable_progress_bar

from tuner.adapters.device_io import one_example_a_row, one_out_of_memory, send
from tuner.adapters.frozen_linear import FusedNll, chunked_nll, head_nll, product, speed_up, token_scores
from tuner.adapters.joined import Attention, Joined, joined_positions, joined_rows
from tuner.adapters.liger import nll_and_gradient, require_liger, use_liger
from tuner.adapters.loaders import load_by_unsloth, require_loader
from tuner.adapters.placement import connect, devices_of, is_about_offloading, on, placed
from tuner.adapters.varlen import compared, refused, require_varlen
from tuner.data import Example
from tuner.data.pretrained import hub_advice, where_to_look
from tuner.errors import ModelError

if TYPE_CHECKING:
    from tuner.config import ModelSpec


_log = logging.getLogger(__name__)

_OF_DAMAGED_FILES = (
    OSError,
    ValueError,
    ImportError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    SafetensorError,
    StrictDataclassError,
    pickle.UnpicklingError,
)
"""What transformers and the libraries below it raise for files that are damaged or of another model."""
_NUM_SHOWN = 3
"""Weights that a message names."""

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""The allowed values of `model.dtype`."""


@dataclass
class Base:
    """A causal language model without gradients or dropout of its own, shared by all trials."""

    model: PreTrainedModel
    dtype: torch.dtype
    """The dtype of activations."""
    head_is_linear: bool
    """Whether the logits are just the output embedding of the last hidden state."""
    joins_rows: bool = field(default=False, init=False)
    """Whether several examples in a row stay apart, as `Joined` lays them."""
    attention: Attention = field(default="torch", init=False)
    """What computes attention over joined rows."""
    last: nn.Module | None = field(default=None, init=False)
    """The feed-forward module of the last layer, where tokens do not meet there or afterwards."""
    fused_nll: FusedNll | None = field(default=None, init=False)
    """A kernel for losses with gradients."""

    @property
    def device(self) -> torch.device:
        """Return the device of the inputs."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Return all devices that it is on, that of the inputs first."""
        return devices_of(self.model)

    @property
    def vocabulary_size(self) -> int:
        """Return the number of logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def num_embeddings(self) -> int:
        """Return the number of token ids that it can read and predict."""
        return num_embeddings(self.model)

    def keep_fewer_activations(self) -> bool:
        """Recompute every layer in the backward pass instead of keeping its activations.

        Less memory, a third more time, the same numbers. False if the model cannot, or does so already.
        """
        if not self.model.supports_gradient_checkpointing or self.model.is_gradient_checkpointing:
            return False
        # Without dropout of its own, and with that of adapters drawn from counters, it repeats itself.
        self.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                # transformers checks only the layer's own flag; its submodules stay without dropout.
                module.training = True
                module._gradient_checkpointing_func = partial(
                    _without_dropout, module, module._gradient_checkpointing_func
                )
        return True

    def token_nll(self, input_ids: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the negative log-likelihood, in float32 and nats, of the tokens at (rows[i], columns[i]).

        `input_ids` is [rows, length], padded on the right: with causal attention no real token sees the
        padding, so no mask is needed. `columns` are at least 1. Only these positions reach the output
        embedding.
        """
        hidden, targets = self._before(input_ids, rows, columns)
        if not self.head_is_linear:
            return chunked_nll(self._logits, hidden, targets, vocabulary_size=self.vocabulary_size)
        head = self.model.get_output_embeddings()
        return head_nll(hidden, head.weight, head.bias, targets, fused=self.fused_nll)

    @torch.no_grad()
    def token_scores(self, input_ids: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return `token_nll` without gradients, and for each token whether no other is likelier there."""
        hidden, targets = self._before(input_ids, rows, columns)
        head = self.model.get_output_embeddings()
        logits = partial(product, weight=head.weight, bias=head.bias) if self.head_is_linear else self._logits
        return token_scores(logits, hidden, targets, vocabulary_size=self.vocabulary_size)

    def _before(self, input_ids: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden states [tokens, width] at the preceding positions, which predict these.

        The tokens at these [tokens] follow. Both are on the device of the output embedding.
        """
        head = self.model.get_output_embeddings()
        there = head.weight.device
        rows, columns, ids = (on(each, there) for each in (rows, columns, input_ids))
        targets = ids[rows, columns]
        if not self.head_is_linear:
            return self._last_hidden(input_ids).to(there)[rows, columns - 1], targets
        picked: list[Tensor] = []

        def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            picked.append(inputs[0][rows, columns - 1])
            return (picked[0][None, :1],)

        hook = head.register_forward_pre_hook(pick)
        try:
            with one_example_a_row():
                self.model(input_ids=input_ids, use_cache=False, **joined_positions())
        finally:
            hook.remove()
        return picked[0], targets

    def _last_hidden(self, input_ids: Tensor) -> Tensor:
        """Return the output of the layers for `input_ids`: [rows, length, width]."""
        with one_example_a_row():
            decoder, given = self.model.get_decoder(), joined_positions()
            hidden: Tensor = decoder(input_ids=input_ids, use_cache=False, **given).last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return the model's logits for last hidden states [tokens, width], without running its layers."""
        known = MoeModelOutputWithPast(last_hidden_state=hidden[None])
        with _answering(self.model.get_decoder(), known):
            logits: Tensor = self.model(input_ids=hidden.new_zeros((1, 1), dtype=torch.long)).logits[0]
        return logits


def _without_dropout(layer: nn.Module, checkpoint: Any, run: Any, *inputs: Any) -> Any:
    """Checkpoint a layer that does not train while it runs: some, such as OPT's, drop out by their own
    flag.
    """

    def still(*inputs: Any) -> Any:
        layer.training = False
        try:
            return run(*inputs)
        finally:
            layer.training = True

    return checkpoint(still, *inputs)


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module answer with an output instead of computing one."""
    own = vars(module).get("forward")  # some loaders give a layer one of its own
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def load_base(
    model: ModelSpec,
    *,
    device: str | torch.device,
    max_length: int,
    others: Sequence[torch.device] = (),
    kernels: Literal["torch", "liger"] = "torch",
    attention: Attention = "torch",
) -> Base:
    """Load a causal language model for training adapters on it, spread over all devices if there are others.

    `kernels` and `attention` are those of `model` for a worker that trains; answers and later scores are
    computed by torch alone. Raises ModelError if the model cannot be found, if its rows influence one
    another, so that a trial's result would depend on its neighbours, or if one of the two cannot be used.
    """
    if kernels == "liger":
        require_liger()
    if attention == "varlen":
        require_varlen(torch.device(device))
    loaded = load_model(model, device=device, max_length=max_length, others=others)
    try:
        with one_out_of_memory():
            if kernels == "liger":
                use_liger(loaded.eval().requires_grad_(False))
            base = freeze(loaded, dtype=DTYPES[model.dtype])
            if attention == "varlen":
                _use_varlen(base, max_length=max_length)
    except torch.OutOfMemoryError as error:  # of a few tokens
        raise _too_large(model, (torch.device(device), *others), error) from error
    base.fused_nll = nll_and_gradient if kernels == "liger" else None
    return base


def load_model(
    model: ModelSpec,
    *,
    device: str | torch.device,
    max_length: int,
    others: Sequence[torch.device] = (),
) -> PreTrainedModel:
    """Load the model with transformers, quantised if the round file says so. Raises as `load_base` does.

    Sets for the process how a GPU multiplies float32.
    """
    choose_products(model, torch.device(device))
    with _without_bars():
        return _loaded(model, (torch.device(device), *others), max_length=max_length)


def choose_products(model: ModelSpec, device: torch.device) -> None:
    """Set whether a GPU multiplies float32 in TF32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if model.tf32 else "highest")
    elif model.tf32:
        _log.warning("model.tf32 has no effect on %s: only GPUs have TF32", device)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep progress bars out of logs; that of a GGUF file asks nobody."""
    disable_progress_bar()
    shown = modeling_gguf_pytorch_utils.tqdm
    modeling_gguf_pytorch_utils.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = shown


def _loaded(model: ModelSpec, devices: Sequence[torch.device], *, max_length: int) -> PreTrainedModel:
    config = load_config(model, max_length=max_length)
    try:
        with one_out_of_memory():
            loaded = _from_files(model, config, devices, max_length=max_length)
    except torch.OutOfMemoryError as error:
        raise _too_large(model, devices, error) from error
    except _OF_DAMAGED_FILES as error:
        if is_about_offloading(error):
            raise _too_large(model, devices, error) from error
        raise _cannot_load(model, error) from error
    except RuntimeError as error:  # a GPU's is the machine's fault
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise _cannot_load(model, "its weights have other shapes than its config.json says") from error
    return loaded


def _too_large(model: ModelSpec, devices: Sequence[torch.device], error: Exception) -> ModelError:
    where = ", ".join(map(str, devices))
    return ModelError(
        f"model.path: {model.path!r} does not fit into the memory of {where}: {error}\n"
        "Set model.quantization: nf4, set run.gpus_per_worker to more GPUs, choose a smaller model, or free "
        "memory used by other processes."
    )


def _from_files(
    model: ModelSpec, config: Any, devices: Sequence[torch.device], *, max_length: int
) -> PreTrainedModel:
    dtype, quantization, device = DTYPES[model.dtype], _quantization(model), devices[0]
    if model.loader == "unsloth":
        positions = getattr(config, "max_position_embeddings", None) or max_length
        return load_by_unsloth(
            model, device=device, dtype=dtype, max_length=positions, quantization=quantization
        )
    loaded, found = AutoModelForCausalLM.from_pretrained(
        model.path,
        config=config,
        dtype=dtype,
        quantization_config=quantization,
        trust_remote_code=model.trust_remote_code,
        output_loading_info=True,
        **placed(devices),
        **model_source(model),
    )
    _refuse_missing_weights(model, loaded, found["missing_keys"])
    connect(loaded)
    return loaded


def _refuse_missing_weights(model: ModelSpec, loaded: PreTrainedModel, names: Collection[str]) -> None:
    """Raise ModelError if weights are in none of the files: transformers makes them up, at random."""
    missing = [name for name, _ in loaded.named_parameters() if name in names]
    if missing:
        shown = ", ".join(missing[:_NUM_SHOWN]) + (", ..." if len(missing) > _NUM_SHOWN else "")
        raise _cannot_load(
            model, f"{len(missing)} of its weights are in none of its files, so they would be random: {shown}"
        )


def load_config(model: ModelSpec, *, max_length: int) -> Any:
    """Load a model's configuration. Raises ModelError as `load_base` does."""
    require_loader(model)
    try:
        config = AutoConfig.from_pretrained(
            model.path, trust_remote_code=model.trust_remote_code, **model_source(model)
        )
    except _OF_DAMAGED_FILES as error:
        raise _cannot_load(model, error) from error
    _refuse_shared_rows(config.get_text_config(decoder=True), model.path, max_length)
    return config


def model_source(model: ModelSpec) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` other than the path."""
    source = where_to_look(model.path)
    if model.revision:
        source["revision"] = model.revision
    if model.gguf_file:
        source["gguf_file"] = model.gguf_file
    return source


def _cannot_load(model: ModelSpec, error: Exception | str) -> ModelError:
    if isinstance(error, Exception) and (advice := hub_advice(model, error)) is not None:
        return ModelError(f"model.path: cannot load {model.path!r}: {advice}")
    return ModelError(
        f"model.path: cannot load {model.path!r}: {error}\n"
        "Set model.path to a directory with config.json and safetensors, a Hub id, or a directory with "
        "gguf_file."
    )


def num_embeddings(model: PreTrainedModel) -> int:
    """Return the number of token ids that a causal model can read and predict."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return min(int(end.weight.shape[0]) for end in ends if end is not None)


def freeze(model: PreTrainedModel, *, dtype: torch.dtype) -> Base:
    """Make a Base from a loaded model. Raises ModelError for layers that mix rows."""
    model.eval()
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ModelError(f"model: {name} is a BatchNorm, which mixes the rows of different trials")
    if model.get_output_embeddings() is None:
        raise ModelError(f"model: {type(model).__name__} has no output embedding; tuner trains causal models")
    if getattr(model, "is_quantized", False):
        keep_differentiable(model)
    speed_up(model)
    base = Base(model, dtype, head_is_linear=False)
    if _sees_what_follows(base):
        raise ModelError(
            f"model: in {type(model).__name__} tokens attend to later tokens, so the model could read the "
            "answer it is trained to predict; tuner trains causal models"
        )
    base.head_is_linear = _head_is_linear(base)
    if not base.head_is_linear and not _head_stands_alone(base):
        raise ModelError(
            f"model: {type(model).__name__} does not compute its logits from the last hidden states alone; "
            "tuner trains models that do, since it computes them at target positions only"
        )
    base.joins_rows = _keeps_joined_rows_apart(base)
    if base.joins_rows:
        base.last = next(filter(partial(_may_skip_tokens, base), _parts_of_last_layer(model)), None)
    return base


def _refuse_shared_rows(config: Any, path: str, max_length: int) -> None:
    if getattr(config, "router_aux_loss_coef", 0) and getattr(config, "output_router_logits", False):
        raise ModelError(
            f"model.path: {path!r} is a mixture of experts with an auxiliary loss over the whole batch, "
            "which would make a trial depend on its neighbours; tuner trains dense models"
        )
    limit = getattr(config, "max_position_embeddings", None)
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type", "default")
        original = int(rope.get("original_max_position_embeddings") or limit or max_length)
        if kind == "dynamic" or (kind == "longrope" and max_length > original):
            raise ModelError(
                f"model.path: {path!r} uses {kind} RoPE scaling, which changes with the longest row of a "
                "batch; tuner trains models whose positions do not depend on the batch"
            )
    if limit and max_length > limit:
        raise ModelError(f"data.max_length: {max_length} is longer than the {limit} positions of {path!r}")


def _rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """Return the model's RoPE parameters, or those of each kind of layer."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [part for part in rope.values() if isinstance(part, Mapping)]
    return kinds or [rope]


def _quantization(model: ModelSpec) -> BitsAndBytesConfig | None:
    match model.quantization:
        case "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=DTYPES[model.dtype],
            )
        case "int8":
            # LLM.int8's outlier threshold depends on all rows together, so neighbours would matter.
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        case _:
            return None


def keep_differentiable(model: PreTrainedModel) -> None:
    """Let gradients pass through 4-bit layers on a CPU.

    In evaluation mode bitsandbytes repacks their weights for inference at the first pass without gradients,
    on processors with AVX512-BF16; no gradient passes through a repacked layer.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()


@torch.no_grad()
def _sees_what_follows(base: Base) -> bool:
    """Change the last token of a few, and compare the logits before it."""
    ids = (torch.arange(4, device=base.device) % base.vocabulary_size).repeat(2, 1)
    ids[1, -1] = base.vocabulary_size - 1
    one, other = base.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return bool((one - other).norm() > torch.finfo(base.dtype).eps ** 0.5 * one.norm())


_OF_OTHER_ROWS = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)
"""What a model may raise for rows that it was not written for."""


@torch.no_grad()
def _keeps_joined_rows_apart(base: Base) -> bool:
    """Join two examples, change the first, and compare the bits of the second's logits.

    Any precision gives the same bits where nothing of the first reaches the second: against the second alone,
    a leak may be smaller than rounding. That comparison is for the positions, with a loose tolerance.
    """
    if base.model.config._attn_implementation != "sdpa":
        return False
    size = 8
    is_target = np.arange(size) > 0
    first, changed, second = (
        Example(((np.arange(size) * factor + shift) % base.vocabulary_size).astype(np.int32), is_target)
        for factor, shift in ((1, 0), (3, 5), (1, 1))
    )
    found = []
    try:
        for before in (first, changed):
            sent, shapes = joined_rows([[before, second]])
            ids, _, _, positions, examples, places, starts = send(sent, base.device)
            joined = Joined(positions, examples, places, starts, shapes)
            with (
                one_out_of_memory(),
                joined.within(base.model, attention=base.attention),
                one_example_a_row(),
            ):
                found.append(base.model(input_ids=ids, use_cache=False, **joined_positions()).logits)
    except torch.OutOfMemoryError:
        raise
    except _OF_OTHER_ROWS as error:
        _log.info("rows are padded: %s", error)
        return False
    one, other = (logits[0, size:] for logits in found)
    ids = torch.from_numpy(second.input_ids).to(base.device)[None]
    alone = base.model(input_ids=ids, use_cache=False).logits[0].float()
    near = bool((one.float() - alone).norm() <= torch.finfo(base.dtype).eps ** 0.5 * alone.norm())
    return near and not torch.equal(*found) and torch.equal(one, other)


def _use_varlen(base: Base, *, max_length: int) -> None:
    """Let `varlen_attn` compute attention over joined rows, after comparing it with torch's.

    Raises ModelError if it cannot compute this model's attention, or computes something else.
    """
    name, own = type(base.model).__name__, base.model.config._attn_implementation
    if not base.joins_rows:
        why = "examples in one row would meet" if own == "sdpa" else f"its attention is {own} and not sdpa"
        raise refused(f"rows of {name} are padded, since {why}")
    base.attention = "varlen"
    with compared(max_length):
        apart = _keeps_joined_rows_apart(base)
    if not apart:
        raise refused(f"with it, examples of {name} in one row meet, or logits differ from torch's")


def _parts_of_last_layer(model: nn.Module) -> list[nn.Module]:
    """Return the parts of the last layer that have products, the last first."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = list(layers[-1].children()) if layers else []
    return [part for part in reversed(parts) if any(weight.dim() == 2 for weight in part.parameters())]


@torch.no_grad()
def _may_skip_tokens(base: Base, part: nn.Module) -> bool:
    """Return whether a token's logits need this part's output, and its input, at that token only.

    Both are changed at every other token, and must change the logits at those, and no bit between.
    """
    ids = (torch.arange(8, device=base.device) * 3 % base.vocabulary_size)[None]
    kept = torch.arange(0, 8, 2, device=base.device)
    others = (torch.arange(8, device=base.device) % 2)[None, :, None]
    whole = torch.zeros_like(ids)
    places = torch.arange(8, device=base.device)
    starts = torch.tensor([0, 8], dtype=torch.int32, device=base.device)
    joined = Joined(places[None], whole[0], places, starts, ((1, 8),))

    def logits(of: Joined) -> Tensor:
        with one_out_of_memory(), of.within(base.model, last=part), one_example_a_row():
            return base.model(input_ids=ids, use_cache=False, **joined_positions()).logits[0]  # type: ignore[no-any-return]

    hooks: list[Any] = []
    try:
        own = logits(joined)
        few = logits(replace(joined, predicting=kept))
        hooks.append(part.register_forward_pre_hook(lambda _, inputs: (inputs[0] + others.to(inputs[0]),)))
        hooks.append(part.register_forward_hook(lambda _, __, output: output + others.to(output)))
        changed = logits(joined)
    except torch.OutOfMemoryError:
        raise
    except _OF_OTHER_ROWS as error:
        _log.info("the last layer sees all tokens: %s", error)
        return False
    finally:
        for hook in hooks:
            hook.remove()
    kept = on(kept, own.device)
    difference = (few[kept] - own[kept]).float().norm()
    near = bool(
        difference <= torch.finfo(base.dtype).eps ** 0.5 * own.float().norm() and few.isfinite().all()
    )
    return near and torch.equal(changed[kept], own[kept]) and not torch.equal(changed, own)


def _head_is_linear(base: Base) -> bool:
    """Compare the model's own logits with a plain product on a few tokens, instead of trusting a list of
    names.
    """
    head = base.model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.dtype.is_floating_point:
        return False
    hidden: list[Tensor] = []

    def enlarge(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(inputs[0] * 256)  # soft-capped logits look linear where they are small
        return (hidden[0],)

    hook = head.register_forward_pre_hook(enlarge)
    try:
        with torch.no_grad():
            ids = torch.arange(4, device=base.device)[None] % base.vocabulary_size
            logits = base.model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    product = nn.functional.linear(hidden[0], head.weight, head.bias)
    return _agree(logits, product)


def _head_stands_alone(base: Base) -> bool:
    ids = torch.arange(4, device=base.device)[None] % base.vocabulary_size
    with torch.no_grad():
        logits = base.model(input_ids=ids, use_cache=False).logits
        return _agree(logits[0], base._logits(base._last_hidden(ids)[0]))


def _agree(logits: Tensor, expected: Tensor) -> bool:
    return logits.shape == expected.shape and torch.allclose(
        logits.float(), expected.float(), rtol=1e-3, atol=1e-3
    )
