"""What tests of data share."""

from __future__ import annotations

import pytest

from tuner.data import pretrained


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a network: the Hub's name has no address, and no proxy is asked for it."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(pretrained, "_PAUSES_SECONDS", (0.0, 0.0))
    for proxy in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
