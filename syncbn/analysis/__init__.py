"""What batch normalization does to a network, measured: on your own network, on one process or data parallel."""

from .factor import GrowthFactor, growth_factor
from .gdnp import Descent, gdnp_halfspace, gdnp_least_squares
from .growth import Growth, advice, gradient_growth
from .rayleigh import Ascent, rayleigh_ascent
from .shift import LayerShift, Shift, gradient_correlation

__all__ = [
    "Ascent",
    "Descent",
    "Growth",
    "GrowthFactor",
    "LayerShift",
    "Shift",
    "advice",
    "gdnp_halfspace",
    "gdnp_least_squares",
    "gradient_correlation",
    "gradient_growth",
    "growth_factor",
    "rayleigh_ascent",
]
