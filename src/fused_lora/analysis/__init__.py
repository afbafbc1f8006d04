"""What an update did to a weight: its spectrum, its rank, the singular directions that it brought in; learning against
forgetting."""

from fused_lora.analysis.intruders import Intruders, intruder_dimensions, left_vectors, scale_intruders
from fused_lora.analysis.pareto import pareto
from fused_lora.analysis.spectra import Factors, effective_rank, perturbation_rank, singular_values

__all__ = [
    "Factors",
    "Intruders",
    "effective_rank",
    "intruder_dimensions",
    "left_vectors",
    "pareto",
    "perturbation_rank",
    "scale_intruders",
    "singular_values",
]
