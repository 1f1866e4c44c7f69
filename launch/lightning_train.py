"""The training of launch/train.py by Lightning, which starts the processes: python launch/lightning_train.py [--processes 2]"""

import datetime

import data
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning_module import Training, file_of
from train import arguments, gpus_and_processes, unfit

from syncbn.lightning import SyncBatchNormPlugin

if __name__ == "__main__":
    options, (gpus, _) = (parser := arguments(for_lightning=True)).parse_args(), gpus_and_processes()
    problem = unfit(options.bn, gpus, options.processes)
    if problem:
        parser.error(f"argument --bn: {problem}")
    model = Training(options, data.open(options.data, options.image_size)).to(getattr(torch, options.dtype))
    file = file_of(options, model.settings)
    strategy = DDPStrategy(timeout=datetime.timedelta(seconds=options.timeout))
    settings = {
        "devices": options.processes,
        "accelerator": "gpu" if gpus >= options.processes else "cpu",
        "strategy": strategy,
    }
    settings |= {"sync_batchnorm": options.bn == "torch", "plugins": [SyncBatchNormPlugin()] if options.bn == "syncbn" else []}
    settings["callbacks"] = [ModelCheckpoint(file.parent, file.stem, enable_version_counter=False)] if file else []
    # The end is given in steps alone: of a run that goes on, Lightning counts the epoch in which it was ended twice.
    settings |= {"max_steps": model.last, "reload_dataloaders_every_n_epochs": 1}
    trainer = pl.Trainer(**settings, enable_checkpointing=file is not None, logger=False)
    trainer.fit(model, ckpt_path=file if file and file.exists() else None)
