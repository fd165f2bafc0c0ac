"""A small model with every kind of linear that the options meet, and what the laws need to be asked of it."""

import torch
from torch import nn

from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import SavedCopy

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Law 6, by dtype; bfloat16 keeps 8 bits of the merged weight, and the tests' updates are as large as W0.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Net(nn.Module):
    """Linears with and without a bias, a norm with one, a head; wider than tall and taller than wide."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.down = nn.Linear(20, 10, bias=False)
        self.square = nn.Linear(10, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x = torch.tanh(self.up(x))
        x = self.down(self.norm(x))
        return self.head(torch.tanh(self.square(x)))


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Net().to(dtype).eval()


def inputs(dtype=torch.float32, seed=1, rows=7):
    return torch.randn(2, rows, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def shake(model, seed=2, size=0.1):
    """Move everything that trains, as training would: magnitudes and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(size * noise.to(parameter.dtype))
    return model


def trained_tensors(model):
    """The adapter's own parameters by name, less buffers."""
    ours = {f"{name}.{own}" for name, module in grafted_modules(model) for own in module.lora_tensors()}
    ours |= {
        f"{name}.lora_copy.{p}"
        for name, m in grafted_modules(model, SavedCopy)
        for p, _ in m.lora_copy.named_parameters()
    }
    return {name for name, p in model.named_parameters() if name in ours and p.requires_grad}


def assert_close(actual, expected, dtype):
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCE[dtype], float(error)


def batches(dtype=torch.float32, count=3):
    return [inputs(dtype, seed=100 + i) for i in range(count)]


def square_loss(model, batch):
    return model(batch).double().square().mean()
