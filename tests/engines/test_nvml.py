"""What the driver says becomes readings, and what it will not say is left out."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from tuner.engines.devices import gpu_meter, open_nvml
from tuner.report.format import GpuReading, gpu_line

GB = 10**9


@dataclass
class Memory:
    used: int
    total: int


@dataclass
class Rates:
    gpu: int


class DriverError(Exception):
    pass


@dataclass
class Driver:
    """A driver as the package `pynvml` shows it: by index or UUID."""

    gpus: dict[str, tuple[str, int]]
    """Name and busy percent, -1 where the GPU does not say, by UUID."""
    asked: list[str] = field(default_factory=list)
    NVMLError = DriverError

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        if index >= len(self.gpus):
            raise DriverError
        return list(self.gpus)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid not in self.gpus:
            raise DriverError
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Memory:  # noqa: N802
        self.asked.append(handle)
        return Memory(30 * GB, 150 * GB)

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return self.gpus[handle][0]

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Rates:  # noqa: N802
        if self.gpus[handle][1] < 0:
            raise DriverError
        return Rates(self.gpus[handle][1])


DRIVER = Driver({"GPU-a": ("NVIDIA H200", 97), "MIG-b": ("NVIDIA H200 MIG 1g.18gb", -1)})


@pytest.mark.parametrize("devices", [("0", "1"), ("GPU-a", "MIG-b"), ("GPU-a", "7", "GPU-gone", "1")])
def test_devices_are_read_by_number_and_by_name(devices: tuple[str, ...]) -> None:
    meter = gpu_meter(DRIVER, devices)
    assert meter is not None
    first, second = meter()
    assert (first.index, first.name, first.utilisation) == (0, "NVIDIA H200", 0.97)
    assert (second.index, second.utilisation) == (devices.index(devices[-1]), None)
    assert (second.used_bytes, second.total_bytes) == (30 * GB, 150 * GB)


def test_it_is_read_each_time() -> None:
    meter = gpu_meter(driver := Driver(DRIVER.gpus), ("1",))
    assert meter is not None
    assert driver.asked == []
    assert (len(meter()), len(meter())) == (1, 1)
    assert driver.asked == ["MIG-b", "MIG-b"]


def test_without_driver_or_device_there_is_no_meter() -> None:
    assert gpu_meter(None, ("0",)) is None
    assert gpu_meter(DRIVER, ()) is None


def test_without_a_gpu_the_driver_is_not_opened() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert open_nvml() is None


def test_a_line() -> None:
    assert gpu_line(GpuReading(0, "NVIDIA H200", 30 * GB, 150 * GB, 0.97)) == (
        "GPU 0  30 GB of 150 GB (20%), 97% busy  NVIDIA H200"
    )
    assert "busy" not in gpu_line(GpuReading(1, "NVIDIA H200 MIG", 0, 0, None))
