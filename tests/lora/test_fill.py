"""W0 from its files: the shard of each process, no more memory than that, and modules of one's own."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lora_lightning.lora.config import LoRAConfig
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats import tensor_files
from lora_lightning.lora.meta.empty_model import fill_from_files, inject_anywhere, on_meta


class Net(nn.Module):
    """Odd sizes, a tie, batch statistics, a buffer that no file holds."""

    def __init__(self, scale=(1.5,)):
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6)) for _ in range(2))
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.tensor(scale))
        self.one = nn.Parameter(torch.ones(1, 6))
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("angles", torch.arange(6.0), persistent=False)

    def forward(self, ids):
        x = self.embed(ids) + self.angles * self.one
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x.flatten(0, 1)) * self.scale)


with_number = partial(Net, 1.5)  # which `fully_shard` does not take


def trained_net(make=Net):
    torch.manual_seed(5)
    net = make().eval()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor).abs() + 0.1)
    return net


def written(net, path):
    state = net.state_dict()
    del state["head.weight"]
    save_file(state, path)
    return path


@pytest.fixture
def file(tmp_path):
    return written(trained_net(), tmp_path / "net.safetensors")


def same(got, wanted):
    for kind in ("named_parameters", "named_buffers"):
        one, other = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (got, wanted))
        assert list(one) == list(other)
        assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("block", [1, 50, 2**25])
def test_a_module_of_ones_own_is_filled_from_its_file(tmp_path, monkeypatch, block):
    monkeypatch.setattr(tensor_files, "BLOCK", block)
    wanted = trained_net(with_number)
    got = on_meta(with_number, written(wanted, tmp_path / "own.safetensors"))
    assert all(p.is_meta for p in got.parameters())
    assert got.head.weight is got.embed.weight
    assert torch.equal(got.angles, torch.arange(6.0))
    assert torch.equal(got.norm.running_mean, wanted.norm.running_mean)
    read = []
    monkeypatch.setattr(tensor_files.Stored, "read_bytes", counting(read))
    assert fill_from_files(got) == 13
    assert max(read) <= max(block, 40), "no more than a block, or a row, is held beside the model"
    same(got, wanted)
    assert got.head.weight is got.embed.weight
    half = on_meta(lambda: Net().to(torch.bfloat16), written(trained_net(), tmp_path / "net.safetensors"))
    fill_from_files(half)
    same(half, trained_net().to(torch.bfloat16))  # a cast on the way is torch's own


MISFITS = {
    r"no 'extra.weight'": (lambda: nn.ModuleDict({"extra": nn.Linear(2, 2)}), "small.safetensors"),
    r"which the module has not": (lambda: nn.Linear(3, 3), "net.safetensors"),
    r"'weight' of shape \(2, 3\) instead of \(4, 3\)": (lambda: nn.Linear(3, 4), "small.safetensors"),
    r"safetensors files, got net\.bin": (Net, "net.bin"),
}


def test_a_file_that_does_not_fit_is_told(file, tmp_path):
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, tmp_path / "small.safetensors")
    torch.save({}, tmp_path / "net.bin")
    for match, (make, name) in MISFITS.items():
        with pytest.raises(LoRAError, match=match):
            on_meta(make, tmp_path / name)


@contextmanager
def rank_of(rank, size):
    """As if this were one process of several, none of which sends anything."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def by_fsdp(model, size, **options):
    # torch takes two equal meshes for one, though this process is now another of its ranks: so each has its name
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=(f"data{distributed.get_rank()}",))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh)


def by_columns(model, size):
    by_fsdp(model, size, shard_placement_fn=lambda p: Shard(1) if p.shape == (6, 10) else None)


CASES = [(by_fsdp, 2), (by_fsdp, 3), (by_columns, 2)]


@pytest.mark.parametrize(("shard", "size"), CASES, ids=lambda case: getattr(case, "__name__", str(case)))
def test_each_process_gets_its_shard_and_reads_no_other(file, monkeypatch, shard, size):
    lora = LoRAConfig(r=2, use_dora=True, exclude_modules=["embed"])
    for rank in range(size):
        with rank_of(rank, size):
            wanted, got = trained_net(), on_meta(Net, file)
            for model in (wanted, got):
                torch.manual_seed(6)
                inject_anywhere(model, lora)
                shard(model, size)
            read = []
            monkeypatch.setattr(tensor_files.Stored, "read_bytes", counting(read))
            fill_from_files(got)
            monkeypatch.undo()
            one, other = dict(got.named_parameters()), dict(wanted.named_parameters())
            assert list(one) == list(other)
            assert any(isinstance(p, DTensor) for p in one.values())
            for name, tensor in other.items():
                assert one[name].placements == tensor.placements
                assert torch.equal(one[name].to_local(), tensor.to_local()), (name, rank)
                assert one[name].requires_grad == tensor.requires_grad
            if shard is by_fsdp:
                held = sum(p.to_local().nbytes for n, p in one.items() if "lora" not in n)
                assert sum(read) == held


def counting(read):
    own = tensor_files.Stored.read_bytes

    def read_bytes(self, *place):
        read.append((found := own(self, *place)).nbytes)
        return found

    return read_bytes
