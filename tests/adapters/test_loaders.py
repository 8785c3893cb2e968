"""A loader that cannot be used says what it lacks; where it can, training by it is tests/gpu's."""

from __future__ import annotations

import pytest

from tests import tiny
from tuner.adapters.loaders import refuse_without_unsloth, require_loader
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
