"""The machine under the process: names of its CPU and GPU, and what they can do that decides the speed of a kernel."""

import functools
import platform
import re
import subprocess
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}
# What decides the speed of the CPU kernels and of PyTorch's products, fp32 and bf16.
_INSTRUCTION_SETS = ("avx512f", "avx512_bf16", "amx_bf16")


def _first_cpu() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty where there is none."""
    text = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def cpu_model() -> str:
    """The CPU's name as lscpu prints it, with the vendor before it where the name doesn't say it."""
    cpu = _first_cpu()
    name = cpu.get("model name") or _lscpu_name() or platform.processor() or platform.machine()
    vendor = _VENDORS.get(cpu.get("vendor_id", ""), "")
    return name if vendor.lower() in name.lower() else f"{vendor} {name}"


@functools.cache
def _lscpu_name() -> str:
    """What lscpu decodes from numbers on CPUs whose names the kernel doesn't know, as Arm's; empty where it can't."""
    try:
        done = subprocess.run(["lscpu"], capture_output=True, text=True)
    except OSError:
        return ""
    found = re.search(r"^Model name: +(.*)$", done.stdout, re.MULTILINE)
    return found[1] if found and found[1] != "-" else ""


def cpu_slug() -> str:
    """amd-26-2 or intel-6-143, of vendor, family and model, else the architecture's name: what tells files of figures
    from several CPUs apart."""
    cpu = _first_cpu()
    vendor = _VENDORS.get(cpu.get("vendor_id", ""), platform.machine()).lower()
    return "-".join([vendor, *(cpu[key] for key in ("cpu family", "model") if key in cpu)])


def cpu_features() -> dict[str, bool]:
    """Which of avx2, avx512, bf16_dot and amx the CPU kernels use here; FUSED_LORA_MAX_CPU_ISA caps them."""
    from fused_lora import _C  # here: `info` names the CPU where the compiled part doesn't load, too

    return _C.cpu_features()


def cpu_name() -> str:
    """The CPU's name with what decides its speed: "AMD EPYC (family 26 model 2, avx512f, avx512_bf16)". Many a guest is
    told no more of its name than that, in every generation."""
    cpu = _first_cpu()
    flags = cpu.get("flags", "").split()
    if not flags:
        return cpu_model()
    present = [name for name in _INSTRUCTION_SETS if name in flags] or ["avx2" if "avx2" in flags else "no AVX2"]
    numbers = [f"family {cpu['cpu family']} model {cpu['model']}"] if "cpu family" in cpu and "model" in cpu else []
    return f"{cpu_model()} ({', '.join(numbers + present)})"


def gpu_name(device: torch.device) -> str:
    """The name of a device that is no CPU."""
    return torch.get_device_module(device.type).get_device_name(device.index)


def gpu_driver() -> str:
    """The version of NVIDIA's driver; empty where there is none or it doesn't say."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)*", _NVIDIA_DRIVER.read_text())
    except OSError:
        return ""
    return found[0] if found else ""


def gpu_clocks(index: int) -> dict:
    """What PyTorch's cuda:<index> runs at right now and what slows it: sm_mhz, memory_mhz, watts, celsius and throttle,
    a bit mask that is 0 or idle (1) for an undisturbed card; empty where nvidia-smi doesn't say."""
    try:
        which = f"GPU-{torch.cuda.get_device_properties(index).uuid}"  # CUDA_VISIBLE_DEVICES renumbers PyTorch's alone
    except (AssertionError, AttributeError, RuntimeError):  # a PyTorch without CUDA
        return {}
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        sm, memory, watts, celsius, reasons = line.strip().split(", ")
        numbers = dict(sm_mhz=float(sm), memory_mhz=float(memory), watts=float(watts), celsius=float(celsius))
        return numbers | dict(throttle=int(reasons, 16))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}
