"""Fixtures of all tests. Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before
Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["FUSED_LORA_TUNED"] = "0"  # what was found out on this machine decides no test

from dataclasses import dataclass

import pytest

from fused_lora.ops import internals
from fused_lora.ops.linear import forget_verdicts

# The longest files first: begun last, one of them would keep a process busy when the others have nothing left to do.
_LONGEST = (
    "test_cuda_build", "test_examples", "test_amx_emulated", "test_triton_compile", "test_cuda_emulated", "test_triton",
    "test_packaging", "test_distributed", "test_tune", "test_smollm2", "test_cli", "test_bench_steps", "test_compile",
    "test_qlora",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Each process takes the next file of this order (--dist loadfile)."""
    places = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@dataclass(frozen=True)
class Backend:
    """A back end under test: its name, the device its tensors lie on, the dtypes it is right in there."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]


_HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def _backend(name: str) -> Backend:
    gpu = torch.cuda.is_available()
    if name == "cuda":
        if not gpu or torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs an NVIDIA GPU of compute capability 9.0 (H100, H200)")
        return Backend(name, "cuda", (torch.float16, torch.bfloat16))
    if name == "triton" and not gpu:  # the interpreter computes bf16 products wrongly
        return Backend(name, "cpu", (torch.float32, torch.float16))
    if name == "triton" or (name == "reference" and gpu):
        return Backend(name, "cuda", _HALF_AND_SINGLE)
    return Backend(name, "cpu", _HALF_AND_SINGLE)


@pytest.fixture(params=["cpu", "triton", "cuda", "reference"])
def backend(request) -> Backend:
    """Every back end; a test that takes it runs on each."""
    return _backend(request.param)


@pytest.fixture(params=["cpu", "triton", "cuda"])
def fused(request) -> Backend:
    """Every back end with kernels of its own."""
    return _backend(request.param)


@pytest.fixture
def on_triton() -> Backend:
    """The Triton back end alone."""
    return _backend("triton")


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory is NaN, so that an element that nobody wrote shows."""

    def poisoned(make):
        def wrapper(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return wrapper

    owners = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))
    for owner, name in (*owners, (internals, "empty_on_cpu"), (internals, "empty_on_cuda")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """The directory of a random two-layer Llama over bytes, with its tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model")
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>"]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    torch.manual_seed(0)
    shape = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=257,
    )
    LlamaForCausalLM(
        LlamaConfig(**shape, max_position_embeddings=64, bos_token_id=256, eos_token_id=256)
    ).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def one_thread():
    """Two threads cost a tiny model more than they give, and much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The path of a directory for what `fused-lora tune` finds out, which counts for one test and is not made yet."""
    monkeypatch.setenv("FUSED_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSED_LORA_TUNED", raising=False)
    forget_verdicts()
    yield tmp_path / "cache"
    monkeypatch.undo()
    forget_verdicts()
