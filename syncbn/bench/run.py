"""`python -m syncbn bench`: options, which benchmark runs, and the exit status.

Requirements: help needs nothing but torch; nothing is reported where a result is wrong; rows say how they were made.
"""

import argparse
import importlib
import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any

from ..options import Defaults, file_problem, positive, whole

LAYOUTS = ("contiguous", "channels_last", "rows", "contiguous 3d", "channels_last 3d")
Subcommands = Any  # argparse's, which cannot be subscripted when the program runs
NEEDED = {"plot": ("matplotlib",)}  # others: tqdm
DTYPES = ("float32", "bfloat16", "float16")
VARIANTS = (
    *("torch", "torch-inductor", "torch-sync", "torch-sync-unmasked"),
    *("plain", "plain-inductor", "syncbn", "syncbn-host", "syncbn-aten", "syncbn-inductor"),
)


class UsageError(ValueError):
    """Options that each can be, but not together."""


def add_command(commands: Subcommands) -> None:
    """Add `bench` and its commands to the command line."""
    parser = commands.add_parser(
        "bench",
        help="measure the layer, a training step, scaling and accuracy beside peers, and draw what was measured",
        description="Measure in interleaved runs, print medians and ratios, and append rows to CSV files with the hardware, "
        "versions, commit and command. Exit status: 0; 1 if a result is wrong, which is then not reported, or --check found a "
        "ratio that grew; 2 for a usage error, or nothing to check against; 130 if interrupted.",
    )
    kinds = parser.add_subparsers(title="benchmarks", metavar="<benchmark>", required=True)
    for add in (_layer, _fused, _accuracy, _step, _resnet50, _merge, _scaling, _plot):
        made: argparse.ArgumentParser = add(kinds)
        made.add_argument("--results", type=Path, metavar="DIR", help=RESULTS)


RESULTS = "where rows are; without it benchmarks/results of the checkout one stands in, else ./syncbn-bench"


def _parser(kinds: Subcommands, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text, formatter_class=Defaults)
    parser.set_defaults(run=lambda options: run(name, options))
    return parser


def _device(parser: argparse.ArgumentParser, default: str = "cpu") -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="where it runs")


def _repeats(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--repeats", type=whole(2), default=default, metavar="N", help="of each variant")


def _cases(parser: argparse.ArgumentParser) -> None:
    """Options of which shapes, dtypes and threads."""
    parser.add_argument(
        "--threads", type=whole(1, 1024), nargs="+", default=sorted({1, os.cpu_count() or 1}), metavar="N", help="CPU"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="of the input; default: all, on a GPU the first two")
    parser.add_argument("--shapes", nargs="+", metavar="NxCx...", help="these alone, as rows name them; default: all")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="these alone; default: all")
    parser.add_argument("--quick", action="store_true", help="three shapes")
    _device(parser)
    _repeats(parser, 15)


def _layer(kinds: Subcommands) -> argparse.ArgumentParser:
    parser = _parser(kinds, "layer", "forward and backward of one layer on one process, over torch's local batch norm")
    _cases(parser)
    choices = (*VARIANTS, "memory")  # the last: as many passes over it, with next to nothing computed
    parser.add_argument("--variants", nargs="+", choices=choices, help="beside torch's own; default: all that fit the device")
    parser.add_argument("--check", action="store_true", help="append nothing; compare with the rows of this hardware and torch")
    return parser


def _fused(kinds: Subcommands) -> argparse.ArgumentParser:
    parser = _parser(kinds, "fused", "batch norm with addition and ReLU as one layer, over separate modules")
    _cases(parser)
    return parser


def _accuracy(kinds: Subcommands) -> argparse.ArgumentParser:
    parser = _parser(kinds, "accuracy", "error of every output against float64, by mean/std of the channels")
    default = ["torch", "plain", "syncbn", "syncbn-aten"]
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=default, help="beside torch's own")
    for name, value in (("images", 8), ("channels", 16), ("size", 56)):
        parser.add_argument(f"--{name}", type=whole(1), default=value, metavar="N", help="of the input")
    _device(parser)
    return parser


def _step(kinds: Subcommands) -> argparse.ArgumentParser:
    parser = _parser(kinds, "step", "a data-parallel training step of a ResNet-18, over the same with local batch norm")
    parser.add_argument("--ranks", type=whole(1), nargs="+", default=[1, 2, 4], metavar="N", help="processes")
    parser.add_argument("--images", type=whole(1), default=16, metavar="N", help="of 64×64, on each rank")
    parser.add_argument("--width", type=whole(1), default=64, metavar="N", help="channels of the first stage")
    parser.add_argument("--timeout", type=positive, default=1800.0, metavar="S", help="seconds for each number of ranks")
    _device(parser)
    _repeats(parser, 20)
    return parser


def _resnet50(kinds: Subcommands) -> argparse.ArgumentParser:
    parser = _parser(kinds, "resnet50", "a training step of a ResNet-50 on one GPU, uncommunicated, over local batch norm")
    parser.add_argument("--images", type=whole(1), nargs="+", default=[8, 32], metavar="N", help="of a step")
    parser.add_argument("--width", type=whole(1), default=64, metavar="N", help="channels of the first stage")
    parser.add_argument("--size", type=whole(32), default=224, metavar="N", help="pixels of a side")
    _device(parser, "cuda")
    _repeats(parser, 20)
    return parser


def _merge(kinds: Subcommands) -> argparse.ArgumentParser:
    parser = _parser(kinds, "merge", "the merge of W ranks' statistics in torch.nn.SyncBatchNorm, beside ours of one message")
    parser.add_argument("--ranks", type=whole(1), nargs="+", default=[8 << n for n in range(10)], metavar="W", help="modelled")
    parser.add_argument("--channels", type=whole(1), nargs="+", default=[64, 512, 2048], metavar="C", help="of the layer")
    _device(parser, "cuda")
    _repeats(parser, 50)
    return parser


def _scaling(kinds: Subcommands) -> argparse.ArgumentParser:
    parser = _parser(kinds, "scaling", "latency of the collectives here, a model of it, and its projection to many ranks")
    parser.add_argument("--ranks", type=whole(1), nargs="+", default=list(range(1, 9)), metavar="N", help="processes measured")
    parser.add_argument("--channels", type=whole(1), nargs="+", default=[64, 512, 2048, 16384], metavar="C", help="of messages")
    parser.add_argument("--nodes", choices=("auto", "one"), default="auto", help="auto: in two network namespaces too, as root")
    parser.add_argument("--node-size", type=whole(1), default=8, metavar="N", help="GPUs of a modelled node")
    parser.add_argument("--bandwidth", type=positive, default=25.0, metavar="GB/S", help="assumed, of a GPU's network")
    parser.add_argument("--images", type=whole(1), default=32, metavar="N", help="on each rank, weak scaling")
    parser.add_argument("--global-batch", type=whole(1), default=32768, metavar="N", help="images, strong scaling")
    parser.add_argument("--image-microseconds", type=positive, default=400.0, metavar="T", help="assumed, of one image's step")
    parser.add_argument("--floor-milliseconds", type=positive, default=8.0, metavar="T", help="assumed: no step is shorter")
    parser.add_argument("--modelled", action="store_true", help="measure nothing; append the modelled efficiencies alone")
    parser.add_argument("--timeout", type=positive, default=600.0, metavar="S", help="seconds for each number of ranks")
    _device(parser)
    _repeats(parser, 100)
    return parser


def _plot(kinds: Subcommands) -> argparse.ArgumentParser:
    parser = _parser(
        kinds, "plot", "draw layer.png, scaling.png, layer_cuda.png and merge.png beside the rows, from the rows alone"
    )
    parser.add_argument("--hardware", metavar="TEXT", help="of the rows to draw; default: that of the last row")
    return parser


def run(name: str, options: argparse.Namespace) -> int:
    """Run a benchmark; the exit status."""
    missing = [package for package in NEEDED.get(name, ("tqdm",)) if importlib.util.find_spec(package) is None]
    if missing:
        return say(f'{", ".join(missing)} not installed; expected what the benchmarks need: pip install "syncbn[bench]"')
    import torch

    if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        return say("given --device cuda, and there is no GPU; expected one")
    from .agreement import DisagreementError
    from .processes import ProcessError
    from .rows import RowError, prepare

    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if name != "plot" and not getattr(options, "check", False):
            prepare(options.results)
        status: int = importlib.import_module(f"syncbn.bench.{name}").run(options)
        return status
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except DisagreementError as error:
        return say(f"{error}; nothing is reported")
    except UsageError as error:
        say(str(error))
        return 2
    except (ProcessError, RowError) as error:
        return say(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:  # of a picture, or a folder of processes
        return say(file_problem(error))
    finally:
        signal.signal(signal.SIGTERM, terminate)


def say(message: str) -> int:
    """One line on standard error; the status of a failure."""
    print(f"syncbn bench: {message}", file=sys.stderr, flush=True)
    return 1
