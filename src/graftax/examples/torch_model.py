"""The digits network in torch. Imported by `graftax.examples.digits_torch`, which needs torch."""

from __future__ import annotations

import torch
from torch import nn


class Digits(nn.Module):
    """A small convolutional classifier of 8x8 grey images: (N, 1, 8, 8) -> logits (N, 10).

    No two axes of a weight have the same size, so a wrong layout fails a shape check. The flatten before `fc1` is the
    one exception: a (C, H, W) = (20, 2, 3) map becomes 120 columns in that order, and no shape shows it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, kernel_size=(5, 3), padding=(2, 1))
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 20, kernel_size=(3, 2), stride=(2, 1), padding=(1, 0))
        self.bn2 = nn.BatchNorm2d(20)
        self.fc1 = nn.Linear(20 * 2 * 3, 48)
        self.fc2 = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.bn1(self.conv1(x)))
        x = nn.functional.max_pool2d(x, 2)
        x = nn.functional.relu(self.bn2(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = nn.functional.relu(self.fc1(x))
        return self.fc2(x)
