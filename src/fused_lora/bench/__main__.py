"""python -m fused_lora.bench README.md bench/results: write README's measured tables from the JSON files (`make
bench`)."""

import sys
from pathlib import Path

from fused_lora.bench.report import update_readme

if __name__ == "__main__":
    update_readme(Path(sys.argv[1]), Path(sys.argv[2]))
