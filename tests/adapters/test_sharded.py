"""Models under FSDP1, FSDP2 and DistributedDataParallel, in two processes: files are whole, values come back, what is
not served is refused."""

import os
import socket
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import mse_loss

from fused_lora.adapters import apply_lora, load_adapter, merged, save_adapter, set_adapter

WEIGHTS = "adapter_model.safetensors"
X = torch.linspace(-1, 1, 3 * 8).view(3, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(OrderedDict(up=nn.Linear(8, 6), act=nn.ReLU()))
    return nn.Sequential(OrderedDict(block=block, down=nn.Linear(6, 4), head=nn.Linear(4, 4)))


def adapted(seed: int, name: str = "default", model: nn.Module | None = None) -> nn.Module:
    """The net with an adapter on two layers and a copy of the third."""
    model = apply_lora(model or net(), 2, target_modules=["up", "down"], modules_to_save=["head"], adapter_name=name)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=g))
    return model


def sharded(model: nn.Module, kind: str) -> nn.Module:
    """Block and root, as a trainer shards."""
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model.block)
        return fully_shard(model)
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model.block = FSDP(model.block, use_orig_params=True, device_id=torch.device("cpu"))
    return FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))


def step(model: nn.Module) -> None:
    """One step of SGD in what trains."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    mse_loss(model(X), torch.zeros(3, 4)).backward()
    optimizer.step()


def refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def in_one_process(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    save_adapter(adapted(1), f"{directory}/one{rank}")
    trained = adapted(1)
    step(trained)
    save_adapter(trained, f"{directory}/trained{rank}")
    for kind in ("fsdp2", "fsdp1"):
        model = sharded(adapted(1), kind)
        want = adapted(1)(X)
        torch.testing.assert_close(model(X), want)  # FSDP2's root keeps the weights that it computed with
        save_adapter(model, f"{directory}/{kind}-same{rank}")
        step(model)
        save_adapter(model, f"{directory}/{kind}-trained{rank}")
        load_adapter(model, f"{directory}/one{rank}")
        torch.testing.assert_close(model(X), want)
        refused(lambda: merged(model).__enter__(), "model must not be sharded to be merged")
        refused(lambda: apply_lora(model, adapter_name="second"), "apply_lora before FSDP")
        refused(lambda: load_adapter(model, f"{directory}/one{rank}", "second"), "apply_lora before FSDP")
        torch.testing.assert_close(model(X), want)
    replicated = nn.parallel.DistributedDataParallel(adapted(1))
    save_adapter(replicated, f"{directory}/ddp-same{rank}")
    load_adapter(replicated, f"{directory}/trained{rank}")
    save_adapter(replicated, f"{directory}/ddp-trained{rank}")
    refused(lambda: apply_lora(replicated, adapter_name="second"), "DistributedDataParallel after adapters are added")
    refused(lambda: sharded(adapted(1), "fsdp2").down.merge(), "weight must be a plain Parameter.*DTensor")
    switching(directory, rank)
    dist.destroy_process_group()


def switching(directory: str, rank: int) -> None:
    """The adapter that is switched to is the one that trains, although FSDP2 has run the other."""
    both, plain = (adapted(2, "b", adapted(1, "a")) for _ in range(2))
    for model in (sharded(both, "fsdp2"), plain):
        set_adapter(model, "b")
        model(X)
        set_adapter(model, "a")
        step(model)
    save_adapter(both, f"{directory}/switched{rank}", "a")
    save_adapter(plain, f"{directory}/plain-switched{rank}", "a")


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, __file__]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=os.environ | address, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=300)[1].decode()[-3000:] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    for rank in (0, 1):
        one, trained = (load_file(tmp_path / f"{what}{rank}" / WEIGHTS) for what in ("one", "trained"))
        assert len(one) == 6 and any((one[key] != trained[key]).any() for key in one)
        for what, want in (("same", one), ("trained", trained)):
            for kind in ("fsdp1", "fsdp2", "ddp"):
                torch.testing.assert_close(load_file(tmp_path / f"{kind}-{what}{rank}" / WEIGHTS), want)
        got, want = (load_file(tmp_path / f"{what}{rank}" / WEIGHTS) for what in ("switched", "plain-switched"))
        torch.testing.assert_close(got, want)
        config = (tmp_path / f"fsdp2-same{rank}" / "adapter_config.json").read_text()
        assert '"base_model_class": "Sequential"' in config


if __name__ == "__main__":
    in_one_process(int(sys.argv[1]), sys.argv[2])
