"""What the library says of the machine under it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fused_lora import hardware
from fused_lora.bench import results


def _cpu(monkeypatch, tmp_path, text):
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(text)


@pytest.mark.parametrize(
    "vendor_id, model, flags, name, slug",
    [
        (
            "AuthenticAMD",
            "AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2",
            "fpu avx2 avx512f avx512_bf16",
            "AMD EPYC (family 26 model 2, avx512f, avx512_bf16)",
            "amd-26-2",
        ),
        (
            "GenuineIntel",
            "Xeon",
            "avx2 avx512f avx512_bf16 amx_bf16",
            "Intel Xeon (avx512f, avx512_bf16, amx_bf16)",
            "intel",
        ),
        ("GenuineIntel", "Intel(R) Core", "avx avx2", "Intel(R) Core (avx2)", "intel"),
        ("GenuineIntel", "Atom", "sse2 avx512fp", "Intel Atom (no AVX2)", "intel"),
    ],
)
def test_the_cpu_is_named_by_what_decides_its_speed(monkeypatch, tmp_path, vendor_id, model, flags, name, slug):
    block = f"processor\t: 0\nvendor_id\t: {vendor_id}\nmodel name\t: {model}\nflags\t\t: {flags}\n"
    _cpu(monkeypatch, tmp_path, f"{block}\n{block.replace(model, 'another')}")
    assert hardware.cpu_name() == name and hardware.cpu_slug() == slug
    document = dict(preset="readme", environment=dict(kind="cpu", cpu=hardware.cpu_slug()))
    assert results.target(document, tmp_path, ".json", "output") == tmp_path / f"readme-cpu-{slug}.json"


def test_a_cpu_without_cpuinfo_has_a_name(monkeypatch, tmp_path):
    for text in ("", "processor\t: 0\nFeatures\t: asimd sve\n"):
        _cpu(monkeypatch, tmp_path, text)
        assert hardware.cpu_name() and hardware.cpu_slug()


def test_lscpu_names_what_the_kernel_does_not(monkeypatch, tmp_path):
    """Arm's cores have numbers in /proc/cpuinfo, which lscpu decodes."""
    _cpu(monkeypatch, tmp_path, "processor\t: 0\nCPU part\t: 0xd4f\n")
    said = SimpleNamespace(stdout="Architecture:  aarch64\nModel name:    Neoverse-V2\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: said)
    hardware._lscpu_name.cache_clear()
    assert hardware.cpu_name() == "Neoverse-V2"
    hardware._lscpu_name.cache_clear()


def test_the_compiled_part_says_what_the_kernels_use():
    """Not the flags alone: the system must allow AMX, and the environment may cap it."""
    assert set(hardware.cpu_features()) >= {"avx512", "bf16_dot", "amx"}
    code = "from fused_lora import hardware; print(hardware.cpu_features()['amx'])"
    capped = os.environ | dict(FUSED_LORA_MAX_CPU_ISA="avx2")
    done = subprocess.run([sys.executable, "-c", code], env=capped, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_the_gpu_driver_is_read_where_there_is_one(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_NVIDIA_DRIVER", tmp_path / "version")
    assert hardware.gpu_driver() == ""
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.20  Sun Mar 30\nGCC version:  gcc 12.3.0\n"
    (tmp_path / "version").write_text(text)
    assert hardware.gpu_driver() == "570.133.20"


@pytest.mark.parametrize(
    "says, clocks",
    [
        (
            "1980, 2619, 412.31, 51, 0x0000000000000004",
            dict(sm_mhz=1980.0, memory_mhz=2619.0, watts=412.31, celsius=51.0, throttle=4),
        ),
        ("No devices were found", {}),
    ],
)
def test_the_clocks_of_a_gpu(monkeypatch, tmp_path, says, clocks):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncase $1 in --id=GPU-5f1a) echo '{says}';; *) echo 'another card';; esac\n")
    smi.chmod(0o755)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="5f1a"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert hardware.gpu_clocks(0) == clocks
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert hardware.gpu_clocks(0) == {}
