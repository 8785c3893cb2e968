from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests import tiny
from tests.training.driving import begin, worker_state
from tuner.adapters import Adapter
from tuner.errors import CheckpointError
from tuner.records import CheckpointKind, Evaluation
from tuner.training.checkpoints import Snapshot, publish_best, publish_snapshot, read_snapshot
from tuner.whole import digest, lead


@pytest.fixture(scope="module")
def adapter(models: tiny.Models) -> Adapter:
    trial = tiny.hyperparameters()
    with worker_state(models.base("llama"), [trial]) as state:
        return begin(state, 0, trial, max_train_steps=1).adapter


@pytest.fixture
def snapshot(adapter: Adapter) -> Snapshot:
    return Snapshot(
        step=6,
        adapter=adapter,
        optimizer={"0.step": torch.tensor(6.0), "0.exp_avg": torch.randn(5)},
        evaluations=(
            Evaluation(0, 6.5, example_nll=(1.25, 0.1), example_tokens=(2, 1)),
            Evaluation(3, math.inf, train_loss=math.nan, learning_rate=0.1, clipped_updates=2),
        ),
        best={name: (a + 1, b - 1) for name, (a, b) in adapter.weights.items()},
        counters={"nll": 0.1 + 0.2, "clipped": 3.0},
        sums={0: (0.0, 0.0), 3: (0.1 + 0.7, math.inf)},
    )


def files_under(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


class TestSnapshot:
    def test_comes_back_whole(self, snapshot: Snapshot, tmp_path: Path) -> None:
        kept = publish_snapshot(tmp_path / "trial-0007", snapshot, kind=CheckpointKind.LAST, attempt=2)
        read = read_snapshot(tmp_path / kept.path, sha256=kept.sha256)
        assert (kept.kind, kept.step, kept.path) == ("last", 6, "trial-0007/last/step-000006.a2")
        assert kept.size_bytes == sum(path.stat().st_size for path in (tmp_path / kept.path).iterdir())
        assert (read.step, read.counters, read.sums) == (6, snapshot.counters, snapshot.sums)
        assert repr(read.evaluations) == repr(snapshot.evaluations)  # NaN differs from itself
        assert read.optimizer.keys() == snapshot.optimizer.keys()
        assert all(torch.equal(read.optimizer[key], value) for key, value in snapshot.optimizer.items())
        assert read.best is not None
        assert snapshot.best is not None
        for name, (a, b) in snapshot.best.items():
            assert torch.equal(read.best[name][0], a)
            assert torch.equal(read.best[name][1], b)

    def test_without_best_and_without_moments(self, adapter: Adapter, tmp_path: Path) -> None:
        bare = Snapshot(step=0, adapter=adapter, optimizer={}, evaluations=(), best=None, counters={})
        kept = publish_snapshot(tmp_path / "trial-0000", bare, kind=CheckpointKind.TRUNK, attempt=1)
        assert kept.path == "trial-0000/trunk/step-000000.a1"
        read = read_snapshot(tmp_path / kept.path, sha256=kept.sha256)
        assert (read.best, dict(read.optimizer), read.evaluations) == (None, {}, ())

    def test_holds_safetensors_and_json_only(self, snapshot: Snapshot, tmp_path: Path) -> None:
        kept = publish_snapshot(tmp_path / "trial-0007", snapshot, kind=CheckpointKind.LAST, attempt=1)
        directory = tmp_path / kept.path
        assert files_under(directory) == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "best.safetensors",
            "optimizer.safetensors",
            "state.json",
        }
        for path in directory.glob("*.json"):
            json.loads(path.read_text())

    @pytest.mark.parametrize("file", ["state.json", "optimizer.safetensors", "best.safetensors"])
    def test_damage_is_refused(self, snapshot: Snapshot, tmp_path: Path, file: str) -> None:
        kept = publish_snapshot(tmp_path / "trial-0007", snapshot, kind=CheckpointKind.LAST, attempt=1)
        directory = tmp_path / kept.path
        (directory / file).write_bytes((directory / file).read_bytes()[:-9])
        with pytest.raises(CheckpointError, match="changed or damaged"):
            read_snapshot(directory, sha256=kept.sha256)
        with pytest.raises(CheckpointError, match="not a resumable checkpoint"):
            read_snapshot(directory, sha256=None)

    def test_other_formats_are_refused(self, snapshot: Snapshot, tmp_path: Path) -> None:
        kept = publish_snapshot(tmp_path / "trial-0007", snapshot, kind=CheckpointKind.LAST, attempt=1)
        state = tmp_path / kept.path / "state.json"
        state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 99}))
        with pytest.raises(CheckpointError, match="checkpoint format 99"):
            read_snapshot(tmp_path / kept.path, sha256=None)

    def test_missing_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="missing"):
            read_snapshot(tmp_path / "nowhere", sha256=None)


class TestPublishing:
    def test_leaves_nothing_when_writing_fails(self, snapshot: Snapshot, tmp_path: Path) -> None:
        unwritable = Snapshot(
            snapshot.step,
            snapshot.adapter,
            {"0.step": object()},
            (),
            None,
            {},  # type: ignore[dict-item]
        )
        with pytest.raises(Exception, match="object"):
            publish_snapshot(tmp_path / "trial-0000", unwritable, kind=CheckpointKind.LAST, attempt=1)
        assert files_under(tmp_path) == {"trial-0000", "trial-0000/last"}

    def test_failing_leaves_the_checkpoint_before_it(self, snapshot: Snapshot, tmp_path: Path) -> None:
        kept = publish_snapshot(tmp_path / "t", snapshot, kind=CheckpointKind.TRUNK, attempt=1)
        unwritable = Snapshot(snapshot.step, snapshot.adapter, snapshot.optimizer, (), None, {"x": object()})
        with pytest.raises(TypeError):
            publish_snapshot(tmp_path / "t", unwritable, kind=CheckpointKind.TRUNK, attempt=1)
        assert read_snapshot(tmp_path / kept.path, sha256=kept.sha256).step == snapshot.step
        assert not list(tmp_path.rglob("*.tmp"))

    def test_replaces_its_own_and_no_other_attempts(self, snapshot: Snapshot, tmp_path: Path) -> None:
        first = publish_snapshot(tmp_path / "t", snapshot, kind=CheckpointKind.TRUNK, attempt=1)
        second = publish_snapshot(tmp_path / "t", snapshot, kind=CheckpointKind.TRUNK, attempt=2)
        assert publish_snapshot(tmp_path / "t", snapshot, kind=CheckpointKind.TRUNK, attempt=2) == second
        assert [Path(each.path).name for each in (first, second)] == ["step-000006.a1", "step-000006.a2"]
        assert read_snapshot(tmp_path / first.path, sha256=first.sha256).step == snapshot.step
        assert read_snapshot(tmp_path / second.path, sha256=second.sha256).step == snapshot.step


class TestBest:
    def test_link_follows(self, adapter: Adapter, tmp_path: Path) -> None:
        trial = tmp_path / "trial-0000"
        for step, attempt in ((3, 1), (6, 1), (6, 2)):
            kept = publish_best(trial, adapter, adapter.weights, step=step, attempt=attempt)
            lead(trial / "best", tmp_path / kept.path)
            assert kept.path == f"trial-0000/best-steps/step-{step:06d}.a{attempt}"
            assert (trial / "best").is_symlink()
            assert (trial / "best").resolve() == (tmp_path / kept.path).resolve()
            assert digest(trial / "best") == kept.sha256
        assert files_under(trial / "best") == {"adapter_config.json", "adapter_model.safetensors"}

    def test_link_moves_with_the_study(self, adapter: Adapter, tmp_path: Path) -> None:
        kept = publish_best(tmp_path / "a" / "trial-0000", adapter, adapter.weights, step=3, attempt=1)
        lead(tmp_path / "a" / "trial-0000" / "best", tmp_path / "a" / kept.path)
        shutil.move(tmp_path / "a", tmp_path / "b")
        assert digest(tmp_path / "b" / "trial-0000" / "best") == kept.sha256

    @pytest.mark.parametrize("call", ["symlink_to", "replace"])
    def test_crash_between_the_new_directory_and_its_link(
        self, adapter: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        """Before the new link is made, and before it takes the old one's place."""
        trial = tmp_path / "trial-0000"
        before = publish_best(trial, adapter, adapter.weights, step=3, attempt=1)
        lead(trial / "best", tmp_path / before.path)
        between = publish_best(trial, adapter, adapter.weights, step=6, attempt=1)
        with monkeypatch.context() as patch:
            patch.setattr(Path, call, _power_cut)
            with pytest.raises(InterruptedError):
                lead(trial / "best", tmp_path / between.path)
        assert files_under(trial / "best-steps" / "step-000006.a1") == files_under(trial / "best")
        assert (trial / "best").resolve().name == "step-000003.a1"
        assert digest(trial / "best") == before.sha256
        after = publish_best(trial, adapter, adapter.weights, step=6, attempt=2)
        lead(trial / "best", tmp_path / after.path)
        assert digest(trial / "best") == after.sha256
        assert not list(trial.glob(".*"))


def _power_cut(*_: object) -> None:
    raise InterruptedError


NAMES = st.text("abc", min_size=1, max_size=3)
CONTENTS = st.dictionaries(NAMES, st.binary(max_size=4), max_size=3)


@given(one=CONTENTS, other=CONTENTS)
@example(one={"a": b"x"}, other={"b": b"x"})
@example(one={"a": b"x", "b": b"y"}, other={"b": b"x", "a": b"y"})
def test_digest_is_of_names_and_contents(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, bytes], other: dict[str, bytes]
) -> None:
    digests = []
    for files in (one, dict(reversed(other.items()))):
        directory = tmp_path_factory.mktemp("digest")
        for name, content in files.items():
            (directory / name).write_bytes(content)
        digests.append(digest(directory))
    assert (digests[0] == digests[1]) == (one == other)
