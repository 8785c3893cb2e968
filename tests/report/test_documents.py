from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tuner.errors import Mistake
from tuner.records import (
    Attempt,
    Continuation,
    Evaluation,
    NodeChange,
    Throughput,
    Trial,
    TrialState,
    added_up,
)
from tuner.report.documents import (
    RoundPlan,
    check_document,
    dumped,
    dumps,
    round_status,
    status_document,
    trial_document,
)
from tuner.report.tables import status_table

from . import synthetic

TRIAL_KEYS = [
    "number", "round", "state", "reason", "hyperparameters", "seed", "best_step", "best_eval_loss",
    "settled_step", "metric", "direction", "best_value", "adapter", "answers", "test", "continues",
    "executed_steps", "executed_steps_exact", "attempts", "evaluations",
]  # fmt: skip
STATES = ["waiting", "running", "complete", "pruned", "infeasible", "failed"]


def strictly(text: str) -> Any:
    """The JSON value of a text, refusing NaN and Infinity, which Python's parser would take."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


class TestTrialDocument:
    def test_keys_and_values(self) -> None:
        trial = synthetic.trial(3, 3e-4, continues=Continuation("round0", 1, 35))
        document = strictly(dumps(trial_document(trial, adapter="/runs/trial-0003/best")))
        assert list(document) == TRIAL_KEYS
        best = min(trial.evaluations, key=lambda e: e.eval_loss)
        assert document["best_step"] == best.step
        assert document["best_eval_loss"] == best.eval_loss
        assert document["continues"] == "round0/1@35"
        assert document["executed_steps"] == 25
        assert document["attempts"] == 1
        assert document["adapter"] == "/runs/trial-0003/best"
        assert document["seed"] == 0
        assert [list(e) for e in document["evaluations"]] == [
            ["step", "train_loss", "eval_loss", "learning_rate", "token_accuracy", "metrics"]
        ] * len(trial.evaluations)

    def test_an_infeasible_trial_shows_its_earlier_best_and_nan_as_null(self) -> None:
        document = strictly(dumps(trial_document(synthetic.trials()[7], adapter=None)))
        assert document["state"] == "infeasible"
        assert (document["best_step"], document["best_eval_loss"]) == (5, pytest.approx(2.1))
        assert document["evaluations"][-1]["eval_loss"] is None
        assert document["reason"] == "evaluation loss is nan at step 20"

    def test_a_waiting_trial_has_no_numbers(self) -> None:
        trial = synthetic.trial(0, 1e-4, state=TrialState.WAITING, evaluations=())
        document = trial_document(trial, adapter=None)
        assert [document[key] for key in ("best_step", "best_eval_loss", "settled_step", "continues")] == [
            None
        ] * 4
        assert document["evaluations"] == []
        assert document["executed_steps"] == 0

    def test_lists_of_names_become_json_lists(self) -> None:
        trial = synthetic.trial(0, 1e-4)
        trial = dataclasses.replace(
            trial, hyperparameters={**trial.hyperparameters, "target_modules": ("q_proj", "v_proj")}
        )
        assert trial_document(trial, adapter=None)["hyperparameters"]["target_modules"] == [
            "q_proj",
            "v_proj",
        ]

    @given(st.lists(st.floats(width=32), max_size=6))
    def test_any_losses_make_valid_json(self, losses: list[float]) -> None:
        evaluations = [synthetic.evaluation(5 * i, loss) for i, loss in enumerate(losses)]
        document = trial_document(synthetic.trial(0, 1e-4, evaluations=evaluations), adapter=None)
        read = strictly(dumps(document))
        assert [e["eval_loss"] for e in read["evaluations"]] == [
            x if math.isfinite(x) else None for x in losses
        ]
        assert (read["best_step"] is None) == (not any(map(math.isfinite, losses)))


class TestStatus:
    def test_a_complete_round(self) -> None:
        status = round_status(
            "round1",
            max_train_steps=60,
            trials=synthetic.trials(),
            promised=8,
            is_running=False,
            adapters={6: "runs/round1/trial-0006/best"},
        )
        document = strictly(dumps(status_document("alpaca", [status])))
        (shown,) = document["rounds"]
        assert document["study"] == "alpaca"
        assert list(shown) == [
            "round",
            "max_train_steps",
            "state",
            "trials",
            "metric",
            "direction",
            "best",
            "running",
            "branches_left",
            "seconds_left",
            "overfitting",
            "throughput",
            "throughput_by_node",
            "node_changes",
        ]
        assert (shown["branches_left"], shown["throughput"]) == (0, None)
        assert shown["state"] == "complete"
        assert list(shown["trials"]) == STATES
        assert shown["trials"] == dict.fromkeys(STATES, 0) | {"complete": 7, "infeasible": 1}
        assert list(shown["best"]) == ["trial", "eval_loss", "step", "adapter", "answer_score", "best_value"]
        assert (shown["metric"], shown["direction"]) == ("eval_loss", "minimize")
        assert shown["best"]["best_value"] == shown["best"]["eval_loss"]
        assert shown["best"]["trial"] == 6
        assert shown["best"]["adapter"] == "runs/round1/trial-0006/best"

    def test_what_became_of_a_clusters_nodes_is_shown_the_last_of_them_as_lines(self) -> None:
        joined = [NodeChange(f"gpu-{n}", "joined", n, 1e9 + n) for n in range(1, 6)]
        lost = NodeChange("gpu-1", "lost", 1, 1e9 + 60)
        left_out = NodeChange("gpu-2", "left_out", 2, 1e9 + 61, "failed 3 times: signal 9\nits log")
        status = round_status(
            "round1",
            max_train_steps=60,
            trials=(),
            promised=8,
            is_running=True,
            adapters={},
            node_changes=(*joined, lost, left_out),
        )
        (shown,) = strictly(dumps(status_document("alpaca", [status])))["rounds"]
        assert len(shown["node_changes"]) == 7
        assert shown["node_changes"][-1] == {
            "node": "gpu-2",
            "change": "left_out",
            "gpus": 2,
            "at": 1e9 + 61,
            "reason": "failed 3 times: signal 9\nits log",
        }
        said = io.StringIO()
        Console(file=said, width=120).print(status_table("alpaca", [status]))
        lines = [line.partition("round1: ")[2] for line in said.getvalue().splitlines() if "node" in line]
        assert lines[0] == "1 earlier change of nodes, see --json"
        assert [re.sub(r"^\d{4}(-\d\d){2} \d\d(:\d\d){2}  ", "", line) for line in lines[1:]] == [
            "node gpu-2 joined: 2 GPUs",
            "node gpu-3 joined: 3 GPUs",
            "node gpu-4 joined: 4 GPUs",
            "node gpu-5 joined: 5 GPUs",
            "node gpu-1 left the cluster",
            "node gpu-2 is left out: failed 3 times: signal 9",
        ]

    def test_a_trial_whose_evaluation_loss_rises_is_marked_while_it_runs(self) -> None:
        def trial(number: int, losses: Sequence[float], state: TrialState, *, train: float = -0.1) -> Trial:
            noise = (0.0, 0.002, -0.001, 0.001, 0.0, -0.002, 0.001)
            made = [
                Evaluation(5 * i, loss + noise[i], train_loss=2.0 + train * i)
                for i, loss in enumerate(losses)
            ]
            return Trial("r", number, {}, state, evaluations=tuple(made))

        rising = (2.0, 1.6, 1.5, 1.6, 1.8, 2.0, 2.2)
        falling = (2.0, 1.8, 1.7, 1.65, 1.62, 1.6, 1.59)
        status = round_status(
            "r",
            max_train_steps=60,
            trials=[
                trial(0, falling, TrialState.RUNNING),
                trial(1, rising, TrialState.RUNNING),
                trial(2, rising, TrialState.COMPLETE),
                trial(3, rising, TrialState.INFEASIBLE),
                trial(4, rising, TrialState.RUNNING, train=0.1),
                trial(5, (1.5, 1.5, 1.5, 1.6, 1.8, 2.0, 2.2), TrialState.RUNNING),
            ],
            promised=6,
            is_running=True,
            adapters={},
        )
        (shown,) = status_document("alpaca", [status])["rounds"]
        assert shown["overfitting"] == [{"trial": 1, "since_step": 10}, {"trial": 2, "since_step": 10}]
        said = io.StringIO()
        Console(file=said, width=120).print(status_table("alpaca", [status]))
        assert (
            "r: the evaluation loss rises in trials 1 (since step 10), 2 (since step 10)" in said.getvalue()
        )

    def test_a_round_that_owes_decay_branches_is_open(self) -> None:
        status = round_status(
            "r",
            max_train_steps=60,
            trials=synthetic.trials(),
            promised=8,
            is_running=False,
            adapters={},
            branches_left=2,
        )
        (shown,) = status_document("alpaca", [status])["rounds"]
        assert (shown["state"], shown["branches_left"]) == ("open", 2)

    def test_how_long_it_will_take(self) -> None:
        """Two trials side by side, then one: a step a second, whatever a killed process left in between."""
        attempts = [
            (Attempt(1, 0, 50, 1000.0, 1100.0, "complete"),),
            (Attempt(1, 0, 50, 1000.0, 1100.0, "complete"),),
            (Attempt(1, 0, 30, 2000.0, 90_000.0, "interrupted"), Attempt(2, 20, 40, 90_010.0)),
        ]
        states = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.RUNNING]
        trials = [
            Trial("r", number, {}, state, evaluations=(Evaluation(40, 1.0),), attempts=tried)
            for number, (state, tried) in enumerate(zip(states, attempts, strict=True))
        ]

        def seconds_left(**changes: Any) -> float | None:
            known = {"trials": trials, "promised": 5, "is_running": True, "now": 90_030.0}
            status = round_status("r", max_train_steps=50, adapters={}, **{**known, **changes})
            (shown,) = status_document("alpaca", [status])["rounds"]
            return shown["seconds_left"]  # type: ignore[no-any-return]

        assert seconds_left() == pytest.approx((2 * 50 + 10) * 120 / 120)
        assert seconds_left(is_running=False) == pytest.approx((2 * 50 + 10) * 100 / 100)
        assert seconds_left(trials=trials[:2], promised=2) is None, "nothing is left"
        assert seconds_left(trials=trials[2:], is_running=False) is None, "no pace is known"

    def test_what_was_measured_of_its_workers(self) -> None:
        only_evaluated = Throughput("1-1", evaluating_seconds=2.0, peak_memory_bytes=7)
        rounds = [
            round_status(
                "r",
                max_train_steps=60,
                trials=(),
                promised=1,
                is_running=True,
                adapters={},
                throughput=work,
            )
            for work in (added_up(synthetic.WORK), only_evaluated)
        ]
        first, second = strictly(dumps(status_document("alpaca", rounds)))["rounds"]
        assert first["throughput"] == {
            "tokens_per_second": 3000.0,
            "trial_steps_per_second": 2.0,
            "packing_factor": 3.5,
            "padding_share": pytest.approx(0.2),
            "evaluation_share": 0.3,
            "peak_memory_bytes": 3_000_000_000,
            "training_seconds": 40.0,
            "evaluating_seconds": 18.0,
            "saving_seconds": 2.0,
        }
        assert list(second["throughput"]) == list(first["throughput"])
        assert (second["throughput"]["tokens_per_second"], second["throughput"]["evaluation_share"]) == (
            None,
            1.0,
        )

    def test_promised_trials_that_have_not_begun_are_waiting(self) -> None:
        status = round_status(
            "round1",
            max_train_steps=60,
            trials=synthetic.trials()[:3],
            promised=8,
            is_running=False,
            adapters={},
        )
        assert status.state == "open"
        assert status.counts["waiting"] == 5
        assert status.best is not None
        assert status.best.adapter is None

    def test_a_running_trial_is_not_counted_as_waiting_too(self) -> None:
        running = synthetic.trial(3, 1e-4, state=TrialState.RUNNING)
        trials = [*synthetic.trials()[:3], running]
        status = round_status(
            "r", max_train_steps=60, trials=trials, promised=8, is_running=True, adapters={}
        )
        assert status.state == "running"
        assert (status.counts["waiting"], status.counts["running"]) == (4, 1)

    def test_a_failed_trial_is_replaced_and_does_not_fill_the_promise(self) -> None:
        trials = [synthetic.trial(0, 1e-4, state=TrialState.FAILED), synthetic.trial(1, 1e-4)]
        status = round_status(
            "r", max_train_steps=60, trials=trials, promised=2, is_running=False, adapters={}
        )
        assert (status.state, status.counts["failed"], status.counts["waiting"]) == ("open", 1, 1)

    def test_an_infeasible_trial_is_never_the_best(self) -> None:
        low = [synthetic.evaluation(0, 0.1), synthetic.evaluation(5, math.nan)]
        trials = [synthetic.trial(0, 3e-3, state=TrialState.INFEASIBLE, evaluations=low)]
        status = round_status(
            "r", max_train_steps=60, trials=trials, promised=1, is_running=False, adapters={}
        )
        assert status.state == "complete"
        assert status.best is None


def test_check_document() -> None:
    plan = RoundPlan(
        trials=8, max_train_steps=60, epochs=1.2, train_rows=400, eval_rows=50, tokens=10_000,
        evaluation_share=math.nan, checkpoint_bytes=1000,
    )  # fmt: skip
    document = strictly(dumps(check_document([], plan, ["3 train rows are left out"])))
    assert list(document) == ["ok", "errors", "plan", "remarks"]
    assert document["ok"] is True
    assert document["remarks"] == ["3 train rows are left out"]
    assert list(document["plan"]) == [
        "trials", "max_train_steps", "epochs", "train_rows", "eval_rows", "tokens", "evaluation_share",
        "checkpoint_bytes", "peak_memory_bytes", "hours", "branches", "branch_steps", "token_lengths",
        "metric", "direction",
        "unchecked",
    ]  # fmt: skip
    assert document["plan"]["evaluation_share"] is None
    refused = check_document([Mistake(12, "hyperparameters.lora_rank", "unknown")], None)
    assert refused == {
        "ok": False,
        "errors": [{"line": 12, "key": "hyperparameters.lora_rank", "message": "unknown"}],
        "plan": None,
        "remarks": [],
    }


def test_a_running_trial_says_where_it_runs() -> None:
    """On a cluster node and GPU, on this machine neither; one that has ended is not listed."""
    attempts = [
        Attempt(1, 0, 10, 0.0, environment={"node": "gpu-7", "gpu": "0", "device": "NVIDIA H100"}),
        Attempt(1, 0, 10, 0.0, environment={"device": "cpu"}),
    ]
    running = [
        Trial("round1", number, {}, TrialState.RUNNING, attempts=(attempt,))
        for number, attempt in enumerate(attempts)
    ]
    ended = Trial("round1", 2, {}, TrialState.COMPLETE, attempts=attempts[:1])
    trials = [*running, ended]
    status = round_status(
        "round1", max_train_steps=60, trials=trials, promised=3, is_running=True, adapters={}, now=9.0
    )
    (shown,) = status_document("alpaca", [status])["rounds"]
    assert shown["running"] == [
        {"trial": 0, "node": "gpu-7", "gpu": "0"},
        {"trial": 1, "node": None, "gpu": None},
    ]
    console = Console(file=io.StringIO(), width=120)
    console.print(status_table("alpaca", [status]))
    assert "round1/0 runs on gpu-7 GPU 0" in console.file.getvalue()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(TrialState),
        lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_a_document_is_written_as_json_writes_it(document: Any) -> None:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    expected = json.dumps(plain(document), indent=2, ensure_ascii=False)
    assert dumps(document) == expected
    assert "".join(dumped([document, document])) == dumps([document, document])
    assert "".join(dumped([])) == "[]"
