"""transformers' search is left out where it is known, and every library's lack of memory is one error."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import masking_utils

from tuner.adapters import device_io
from tuner.adapters.device_io import one_example_a_row, one_out_of_memory

SEARCH = "find_packed_sequence_indices"


def test_the_search_is_left_out_within_the_block() -> None:
    own = getattr(masking_utils, SEARCH)
    positions = torch.tensor([[0, 1, 0, 1]])
    assert own(positions) is not None
    with one_example_a_row():
        assert getattr(masking_utils, SEARCH)(positions) is None
        assert getattr(masking_utils, SEARCH)(position_ids=positions) is None
    assert getattr(masking_utils, SEARCH) is own


def test_another_function_of_that_name_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def search(position_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return position_ids + attention_mask

    monkeypatch.setattr(masking_utils, SEARCH, search)
    with caplog.at_level(logging.WARNING, device_io.__name__):
        for _ in range(2):
            with one_example_a_row():
                assert getattr(masking_utils, SEARCH) is search
    assert getattr(masking_utils, SEARCH) is search
    assert caplog.text.count("looks for joined rows another way") == 1


def test_no_function_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(masking_utils, SEARCH)
    with one_example_a_row():
        assert not hasattr(masking_utils, SEARCH)
    assert not hasattr(masking_utils, SEARCH)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_any_librarys_lack_of_memory(message: str) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"(?i)alloc|memory"), one_out_of_memory():
        raise RuntimeError(message)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes") as raised, one_out_of_memory():
        raise RuntimeError("shapes do not match")
    assert not isinstance(raised.value, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError, match="own"), one_out_of_memory():
        raise torch.OutOfMemoryError("torch's own")
