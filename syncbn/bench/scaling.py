"""`bench scaling`: collectives measured on the processes of this machine, a model of them, and what it says of many ranks.

Requirements
    - rows tell measured, published and modelled apart, and name what was assumed;
    - all_reduce is the seam's, the one that layers use; all_gather is measured for comparison;
    - nothing is reported if a collective does not give the sum.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ..doctor.finding import table
from . import messages, namespaces, processes, projection, published, rows
from .agreement import DisagreementError
from .alpha_beta import Fitted, Model, fitted, ring
from .projection import Assumed, Latency
from .rows import Row
from .timing import microseconds, quartiles

TASK = "syncbn.bench.messages:measure"
CHANNELS = 512  # of the projected latency


def run(options: argparse.Namespace) -> int:
    """Measure, fit, project, append rows to four files, or to that of the efficiencies alone; the exit status."""
    nccl = projection.nccl(options.node_size, 1e-9 / options.bandwidth)
    tables = {} if options.modelled else measured_tables(options, nccl)
    tables["scaling_efficiency"] = efficiencies(nccl, options)
    print(shown_efficiency(tables["scaling_efficiency"]))
    for name, of in tables.items():
        print(rows.said(rows.append(name, of, options.results, options.device)))
    return 0


def measured_tables(options: argparse.Namespace, nccl: Mapping[str, Latency]) -> dict[str, list[Row]]:
    """Latencies, the models fitted to them, and both beside NCCL's to many ranks; by the name of their file."""
    measured: list[Row] = []
    for row in latencies(options):
        measured.append(row)
        rows.require("scaling", measured, options.results)
    print(shown(measured))
    models = fits(measured, options.device)
    print("\n" + told(models) + "\n")
    machines = {f"{backend(options.device)} here": projection.gloo(_on_one_node(models), options.node_size), "NCCL": nccl}
    projected = [*points(measured, options), *curves(machines, options)]
    return {"scaling": measured, "scaling_model": model_rows(models), "scaling_projection": projected}


def backend(device: str) -> str:
    return "NCCL" if device == "cuda" else "Gloo"


def latencies(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each operation, number of ranks and of channels; on one node, then on two if they can be made.

    Raises:
        DisagreementError: a collective does not give the sum.
    """
    arguments = {
        "values": [2 * channels + 1 for channels in options.channels],
        "operations": messages.OPERATIONS,
        "repeats": options.repeats,
        "device": options.device,
    }
    for size in tqdm(options.ranks, "one node", unit=" sizes", disable=None, dynamic_ncols=True):
        answers = processes.run(TASK, arguments, size, options.timeout, options.device)
        yield from _rows(answers, size, 1, options)
    if options.nodes == "one" or options.device == "cuda":
        return
    with contextlib.ExitStack() as stack:
        try:
            nodes = stack.enter_context(namespaces.two_nodes())
        except OSError as error:
            print(f"syncbn bench: two nodes are skipped: {error}", file=sys.stderr)
            return
        even = [size for size in options.ranks if size % 2 == 0]
        for size in tqdm(even, "two nodes", unit=" sizes", disable=None, dynamic_ncols=True):
            places = [nodes[rank * 2 // size] for rank in range(size)]
            answers = processes.run(TASK, arguments, size, options.timeout, options.device, places)
            yield from _rows(answers, size, 2, options)


def _rows(answers: Sequence[Any], size: int, nodes: int, options: argparse.Namespace) -> Iterator[Row]:
    for one in messages.slowest(answers):
        if not one["right"]:
            raise DisagreementError(f"{one['operation']} of {one['values']} values on {size} ranks does not give the sum")
        yield {
            "operation": one["operation"],
            "backend": backend(options.device),
            "world_size": size,
            "nodes": nodes,
            "cores": os.cpu_count(),
            "channels": (one["values"] - 1) // 2,
            "bytes": 8 * one["values"],
            **microseconds(quartiles(one["seconds"])),
            "repeats": len(one["seconds"]),
        }


def shown(measured: Sequence[Row]) -> str:
    """Median microseconds, and all_gather over all_reduce."""
    by_key = {
        (row["nodes"], row["world_size"], row["channels"], row["operation"]): row["microseconds_median"] for row in measured
    }
    lines: list[Sequence[object]] = [("nodes", "ranks", "channels", "all_reduce µs", "all_gather µs", "ratio")]
    for nodes, size, channels, operation in by_key:
        if operation == "all_reduce":
            reduce, gather = (by_key[nodes, size, channels, name] for name in messages.OPERATIONS)
            lines.append((nodes, size, channels, f"{reduce:.0f}", f"{gather:.0f}", f"{gather / reduce:.2f}"))
    return table(lines)


Fits = dict[tuple[str, int], Fitted]  # by operation and number of nodes


def fits(measured: Sequence[Row], device: str) -> Fits:
    """A model for each operation and number of nodes; ranks that outnumber the cores take turns."""
    found = {}
    for key in dict.fromkeys((row["operation"], row["nodes"]) for row in measured if row["world_size"] > 1):
        # A rank that is alone sends nothing.
        of = [row for row in measured if (row["operation"], row["nodes"]) == key and row["world_size"] > 1]
        cores = float("inf") if device == "cuda" else os.cpu_count() or 1
        terms = [ring(key[0], row["world_size"], row["bytes"], max(1.0, row["world_size"] / cores)) for row in of]
        found[key] = fitted(terms, [row["microseconds_median"] / 1e6 for row in of])
    return found


def _on_one_node(models: Fits) -> dict[str, Model]:
    return {operation: found.model for (operation, nodes), found in models.items() if nodes == 1}


def told(models: Fits) -> str:
    lines: list[Sequence[object]] = [("model", "nodes", "overhead µs", "α µs a round", "β µs a MB", "worst deviation")]
    for (operation, nodes), (model, off, _) in models.items():
        parts = (f"{1e6 * model.overhead:.0f}", f"{1e6 * model.alpha:.1f}", f"{1e12 * model.beta:.0f}")
        lines.append((f"ring {operation}", nodes, *parts, f"{off:.0%}"))
    return table(lines)


def model_rows(models: Fits) -> list[Row]:
    """Fitted to Gloo here, and to the published latencies."""
    named = [(f"ring {operation}", f"measured, {nodes} nodes", *found) for (operation, nodes), found in models.items()]
    named.append(("NCCL tree all_reduce", "published", *projection.published_model()))
    return [
        {
            "model": name,
            "fitted_to": source,
            "overhead_microseconds": round(1e6 * model.overhead, 2),
            "alpha_microseconds": round(1e6 * model.alpha, 3),
            "beta_microseconds_per_megabyte": round(1e12 * model.beta, 2),
            "worst_deviation": round(off, 3),
            "points": count,
        }
        for name, source, model, off, count in named
    ]


def _point(kind: str, machine: str, operation: str, ranks: int, size: int, seconds: Sequence[float], note: str) -> Row:
    low, middle, high = (round(1e6 * value, 2) for value in seconds)
    of = {"kind": kind, "machine": machine, "operation": operation, "ranks": ranks, "bytes": size}
    return of | {"microseconds": middle, "microseconds_lower": low, "microseconds_upper": high, "note": note}


def points(measured: Sequence[Row], options: argparse.Namespace) -> Iterator[Row]:
    """What was measured at the projected number of channels, or the next, and what was published."""
    channels = min(options.channels, key=lambda count: abs(count - CHANNELS))
    for row in measured:
        if row["channels"] == channels and row["nodes"] == 1 and row["world_size"] > 1:
            times = [row[f"microseconds_{part}"] / 1e6 for part in ("lower_quartile", "median", "upper_quartile")]
            machine, note = f"{row['backend']} here", f"{row['cores']} cores"
            yield _point("measured", machine, row["operation"], row["world_size"], row["bytes"], times, note)
    for one in published.ALL_REDUCE:
        yield _point("published", "NCCL", "all_reduce", one.ranks, 0, (one.lower, one.seconds, one.upper), one.hardware)


def curves(machines: Mapping[str, Mapping[str, Latency]], options: argparse.Namespace) -> Iterator[Row]:
    """Modelled latencies of a forward message, to 16 384 ranks."""
    size = 8 * (2 * CHANNELS + 1)
    for machine, operations in machines.items():
        note = f"{options.node_size} ranks a node"
        note += f", {options.bandwidth:g} GB/s assumed" if machine == "NCCL" else ", a core for each assumed"
        for operation, latency in operations.items():
            for ranks in projection.RANKS:
                yield _point("modelled", machine, operation, ranks, size, (latency(ranks, size),) * 3, note)


def efficiencies(operations: Mapping[str, Latency], options: argparse.Namespace) -> list[Row]:
    """Weak and strong scaling of a ResNet-50 step, modelled."""
    per_image, floor = 1e-6 * options.image_microseconds, 1e-3 * options.floor_milliseconds
    assumed = Assumed(options.images, options.global_batch, per_image, floor)
    found = []
    for name, scheme in projection.schemes(operations).items():
        for kind in ("weak", "strong"):
            for ranks in (1, *projection.RANKS):
                step, part = projection.efficiency(kind, scheme, ranks, assumed)
                found.append(
                    {
                        "kind": "modelled",
                        "scaling": kind,
                        "scheme": name,
                        "ranks": ranks,
                        "step_milliseconds": round(1e3 * step, 3),
                        "efficiency": round(part, 4),
                        "node_size": options.node_size,
                        "images_per_rank": options.images if kind == "weak" else options.global_batch / ranks,
                        "image_microseconds": options.image_microseconds,
                        "floor_milliseconds": options.floor_milliseconds,
                        "bandwidth_gb_per_second": options.bandwidth,
                    }
                )
    return found


def shown_efficiency(found: Sequence[Row]) -> str:
    """At some numbers of ranks."""
    some = (8, 64, 512, 4096, 16384)
    lines: list[Sequence[object]] = [("modelled ResNet-50 step", "scaling", *(f"{ranks} ranks" for ranks in some))]
    for scheme, kind in dict.fromkeys((row["scheme"], row["scaling"]) for row in found):
        of = {row["ranks"]: row["efficiency"] for row in found if (row["scheme"], row["scaling"]) == (scheme, kind)}
        lines.append((scheme, kind, *(f"{of[ranks]:.0%}" for ranks in some)))
    return table(lines)
