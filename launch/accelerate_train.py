"""The training of launch/train.py by Hugging Face accelerate: launch/accelerate.sh, or any launcher of torch's."""

import datetime
import sys

import data
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from checkpoint import Checkpoint, CheckpointError
from loop import Job, Place, fit, report
from train import arguments, build, settings


def train(accelerator: Accelerator, options) -> str | int | None:
    """What is made here goes before the process group: a DistributedDataParallel that outlives it may end in a deadlock."""
    place = Place(accelerator.process_index, accelerator.num_processes, accelerator.device)
    images = data.open(options.data, options.image_size)
    network, optimizer = build(options, images, place.device)  # syncbn.convert comes before prepare
    model, optimizer = accelerator.prepare(network, optimizer)
    checkpoint = Checkpoint(options.checkpoint, settings(options, images), network, optimizer, place.rank)
    try:
        fit(job := Job(options, images, model, optimizer, checkpoint, place, accelerator.backward))
        report(job)
    except CheckpointError as error:
        return f"accelerate_train.py: {error}" if place.rank == 0 else 1


def main() -> None:
    options = arguments().parse_args()
    waiting = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=options.timeout))
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[waiting])  # else, no GPU: each trains alone
    problem = train(accelerator, options)
    accelerator.free_memory()
    accelerator.end_training()
    if problem:
        sys.exit(problem)


if __name__ == "__main__":
    main()
