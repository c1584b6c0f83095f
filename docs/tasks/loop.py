"""Grow and prune a network with its optimizer in a plain torch loop."""

import torch
import torch.nn.functional as F

from elastic import census, discover, grow_index, reindex
from elastic.levels import score_channels
from elastic.models import resnet20

x, y = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
net = resnet20(width=4)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)

widths = discover(net, x)
for epoch in range(3):
    if epoch == 1:  # grow: half as many channels again
        changes = {name: grow_index(width.size, by=width.size // 2) for name, width in widths.items()}
        reindex(net, widths, changes, optimizers=[optimizer])
    if epoch == 2:  # prune: keep the better half
        scores = score_channels(net, widths)
        changes = {name: s.topk(len(s) // 2).indices.sort().values for name, s in scores.items()}
        reindex(net, widths, changes, optimizers=[optimizer])
    loss = F.cross_entropy(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    del loss  # a graph that is alive expects the network as it is
    print(epoch, census(net, widths, x).params_dense)
