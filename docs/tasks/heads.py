"""Make a network of several heads elastic: a class and a number, in a dictionary."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic import Growth, Plateau
from elastic.callbacks import GrowOnSaturation, PruneByGates

x = torch.randn(64, 3, 16, 16)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU())
        self.kind, self.value = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x):
        features = self.trunk(x).mean((2, 3))
        return {"kind": self.kind(features), "value": self.value(features)}


class Learner(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = TwoHeads()

    def training_step(self, batch, batch_idx):
        x, kind, value = batch
        outputs = self.net(x)
        return F.cross_entropy(outputs["kind"], kind) + F.mse_loss(outputs["value"], value)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


data = DataLoader(TensorDataset(x, x.mean((2, 3)).argmax(1), x.mean((1, 2, 3))[:, None]), batch_size=32)

if __name__ == "__main__":
    growth = GrowOnSaturation(Plateau(patience=2, mode="min"), Growth(factor=1.5), monitor="val/loss")
    L.Trainer(max_epochs=10, callbacks=[growth, PruneByGates(budget=1000)]).fit(Learner(), data, data)
