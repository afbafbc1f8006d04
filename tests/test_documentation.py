"""The Python that README.md and docs/ show runs as written."""

from pathlib import Path

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser
from tiny_llama import llama, randomise

import fused_lora

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text()
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with what the pages name: a model and an adapter on it that PEFT has written."""
    import peft

    llama().save_pretrained(tmp_path / "path/to/model")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    randomise(model).save_pretrained(tmp_path / "adapter-from-peft")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_runs(page, folder):
    """In order, one namespace a page; what stands for a user's own things is given."""
    document = Sybil(parsers=[PythonCodeBlockParser()], path=str(ROOT), patterns=[page.name]).parse(page)
    model = llama()
    linear = torch.nn.Linear(64, 32)
    x, weight = torch.randn(3, 64), linear.weight.detach()
    document.namespace.update(torch=torch, F=torch.nn.functional, fused_lora=fused_lora)
    document.namespace.update(base=llama(), plain=llama(), model=model, linear=linear)
    document.namespace.update(x=x, weight=weight, lora_A=torch.randn(4, 64), lora_B=torch.randn(32, 4), scaling=2.0)
    document.namespace.update(inputs=dict(input_ids=torch.arange(8)[None]))
    examples = list(document.examples())
    assert examples
    for example in examples:
        example.evaluate()
