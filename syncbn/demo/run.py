"""`python -m syncbn demo`: options, the three runs, and the exit status.

Requirements
    - (a) one process, whole batch, torch's nn.BatchNorm; (b) N processes, local batch norm; (c) N processes, syncbn: the same
      network, images and order of them, started by torch's launcher on Gloo;
    - the demo checks its own claim: over the first steps (c) has the loss of (a) and (b) has not; the exit status says so;
    - what is wrong with the options or the installation is said before anything starts; an interrupt leaves no process behind.
"""

import argparse
import importlib.util
import signal
import sys
import tempfile
from pathlib import Path

from ..options import Defaults, file_problem, whole
from .launch import LaunchError, launch, torchrun

IMAGES = 1797  # of scikit-learn's digits
HELD_OUT = 360
NEEDED = {"numpy": "numpy", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `demo` and its options to the command line."""
    parser = commands.add_parser(
        "demo",
        help="train one network on one process and on several, with and without syncbn, and compare",
        description="Train a small residual network on handwritten digits (a) in one process, (b) in several with local batch "
        "norm, (c) in several with syncbn; show how far (b) and (c) are from (a), step by step. Exit status: 0 if (c) has the "
        "loss of (a) and (b) has not, 1 if not, 2 for a usage error, 130 if interrupted.",
        formatter_class=Defaults,
    )
    parser.add_argument("--world-size", type=whole(1), default=4, metavar="N", help="processes of (b) and (c)")
    parser.add_argument("--batch-size", type=whole(1), default=4, metavar="N", help="images per process and step")
    parser.add_argument(
        "--steps",
        type=whole(1),
        default=60,
        metavar="N",
        help="training steps, each of which takes 1 MB of temporary disk space",
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of initial network, split and order of images")
    parser.add_argument("--out", type=_writable, default=Path("syncbn-demo.png"), metavar="PNG", help="the picture to write")
    parser.set_defaults(run=lambda options: run(options, parser))


def _writable(text: str) -> Path:
    """The type of an option that names a file to write."""
    path = Path(text)
    try:
        if path.exists():
            path.open("r+b").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"given {text!r}; expected a file that can be written, in a directory that exists: {error.strerror}"
        ) from None
    return path


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the demo by its options; the exit status."""
    batch, images = options.world_size * options.batch_size, IMAGES - HELD_OUT
    if batch > images:
        parser.error(
            f"given {options.world_size} processes of {options.batch_size} images, {batch} in a global batch; "
            f"expected at most the {images} images of the training set"
        )
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        say(f'{", ".join(missing)} not installed; expected what the demo needs: pip install "syncbn[demo]"')
        return 1
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _demo(options)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # below the progress bar
        say("interrupted")
        return 130
    except LaunchError as error:
        say(str(error))
        return 1
    except BrokenPipeError:
        raise
    except OSError as error:
        say(file_problem(error))
        return 1
    finally:
        signal.signal(signal.SIGTERM, terminate)


def say(message: str) -> None:
    """One line on standard error."""
    print(f"syncbn demo: {message}", file=sys.stderr, flush=True)


def _demo(options: argparse.Namespace) -> int:
    """Train, compare, report; the exit status."""
    from . import compare, report

    batch = options.world_size * options.batch_size
    with tempfile.TemporaryDirectory(prefix="syncbn-demo-") as name:
        directory = Path(name)
        write_data(directory / "data.npz", options.seed)
        say(f"(a) world size 1, batch size {batch}, torch's nn.BatchNorm2d")
        train(["whole"], 1, directory, options)
        setting = f"world size {options.world_size}, batch size {options.batch_size} per process"
        say(f"(b) {setting}, torch's nn.BatchNorm2d; then (c), the same with syncbn")
        train(["local", "syncbn"], options.world_size, directory, options)
        whole, local, syncbn = (
            compare.read(directory / mode, size, batch)
            for mode, size in {"whole": 1, "local": options.world_size, "syncbn": options.world_size}.items()
        )
        assert not whole.imported_syncbn, "(a) is torch alone"
        assert syncbn.imported_syncbn
        apart = compare.differences(local, whole), compare.differences(syncbn, whole)
        result = report.Result(whole, local, syncbn, *apart, options.world_size)
    verdict = compare.judge(*apart) if options.world_size > 1 else None
    print(report.tables(result, HELD_OUT))
    print(report.judgement(verdict))
    report.draw(options.out, f"{setting}, {batch} in all, seed {options.seed}".capitalize(), result)
    print(f"picture: {options.out}")
    return 0 if verdict is None or verdict.passed else 1


def write_data(path: Path, seed: int) -> None:
    """Write the digits, split by the seed, as train.py reads them."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(IMAGES)
    x = (digits.images[order, None] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int64)
    held_out = {"held_out": x[:HELD_OUT], "held_out_labels": labels[:HELD_OUT]}
    np.savez(path, x=x[HELD_OUT:], labels=labels[HELD_OUT:], **held_out)


def train(modes: list[str], size: int, directory: Path, options: argparse.Namespace) -> None:
    """Run train.py in `size` processes, in one mode after the other; each leaves its record below `directory`."""
    for mode in modes:
        (directory / mode).mkdir()
    batch = options.world_size * options.batch_size
    numbers = [f"--global-batch={batch}", f"--steps={options.steps}", f"--seed={options.seed}"]
    arguments = ["--modes", *modes, f"--directory={directory}", *numbers]
    command = torchrun(size, directory / "logs", Path(__file__).with_name("train.py"), arguments)
    launch(command, "mode " + " and ".join(modes))
