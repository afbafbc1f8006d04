"""What is right and what is fastest on this machine: `fused_lora.tune` and `fused-lora tune`.

problems  which shapes          check   is a candidate right      race     which one is fastest
jail      a process for both    worker  the process's other end   job      all of it, into the file that `pick` reads

A candidate is a back end with one of its plans, "cpu:inside"; the PyTorch composition, "reference", is one of them.
"""

from fused_lora.tuning.job import tune

__all__ = ["tune"]
