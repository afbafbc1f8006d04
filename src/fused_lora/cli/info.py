"""fused-lora info: what is installed and which back end serves what."""

from importlib import metadata

from rich.table import Table

from fused_lora.cli.console import out
from fused_lora.models import DTYPES


def info() -> None:
    """What is installed, what the compiled part holds, and which back end serves each device and dtype, and why."""
    import torch

    from fused_lora.backends import explain
    from fused_lora.bench.report import cpu_name

    facts = Table(box=None, show_header=False, pad_edge=False)
    for name in ("fused-lora", "torch", "triton", "transformers", "peft"):
        try:
            facts.add_row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            facts.add_row(name, "not installed")
    facts.add_row("compiled part", _compiled_part())
    devices = {"cpu": f"{cpu_name()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    for device, name in devices.items():
        facts.add_row(device, name)
    out.print(facts)
    table = Table(title="\nbackend='auto' for plain LoRA", title_justify="left", title_style="bold")
    for column in ("device", "dtype", "back end", "why"):
        table.add_column(column, no_wrap=column != "why")
    for device in devices:
        for dtype in (*DTYPES.values(), torch.float64):
            table.add_row(device, str(dtype).removeprefix("torch."), *explain(device, dtype))
    out.print(table)


def _compiled_part() -> str:
    try:
        from fused_lora import _C
    except ImportError as error:
        return f"does not load ({error}): install again with a C++ compiler at hand"
    built = _C.build_info()
    names = ", ".join(f"sm_{name}" for name in built["cuda_archs"].replace(";", " ").replace(",", " ").split())
    cuda = f"CUDA kernels for {names}" if built["cuda"] else "no CUDA kernels (built without nvcc)"
    return f"CPU kernels and {cuda}, by compiler {built['compiler']}"
