"""A backbone is called what its author called it, whatever was put over its class."""

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lora_lightning.reports.console import backbone_name


class Net(nn.Module):
    """A class of the user's."""


def test_a_sharded_backbone_keeps_its_name():
    model = Net()
    model.__class__ = type("FSDPNet", (FSDPModule, Net), {})  # as `fully_shard` does it
    assert backbone_name(model) == backbone_name(Net()) == "Net"
