"""What batch normalization does to a network, measured: on your own network, on one process or data parallel."""

from .factor import GrowthFactor, growth_factor
from .gdnp import Descent, gdnp_halfspace, gdnp_least_squares
from .growth import Growth, advice, gradient_growth
from .rayleigh import Ascent, rayleigh_ascent

__all__ = [
    "Ascent",
    "Descent",
    "Growth",
    "GrowthFactor",
    "advice",
    "gdnp_halfspace",
    "gdnp_least_squares",
    "gradient_growth",
    "growth_factor",
    "rayleigh_ascent",
]
