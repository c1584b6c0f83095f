"""Make the backbone of a detector elastic; its head, which finds an object a cell, stays."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic import Growth, Plateau
from elastic.callbacks import FollowNetwork, GrowOnSaturation, PruneByGates

x = torch.randn(64, 3, 16, 16)


class Detector(L.LightningModule):
    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, padding=1), nn.ReLU()]
        self.backbone = nn.Sequential(*layers, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(16, 5, 1)  # is there an object in the cell, and its box

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        x, there, boxes = batch
        out = self(x)
        return F.binary_cross_entropy_with_logits(out[:, 0], there) + F.smooth_l1_loss(out[:, 1:], boxes)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


data = DataLoader(TensorDataset(x, (x[:, 0, ::4, ::4] > 1).float(), torch.rand(64, 4, 4, 4)), batch_size=32)

if __name__ == "__main__":
    growth = GrowOnSaturation(Plateau(patience=2, mode="min"), Growth(factor=1.5), monitor="val/loss")
    L.Trainer(max_epochs=10, callbacks=[FollowNetwork("backbone"), growth, PruneByGates(budget=2500)]).fit(
        Detector(), data, data
    )
