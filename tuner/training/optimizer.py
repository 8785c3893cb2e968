"""A trial's own optimizer over weights in PEFT's shapes, built by its description in `tuner.methods`.

Trials in a pack never share an optimizer, so each one's moments, rate, decay, clipping and step counter are
identical to those of a trial alone, to the digit, in any slot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tuner.adapters.placement import on
from tuner.errors import InputError, last_words
from tuner.methods.optimizers import optimizer
from tuner.methods.table import HYPERPARAMETERS
from tuner.records import Hyperparameters
from tuner.training.flat_tensors import FlatTensors

_PARTS = ("A", "B", "magnitude")
"""The entries of a module's tuple; the last with DoRA only."""


class TrialOptimizer:
    """Float32 master weights of one adapter, their gradients, and the update.

    `weights` and `gradients` map module paths to (A, B) in PEFT's shapes, with DoRA (A, B, magnitude). All
    A's, all B's and all magnitudes are views of one flat vector each on every device, so an elementwise
    optimizer runs one fused kernel for each.
    """

    def __init__(
        self,
        start: Mapping[str, tuple[Tensor, ...]],
        hyperparameters: Hyperparameters,
        *,
        device: torch.device,
        places: Mapping[str, torch.device] | None = None,
    ) -> None:
        """`places` has the devices of modules, if they are on several. Norms are summed on `device`."""
        names = sorted(start)  # a checkpoint's flat moments must not depend on how its file was read
        method = optimizer(str(HYPERPARAMETERS["optimizer"].value(hyperparameters)))
        # B is stored transposed, as in the pack, so that copies between them are one kernel. Which elements
        # bitsandbytes quantises together depends on the layout: there B has PEFT's layout.
        self._device, devices = device, {name: device if places is None else places[name] for name in names}
        parts: list[FlatTensors] = []
        gradients: list[FlatTensors] = []
        for part_name, part in zip(_PARTS, zip(*(start[name] for name in names), strict=True), strict=False):
            transposed = part_name == "B" and method.is_elementwise
            flatten = partial(
                FlatTensors.of, devices=devices, transposed=transposed, multiple=method.block_elements
            )
            parts.append(flatten(dict(zip(names, part, strict=True))))
            gradients.append(
                flatten({name: torch.zeros_like(view) for name, view in parts[-1].views.items()})
            )
        self._flat_gradients = [flat for part in gradients for flat in part.flats]
        self.weights = {name: tuple(part.views[name] for part in parts) for name in names}
        self.gradients = {name: tuple(part.views[name] for part in gradients) for name in names}
        is_spread = len(set(devices.values())) > 1
        self._order_of_norms = _order(devices, len(parts), device=device) if is_spread else None
        self._base_rate = HYPERPARAMETERS["learning_rate"].number(hyperparameters)
        self.max_norm = HYPERPARAMETERS["max_grad_norm"].number(hyperparameters)
        self._ratios = {"B": HYPERPARAMETERS["loraplus_ratio"].number(hyperparameters)}
        self._owners: dict[Tensor, FlatTensors] = {}
        """Of each parameter that is a whole vector."""
        groups = self._groups(parts, gradients, is_elementwise=method.is_elementwise)
        self._optimizer = method.build(groups, hyperparameters)
        self._skips_on_device, self.counts_on_host = method.skips_on_device, method.counts_on_host
        self.decides_on_device = method.skips_on_device and device.type != "cpu"
        """Whether `step_on_device` updates; else the host reads each norm. A CPU has nothing to wait for."""
        self._built = [copy.deepcopy(own) for own in self._settings()]

    def _groups(
        self, parts: Sequence[FlatTensors], gradients: Sequence[FlatTensors], *, is_elementwise: bool
    ) -> list[dict[str, Any]]:
        """Return the parameter groups: all A's, all B's and all magnitudes, as vectors or as matrices."""
        groups = []
        for part_name, *of_part in zip(_PARTS, parts, gradients, strict=False):
            pairs = zip(*((p.flats if is_elementwise else p.views.values()) for p in of_part), strict=True)
            parameters = [_parameter(values, gradient) for values, gradient in pairs]
            rate = self._base_rate * self._ratios.get(part_name, 1.0)
            groups.append({"params": parameters, "lr": rate, "part": part_name})
            if is_elementwise:
                self._owners |= dict.fromkeys(parameters, of_part[0])
        return groups

    def zero_gradients(self) -> None:
        """Zero the gradients before an update."""
        for flat in self._flat_gradients:
            flat.zero_()

    def gradient_norm(self) -> Tensor:
        """Return the gradient's norm before clipping, as a tensor still on the device.

        Computed tensor by tensor, so it does not depend on the memory layout of the weights. The norms of
        each device's tensors are brought to the first in one copy, and summed in the order of one device.
        """
        gradients = [gradient for parts in self.gradients.values() for gradient in parts]
        if self._order_of_norms is None:
            return nn.utils.get_total_norm(gradients).to(self._device)
        by_device: dict[torch.device, list[Tensor]] = {}
        for gradient in gradients:
            by_device.setdefault(gradient.device, []).append(gradient)
        norms = [torch.stack(list(_norm_each(each))).to(self._device) for each in by_device.values()]
        total: Tensor = torch.linalg.vector_norm(torch.cat(norms)[self._order_of_norms])
        return total

    def step(self, multiplier: float, *, norm: float) -> tuple[float, bool]:
        """Update the weights at `multiplier` times the trial's rate, unless the gradient is not finite.

        `norm` is the value of `gradient_norm`. Returns the rate and whether the gradient was clipped.
        """
        rate = self.rate(multiplier)
        if norm != norm or norm == float("inf"):
            return rate, False
        clipped = self.max_norm > 0 and norm > self.max_norm
        if clipped:
            coefficient = self.max_norm / (norm + 1e-6)  # as torch's clip_grad_norm_
            for flat in self._flat_gradients:
                flat.mul_(coefficient)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * self._ratios.get(group["part"], 1.0)
        self._optimizer.step()
        return rate, clipped

    def step_on_device(self, multiplier: float, *, orders: Tensor, number: int) -> None:
        """Update the weights as the device decided for the trial of this number, without waiting for it.

        `orders` are `Decided.orders`; other devices get them in one copy, for all trials.
        """
        for flat in self._flat_gradients:
            flat.mul_(on(orders, flat.device)[0, number])
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate(multiplier) * self._ratios.get(group["part"], 1.0)
        self._optimizer.found_inf = orders[1, number]  # type: ignore[attr-defined]  # torch's, for loss scaling
        self._optimizer.step()
        self._optimizer.found_inf = None  # type: ignore[attr-defined]

    def count_back(self, updates: int) -> None:
        """Take back that updates which the device skipped were counted, by an optimizer that counts them."""
        if self.counts_on_host:
            for state in self._optimizer.state.values():
                state["step"] -= updates

    def rate(self, multiplier: float) -> float:
        """Return `multiplier` times the trial's rate."""
        return self._base_rate * multiplier

    def state(self) -> dict[str, Tensor]:
        """Return the moments and counters as tensors by name, for a checkpoint.

        Settings of a group that an update has changed belong to it, such as Prodigy's estimate of the rate.
        """
        named = {}
        for number, parameters in enumerate(self._parameters()):
            for key, value in self._optimizer.state[parameters[0]].items():
                if len(parameters) > 1 and isinstance(value, Tensor):
                    owner = self._owners[parameters[0]]
                    value = owner.joined([self._optimizer.state[each][key] for each in parameters])
                named[f"{number}.{key}"] = _tensor(value if isinstance(value, Tensor) else int(value))
        for number, (built, own) in enumerate(zip(self._built, self._settings(), strict=True)):
            for key, value in own.items():
                if key not in built or not _is_same(value, built[key]):
                    kind = "tensor" if isinstance(value, Tensor) else "number"
                    named[f"group{number}.{kind}.{key}"] = _tensor(value)
        return named

    def load_state(self, named: Mapping[str, Tensor]) -> None:
        """Resume from `state`.

        Set directly, since bitsandbytes' `load_state_dict` and torch's cast tensors to the parameters' dtype
        by different rules.
        """
        parameters = self._parameters()
        for name, tensor in named.items():
            owner, _, key = name.partition(".")
            if owner.startswith("group"):
                kind, _, key = key.partition(".")
                group = self._optimizer.param_groups[int(owner.removeprefix("group"))]
                device = group["params"][0].device
                group[key] = tensor.item() if kind == "number" else tensor.to(device).clone()
                continue
            holders = parameters[int(owner)]
            is_count = tensor.dtype == torch.int64 and tensor.dim() == 0
            tensors = [tensor] if len(holders) == 1 else self._owners[holders[0]].apart(tensor)
            for parameter, value in zip(holders, tensors, strict=True):
                # torch keeps its float step counter of a fused AdamW on the parameter's device, too.
                self._optimizer.state[parameter][key] = (
                    int(value) if is_count else value.to(parameter.device).clone()
                )

    def mistake(self) -> str | None:
        """Return what a custom optimizer lacks; None if nothing is wrong."""
        groups = getattr(self._optimizer, "param_groups", None)
        if groups is None:
            return f"build returned {self._optimizer!r}, expects a torch.optim.Optimizer"
        if not all("part" in group for group in groups):
            return "its param_groups lack `part`; create it from the groups that `build` receives"
        for values in self._optimizer.state.values():
            for key, value in values.items():
                if not isinstance(value, (int, Tensor)):
                    return f"its state has {key} = {value!r}; checkpoints keep tensors and whole numbers"
        for built, own in zip(self._built, self._settings(), strict=True):
            for key, value in own.items():
                is_changed = key not in built or not _is_same(value, built[key])
                if is_changed and not isinstance(value, (int, float, Tensor)):
                    return f"an update sets {key} = {value!r}; checkpoints keep tensors and numbers"
        return None

    def does_not_skip(self) -> str | None:
        """Return what an optimizer with `skips_on_device` changes in an update that it is to skip."""
        if not self._skips_on_device:
            return None

        def kept() -> dict[str, Tensor]:
            weights = {
                f"{name}.{n}": part for name, parts in self.weights.items() for n, part in enumerate(parts)
            }
            return {name: value.clone() for name, value in (weights | self.state()).items()}

        before = kept()
        self.step_on_device(1.0, orders=torch.ones(2, 1, device=self._device), number=0)
        self.count_back(1)
        changed = [name for name, value in kept().items() if not _is_same(value, before.get(name))]
        return f"skips_on_device=True, and found_inf = 1 changes {', '.join(changed)}" if changed else None

    def _settings(self) -> list[dict[str, Any]]:
        """Return the settings of each group, besides those that are set before each update."""
        groups = getattr(self._optimizer, "param_groups", [])
        return [
            {key: value for key, value in group.items() if key not in ("params", "lr", "part")}
            for group in groups
        ]

    def _parameters(self) -> list[list[nn.Parameter]]:
        """Return all parameters; those that are one vector where there is one device are together."""
        found: dict[int, list[nn.Parameter]] = {}
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                owner: object = self._owners.get(parameter, parameter)
                found.setdefault(id(owner), []).append(parameter)
        return list(found.values())


def refuse_bad_optimizer(trial: Hyperparameters, *, devices: Sequence[torch.device]) -> None:
    """Build a custom optimizer, update small weights once, and take its state through a checkpoint.

    Each of the worker's devices has a layer. Raises InputError for what would otherwise fail in every trial.
    """
    name = str(HYPERPARAMETERS["optimizer"].value(trial))
    weights = (torch.full((2, 4), 0.1), torch.full((4, 2), 0.1), torch.full((4,), 0.1))
    try:
        places = {f"layer{number or ''}": device for number, device in enumerate(devices)}
        tried = TrialOptimizer(dict.fromkeys(places, weights), trial, device=devices[0], places=places)
        if (mistake := tried.mistake()) is None:
            for gradient in tried._flat_gradients:
                gradient.fill_(1e-3)
            tried.step(1.0, norm=float(tried.gradient_norm()))
            if (mistake := tried.mistake() or tried.does_not_skip()) is None:
                tried.load_state(tried.state())
    except Exception as error:  # noqa: BLE001  a plug-in may raise anything
        mistake = f"an update of small weights raised {last_words(error, __file__)}"
    if mistake is not None:
        raise InputError(f"optimizer {name}: {mistake}")


def _tensor(value: Tensor | float) -> Tensor:
    """Return a value of an optimizer's state as a tensor, to the digit."""
    if isinstance(value, Tensor):
        return value.detach().cpu().contiguous().clone()
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _order(devices: Mapping[str, torch.device], num_parts: int, *, device: torch.device) -> Tensor:
    """Return where the norm of each tensor, module by module, is among those that are device by device."""
    of_tensors = [place for place in devices.values() for _ in range(num_parts)]
    sorted_by_device = [
        number for each in dict.fromkeys(of_tensors) for number, at in enumerate(of_tensors) if at == each
    ]
    order = torch.empty(len(of_tensors), dtype=torch.int64)
    order[torch.tensor(sorted_by_device)] = torch.arange(len(of_tensors))
    return order.to(device)


def _norms(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.linalg.vector_norm(tensor) for tensor in tensors]


# Private to torch, whose own norm of all gradients is made of it.
_norm_each: Callable[[Sequence[Tensor]], Sequence[Tensor]] = getattr(torch, "_foreach_norm", _norms)


def _parameter(values: Tensor, gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values, requires_grad=True)
    parameter.grad = gradient
    return parameter
