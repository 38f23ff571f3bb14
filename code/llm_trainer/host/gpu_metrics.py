# SPDX-License-Identifier: Apache-2.0
"""Load, memory, heat and errors of each GPU, read through NVML (NVIDIA's NVML API Reference Guide).

A metric that a GPU does not support is left out from then on. A GPU that is lost is reported once, and asked no more.
"""

import ctypes
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pynvml

# Name -> what it is; units are in the names. In the journal each stands behind gpu/<host>/<index as NVML numbers it>/.
GPU_METRICS = {
    "utilization_percent": "share of the last moments (up to 1 s) in which a kernel ran, on however few of the SMs",
    "memory_controller_percent": "share of the last moments in which device memory was read or written",
    "memory_used_bytes": "device memory in use, by all processes and the driver",
    "memory_total_bytes": "device memory there is",
    "power_watts": "power drawn",
    "power_limit_watts": "power the GPU may draw",
    "temperature_celsius": "temperature of the chip",
    "sm_clock_mhz": "clock of the streaming multiprocessors (SMs)",
    "memory_clock_mhz": "clock of the device memory",
    "throttled_power_cap": "1 while the power limit holds the clocks down, which is normal under full load",
    "throttled_hardware": "1 while the hardware slows the clocks: heat, power or a fault",
    "throttled_thermal": "1 while heat slows the clocks",
    "throttled_power_brake": "1 while the machine's power supply slows the clocks",
    "ecc_uncorrected_errors": "memory errors since the driver was loaded that lost data",
    "ecc_corrected_errors": "memory errors since the driver was loaded that were corrected",
    "xid_errors": "errors that the driver reported (XID) since the job began",
    "sm_activity_percent": "share of the SMs that were busy since the last sample (Hopper and later)",
    "sm_occupancy_percent": "warps that were active, of the most that fit (Hopper and later)",
    "tensor_activity_percent": "share of the time in which tensor cores computed (Hopper and later)",
    "memory_bandwidth_percent": "memory bandwidth used, of the most there is (Hopper and later)",
    "pcie_sent_bytes_per_second": "sent over PCIe (Hopper and later)",
    "pcie_received_bytes_per_second": "received over PCIe (Hopper and later)",
    "nvlink_sent_bytes_per_second": "sent over all NVLinks (Hopper and later)",
    "nvlink_received_bytes_per_second": "received over all NVLinks (Hopper and later)",
}
MIB = 1 << 20
# NVML's GPM (GPU performance monitoring): what it is called there, here, and our unit in its own.
ACTIVITY = (
    (pynvml.NVML_GPM_METRIC_SM_UTIL, "sm_activity_percent", 1),
    (pynvml.NVML_GPM_METRIC_SM_OCCUPANCY, "sm_occupancy_percent", 1),
    (pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL, "tensor_activity_percent", 1),
    (pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL, "memory_bandwidth_percent", 1),
    (pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC, "pcie_sent_bytes_per_second", MIB),
    (pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC, "pcie_received_bytes_per_second", MIB),
    (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC, "nvlink_sent_bytes_per_second", MIB),
    (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC, "nvlink_received_bytes_per_second", MIB),
)
HEAT = pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown
THROTTLING = {
    "throttled_power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "throttled_hardware": pynvml.nvmlClocksEventReasonHwSlowdown,
    "throttled_thermal": HEAT,
    "throttled_power_brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
}
HARMFUL = {
    "throttled_hardware": "the hardware slows its clocks, for heat, power or a fault",
    "throttled_thermal": "heat slows its clocks: its cooling does not keep up",
    "throttled_power_brake": "the machine's power supply slows its clocks",
}
# NVIDIA's "XID Errors" document.
XIDS = {
    13: "a kernel of the program accessed memory out of bounds or ran an illegal instruction",
    31: "a kernel of the program accessed an address that is not its own",
    43: "a fault of the program stopped its work on the GPU, which is well",
    45: "the GPU ended the program's work after an earlier error, or because the program was killed",
    48: "uncorrectable memory error: the GPU has to be reset",
    63: "faulty memory was marked to be replaced: the GPU has to be reset",
    64: "faulty memory could not be replaced: the GPU has to be exchanged",
    74: "error of an NVLink connection",
    79: "the GPU has fallen off the bus: the machine has to be restarted or exchanged",
    94: "memory error that ended only the program it struck",
    95: "memory error that struck every program: the GPU has to be reset",
    119: "the GPU's own processor (GSP) does not answer the driver: the machine has to be restarted",
}
UNSUPPORTED = (
    pynvml.NVMLError_NotSupported,
    pynvml.NVMLError_FunctionNotFound,  # an older driver
    pynvml.NVMLError_NoPermission,
    pynvml.NVMLError_ArgumentVersionMismatch,
)
LOST = (pynvml.NVMLError_GpuIsLost, pynvml.NVMLError_GpuNotFound, pynvml.NVMLError_ResetRequired)
MAX_XIDS_AT_ONCE = 100


def read_load(handle: Any) -> dict[str, float]:
    """Return the load of a GPU and of its memory controller, in percent."""
    rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
    return {"utilization_percent": rates.gpu, "memory_controller_percent": rates.memory}


def read_memory(handle: Any) -> dict[str, float]:
    """Return the device memory in use and in all, in bytes."""
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {"memory_used_bytes": memory.used, "memory_total_bytes": memory.total}


def read_power(handle: Any) -> dict[str, float]:
    """Return the power drawn, in watts."""
    return {"power_watts": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000}


def read_power_limit(handle: Any) -> dict[str, float]:
    """Return the power that the GPU may draw, in watts."""
    return {"power_limit_watts": pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000}


def read_temperature(handle: Any) -> dict[str, float]:
    """Return the chip's temperature, in degrees Celsius."""
    return {"temperature_celsius": pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)}


def read_sm_clock(handle: Any) -> dict[str, float]:
    """Return the clock of the SMs, in MHz."""
    return {"sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)}


def read_memory_clock(handle: Any) -> dict[str, float]:
    """Return the clock of the device memory, in MHz."""
    return {"memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)}


def read_throttling(handle: Any) -> dict[str, float]:
    """Return 1 for each cause that slows the clocks now, 0 for the others."""
    reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    return {name: int(reasons & bits != 0) for name, bits in THROTTLING.items()}


def read_ecc(handle: Any) -> dict[str, float]:
    """Return the memory errors since the driver was loaded."""
    kinds = {
        "ecc_uncorrected_errors": pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
        "ecc_corrected_errors": pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED,
    }
    counter = pynvml.NVML_VOLATILE_ECC
    return {name: pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, counter) for name, kind in kinds.items()}


class ActivityCounter:
    """The activity of one GPU's SMs, memory and links between two samples of their counters, by NVML's GPM."""

    def __init__(self) -> None:
        """Prepare the request for all metrics of ACTIVITY."""
        self.earlier: Any = None
        self.later: Any = None
        self.request = pynvml.c_nvmlGpmMetricsGet_t()
        self.request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
        self.request.numMetrics = len(ACTIVITY)
        for metric, (number, _, _) in zip(self.request.metrics, ACTIVITY, strict=False):
            metric.metricId = number

    def __call__(self, handle: Any) -> dict[str, float]:
        """Return the activity since the last call; {} at the first. Raises NVMLError_NotSupported before Hopper."""
        if self.earlier is None:
            if not pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            self.earlier = pynvml.nvmlGpmSampleGet(handle, pynvml.nvmlGpmSampleAlloc())
            self.later = pynvml.nvmlGpmSampleAlloc()
            return {}
        pynvml.nvmlGpmSampleGet(handle, self.later)
        self.request.sample1, self.request.sample2 = self.earlier, self.later
        pynvml.nvmlGpmMetricsGet(self.request)
        self.earlier, self.later = self.later, self.earlier
        metrics = zip(self.request.metrics, ACTIVITY, strict=False)
        return {
            name: metric.value * unit
            for metric, (_, name, unit) in metrics
            if metric.nvmlReturn == pynvml.NVML_SUCCESS and math.isfinite(metric.value)
        }


class Gpu:
    """One GPU, and the queries that it answers."""

    def __init__(self, index: int) -> None:
        """Take the number that NVML has for it."""
        self.index = index
        self.handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self.num_xids: int | None = None  # None until NVML agrees to report them
        self.queries: list[Callable[[Any], dict[str, float]]] = [
            read_load,
            read_memory,
            read_power,
            read_power_limit,
            read_temperature,
            read_sm_clock,
            read_memory_clock,
            read_throttling,
            read_ecc,
            ActivityCounter(),
        ]

    def read(self) -> dict[str, float]:
        """Return the value of each metric. Raises one of LOST."""
        values: dict[str, float] = {} if self.num_xids is None else {"xid_errors": self.num_xids}
        for query in list(self.queries):
            try:
                values |= query(self.handle)
            except UNSUPPORTED:
                self.queries.remove(query)
            except LOST:
                raise
            except pynvml.NVMLError:  # busy, say: this value is missing in this sample
                continue
        return {name: round(value, 1) if isinstance(value, float) else value for name, value in values.items()}


class Gpus:
    """The GPUs that the job may use."""

    def __init__(self, host: str, warn: Callable[[str], None]) -> None:
        """Take a function that gets one sentence for each XID, loss or harmful throttling.

        Raises NVMLError where NVML does not answer.
        """
        self.host = host
        self.warn = warn
        self.gpus: dict[int, Gpu] = {}
        self.reported: set[tuple[int | None, object]] = set()
        self.faults: dict[str, float] = {}  # sentence -> when it last happened, by time.monotonic()
        for index in find_visible_gpus(pynvml.nvmlDeviceGetCount(), os.environ):
            try:
                self.gpus[index] = Gpu(index)
            except LOST as error:
                self.drop_gpu(index, error)
        self.events = None
        with suppress(pynvml.NVMLError):  # as under WSL
            self.events = pynvml.nvmlEventSetCreate()
        for gpu in self.gpus.values() if self.events else ():
            with suppress(pynvml.NVMLError):  # a virtual GPU, or one that is just being lost, which read() will tell
                pynvml.nvmlDeviceRegisterEvents(gpu.handle, pynvml.nvmlEventTypeXidCriticalError, self.events)
                gpu.num_xids = 0

    def read(self) -> dict[str, list[float | None]]:
        """Return metric -> its value for every index up to the last, None where there is none."""
        columns: dict[str, list[float | None]] = {}
        size = max(self.gpus, default=-1) + 1
        for index, gpu in list(self.gpus.items()):
            try:
                values = gpu.read()
            except LOST as error:
                self.drop_gpu(index, error)
                continue
            for name, value in values.items():
                columns.setdefault(name, [None] * size)[index] = value
            for name, meaning in HARMFUL.items():
                if values.get(name):
                    self.warn_once(index, name, f"GPU {index} of {self.host}: {meaning}.")
        return columns

    def collect_xids(self) -> None:
        """Report the XIDs that came since the last call, without waiting."""
        for _ in range(MAX_XIDS_AT_ONCE if self.events else 0):
            try:
                event = pynvml.nvmlEventSetWait_v2(self.events, 0)
            except pynvml.NVMLError:  # Timeout: there is none
                return
            gpu = next(
                (
                    gpu
                    for gpu in self.gpus.values()
                    if read_device_address(gpu.handle) == read_device_address(event.device)
                ),
                None,
            )
            index = gpu.index if gpu else None
            if gpu:
                gpu.num_xids = (gpu.num_xids or 0) + 1
            text = describe_xid(index, self.host, event.eventData)
            self.faults[text] = time.monotonic()
            self.warn_once(index, event.eventData, text)

    def drop_gpu(self, index: int, error: Exception) -> None:
        """Report a lost GPU, and ask it no more."""
        self.gpus.pop(index, None)
        text = f"GPU {index} of {self.host} no longer answers ({error}): its metrics end."
        self.faults[text] = time.monotonic()
        self.warn_once(index, "lost", text)

    def warn_once(self, index: int | None, what: object, text: str) -> None:
        """Warn of something about a GPU, unless that was done before."""
        if (index, what) not in self.reported:
            self.reported.add((index, what))
            self.warn(text)


def find_visible_gpus(num_gpus: int, variables: Mapping[str, str]) -> list[int]:
    """List NVML's numbers of the GPUs that CUDA_VISIBLE_DEVICES leaves; all where it has UUIDs or MIG names.

    GPUs that NVIDIA_VISIBLE_DEVICES leaves out are not in the container. On a machine of unlike GPUs, CUDA numbers them
    as NVML does only with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    named = [name.strip() for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if "CUDA_VISIBLE_DEVICES" not in variables or not all(name.lstrip("-").isdigit() for name in named):
        return list(range(num_gpus))
    return sorted({int(name) for name in named} & set(range(num_gpus)))


def describe_xid(index: int | None, host: str, xid: int) -> str:
    """Return a sentence about an error that the driver reported."""
    who = "A GPU" if index is None else f"GPU {index}"
    meaning = XIDS.get(xid, "see NVIDIA's list of XID errors")
    return f"{who} of {host} reported XID {xid}: {meaning}."


def read_device_address(handle: Any) -> int | None:
    """Return the address of the device that a handle points to: NVML has one for each GPU."""
    return ctypes.cast(handle, ctypes.c_void_p).value
