"""Benchmarks of the layer for people and for CI: `fused-lora bench`, and the pytest-benchmark suites in bench/.

timing  the interleaving timer    cases   named sizes           candidates  who is timed
runner  check, time, count        steps   a training step       memory      what a step needs at its peak
latency forwards and tokens       mixed   batches of adapters   ways        how a model gets each of LoRA's variants
suite   arguments to files        report  lines on a terminal   results     the JSON file    plot  the picture
machine device and versions
"""

from fused_lora.bench.candidates import CANDIDATES
from fused_lora.bench.cases import Case
from fused_lora.bench.cases import preset as cases_of
from fused_lora.bench.machine import environment
from fused_lora.bench.suite import run

__all__ = ["CANDIDATES", "Case", "cases_of", "environment", "run"]
