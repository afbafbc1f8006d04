"""`fused-lora info --model DIR --adapter DIR`: the table of a PEFT model, and one line for what is wrong."""

import importlib
import sys

import pytest
from peft_twins import peft_model
from tiny_llama import llama
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from fused_lora.cli import app

info = importlib.import_module("fused_lora.cli.info")  # the package has the command under this name


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base model's folder and an adapter's."""
    from tokenizers import Tokenizer, models

    root = tmp_path_factory.mktemp("info")
    llama().save_pretrained(root / "base")
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(root / "base")
    peft_model(target_modules=["q_proj", "v_proj", "embed_tokens"]).save_pretrained(root / "adapter")
    return root / "base", root / "adapter"


def run(*options):
    done = CliRunner().invoke(app, ["info", *map(str, options)])
    return done.exit_code, done.output


def test_the_table(folders, monkeypatch):
    base, adapter = folders
    monkeypatch.setattr(info.out, "width", 140)
    code, text = run("--model", base, "--adapter", adapter, "--dtype", "bf16")
    lines = [line.split() for line in text.splitlines()]
    assert code == 0 and "4 of 5 adapted layers are fused" in text
    assert ["2", "base_model.model.model.layers.*.self_attn.q_proj", "fused"] in [line[:3] for line in lines]
    assert ["1", "base_model.model.model.embed_tokens", "peft"] in [line[:3] for line in lines]


def test_wrong_folders_are_one_line(folders, tmp_path):
    base, adapter = folders
    other = tmp_path / "other"
    peft_model(lambda dtype: llama(dtype, hidden=32)).save_pretrained(other)
    for options, words in (
        (("--model", base), "--adapter must be given beside --model"),
        (("--model", base, "--adapter", tmp_path), "--adapter must be a directory with an adapter_config.json"),
        (("--model", tmp_path, "--adapter", adapter), "with a config.json"),
        (("--model", base, "--adapter", other), "must be an adapter of this model; PEFT says RuntimeError"),
        (("--model", base, "--adapter", adapter, "--dtype", "fp8"), "dtype must be one of"),
    ):
        code, text = run(*options)
        assert code == 2 and words in text and len(text.strip().splitlines()) == 1, text


def test_without_peft_it_says_what_to_install(folders, monkeypatch):
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "peft" or name.startswith("fused_lora.peft")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    code, text = run("--model", folders[0], "--adapter", folders[1])
    assert code == 1 and "peft is not installed: pip install 'fused-lora[peft]'" in text, text
