"""Make a classifier elastic: the usual program of Lightning's, and two lines."""

import lightning as L
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from elastic import Growth, Plateau
from elastic.callbacks import GrowOnSaturation, PruneByGates
from elastic.models import resnet20


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = resnet20(width=4, in_channels=1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/acc", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def make_loader(part=slice(0, 512)):
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16).float().view(-1, 1, 8, 8), torch.tensor(labels)
    return DataLoader(TensorDataset(x[part], y[part]), batch_size=64)


if __name__ == "__main__":
    growth = GrowOnSaturation(Plateau(patience=2), Growth(factor=1.5, ceiling=2))
    trainer = L.Trainer(max_epochs=10, callbacks=[growth, PruneByGates(budget=20_000)])
    trainer.fit(Classifier(), make_loader(), make_loader(slice(512, 768)))
