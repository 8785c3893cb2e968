"""What every description of an optimizer, a schedule and a variant keeps its word on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch

from tuner.methods import registry
from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.optimizers import Optimizer
from tuner.methods.schedules import Schedule
from tuner.methods.table import HYPERPARAMETERS
from tuner.methods.variants import Variant
from tuner.records import Value

HORIZON = 60
WARMUP = 5
LIBRARIES = ("torch", "peft", "transformers", "numpy", "bitsandbytes")


def defaults(rows: tuple[Hyperparameter, ...]) -> dict[str, Value]:
    """Those of the rows that have one."""
    return {row.name: row.default for row in rows if row.default is not None}


class MethodContract:
    """What all kinds share. Subclasses give the fixture `method`."""

    kind: registry.Kind

    def test_its_hyperparameters_accept_their_defaults(self, method: Optimizer | Schedule | Variant) -> None:
        for row in method.hyperparameters:
            assert row.default is not None or row.default_note
            if row.default is not None:
                assert row.kind.parse(row.default) == row.default

    def test_the_table_has_what_it_declares(self, method: Optimizer | Schedule | Variant) -> None:
        for row in method.hyperparameters:
            listed = HYPERPARAMETERS[row.name]
            assert (listed.kind, listed.default, listed.tier) == (row.kind, row.default, row.tier)
            if not isinstance(method, Variant):
                assert listed.only_with is not None
                chosen_by, names = listed.only_with
                assert chosen_by == self.kind
                assert method.name in names

    def test_describing_it_loads_no_heavy_library(self, method: Optimizer | Schedule | Variant) -> None:
        program = (
            "import sys\nfrom tuner.methods import registry\n"
            f"registry.described({self.kind!r}, {method.name!r}, object)\n"
            f"print([name for name in {LIBRARIES} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


class OptimizerContract(MethodContract):
    """Fixture `method`; `device` where it can run, and `atol`, its tolerance of a run that was resumed."""

    kind = "optimizer"
    device = "cpu"

    def groups(self, rows: int = 8, *, rate: float = 1e-2) -> list[dict[str, object]]:
        """Three parts as an adapter has them, with gradients, as the description asks for them."""
        made = torch.Generator().manual_seed(0)
        parts = {"A": [(4, 32), (4, 32)], "B": [(32, 4), (32, 4)], "magnitude": [(32,)]}
        groups: list[dict[str, object]] = []
        for part, shapes in parts.items():
            tensors = [torch.randn(shape, generator=made).to(self.device) for shape in shapes]
            if self.method_of_groups.is_elementwise:
                tensors = [torch.cat([tensor.reshape(-1) for tensor in tensors])]
            params = [torch.nn.Parameter(tensor) for tensor in tensors]
            for param in params:
                param.grad = torch.randn(param.shape, generator=made).to(self.device)
            groups.append({"params": params, "lr": rate, "part": part})
        return groups

    method_of_groups: Optimizer

    @pytest.fixture
    def groups_of(self, method: Optimizer) -> list[dict[str, object]]:
        """The groups that this description asks for."""
        self.method_of_groups = method
        return self.groups()

    def values(self, method: Optimizer) -> Mapping[str, Value]:
        """A trial's hyperparameters."""
        return {"optimizer": method.name, "learning_rate": 1e-2, **defaults(method.hyperparameters)}

    def test_keeps_the_parts_of_its_groups_and_steps_at_their_rates(
        self, method: Optimizer, groups_of: list[dict[str, object]]
    ) -> None:
        made = method.build(groups_of, self.values(method))
        before = [[p.detach().clone() for p in group["params"]] for group in made.param_groups]
        assert {group["part"] for group in made.param_groups} == {"A", "B", "magnitude"}
        for group in made.param_groups:
            group["lr"] = 1e-2 if group["part"] == "B" else 0.0
        made.step()
        for group, old in zip(made.param_groups, before, strict=True):
            moved = [not torch.equal(p, q) for p, q in zip(group["params"], old, strict=True)]
            assert moved == [group["part"] == "B"] * len(moved), group["part"]

    def test_takes_no_more_memory_than_it_says(
        self, method: Optimizer, groups_of: list[dict[str, object]]
    ) -> None:
        """Apart from counters, and quantisation's own tables: a weight's state in tensors of its shape."""
        made = method.build(groups_of, self.values(method))
        made.step()
        for parameter, state in made.state.items():
            shaped = [
                value
                for value in state.values()
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape
            ]
            held = sum(value.element_size() for value in shaped)
            # bitsandbytes leaves small tensors in 32 bits, and what is no matrix muon leaves to AdamW.
            is_exempt = parameter.numel() < 4096 and (method.state_bytes < 4 or parameter.dim() < 2)
            assert held <= (8 if is_exempt else method.state_bytes)

    def test_works_without_its_hyperparameters_named(
        self, method: Optimizer, groups_of: list[dict[str, object]]
    ) -> None:
        """A missing one is at its default."""
        made = method.build(groups_of, {"optimizer": method.name})
        named = method.build(self.groups(), self.values(method))
        made.step()
        named.step()
        for group, other in zip(made.param_groups, named.param_groups, strict=True):
            for p, q in zip(group["params"], other["params"], strict=True):
                assert torch.equal(p, q)

    def test_trainer_arguments_name_it(self, method: Optimizer) -> None:
        from transformers.training_args import OptimizerNames

        if method.trainer_arguments is not None:
            arguments = method.trainer_arguments(self.values(method))
            assert arguments["optim"] in {name.value for name in OptimizerNames}


class ScheduleContract(MethodContract):
    """Fixture `method`."""

    kind = "schedule"

    def values(self, method: Schedule, *, horizon: int = HORIZON) -> dict[str, Value]:
        """A trial's hyperparameters."""
        lengths = method.decay_lengths
        decay = {row.name: horizon // 4 // len(lengths) for row in lengths}
        return {
            "schedule": method.name,
            "warmup_steps": WARMUP,
            **defaults(method.hyperparameters),
            **decay,
        }

    def test_is_a_share_of_the_peak_that_it_begins_at(self, method: Schedule) -> None:
        values = self.values(method)
        rates = [method.multiplier(done, values, HORIZON) for done in range(WARMUP, HORIZON)]
        assert rates[0] == 1.0
        assert all(0.0 <= rate <= 1.0 for rate in rates)

    def test_its_stable_phase_does_not_depend_on_the_horizon(self, method: Schedule) -> None:
        values = self.values(method)
        decay = method.decay_length(values)
        if decay is None:
            return
        assert 0 <= decay <= HORIZON - WARMUP
        for longer in (HORIZON + 1, 3 * HORIZON):
            assert [method.multiplier(done, values, HORIZON) for done in range(WARMUP, HORIZON - decay)] == [
                method.multiplier(done, values, longer) for done in range(WARMUP, HORIZON - decay)
            ]

    def test_the_shape_of_its_decay_changes_nothing_before_it(self, method: Schedule) -> None:
        values = self.values(method)
        stable = range(WARMUP, HORIZON - (method.decay_length(values) or 0))
        for row in method.hyperparameters:
            for shape in getattr(row.kind, "names", ()) if row.in_decay == "shape" else ():
                other = {**values, row.name: shape}
                assert [method.multiplier(done, values, HORIZON) for done in stable] == [
                    method.multiplier(done, other, HORIZON) for done in stable
                ]

    @pytest.mark.parametrize("keep", ["share", "steps"])
    @pytest.mark.parametrize("new", [HORIZON // 2, HORIZON, 2 * HORIZON])
    def test_is_rescaled_to_another_horizon(self, method: Schedule, keep: str, new: int) -> None:
        values = self.values(method)
        changed = method.rescale(values, HORIZON, new, keep)  # type: ignore[arg-type]
        assert set(changed) == {row.name for row in method.decay_lengths}
        decay, recut = method.decay_length(values), method.decay_length({**values, **changed})
        assert (decay is None) == (recut is None)
        if decay is not None and recut is not None:
            assert 0 <= recut <= new - WARMUP
            if keep == "share":
                assert recut == pytest.approx(decay * new / HORIZON, abs=0.5)

    @pytest.mark.parametrize("steps", [WARMUP + 1, HORIZON - 3, HORIZON])
    def test_transformers_gives_the_same_rate_by_the_name_it_says(self, method: Schedule, steps: int) -> None:
        from transformers import get_scheduler

        if method.trainer_scheduler is None:
            return
        values = self.values(method)
        name, arguments = method.trainer_scheduler(values, steps, HORIZON)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=WARMUP,
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(arguments),
        )
        for done in range(steps):
            if done >= WARMUP:
                assert theirs.get_last_lr()[0] == pytest.approx(
                    method.multiplier(done, values, HORIZON), abs=1e-12
                )
            optimizer.step()
            theirs.step()


class VariantContract(MethodContract):
    """Fixture `method`."""

    kind = "variant"

    def test_peft_takes_its_configuration(self, method: Variant) -> None:
        from peft import LoraConfig

        from tuner.methods.variants import variant, variant_of

        values = {**defaults(variant("lora").hyperparameters), **defaults(method.hyperparameters)}
        if method.switch is not None:
            assert not values[method.switch], "off by default"
            values[method.switch] = True
        assert variant_of(values) is method
        LoraConfig(**{**variant("lora").config(values), **method.config(values)})
