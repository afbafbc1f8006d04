"""transformers' Trainer in two processes: DeepSpeed's ZeRO gives the losses and the adapter of data parallelism, and
goes on from its checkpoints. Trainer shards by FSDP on accelerators only; on a CPU it runs DistributedDataParallel."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_llama import llama
from two_processes import outcomes, run_checks

from fused_lora import apply_lora, load_adapter
from fused_lora.deepspeed_zero import is_copied, is_split

TOKENS = [torch.arange(12) * k % 128 for k in range(1, 33)]


def trained(directory: Path, name: str, split: bool = False, **how) -> tuple[list[float], torch.Tensor]:
    """The losses of four steps and the logits with the adapter that was saved, after the last two have been run again
    from the checkpoint in between.

    Args:
        split: whether the weights are in pieces from loading on.
        how: what Trainer is told of the processes.
    """
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    out, base, losses = directory / name, directory / "base", []
    llama().save_pretrained(base)
    dist.barrier()
    for checkpoint in (None, str(out / "checkpoint-2")):
        arguments = TrainingArguments(
            out, use_cpu=True, per_device_train_batch_size=2, max_steps=4, save_steps=2, learning_rate=1e-2,
            report_to=[], logging_steps=1, seed=0, lr_scheduler_type="constant", disable_tqdm=True, max_grad_norm=0.0,
            **how,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(base)
        assert (model.lm_head.weight.numel() == 0) == split
        torch.manual_seed(1)
        apply_lora(model, r=4, lora_alpha=8, use_dora=True)
        trainer = Trainer(model, arguments, train_dataset=[dict(input_ids=ids, labels=ids) for ids in TOKENS])
        trainer.train(resume_from_checkpoint=checkpoint)
        parameters = list(model.parameters())
        assert any(is_copied(p) or is_split(p) for p in parameters) == ("deepspeed" in how)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4), losses
    trainer.save_model(out / "final")
    dist.barrier()
    again = load_adapter(llama(), out / "final")
    with torch.no_grad():
        return losses[0], again(torch.stack(TOKENS[:2])).logits


def equal_to_data_parallel(directory: Path, name: str, **how) -> None:
    losses, logits = trained(directory, name, **how)
    expected = json.loads((directory / "losses.json").read_text())
    assert losses == pytest.approx(expected, abs=1e-3) and losses[0] != pytest.approx(losses[1], abs=1e-3)
    torch.testing.assert_close(logits, torch.load(directory / "logits.pt"), atol=1e-3, rtol=1e-3)


def data_parallel(directory: Path) -> None:
    losses, logits = trained(directory, "ddp")
    (directory / "losses.json").write_text(json.dumps(losses))
    torch.save(logits, directory / "logits.pt")
    dist.barrier()


def zero(directory: Path, stage: int) -> None:
    optimization = dict(
        stage=stage, stage3_param_persistence_threshold=0, stage3_gather_16bit_weights_on_model_save=True
    )
    config = dict(zero_allow_untested_optimizer=True, zero_optimization=optimization)
    config |= dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    equal_to_data_parallel(directory, f"zero{stage}", split=stage == 3, deepspeed=config)


def zero_2(directory: Path) -> None:
    zero(directory, 2)


def zero_3(directory: Path) -> None:
    zero(directory, 3)


CHECKS = [data_parallel, zero_2, zero_3]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return outcomes(__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_in_two_processes(check, found):
    if check.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    assert found[check] == [None, None], "\n".join(map(str, found[check]))


if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2"}
    run_checks(CHECKS, int(sys.argv[1]), Path(sys.argv[2]))
