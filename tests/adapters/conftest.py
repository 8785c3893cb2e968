"""One set of tiny models for all tests of this folder."""

from __future__ import annotations

import pytest
import torch

from tests import tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tiny.Models:
    torch.set_num_threads(1)
    return tiny.Models(tmp_path_factory.mktemp("models"))
