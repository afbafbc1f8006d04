"""torch.export and ONNX of a model with an adapter, unmerged: plain operators, which run where this library is not."""

import subprocess
import sys

import pytest
import torch
from tiny_llama import llama, randomise
from torch import nn
from torch.export import Dim

from fused_lora import apply_lora, lora_linear
from fused_lora.testing import random_problem

pytestmark = pytest.mark.usefixtures("one_thread")


class Logits(nn.Module):
    """Token ids [M, T] to logits [M, T, V]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.arange(batch * length).view(batch, length) * 7 % 128


IDS, OTHER = tokens(2, 8), tokens(3, 13)
DYNAMIC = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Logits(randomise(apply_lora(llama(hidden=32), 4))).eval()


@pytest.fixture(scope="module")
def program(model) -> torch.export.ExportedProgram:
    return torch.export.export(model, (IDS,), dynamic_shapes=DYNAMIC)


def ours(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if "fused_lora" in str(node.target)]


def test_the_program_is_of_plain_operators_for_every_size(model, program):
    adapter = [name for name in program.state_dict if ".lora_B." in name]
    assert not ours(program) and len(adapter) == 14
    for decomposed in (program, program.run_decompositions()):
        with torch.no_grad():
            torch.testing.assert_close(decomposed.module()(OTHER), model(OTHER))


RUN = """
import sys, torch
program, given, wanted = sys.argv[1:]
torch.testing.assert_close(torch.export.load(program).module()(torch.load(given)), torch.load(wanted))
assert not [name for name in sys.modules if name.startswith("fused_lora")]
"""


def test_the_program_runs_without_this_library(model, program, tmp_path):
    files = [tmp_path / name for name in ("program.pt2", "given.pt", "wanted.pt")]
    torch.export.save(program, files[0])
    torch.save(OTHER, files[1])
    torch.save(model(OTHER).detach(), files[2])
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_onnx(model, program, tmp_path):
    import onnx
    import onnxruntime

    path = tmp_path / "model.onnx"
    torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for ids in (IDS, OTHER):
        (got,) = session.run(None, {"input_ids": ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(ids).detach(), rtol=1e-4, atol=1e-4)


def test_onnx(model, program, tmp_path):
    check_onnx(model, program, tmp_path)


@pytest.mark.parametrize(
    "lora",
    [
        dict(trainable_token_indices={"embed_tokens": [1, 49], "lm_head": [1, 49]}),
        dict(use_dora=True),
        dict(target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]),
    ],
    ids=["rows", "dora", "embedding and head"],
)
def test_other_adapters_are_plain_operators_too(lora, tmp_path):
    model = Logits(randomise(apply_lora(llama(hidden=32), 4, **lora))).eval()
    program = torch.export.export(model, (IDS,), dynamic_shapes=DYNAMIC)
    assert not ours(program)
    check_onnx(model, program, tmp_path)


class Layer(nn.Module):
    """The op with a backend and dropout."""

    def __init__(self, p, backend="auto", dropout_p=0.0):
        super().__init__()
        self.p, self.backend, self.dropout_p = p, backend, dropout_p
        self.weight, self.lora_A, self.lora_B = (nn.Parameter(t) for t in (p.weight, p.lora_A, p.lora_B))

    def forward(self, x):
        return lora_linear(
            x, self.weight, self.lora_A, self.lora_B, 1.5, bias=self.p.bias, backend=self.backend,
            dropout_p=self.dropout_p,
        )  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_trains(strict):
    """A program keeps autograd's rules, as plain operators have them."""
    p = random_problem(6, 10, 12, 3)
    layer = Layer(p)
    exported = torch.export.export(layer, (p.x,), strict=strict)
    assert not ours(exported)
    run = exported.module()
    wanted = torch.autograd.grad(layer(p.x), list(layer.parameters()), p.dy)
    torch.testing.assert_close(torch.autograd.grad(run(p.x), list(run.parameters()), p.dy), wanted)


def test_dropout_is_in_the_program():
    p = random_problem(6, 10, 12, 3)
    run = torch.export.export(Layer(p, dropout_p=0.5), (p.x,)).module()
    assert not torch.equal(run(p.x), run(p.x))


def test_a_named_back_end_has_no_plain_operators():
    p = random_problem(6, 10, 12, 3)
    with pytest.raises(ValueError, match="backend must be 'auto' or 'reference' under torch.func, torch.export"):
        torch.export.export(Layer(p, backend="cpu"), (p.x,))
