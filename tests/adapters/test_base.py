from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Cohere2MoeConfig,
    GPT2Config,
    GraniteConfig,
    LlavaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
)

from tests import tiny
from tuner.adapters import frozen_linear, load_base
from tuner.adapters.base import choose_products, freeze, load_config
from tuner.config import ModelSpec
from tuner.errors import ModelError


class TestTokenNll:
    @pytest.mark.parametrize("shape", tiny.SHAPES)
    def test_is_that_of_the_model(self, models: tiny.Models, shape: tiny.Shape) -> None:
        """Values and gradients; rows padded on the right, as many positions as asked for."""
        base, plain = models.base(shape), models.plain(shape)
        examples = [tiny.examples(5, seed=3)[row] for row in range(5)]
        length = max(len(example.input_ids) for example in examples)
        ids = torch.full((5, length), 9)
        chosen = []
        for row, example in enumerate(examples):
            ids[row, : len(example.input_ids)] = torch.from_numpy(example.input_ids)
            chosen += [(row, int(column)) for column in example.is_target.nonzero()[0]]
        rows, columns = torch.tensor(chosen).T
        embedded: list[torch.Tensor] = []

        def watch(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        weights = torch.linspace(0.5, 2.0, len(chosen))
        gradients, values = [], []
        for model in (base.model, plain):
            hook = model.get_input_embeddings().register_forward_hook(watch)
            if model is plain:
                logits = model(input_ids=ids).logits[rows, columns - 1]
                nll = nn.functional.cross_entropy(logits, ids[rows, columns], reduction="none")
            else:
                nll = base.token_nll(ids, rows, columns)
            hook.remove()
            gradients.append(torch.autograd.grad((nll * weights).sum(), embedded.pop())[0])
            values.append(nll.detach())
        assert torch.allclose(values[0], values[1], rtol=1e-5, atol=1e-5)
        assert float((gradients[0] - gradients[1]).norm()) < 1e-5 * float(gradients[1].norm())

    @pytest.mark.parametrize("shape", tiny.SHAPES)
    def test_padding_is_not_seen(self, models: tiny.Models, shape: tiny.Shape) -> None:
        ids = torch.arange(20).view(2, 10) * 3
        padded = torch.cat([ids, torch.full((2, 6), 77)], dim=1)
        rows, columns = torch.tensor([0, 0, 1]), torch.tensor([1, 9, 5])
        with torch.no_grad():
            one, other = (models.base(shape).token_nll(x, rows, columns) for x in (ids, padded))
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", tiny.SHAPES)
    def test_scores_say_which_tokens_the_model_finds_likeliest(
        self, models: tiny.Models, shape: tiny.Shape
    ) -> None:
        base = models.base(shape)
        rows, columns = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 4, 9, 5, 8])
        ids = torch.arange(20).view(2, 10) * 3
        likeliest = base.model(input_ids=ids).logits[0, 3].argmax()
        ids[0, 4] = likeliest  # it follows from what comes before it, which stays
        expected = base.model(input_ids=ids).logits[rows, columns - 1].argmax(dim=1) == ids[rows, columns]
        nll, is_first = base.token_scores(ids, rows, columns)
        assert torch.equal(nll, base.token_nll(ids, rows, columns))
        assert is_first.tolist() == expected.tolist()
        assert bool(is_first[1])

    def test_heads_that_are_more_than_a_product_are_found(self, models: tiny.Models) -> None:
        assert {shape: models.base(shape).head_is_linear for shape in tiny.SHAPES} == {
            "llama": True,
            "qwen2": True,
            "gpt2": True,
            "gemma2": False,
        }

    @pytest.mark.parametrize(
        ("made", "is_linear"),
        [
            (GraniteConfig(logits_scaling=4.0), False),
            (BertConfig(is_decoder=True), True),
            (Cohere2MoeConfig(num_hidden_layers=2, num_experts=4), False),
        ],
    )
    def test_is_that_of_a_head_of_any_kind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: PreTrainedConfig, is_linear: bool
    ) -> None:
        """Scaled logits; layers between the last hidden states and the embedding; a model that looks for its
        routers' choices beside them. Chunk by chunk."""
        made.update(
            tiny.config("llama").to_diff_dict() | {"model_type": made.model_type, "architectures": None}
        )
        tiny.save_model(tmp_path, made)
        base = load_base(tiny.model_spec(tmp_path), device="cpu", max_length=8)
        assert base.head_is_linear == is_linear
        monkeypatch.setattr(frozen_linear, "CHUNK_ELEMENTS", 2 * tiny.VOCABULARY)
        ids = torch.arange(16).view(2, 8) * 3
        rows, columns = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 3, 7, 2, 6])
        expected = nn.functional.cross_entropy(
            base.model(input_ids=ids).logits[rows, columns - 1], ids[rows, columns], reduction="none"
        )
        assert torch.allclose(base.token_nll(ids, rows, columns), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", ["llama", "gemma2"])
    def test_no_more_logits_at_once_than_a_chunk(
        self, models: tiny.Models, monkeypatch: pytest.MonkeyPatch, shape: tiny.Shape
    ) -> None:
        """With gradients and without; logits of positions that are not asked for are never made."""
        monkeypatch.setattr(frozen_linear, "CHUNK_ELEMENTS", 3 * tiny.VOCABULARY)
        base = models.base(shape)
        ids = torch.arange(40).view(2, 20) * 3
        rows, columns = torch.arange(2).repeat_interleave(10), torch.arange(1, 11).repeat(2)
        hidden = base.model.get_input_embeddings().register_forward_hook(lambda _, __, y: y.requires_grad_())
        with LargestLogits(base.model.get_output_embeddings().weight) as largest:
            base.token_nll(ids, rows, columns).sum().backward()
            base.token_scores(ids, rows, columns)
        hidden.remove()
        assert largest.rows == 3

    def test_weak_soft_capping_is_found(self, models: tiny.Models) -> None:
        """With a cap that logits of this size hardly feel."""
        path = models.path("gemma2", final_logit_softcapping=300.0)
        base = load_base(tiny.model_spec(path), device="cpu", max_length=8)
        assert not base.head_is_linear


class LargestLogits(TorchDispatchMode):
    """Watches every tensor that is made as wide as the vocabulary."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.rows = 0
        self._weight = weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (
            isinstance(made, torch.Tensor)
            and made.shape[-1:] == (tiny.VOCABULARY,)
            and made.untyped_storage().data_ptr() != self._weight
        ):
            self.rows = max(self.rows, made.numel() // tiny.VOCABULARY)
        return made


class TestFrozen:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_without_gradient_and_without_its_own_dropout(self, models: tiny.Models, dtype: str) -> None:
        base = models.base("gpt2", dtype=dtype)
        ids, rows, columns = torch.arange(8)[None], torch.tensor([0]), torch.tensor([7])
        assert base.model.config.attn_pdrop > 0
        assert not any(parameter.requires_grad for parameter in base.model.parameters())
        assert torch.equal(base.token_nll(ids, rows, columns), base.token_nll(ids, rows, columns))
        assert base.token_nll(ids, rows, columns).dtype == torch.float32
        assert base.vocabulary_size == tiny.VOCABULARY
        assert base.device == torch.device("cpu")

    def test_gradients_pass_a_4_bit_base_after_an_evaluation(self, models: tiny.Models) -> None:
        """On some processors bitsandbytes repacks the weights at the first pass without gradients."""
        base = models.base("llama", quantization="nf4", **tiny.WIDE)
        ids, rows, columns = torch.arange(8)[None], torch.tensor([0]), torch.tensor([7])
        embedded = base.model.get_input_embeddings()(ids).requires_grad_()
        with torch.no_grad():
            base.token_nll(ids, rows, columns)
        loss = base.model(inputs_embeds=embedded).logits[0, -1].logsumexp(0)
        (gradient,) = torch.autograd.grad(loss, embedded)
        assert float(gradient[0, 0].norm()) > 0

    def test_8_bit_base_has_no_outlier_threshold(self, models: tiny.Models) -> None:
        """A threshold would look at the rows of all trials together."""
        base = models.base("llama", quantization="int8", **tiny.WIDE)
        assert base.model.config.quantization_config.llm_int8_threshold == 0.0

    def test_logits_in_float32_of_a_bfloat16_head(self, tmp_path: Path) -> None:
        """Mamba's."""
        made = MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2)
        AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
        base = load_base(tiny.model_spec(tmp_path, dtype="bfloat16"), device="cpu", max_length=8)
        assert base.head_is_linear


def test_layers_that_run_again_have_no_dropout_of_their_own(tmp_path: Path) -> None:
    """OPT's layers drop out by the flag that also lets them run again."""
    made = OPTConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        dropout=0.5,
    )
    base = load_base(tiny.model_spec(tiny.save_model(tmp_path, made)), device="cpu", max_length=8)
    ids = torch.arange(16).view(2, 8) * 3
    rows, columns = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 3, 7, 2, 6])
    first = base.model.get_input_embeddings().weight.requires_grad_()

    def found() -> list[torch.Tensor]:
        nll = base.token_nll(ids, rows, columns)
        return [nll.detach(), *torch.autograd.grad(nll.sum(), first)]

    kept = found()
    assert base.keep_fewer_activations()
    for one, other in zip(found(), kept, strict=True):
        assert torch.equal(one, other)
        assert one.any()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_layers_that_are_computed_again_keep_no_random_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    """Reading it waits for a GPU, layer by layer. No base needs it: its own dropout is off."""
    made = GPT2Config(
        vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=dropout, embd_pdrop=dropout
    )
    base = load_base(tiny.model_spec(tiny.save_model(tmp_path, made)), device="cpu", max_length=8)
    assert base.keep_fewer_activations()
    first, ids = base.model.get_input_embeddings().weight.requires_grad_(), torch.arange(16).view(2, 8) * 3
    before, asked = torch.get_rng_state(), []
    own = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: (asked.append(1), own())[1])
    base.token_nll(ids, torch.tensor([0, 1]), torch.tensor([3, 5])).sum().backward()
    assert not asked
    assert first.grad is not None
    assert torch.equal(own(), before)


@pytest.mark.parametrize("chosen", [False, True])
def test_tf32_is_a_gpus(chosen: bool, caplog: pytest.LogCaptureFixture) -> None:
    spec = ModelSpec(path="base", dtype="float32", tf32=chosen)
    own = torch.get_float32_matmul_precision()
    try:
        choose_products(spec, torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == ("high" if chosen else "highest")
        assert not caplog.records
        torch.set_float32_matmul_precision("highest")
        choose_products(spec, torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "highest"
        said = ["model.tf32 has no effect on cpu: only GPUs have TF32"]
        assert [record.getMessage() for record in caplog.records] == said * chosen
    finally:
        torch.set_float32_matmul_precision(own)


class TestRefused:
    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("Tried to allocate 130 GiB"),
            RuntimeError("CUDA error: out of memory: Tried to allocate 130 GiB"),
        ],
    )
    def test_a_base_that_does_not_fit_into_memory(
        self, models: tiny.Models, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
    ) -> None:
        """bitsandbytes, which quantises while loading, has an error of its own."""

        def load(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
        said = (
            r"does not fit into the memory of cpu: .*Tried to allocate 130 GiB\nSet model.quantization: nf4"
        )
        with pytest.raises(ModelError, match=said):
            load_base(ModelSpec(path=str(models.path("llama"))), device="cpu", max_length=tiny.MAX_LENGTH)

    def refusal(self, directory: Path, *, max_length: int = tiny.MAX_LENGTH) -> str:
        with pytest.raises(ModelError) as refused:
            load_base(tiny.model_spec(directory), device="cpu", max_length=max_length)
        return str(refused.value)

    @pytest.mark.parametrize(
        "rope", [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", "factor": 2.0}]
    )
    def test_positions_that_depend_on_the_batch(self, tmp_path: Path, rope: dict[str, Any]) -> None:
        scaling = {"rope_theta": 1e4, "original_max_position_embeddings": 16, **rope}
        if rope["rope_type"] == "longrope":
            scaling |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        made = tiny.config("llama", rope_parameters=scaling)
        made.save_pretrained(tmp_path)
        assert f"uses {rope['rope_type']} RoPE scaling" in self.refusal(tmp_path)
        LlavaConfig(text_config=made).save_pretrained(tmp_path / "with-pictures")
        assert f"uses {rope['rope_type']} RoPE scaling" in self.refusal(tmp_path / "with-pictures")

    def test_positions_of_one_kind_of_layers(self, tmp_path: Path) -> None:
        """Where kinds of layers have parameters of their own, as in Gemma 3."""
        tiny.config("llama").save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        document = json.loads(file.read_text())
        dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        document |= {
            "model_type": "gemma3_text",
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": dynamic,
            },
        }
        file.write_text(json.dumps(document))
        assert "uses dynamic RoPE scaling" in self.refusal(tmp_path)

    def test_long_positions_within_the_original_ones(self, tmp_path: Path) -> None:
        """longrope changes only for rows beyond the original length."""
        scaling = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        }
        tiny.config("llama", rope_parameters=scaling).save_pretrained(tmp_path)
        assert load_config(tiny.model_spec(tmp_path), max_length=16).model_type == "llama"

    def test_rows_longer_than_the_positions(self, models: tiny.Models) -> None:
        path = models.path("llama")
        message = self.refusal(path, max_length=2 * tiny.MAX_LENGTH + 1)
        assert message == f"data.max_length: 65 is longer than the 64 positions of {str(path)!r}"
        load_config(tiny.model_spec(path), max_length=2 * tiny.MAX_LENGTH)

    def test_auxiliary_loss_over_the_batch(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.01).save_pretrained(tmp_path)
        assert "mixture of experts with an auxiliary loss" in self.refusal(tmp_path)

    def test_batch_norm(self, models: tiny.Models) -> None:
        model = models.plain("llama")
        model.model.layers[1].mlp.norm = nn.BatchNorm1d(8)
        with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.norm is a BatchNorm"):
            freeze(model, dtype=torch.float32)

    def test_tokens_that_see_what_follows_them(self, tmp_path: Path) -> None:
        made = BertConfig()
        made.update(
            tiny.config("llama").to_diff_dict()
            | {"model_type": "bert", "architectures": None, "is_decoder": False}
        )
        tiny.save_model(tmp_path, made)
        assert "tokens attend to later tokens" in self.refusal(tmp_path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert "cannot load" in self.refusal(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        "changes",
        [
            {"hidden_size": "32"},
            {"hidden_size": float("nan")},
            {"num_attention_heads": 0},
            {"model_type": ["llama"]},
            {"dtype": "wide"},
            {"quantization_config": "x"},
            {"eos_token_id": ["</s>"]},
        ],
        ids=str,
    )
    def test_a_configuration_that_is_damaged(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        tiny.save_model(tmp_path, tiny.config("llama"))
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        assert "cannot load" in self.refusal(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content"), [("config.json", "[" * 9_999), ("generation_config.json", "[]")]
    )
    def test_json_that_is_no_configuration(self, tmp_path: Path, name: str, content: str) -> None:
        tiny.save_model(tmp_path, tiny.config("llama"))
        (tmp_path / name).write_text(content)
        assert "cannot load" in self.refusal(tmp_path)

    def test_a_pickle_in_place_of_weights(self, tmp_path: Path) -> None:
        tiny.save_model(tmp_path, tiny.config("llama"))
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n.")
        assert "cannot load" in self.refusal(tmp_path)

    def test_weights_of_another_width(self, tmp_path: Path) -> None:
        tiny.save_model(tmp_path, tiny.config("llama"))
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 99}))
        assert "its weights have other shapes than its config.json says" in self.refusal(tmp_path)

    def test_weights_that_are_missing_are_not_made_up(self, tmp_path: Path) -> None:
        tiny.save_model(tmp_path, tiny.config("llama"))
        weights = load_file(file := tmp_path / "model.safetensors")
        del weights[name := "model.layers.1.mlp.up_proj.weight"]
        save_file(weights, file, metadata={"format": "pt"})
        said = self.refusal(tmp_path)
        assert f"1 of its weights are in none of its files, so they would be random: {name}" in said

    def test_weights_that_are_damaged(self, tmp_path: Path) -> None:
        tiny.save_model(tmp_path, tiny.config("llama"))
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        assert "cannot load" in self.refusal(tmp_path)
