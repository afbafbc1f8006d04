"""A training run's state in one safetensors file, written aside and renamed: whole at every moment, and nothing in it
is ever unpickled.

adapter.<parameter>                tensors that train or have trained, in their own dtype
optimizer.<state>.<parameter>      the optimizer's state, AdamW's step, exp_avg and exp_avg_sq
schedule.<entry>                   a merge schedule's state: counts, base weights, past stages
rng.cpu, rng.cuda                  PyTorch's generators, uint8 [processes, size]
metadata["fused_lora"]             JSON: format, step, settings, scaler
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fused_lora.files import write_whole
from fused_lora.finetune import processes
from fused_lora.schedules import MergeSchedule

NAME, METRICS = "checkpoint.safetensors", "metrics.jsonl"
_FORMAT = 1
# Settings that follow from others, as the warm-up from the steps, or from a recipe, where they are not given: they are
# compared last, so that whoever changed one of the others is told of that one.
_DERIVED = frozenset(
    ("alpha", "target_modules", "lr", "warmup", "schedule", "final_share", "optimizer", "max_grad_norm")
)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def kept(model: nn.Module) -> dict[str, nn.Parameter]:
    """The same and A where LoRA-FA has frozen it, which was drawn for this run."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad or ".lora_A." in name}


def bytes_of(parameters: dict[str, nn.Parameter]) -> int:
    """Their size."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
    settings: dict,
    schedule: MergeSchedule | None = None,
) -> None:
    """Write the run's state after `step` steps; every process must come here.

    Args:
        path: the file.
        model, optimizer, scaler: their trained parameters, moments and loss scale are written.
        step: optimizer steps done.
        settings: what a resumed run must have unchanged; JSON values.
        schedule: whose state is written.
    Raises: OSError naming the file; the old one is whole then.
    """
    tensors = {}
    for name, parameter in kept(model).items():
        tensors[f"adapter.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    for key, value in schedule.state_dict().items() if schedule is not None else ():
        tensors[f"schedule.{key}"] = value
    device = next(iter(trained(model).values())).device
    tensors["rng.cpu"] = processes.gathered(torch.get_rng_state(), device)
    if device.type == "cuda":
        tensors["rng.cuda"] = processes.gathered(torch.cuda.get_rng_state(device), device)
    state = {"format": _FORMAT, "step": step, "settings": settings, "scaler": scaler.state_dict()}

    def write() -> None:
        own = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
        write_whole({path: to_bytes(own, metadata={"fused_lora": json.dumps(state)})})

    processes.by_first(write)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    settings: dict,
    schedule: MergeSchedule | None = None,
) -> int:
    """Put the run's state back, PyTorch's generators included; returns the steps done.

    Args: as in `save_checkpoint`.
    Raises: ValueError naming the file and what it lacks if it is damaged or of another model, and naming the setting
        that differs; nothing changes then.
    """
    state, tensors = _read(path)
    check_settings(path, state["settings"], settings)
    parameters = kept(model)
    wanted = {f"adapter.{name}": tuple(parameter.shape) for name, parameter in parameters.items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key.startswith("adapter.")}
    if wanted != found:
        differ = sorted(set(wanted.items()) ^ set(found.items()))[:3]
        raise ValueError(
            f"{path} must hold the {len(wanted)} trained tensors of this model; got {len(found)}, which differ in "
            f"{differ}"
        )
    moments = _moments(path, optimizer, parameters, tensors)
    device = next(iter(parameters.values())).device
    cpu = _generator_state(path, tensors, "rng.cpu", "cpu")
    cuda = _generator_state(path, tensors, "rng.cuda", device) if device.type == "cuda" else None
    if state["scaler"].keys() != scaler.state_dict().keys():
        raise ValueError(f"{path} must hold a loss scale of {list(scaler.state_dict())}; got {list(state['scaler'])}")
    if schedule is not None:  # checks all of it, and changes: so it is the last that may refuse
        before = {key.removeprefix("schedule."): t for key, t in tensors.items() if key.startswith("schedule.")}
        try:
            schedule.load_state_dict(before, optimizer)
        except ValueError as error:
            raise ValueError(f"{path}: the schedule's {error}") from None
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"adapter.{name}"])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)
    return state["step"]


def _moments(
    path: Path, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    """The optimizer's state by the place of each parameter in it. Raises: ValueError for one that does not fit."""
    order = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    names = {order.get(id(parameter)): name for name, parameter in parameters.items()}
    moments: dict[int, dict[str, Tensor]] = {}
    for key in [key for key in tensors if key.startswith("optimizer.")]:
        kind, _, name = key.removeprefix("optimizer.").partition(".")
        if name not in parameters or id(parameters[name]) not in order:
            raise ValueError(f"{path} must hold the optimizer's state of this model only; got {key}")
        parameter, got = parameters[name], tensors[key]
        if not _fits(kind, got, parameter):
            wanted = f"fit a parameter of shape {list(parameter.shape)}"
            raise ValueError(f"{path}: {key} must {wanted}; got {got.dtype} of shape {list(got.shape)}")
        moments.setdefault(order[id(parameter)], {})[kind] = got
    for group in optimizer.param_groups:
        having = [order[id(p)] for p in group["params"] if order[id(p)] in moments]
        kinds = {kind for i in having for kind in moments[i]}
        for i in having:  # a parameter that never had a gradient has no state at all
            if lacking := kinds - moments[i].keys():
                raise ValueError(f"{path} must hold optimizer.{min(lacking)}.{names[i]}, as of others; got none")
    return moments


def _fits(kind: str, moment: Tensor, parameter: Tensor) -> bool:
    """Whether an optimizer can have this of a parameter: a count of steps; a moment of each of its elements, also block
    by block of a factor, [blocks, ...]; or one of its rank, [blocks, R, R]."""
    if kind == "step" or not moment.is_floating_point():
        return kind == "step" and moment.numel() == 1
    square = moment.dim() == 3 and moment.shape[1] == moment.shape[2]
    by_block = parameter.dim() > 1 and moment.dim() == 3 and (square or moment.numel() == parameter.numel())
    return moment.shape == parameter.shape or by_block


def _generator_state(path: Path, tensors: dict[str, Tensor], key: str, device: torch.device | str) -> Tensor:
    """This process's state of PyTorch's generator. Raises: ValueError unless a generator takes it."""
    try:
        own = tensors[key][processes.rank()].clone()  # PyTorch reads a state from where the storage begins
        torch.Generator(device).set_state(own)
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path} must hold the state of PyTorch's generator of each process as {key}; got {type(error).__name__}: "
            f"{error}"
        ) from None
    return own


def check_settings(path: Path, before: dict, now: dict) -> None:
    """Raises ValueError naming the first setting in which a resumed run differs from the one that wrote the
    checkpoint."""
    for name in sorted(dict.fromkeys([*before, *now]), key=_DERIVED.__contains__):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"--resume continues a run under the settings of its checkpoint {path}: {name} must be "
                f"{before.get(name)!r}; got {now.get(name)!r}"
            )


def read_state(path: Path) -> dict:
    """The checkpoint's step and settings, reading no tensor. Raises: ValueError naming the file if it is no whole
    checkpoint."""
    return _open(path)[0]


def read_metrics(path: Path, step: int) -> list[dict]:
    """The rows of metrics.jsonl up to a step.

    Raises: ValueError naming the file unless it holds the steps 0 … step, a line each.
    """
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the line in which the run was killed
            break
    kept = rows[: step + 1]
    if [row.get("step") if isinstance(row, dict) else None for row in kept] != list(range(step + 1)):
        raise ValueError(
            f"{path} must hold the steps 0 to {step} of the checkpoint beside it, a line each; got {len(kept)} lines "
            "that do not"
        )
    return kept


def cut_metrics(path: Path, step: int) -> list[dict]:
    """`read_metrics`; later rows, of a run that was killed after its last checkpoint, are cut off the file."""
    kept = read_metrics(path, step)
    write_whole({path: "".join(json.dumps(row) + "\n" for row in kept).encode()})
    return kept


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    state, file = _open(path)
    return state, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open has no __iter__


def _open(path: Path):
    try:
        file = safe_open(path, framework="pt", device="cpu")
        state = json.loads((file.metadata() or {})["fused_lora"])
        if state["format"] != _FORMAT:
            raise ValueError(f"format must be {_FORMAT}; got {state['format']!r}")
        for name, kind in (("step", int), ("settings", dict), ("scaler", dict)):
            if type(state[name]) is not kind:
                raise ValueError(f"{name} must be of type {kind.__name__}; got {state[name]!r}")
        return {key: state[key] for key in ("step", "settings", "scaler")}, file
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must be a whole checkpoint of fused-lora; got {type(error).__name__}: {error}"
        ) from None
