"""Make a segmenter elastic: a class for each pixel."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic import Growth, Plateau
from elastic.callbacks import GrowOnSaturation, PruneByGates

x = torch.randn(64, 3, 16, 16)


class Segmenter(L.LightningModule):
    def __init__(self):
        super().__init__()
        down = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*down, nn.Upsample(scale_factor=2), nn.Conv2d(16, 2, 3, padding=1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=32)

if __name__ == "__main__":
    growth = GrowOnSaturation(Plateau(patience=2, mode="min"), Growth(factor=1.5), monitor="val/loss")
    L.Trainer(max_epochs=10, callbacks=[growth, PruneByGates(budget=1000)]).fit(Segmenter(), data, data)
