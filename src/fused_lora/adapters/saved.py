"""Which modules an adapter trains in full, or of which it trains rows, and which of them are tied."""

from dataclasses import dataclass

from torch import nn

from fused_lora.adapters.places import Place
from fused_lora.config import LoraConfig, unknown_name
from fused_lora.deepspeed_zero import whole_shape
from fused_lora.nn import LoRALayer
from fused_lora.nn.modules_to_save import ModuleToSave
from fused_lora.nn.trained_rows import TrainedRows


@dataclass(frozen=True)
class Saved:
    """Modules that an adapter has copies of, by the first name they are reached by, those that are tied to others of
    them last; the rows that it trains of those that it does not train in full; and what each is tied to."""

    modules: dict[str, nn.Module]
    rows: dict[str, list[int]]
    ties: dict[str, str]

    def own_rows(self) -> dict[str, list[int]]:
        """The rows of modules that have values of their own."""
        return {name: rows for name, rows in self.rows.items() if name not in self.ties}


def find_saved(model: nn.Module, config: LoraConfig, places: list[Place], first: dict[int, str]) -> Saved:
    """The modules that modules_to_save and trainable_token_indices name, and with them those that share their weight.

    Raises: ValueError for rows that cannot be trained, and for a module that both name.
    """
    modules = {first[id(p.module)]: p.module for p in places if not p.inside}
    ends = tuple(config.modules_to_save)
    saved = {name: module for name, module in modules.items() if ends and name.endswith(ends)}
    embedding = _embedding(model, modules) if config.trainable_token_indices is not None else None
    rows = _rows(config, modules, embedding)
    for name in rows:
        if name in saved:
            raise ValueError(f"modules_to_save and trainable_token_indices must not overlap; got {name} in both")
        _check_rows(name, modules[name], rows[name])
    ties = _tied_rows(config, modules, rows, embedding) if embedding is not None and embedding in rows else {}
    rows |= {name: rows[source] for name, source in ties.items()}
    if config.ensure_weight_tying:
        ties |= _tied_copies(modules, saved)
    saved |= {name: modules[name] for name in (*rows, *ties)}
    order = [*(name for name in saved if name not in ties), *ties]
    return Saved({name: saved[name] for name in order}, rows, ties)


def _embedding(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    """The name of the model's own embedding of tokens, if it says which that is."""
    ask = getattr(model, "get_input_embeddings", None)
    asked = ask() if ask is not None else None
    return next((name for name, module in modules.items() if module is asked), None)


def _rows(config: LoraConfig, modules: dict[str, nn.Module], embedding: str | None) -> dict[str, list[int]]:
    """The rows that trainable_token_indices names, by the names of their modules; a list is for the embedding."""
    given = config.trainable_token_indices
    if given is None:
        return {}
    if isinstance(given, list):
        given = {embedding or "embed_tokens": given}
    rows: dict[str, list[int]] = {}
    for end, numbers in given.items():
        named = [name for name in modules if name.endswith(end)]
        if not named:
            known = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Embedding)}
            raise unknown_name("trainable_token_indices", end, known)
        rows |= dict.fromkeys(named, numbers)
    return rows


def _plain(module: nn.Module) -> nn.Module:
    return module.original_module if isinstance(module, ModuleToSave) else module


def _check_rows(name: str, module: nn.Module, rows: list[int]) -> None:
    if isinstance(module, LoRALayer):
        raise ValueError(f"trainable_token_indices must name modules without adapters; got {name}, which holds some")
    try:
        TrainedRows.check_module(_plain(module))
    except ValueError as error:
        raise ValueError(f"trainable_token_indices: {name}: {error}") from None
    size = whole_shape(_plain(module).weight)[0]  # type: ignore[arg-type]
    if max(rows) >= size:
        raise ValueError(
            f"trainable_token_indices must be below {size}, the rows of {name} (resize the vocabulary first); got "
            f"{max(rows)}"
        )


def _tied_to(name: str, modules: dict[str, nn.Module]) -> list[str]:
    """The names of the other modules that have the weight of one."""
    weight = getattr(_plain(modules[name]), "weight", None)
    return [
        other
        for other, module in modules.items()
        if other != name and weight is not None and _plain(module)._parameters.get("weight") is weight
    ]


def _tied_rows(
    config: LoraConfig, modules: dict[str, nn.Module], rows: dict[str, list[int]], embedding: str
) -> dict[str, str]:
    """The modules that follow the model's embedding, which has rows of its own: those with its weight, unless other
    rows of theirs are named. Raises: ValueError if such are to be tied, or have adapters."""
    ties: dict[str, str] = {}
    for name in _tied_to(embedding, modules):
        module = modules[name]
        if rows.get(name, rows[embedding]) != rows[embedding]:
            if config.ensure_weight_tying:
                raise ValueError(
                    "ensure_weight_tying and different trainable_token_indices of tied modules exclude each other; got "
                    f"{embedding}: {rows[embedding]} and {name}: {rows[name]}"
                )
            continue
        if isinstance(module, LoRALayer) or not isinstance(_plain(module), nn.Linear | nn.Embedding):
            raise ValueError(
                f"trainable_token_indices of {embedding} are those of {name}, too, which has the same weight and must "
                f"be a plain nn.Linear or nn.Embedding for that; got a {type(module).__name__}"
            )
        ties[name] = embedding
    return ties


def _tied_copies(modules: dict[str, nn.Module], saved: dict[str, nn.Module]) -> dict[str, str]:
    """The modules that are to have the copies of others, embeddings before all."""
    ties: dict[str, str] = {}
    embeddings = [name for name in saved if isinstance(_plain(saved[name]), nn.Embedding)]
    for name in [*embeddings, *saved]:
        if name in ties:
            continue
        others = [other for other in _tied_to(name, modules) if other not in ties.values()]
        ties |= dict.fromkeys(others, name)
    return ties
