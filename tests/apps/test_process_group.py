"""The group that `fused-lora finetune` joins ends with the run: what outlives it keeps gloo's threads until the
interpreter's end, where one of them may abort the process."""

import json
import os
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fused_lora.finetune.processes import joined


def test_nothing_keeps_the_group_after_the_run(tmp_path):
    from two_processes import outcomes  # not above: it imports what the run must be seen to import

    assert outcomes(__file__, tmp_path) == {"outlives": [False, False]}


if __name__ == "__main__":
    rank, directory = sys.argv[1:]
    os.environ |= {"WORLD_SIZE": "2", "RANK": rank}
    with joined("cpu"):
        dist.barrier()
        group = weakref.ref(dist.group.WORLD)
        layer = nn.Linear(2, 2)
        layer(torch.ones(1, 2)).sum().backward()
        torch.optim.AdamW(layer.parameters()).step()  # which imports what has kept it
    Path(directory, f"rank{rank}.json").write_text(json.dumps({"outlives": group() is not None}))
