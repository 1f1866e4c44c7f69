"""The user's own network on the command line: `--model module:function`."""

from typing import Any

from torch import nn

from ..doctor.finding import table
from ..options import made_by
from .growth import Growth
from .objective import Loss


def load(name: str) -> tuple[nn.Module, Any, Loss]:
    """What the function gives: (model, batch, loss).

    Raises:
        ValueError: it gives something else.
    """
    made = made_by(name)
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module) and callable(made[2])):
        kinds = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__
        raise ValueError(
            f"given {name}, which returned {kinds}; expected (model, batch, loss): a module, any batch, a function"
        )
    return made


def shown(growth: Growth) -> str:
    """A row for each layer, one for each batch norm."""
    rows = [("layer", "depth", "weight gradient norm", "output gradient norm")]
    rows += [(one.name, str(one.depth), f"{one.weight_norm:.4g}", f"{one.output_norm:.4g}") for one in growth.layers]
    norms = [("batch norm", "values per channel here", "over all ranks")]
    norms += [(one.name, f"{one.local:g}", f"{one.total:g}") for one in growth.norms]
    return "\n\n".join([table(rows), *([table(norms)] if growth.norms else [])])
