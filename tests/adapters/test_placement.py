"""Which devices a base model gets; `tests/training/spread_cases.py` runs one on two of them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import _get_device_map

from tests import tiny
from tuner.adapters import placement
from tuner.adapters.placement import connect, is_about_offloading, on, placed, worker_devices
from tuner.errors import InputError

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(
    ("gpus_per_worker", "num_gpus", "expected"),
    [
        (0, 0, ["cpu"]),
        (1, 0, ["cpu"]),
        (1, 4, ["cuda:0"]),
        (0, 1, ["cuda:0"]),
        (3, 4, ["cuda:0", "cuda:1", "cuda:2"]),
    ],
)
def test_devices_of_a_worker(gpus_per_worker: int, num_gpus: int, expected: list[str]) -> None:
    assert [str(device) for device in worker_devices(gpus_per_worker, num_gpus=num_gpus)] == expected


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_too_few_gpus(num_gpus: int) -> None:
    with pytest.raises(InputError, match=rf"run.gpus_per_worker: 2: torch finds {num_gpus} GPU.*doctor"):
        worker_devices(2, num_gpus=num_gpus)


def test_one_device_is_loaded_and_left_as_ever() -> None:
    assert placed([CPU]) == {"device_map": {"": CPU}}
    model = AutoModelForCausalLM.from_config(tiny.config("llama"))
    connect(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_tensor_is_copied_once_until_it_changes() -> None:
    tensor = torch.ones(3)
    assert on(tensor, CPU) is tensor
    copy = on(tensor, META)
    assert copy.device == META
    assert on(tensor, META) is copy
    tensor.add_(1)
    assert on(tensor, META) is not copy
    assert on(torch.ones(2, requires_grad=True), META).requires_grad
    known, alive = len(placement._copies), weakref.ref(on(tensor, META))
    del tensor, copy
    gc.collect()
    assert len(placement._copies) < known
    assert alive() is None


def test_what_transformers_does_with_the_rooms() -> None:
    """Layers are whole, all GPUs get some, and what has no room goes to the disk: that is refused."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.config("llama", num_hidden_layers=8))
    size = sum(parameter.nbytes for parameter in model.parameters())
    found = _get_device_map(model, "balanced", {0: size, 1: size}, None)
    assert set(found.values()) == {0, 1}
    assert all(name.count(".") <= 2 for name in found)
    model.hf_device_map = _get_device_map(model, "balanced", {0: size // 3, 1: size // 3}, None)
    with pytest.raises(ValueError, match="offloaded to the disk") as error:
        connect(model)
    assert is_about_offloading(error.value)
