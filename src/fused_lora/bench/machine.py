"""Which machine, which versions: what every file of figures says of its origin."""

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from fused_lora.hardware import cpu_features, cpu_name, cpu_slug, gpu_driver


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
        cpu=cpu_slug() if on_cpu else "",
        features=cpu_features() if on_cpu else {},
        driver="" if on_cpu else gpu_driver(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        fused_lora=metadata.version("fused-lora"),
        commit=commit(),
        date=datetime.date.today().isoformat(),
    )
