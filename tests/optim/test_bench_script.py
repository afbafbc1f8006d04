"""bench/optimizer_steps.py on a tiny model."""

import importlib.util
from pathlib import Path

from tiny_llama import TOKENS, llama

from fused_lora import apply_lora


def test_every_optimizer_has_its_row():
    path = Path(__file__).resolve().parents[2] / "bench" / "optimizer_steps.py"
    spec = importlib.util.spec_from_file_location("optimizer_steps", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    times = module.measure(apply_lora(llama(hidden=32), r=4), TOKENS[:1], rounds=2)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys(
        ["forward and backward", *module.MAKERS], 2
    )
    rows = module.report({name: [0.2] if name == "forward and backward" else [0.05] for name in times}).splitlines()
    assert len(rows) == 9 and rows[0].split()[-2:] == ["200.0", "ms"] and rows[1].split()[-2:] == ["0.0", "%"]
