"""The training of launch/train.py by Lightning, which starts the processes: python launch/lightning_train.py [--processes 2]"""

import data
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from train import arguments, network

from syncbn.lightning import SyncBatchNormPlugin


class Training(pl.LightningModule):
    def __init__(self, options, images: data.Images):
        super().__init__()
        torch.manual_seed(options.seed)
        self.options, self.images, self.network = options, images, network(images.shape[0], images.classes)

    def train_dataloader(self):
        order = data.shuffled(data.split(len(self.images), (given := self.options).seed)[0], given.seed, self.current_epoch)
        return data.Batches(self.images, order, given.batch_size, self.global_rank, self.trainer.world_size, 0, given.workers)

    def training_step(self, batch, number):
        x, labels, samples = batch  # this rank's share, and the samples of all ranks: see loop.py
        return F.cross_entropy(self.network(x.to(self.dtype)), labels, reduction="sum") * self.trainer.world_size / samples

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.options.learning_rate, momentum=0.9)


if __name__ == "__main__":
    options = arguments(for_lightning=True).parse_args()
    file = options.checkpoint and options.checkpoint.with_suffix(".ckpt").absolute()
    settings = {"devices": options.processes, "accelerator": "gpu" if torch.cuda.is_available() else "cpu", "strategy": "ddp"}
    settings |= {"sync_batchnorm": options.bn == "torch", "plugins": [SyncBatchNormPlugin()] if options.bn == "syncbn" else []}
    settings["callbacks"] = [ModelCheckpoint(file.parent, file.stem, enable_version_counter=False)] if file else []
    settings |= {"max_epochs": options.epochs, "max_steps": options.steps or -1, "reload_dataloaders_every_n_epochs": 1}
    model = Training(options, data.open(options.data, options.image_size)).to(getattr(torch, options.dtype))
    trainer = pl.Trainer(**settings, enable_checkpointing=file is not None, logger=False)
    trainer.fit(model, ckpt_path=file if file and file.exists() else None)
