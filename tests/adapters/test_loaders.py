"""A loader that cannot be used says what it lacks; where it can, training by it is tests/gpu's."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tests import tiny
from tuner.adapters.base import freeze
from tuner.adapters.generation import Decoding, TextGenerator
from tuner.adapters.loaders import load_by_unsloth, refuse_without_unsloth, require_loader
from tuner.data import Prompt
from tuner.errors import ModelError
from tuner.installation import install_command


@pytest.mark.parametrize(
    ("is_installed", "has_gpu", "words"),
    [
        (False, False, f"not installed; {install_command('unsloth')}, or set model.loader: transformers"),
        (False, True, "not installed"),
        (True, False, "needs a CUDA GPU, and torch finds none; see tuner doctor"),
    ],
)
def test_what_unsloth_lacks(is_installed: bool, has_gpu: bool, words: str) -> None:
    with pytest.raises(ModelError, match=r"^model\.loader: unsloth cannot be used here: ") as refused:
        refuse_without_unsloth(is_installed=is_installed, has_gpu=has_gpu)
    assert words in str(refused.value)
    assert refused.value.exit_code == 2


def test_nothing_is_refused_that_can_be_used() -> None:
    refuse_without_unsloth(is_installed=True, has_gpu=True)
    spec = tiny.model_spec("anything")
    assert spec.loader == "transformers"
    require_loader(spec)


class FastLanguageModel:
    """unsloth's, by its published signature (2026.10), with a cached step that passes by the layers."""

    @staticmethod
    def from_pretrained(
        model_name: str = "",
        max_seq_length: int = 2048,
        dtype: torch.dtype | None = None,
        load_in_4bit: bool = True,
        token: str | None = None,
        device_map: Any = "sequential",
        trust_remote_code: bool = False,
        use_gradient_checkpointing: Any = "unsloth",
        revision: str | None = None,
        use_exact_model_name: bool = False,
        **more: Any,
    ) -> tuple[PreTrainedModel, None]:
        assert more.keys() <= {"quantization_config"}
        model = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype, device_map=device_map)
        for layer in model.model.layers:
            linear, fast = layer.mlp.down_proj, layer.mlp.down_proj.weight

            def forward(hidden: Any, *, mlp: Any = layer.mlp, base: Any = fast) -> Any:
                inner = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
                is_cached_step = hidden.shape[1] == 1
                return torch.nn.functional.linear(inner, base) if is_cached_step else mlp.down_proj(inner)

            layer.mlp.forward = forward
            assert linear.bias is None
        return model, None


def test_answers_by_unsloth_are_those_of_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its step from cached keys and values ignores layers that PEFT has not made, so none is taken."""
    stub = ModuleType("unsloth")
    stub.FastLanguageModel = FastLanguageModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", stub)
    path = tiny.Models(tmp_path).path("llama")
    prompts = [Prompt(row, "", "", tuple(range(row, row + 4))) for row in (5, 50, 90)]

    def answers(model: PreTrainedModel) -> list[Any]:
        base = freeze(model, dtype=torch.float32)
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_hook(lambda _, inputs, out: out - 3 * inputs[0][..., :1])
        generator = TextGenerator(base, AutoTokenizer.from_pretrained(path), limited_by="")
        return generator.answers(base.model, prompts, Decoding(8))

    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    fast = load_by_unsloth(
        tiny.model_spec(path),
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_length=tiny.MAX_LENGTH,
        quantization=None,
    )
    expected = answers(plain)
    assert answers(fast) == expected
    cached = FastLanguageModel.from_pretrained(str(path), dtype=torch.float32, device_map="cpu")[0]
    assert answers(cached) != expected, "the stub's cached step does pass by the adapter"


def test_the_constraints_of_unsloth_are_versions_that_tuner_accepts() -> None:
    root = Path(__file__).parents[2]
    text = (root / "constraints-unsloth.txt").read_text()
    names = {canonicalize_name(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)}
    needed = re.search(r"^dependencies = \[(.*?)^\]", (root / "pyproject.toml").read_text(), re.M | re.S)
    assert needed is not None
    requirements = [Requirement(text) for text in re.findall(r'"([^"]+)"', needed[1])]
    assert len(requirements) > 20
    for requirement in requirements:
        assert requirement.specifier.contains(names[canonicalize_name(requirement.name)]), requirement
    # What unsloth 2026.10 declares.
    assert Requirement("transformers<=5.17.0,>=4.52.4").specifier.contains(
        names[canonicalize_name("transformers")]
    )
    assert Requirement("datasets<5.0.0,>=3.4.1").specifier.contains(names[canonicalize_name("datasets")])
