"""Make a classifier of several labels an image elastic: each label is there or not."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic import Growth, Plateau
from elastic.callbacks import GrowOnSaturation, PruneByGates

x = torch.randn(64, 3, 16, 16)


class Tagger(L.LightningModule):
    def __init__(self):
        super().__init__()
        convolutions = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        self.net = nn.Sequential(
            *convolutions, nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 3)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


data = DataLoader(TensorDataset(x, (x.mean((2, 3)) > 0).float()), batch_size=32)

if __name__ == "__main__":
    growth = GrowOnSaturation(Plateau(patience=2, mode="min"), Growth(factor=1.5), monitor="val/loss")
    L.Trainer(max_epochs=10, callbacks=[growth, PruneByGates(budget=1500)]).fit(Tagger(), data, data)
