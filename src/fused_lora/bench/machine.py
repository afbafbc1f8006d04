"""Which machine, which versions: what every file of figures says of its origin."""

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")
# What decides the speed of the CPU kernels and of PyTorch's products, fp32 and bf16.
_INSTRUCTION_SETS = ("avx512f", "avx512_bf16", "amx_bf16")
_VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}


def _first_cpu() -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo; empty where there is none."""
    text = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def cpu_name() -> str:
    """The CPU's name with the instruction sets that decide its speed: "AMD EPYC (avx512f, avx512_bf16)"."""
    cpu = _first_cpu()
    if "model name" not in cpu:
        return platform.processor() or platform.machine()
    flags = cpu.get("flags", "").split()
    present = [name for name in _INSTRUCTION_SETS if name in flags] or ["avx2" if "avx2" in flags else "no AVX2"]
    return f"{cpu['model name']} ({', '.join(present)})"


def cpu_vendor() -> str:
    """amd, intel, or the architecture's name: what tells files of figures from several CPUs apart."""
    return _VENDORS.get(_first_cpu().get("vendor_id", ""), platform.machine())


def commit() -> str:
    """The checkout's commit with a + if it has changes, or an empty string outside of one: an installed package may lie
    inside another project's checkout, which does not track it."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True
        ).stdout.strip()

    try:
        if not git("ls-files", here.name):
            return ""
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except OSError:  # no git
        return ""


def environment(kind: str) -> dict:
    """Device, versions and date.

    Args:
        kind: cpu or cuda; of several GPUs, the current one.
    """
    on_cpu = kind == "cpu"
    return dict(
        device=cpu_name() if on_cpu else torch.cuda.get_device_name(),
        kind=kind,
        vendor=cpu_vendor() if on_cpu else "",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        fused_lora=metadata.version("fused-lora"),
        commit=commit(),
        date=datetime.date.today().isoformat(),
    )
