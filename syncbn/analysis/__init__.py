"""What batch normalization does to a network, measured: on your own network, on one process or data parallel."""

from .factor import GrowthFactor, growth_factor
from .gdnp import Descent, gdnp_halfspace, gdnp_least_squares
from .growth import Growth, advice, gradient_growth
from .lanczos import Ritz
from .landscape import Landscape, gradient_landscape, hessian_spectrum
from .minibatch import Bias, cross_sample_energy, gradient_bias
from .noise import BatchNoise, NoiseRange
from .rayleigh import Ascent, rayleigh_ascent
from .shift import LayerShift, Shift, gradient_correlation
from .smoothness import LayerSmoothness, batch_norm_smoothness

__all__ = [
    "Ascent",
    "BatchNoise",
    "Bias",
    "Descent",
    "Growth",
    "GrowthFactor",
    "Landscape",
    "LayerShift",
    "LayerSmoothness",
    "NoiseRange",
    "Ritz",
    "Shift",
    "advice",
    "batch_norm_smoothness",
    "cross_sample_energy",
    "gdnp_halfspace",
    "gdnp_least_squares",
    "gradient_bias",
    "gradient_correlation",
    "gradient_growth",
    "gradient_landscape",
    "growth_factor",
    "hessian_spectrum",
    "rayleigh_ascent",
]
