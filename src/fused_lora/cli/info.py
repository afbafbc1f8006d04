"""fused-lora info: what is installed and which back end serves what; or how the layers of a PEFT model run."""

import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from fused_lora.cli.console import Dtype, Model, errors, given, out, printable

_EXTRAS = ("cli", "peft", "finetune", "bench")  # for users; the others are for work on the project


def info(
    model: Model = None,
    adapter: Annotated[
        str | None, typer.Option(help="Directory of an adapter that PEFT loads.", show_default=False)
    ] = None,
    dtype: Dtype = "fp32",
) -> None:
    """What is installed, what the compiled part holds, and which back end serves each device and dtype, and why.

    With an adapter: how each layer of that PEFT model runs after fused_lora.peft.fuse, and why.
    """
    from fused_lora.models import DTYPES

    with errors():
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        if model is None and adapter is None:
            return _print_machine()
        given(model=model, adapter=adapter)
        if adapter is None:
            raise ValueError(
                "--adapter must be given beside --model, the table is of a model with an adapter; got none"
            )
        _print_ways(model, Path(adapter), dtype)


def _print_ways(model: str | None, adapter: Path, dtype: str) -> None:
    """The table of `fused_lora.peft.fuse`, layers of like names in one row."""
    from fused_lora.models import DTYPES, base_model, check_name, load_model

    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"--adapter must be a directory with an adapter_config.json; got {adapter}")
    chosen = base_model(model)
    check_name(chosen)
    from fused_lora.peft import fuse

    ways = fuse(_with_adapter(load_model(chosen, DTYPES[dtype], "cpu")[0], adapter))
    out.print(ways.summary(), style="bold")
    _print_table([("layers", "name", "way", "why"), *(tuple(map(printable, line)) for line in ways.lines())])


def _with_adapter(base: Any, adapter: Path) -> Any:
    """The PEFT model. Raises: ValueError if PEFT can't load the adapter on this base."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, str(adapter))
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        words = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{adapter} must be an adapter of this model; PEFT says {type(error).__name__}: {words}"
        ) from None


def _print_machine() -> None:
    import torch

    from fused_lora.hardware import cpu_name

    names = ("fused-lora", "torch", "triton", "transformers", "peft")
    facts = [(name, _version(name) or "not installed") for name in names]
    loads, holds = _compiled_part()
    facts += [("compiled part", holds)]
    threads = torch.get_num_threads()
    devices = {"cpu": f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    tuned = [("tuned", _tuned(device)) for device in devices if loads]
    _print_table(facts + list(devices.items()) + tuned)
    if missing := missing_of_extras():
        out.print("\nextras that lack packages", style="bold")
        _print_table([(f"fused-lora[{extra}]", ", ".join(packages)) for extra, packages in missing.items()])
    if loads:
        _print_served(devices)


def _print_served(devices: Iterable[str]) -> None:
    import torch

    from fused_lora.backends import explain
    from fused_lora.models import DTYPES

    out.print("\nbackend='auto' for plain LoRA", style="bold")
    rows = [("device", "dtype", "back end", "why")]
    for device in devices:
        served: dict[tuple[str, str], list[str]] = {}
        for dtype in (*DTYPES.values(), torch.float64):
            served.setdefault(explain(device, dtype), []).append(str(dtype).removeprefix("torch."))
        rows += [(device, ", ".join(dtypes), *answer) for answer, dtypes in served.items()]
    _print_table(rows)


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns with two spaces between them, the last one wrapped to the terminal's width; no line ends in spaces."""
    widths = [max(len(cell) for cell in column) for column in list(zip(*rows))[:-1]]
    indent = sum(widths) + 2 * len(widths)
    for row in rows:
        start = "".join(f"{cell:{width}}  " for cell, width in zip(row, widths))
        wrapped = textwrap.wrap(row[-1], max(20, out.width - indent), break_on_hyphens=False)
        for head, line in zip([start, *[" " * indent] * len(wrapped)], wrapped):
            out.print(f"{head}{line}", markup=False, soft_wrap=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing_of_extras() -> dict[str, list[str]]:
    """The packages that are not installed, by the extra that asks for them; extras with all of theirs are left out."""
    if _version("fused-lora") is None:
        return {}
    wanted: dict[str, list[str]] = {}
    for requirement in metadata.requires("fused-lora") or []:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        package = re.match(r"[\w.-]+", requirement)
        if extra and package and package[0] != "fused-lora" and _version(package[0]) is None:
            wanted.setdefault(extra[1], []).append(package[0])
    return {extra: wanted[extra] for extra in _EXTRAS if extra in wanted}


def _tuned(device: str) -> str:
    """What `fused-lora tune` has left for a device, or why it doesn't count."""
    import torch

    from fused_lora.backends import tuned

    with warnings.catch_warnings(action="ignore"):  # of a damaged file: the line says so
        found = tuned.load(torch.device(device))
    if found.ignored == "there is none":
        return f"{device}: nothing yet; `fused-lora tune` finds out what is fastest here"
    if found.ignored:
        return f"{device}: {found.path} does not count: {found.ignored}"
    rows = found.document["rows"]
    failed = sum("fault" in figures for row in rows for figures in row["candidates"].values())
    return f"{device}: {found.path}, {found.document.get('date', '')}, {len(rows)} cases, {failed} failures"


def _compiled_part() -> tuple[bool, str]:
    """Whether the compiled part loads, and what it holds or why it does not."""
    try:
        from fused_lora import _C
    except ImportError as error:
        return False, " ".join(str(error).removeprefix("fused-lora's compiled part ").split())
    built = _C.build_info()
    names = ", ".join(f"sm_{name}" for name in built["cuda_archs"].replace(";", " ").replace(",", " ").split())
    cuda = (
        f"CUDA kernels for {names} (ptxas {built['ptxas']})"
        if built["cuda"]
        else "no CUDA kernels (built without nvcc)"
    )
    return True, f"CPU kernels and {cuda}, by compiler {built['compiler']}"
