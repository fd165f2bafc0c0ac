"""Backbones for images by one line of YAML: timm's and torchvision's, with a new head where the data want one.

transformers' own are named by `lora_lightning.huggingface`, with `auto_class: AutoModelForImageClassification`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lora_lightning.backbones.locate import resolve
from lora_lightning.lora.errors import LoRAError, did_you_mean, first_line
from lora_lightning.lora.formats.tensor_files import read_pickled, read_tensors
from lora_lightning.lora.frozen.tensors import refuse_misfits
from lora_lightning.lora.meta.empty_model import builds_bare

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys under which training scripts of timm and torchvision store a state dict."""


def timm_model(
    model_name: str,
    pretrained: bool = True,
    num_classes: int | None = None,
    checkpoint_path: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """A model of timm, by `timm.create_model`.

    Args:
        model_name: such as `convnext_tiny.fb_in22k_ft_in1k`, or `hf-hub:NAME` for one on the hub.
        pretrained: load timm's weights, from the hub or its cache; not where `checkpoint_path` is given.
        num_classes: outputs of the head, which is new where the weights have another number; by default the
            number of the data's classes.
        checkpoint_path: weights in a file, safetensors or what `torch.save` wrote; `package:NAME/path` is a file
            inside an installed package.
        model_kwargs: more arguments for the model, such as `img_size` or `drop_path_rate`.

    Raises:
        LoRAError: timm is not installed, knows no such model, or the weights do not fit it.
    """
    timm = vision_package("timm", "timm_model")
    check_timm_name(model_name)
    kwargs = {**(model_kwargs or {}), **({} if num_classes is None else {"num_classes": num_classes})}
    if builds_bare():
        pretrained, checkpoint_path = False, None
    try:
        model: nn.Module = timm.create_model(model_name, pretrained=pretrained and checkpoint_path is None, **kwargs)
    except Exception as error:  # no weights, no network, arguments that the model does not take
        raise LoRAError(f"timm cannot make '{model_name}': {first_line(error)}") from error
    known: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}  # the weights' classes and their head
    named = known.get("classifier") or ()
    heads = {named} if isinstance(named, str) else {*named}
    new: list[str] = []
    if checkpoint_path is not None:
        new = _fill(model, Path(resolve(checkpoint_path)), heads)
    elif pretrained and num_classes is not None and num_classes != known.get("num_classes"):
        new = [key for key in model.state_dict() if key.rpartition(".")[0] in heads]
    model.new_keys = new  # type: ignore[assignment]  # as of `huggingface`: what has random values
    return model


def torchvision_model(
    model_name: str,
    weights: str | None = "DEFAULT",
    num_classes: int | None = None,
    checkpoint_path: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """A model of torchvision for classification or segmentation, by `torchvision.models.get_model`.

    Args:
        model_name: such as `resnet50`, `vit_b_16` or `deeplabv3_resnet50`.
        weights: such as `IMAGENET1K_V2`; `DEFAULT` are the newest; null builds the model with random ones.
        num_classes: outputs of the head, which is new where the weights have another number; by default the
            number of the data's classes.
        checkpoint_path: weights in a file in place of `weights`, safetensors or what `torch.save` wrote.
        model_kwargs: more arguments for the model.

    Raises:
        LoRAError: torchvision is not installed, knows no such model or weights, or the weights do not fit.
    """
    models = vision_package("torchvision.models", "torchvision_model")
    if model_name not in (known := models.list_models()):
        raise LoRAError(f"torchvision has no model '{model_name}'{did_you_mean(model_name, known)}")
    kwargs, chosen = dict(model_kwargs or {}), None
    if builds_bare():
        weights = checkpoint_path = None
    if weights is not None and checkpoint_path is None:
        members, name = models.get_model_weights(model_name).__members__, weights.rpartition(".")[2]
        if name not in members:
            raise LoRAError(
                f"torchvision has no weights '{weights}' of '{model_name}'{did_you_mean(name, members)}"
                f" (known: {', '.join(members) or 'none'})"
            )
        chosen = members[name]
    elif num_classes is not None:
        kwargs["num_classes"] = num_classes
    if model_name.startswith(("deeplab", "fcn", "lraspp")):
        kwargs.setdefault("weights_backbone", None)
    try:
        model: nn.Module = models.get_model(model_name, weights=chosen, **kwargs)
    except Exception as error:  # no network, a broken download, arguments that the model does not take
        raise LoRAError(f"torchvision cannot make '{model_name}': {first_line(error)}") from error
    new: list[str] = []
    if checkpoint_path is not None:
        new = _fill(model, Path(resolve(checkpoint_path)), None)
    elif chosen is not None and num_classes is not None:
        new = _resize_heads(model, num_classes, chosen)
    model.new_keys = new  # type: ignore[assignment]
    return model


def vision_package(name: str, user: str) -> Any:
    """Import timm or a part of torchvision; a LoRAError says what to install for its user."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise LoRAError(f"{user} needs {package}: pip install 'lora_lightning[vision]'") from error


def check_timm_name(name: str) -> None:
    """Raise where timm knows no such architecture or weights."""
    import timm

    if ":" in name or "/" in name:  # on the hub or in a directory: timm itself says what is wrong
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise LoRAError(f"timm has no model '{name}'{did_you_mean(architecture, timm.list_models())}")
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in known:
        raise LoRAError(f"timm has no weights '{tag}' of '{architecture}'{did_you_mean(tag, known)}")


def _resize_heads(model: nn.Module, num_classes: int, weights: Any) -> list[str]:
    """Replace each last layer, which has an output for each class of the weights, by a new one of the same kind.

    Returns:
        The new tensors' names.
    """
    old, new = len(weights.meta["categories"]), list[str]()
    for name, layer in list(model.named_modules()) if old != num_classes else ():
        head: nn.Module | None = None
        bias = getattr(layer, "bias", None) is not None
        if isinstance(layer, nn.Linear) and layer.out_features == old:
            head = nn.Linear(layer.in_features, num_classes, bias)
        elif isinstance(layer, nn.Conv2d) and layer.out_channels == old and layer.kernel_size == (1, 1):
            head = nn.Conv2d(layer.in_channels, num_classes, 1, bias=bias)
        if head is not None:
            model.set_submodule(name, head)
            new += [f"{name}.{key}" for key in head.state_dict()]
    if not new and old != num_classes:
        raise LoRAError(
            f"{type(model).__name__} has no last layer of {old} outputs to be replaced: leave num_classes out"
        )
    return new


def _fill(model: nn.Module, file: Path, heads: set[str] | None) -> list[str]:
    """Load a file's weights; only a head of another size stays new.

    Args:
        heads: names of the modules that may stay new; None: those whose tensors have another first dimension.

    Raises:
        LoRAError: keys are missing, left over or wrongly shaped; the error names the first of them.
    """
    state = read_tensors(file)[0] if file.suffix == ".safetensors" else read_pickled(file, wrappers=WRAPPERS)
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    expected: dict[str, Tensor] = model.state_dict()

    def is_head(key: str) -> bool:
        if heads is not None:
            return key.rpartition(".")[0] in heads
        return key in expected and key in state and expected[key].shape[1:] == state[key].shape[1:]

    new = [key for key in expected if is_head(key) and (key not in state or state[key].shape != expected[key].shape)]
    refuse_misfits(
        {key: tensor for key, tensor in expected.items() if key not in new},
        {key: tensor for key, tensor in state.items() if key not in new and (key in expected or not is_head(key))},
        f"{file.name} does not fit {type(model).__name__}",
    )
    model.load_state_dict({key: expected[key] if key in new else state[key] for key in expected})
    return new
