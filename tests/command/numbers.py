"""A set of tensors for a config to name."""

import torch
from torch.utils.data import Dataset


class Sums(Dataset):
    """Four numbers and their sum, as (inputs, target)."""

    def __init__(self, count: int, seed: int = 0):
        self.x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.x[i].sum()
