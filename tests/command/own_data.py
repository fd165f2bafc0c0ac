"""Datasets and networks of a user's own, importable by a config."""

import torch
from torch import nn
from torch.utils.data import Dataset


class Pictures(Dataset):
    def __init__(self, count: int = 16) -> None:
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        draw = torch.Generator().manual_seed(row)
        return {"pixel_values": torch.randn(3, 4, 4, generator=draw) + row % 4, "labels": torch.tensor(row % 4)}


class Net(nn.Sequential):
    def __init__(self, outputs: int = 4) -> None:
        super().__init__(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, outputs))

    def forward(self, pixel_values):
        return super().forward(pixel_values)


class Asking(nn.Module):
    """Its step depends on numbers, and its config is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.classifier, self.config = nn.Linear(8, 8), nn.Linear(8, 2), {"width": 8}

    def forward(self, input_ids, attention_mask):
        out = self.query(torch.ones(len(input_ids), 8))
        return self.classifier(out if out.sum() > 0 else -out)
