"""What batch normalization does to a network, measured: on your own network, on one process or data parallel."""

from .factor import GrowthFactor, growth_factor
from .growth import Growth, advice, gradient_growth

__all__ = [
    "Growth",
    "GrowthFactor",
    "advice",
    "gradient_growth",
    "growth_factor",
]
