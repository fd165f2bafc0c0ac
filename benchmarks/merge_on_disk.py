"""Peak memory of `merge_on_disk`, on a random checkpoint in six shards, against the largest shard and the whole.

    python -m benchmarks.merge_on_disk [--gigabytes 1.5] [--kind llama|mixtral] [--dtype bfloat16|float32] [--lm_head]

Each merge runs in a process of its own; its peak is `VmHWM` less what it was after the merge of a toy, which loads all
code that a merge needs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

CHILD = """
import sys, time
import torch, transformers
from pathlib import Path
from lora_lightning.export.merge_on_disk import merge_on_disk
transformers.LlamaForCausalLM, transformers.MixtralForCausalLM
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
torch.set_num_threads(1)
merge_on_disk(*sys.argv[5:8])
before, start = peak(), time.perf_counter()
report = merge_on_disk(*sys.argv[1:4], dtype=sys.argv[4])
print(peak() - before, time.perf_counter() - start, report.changed, report.copied)
"""


def shape_of(kind, gigabytes, width, vocabulary, dtype):
    """A config of about that size, and the shape of every tensor in the layout of the hub."""
    import transformers

    sizes = {"hidden_size": width, "intermediate_size": width * 11 // 4, "vocab_size": vocabulary}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    cls, config_cls = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
        "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig),
    }[kind]
    layers, per_layer = 1, 1.0
    more = {"num_local_experts": 8} if kind == "mixtral" else {}
    for layers_tried in (1, 2):  # what one layer adds
        config = config_cls(**sizes, **heads, **more, num_hidden_layers=layers_tried, tie_word_embeddings=False)
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(config).parameters())
        per_layer, first = (count - per_layer, per_layer) if layers_tried == 2 else (float(count), 0.0)
    layers = max(1, round((gigabytes * 1e9 / dtype.itemsize - first + per_layer) / per_layer))
    config.num_hidden_layers, config.architectures, config.dtype = layers, [cls.__name__], dtype
    if config.to_dict().get("layer_types"):
        config.layer_types = None
    with torch.device("meta"):
        model = cls(config)
    return config, model


def stored(model):
    """Keys and shapes as the hub has them: experts one by one."""
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.replace("mlp.experts.gate_up_proj", "block_sparse_moe.experts")
            for e in range(len(tensor)):
                yield f"{stem}.{e}.w1.weight", (tensor.shape[1] // 2, tensor.shape[2])
                yield f"{stem}.{e}.w3.weight", (tensor.shape[1] // 2, tensor.shape[2])
        elif name.endswith("experts.down_proj"):
            stem = name.replace("mlp.experts.down_proj", "block_sparse_moe.experts")
            for e in range(len(tensor)):
                yield f"{stem}.{e}.w2.weight", tuple(tensor.shape[1:])
        else:
            yield name.replace("mlp.gate.", "block_sparse_moe.gate."), tuple(tensor.shape)


def make_base(folder, config, model, dtype, shards=6):
    """Random weights in about equal shards, written one at a time; returns the largest shard's bytes and the whole."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    entries = list(stored(model))
    whole = sum(torch.Size(shape).numel() for _, shape in entries) * dtype.itemsize
    weight_map, sizes, file, size = {}, [], 1, 0
    tensors = {}

    def flush():
        save_file(tensors, folder / f"model-{file:05d}-of-{shards:05d}.safetensors", metadata={"format": "pt"})
        sizes.append(size)

    generator = torch.Generator().manual_seed(0)
    for key, shape in entries:
        if size >= whole / shards and file < shards:
            flush()
            tensors, size, file = {}, 0, file + 1
        tensors[key] = torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator)
        size += tensors[key].nbytes
        weight_map[key] = f"model-{file:05d}-of-{shards:05d}.safetensors"
    flush()
    index = {"metadata": {"total_size": whole}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(sizes), whole


def make_adapter(folder, model, r=16, lm_head=False):
    """A PEFT directory with A and B for every linear layer, and for the stacks of experts."""
    folder.mkdir(parents=True)
    tensors, prefix = {}, "base_model.model."
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and (lm_head or n != "lm_head")]
    for name in names:
        weight = model.get_submodule(name).weight
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(r, weight.shape[1]) * 0.02
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(weight.shape[0], r) * 0.02
    stacks = [n for n, _ in model.named_parameters() if re.search(r"experts\.(gate_up|down)_proj$", n)]
    for name in stacks:
        e, rows, columns = model.get_parameter(name).shape
        stem = name.rpartition(".")[0] + (".base_layer" if name.endswith("gate_up_proj") else "")
        tensors[f"{prefix}{stem}.lora_A.weight"] = torch.randn(r * e, columns) * 0.02
        tensors[f"{prefix}{stem}.lora_B.weight"] = torch.randn(rows, r * e) * 0.02
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "task_type": "CAUSAL_LM"}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in names})
    if stacks:
        config["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def measure(kind, base, adapter, output, dtype="auto"):
    """Peak bytes over the baseline, seconds, tensors changed and copied, of one merge in its own process."""
    toy = output.parent / "toy"
    config, model = shape_of(kind, 0.0, 128, 100, torch.float32)
    make_base(toy / "base", config, model, torch.float32, shards=2)
    make_adapter(toy / "adapter", model, r=2, lm_head=True)
    toys = [str(toy / name) for name in ("base", "adapter", "out")]
    command = [sys.executable, "-c", CHILD, str(base), str(adapter), str(output), dtype, *toys]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, seconds, changed, copied = done.stdout.split()[-4:]
    return int(peak), float(seconds), int(changed), int(copied)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--kind", choices=("llama", "mixtral"), default="llama")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--lm_head", action="store_true", help="adapt the output layer too")
    parser.add_argument("--folder", help="where to put the files; a temporary folder by default")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        config, model = shape_of(args.kind, args.gigabytes, args.width, args.vocabulary, dtype)
        start = time.perf_counter()
        largest, whole = make_base(folder / "base", config, model, dtype)
        make_adapter(folder / "adapter", model, lm_head=args.lm_head)
        print(f"made {whole / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s", flush=True)
        tensor = max(t.numel() for t in model.state_dict().values()) * dtype.itemsize
        peak, seconds, changed, copied = measure(args.kind, folder / "base", folder / "adapter", folder / "out")
    print(
        f"{args.kind} {args.dtype}: whole {whole / 1e6:.0f} MB, largest shard {largest / 1e6:.0f} MB, largest tensor"
        f" {tensor / 1e6:.0f} MB; {changed} tensors changed, {copied} copied, {seconds:.1f} s\n"
        f"peak {peak / 1e6:.0f} MB = {peak / largest:.2f} x the largest shard = {peak / whole:.2f} x the whole"
    )


if __name__ == "__main__":
    main()
