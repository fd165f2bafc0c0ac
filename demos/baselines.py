"""What an accuracy has to be compared with: the most common label, a linear probe, and for images the raw pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lora_lightning.export.model_files import is_transformers
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.inject import disabled
from lora_lightning.lora.layers.trained.module_copy import COPY
from lora_lightning.lora.targets.output_heads import output_head
from lora_lightning.tasks.base import Task, inputs_of
from lora_lightning.training.checkpoints import run_folder as run
from lora_lightning.training.module import LoRAModule
from lora_lightning.training.strategies.base import is_sharded

PIXELS = "pixel_values"
SPLITS = ("train", "validation", "test")
STRENGTHS = (0.01, 0.1, 1.0)
"""Inverse regularisations C that a probe chooses from."""
FEW = 10
"""Rows of a label, below which the strongest regularisation is taken unasked."""


@runtime_checkable
class Labelled(Protocol):
    """A DataModule with one label for each row, such as those of texts and of images."""

    tables: Mapping[str, Any]

    def every(self, split: str) -> Iterable[Mapping[str, Tensor]]:
        """All rows of a split in batches, as evaluation sees them."""

    def majority_share(self, split: str) -> float:
        """Accuracy on `split` of always saying the label that is most common in train."""


class Baselines(Callback):
    """After fit: the majority class, and logistic regression on the frozen backbone's features and on raw pixels.

    Features are those of `features`. Needs scikit-learn (`pip install lora_lightning[demo]`).
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what is missing before the fit and not after it."""
        if stage != "fit":
            return
        try:
            import sklearn.linear_model  # noqa: F401
        except ImportError as error:
            raise LoRAError("Baselines needs scikit-learn: pip install 'lora_lightning[demo]'") from error
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, Labelled):
            raise LoRAError(
                "Baselines needs data with one label for each row, such as TextClassificationData: drop it from"
                " trainer.callbacks"
            )
        missing = {"validation", "test"} - set(data.tables)
        if missing:
            raise LoRAError(f"Baselines compares on validation and test, and the set has no {min(missing)} split")
        if not isinstance(pl_module, LoRAModule):
            raise LoRAError(f"Baselines takes its features from a LoRAModule, got {type(pl_module).__name__}")
        if not is_transformers(pl_module.backbone):
            head_of(pl_module.backbone)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute all on validation and test and put them into the run's report."""
        folder = run.run_dir(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LoRAModule)
        if is_sharded(pl_module.backbone):
            rank_zero_warn(
                "Baselines fitted no probe: W0 lies in parts, and one process computes it; run it on one device"
            )
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        values = {
            "majority_accuracy": data.majority_share("validation"),
            "majority_test_accuracy": data.majority_share("test"),
        }
        for kind, accuracy in linear_probes(trainer, pl_module, data).items():
            values |= {f"{kind}_accuracy": accuracy["validation"], f"{kind}_test_accuracy": accuracy["test"]}
        run.update_report(folder, values)


def linear_probes(trainer: Trainer, module: LoRAModule, data: Labelled) -> dict[str, dict[str, float]]:
    """Accuracy of logistic regression by split: `probe` on the frozen backbone's features, `pixels` on images."""
    module.backbone.eval()
    with disabled(module.backbone), trainer.precision_plugin.forward_context():
        found = {split: _vectors(module, data.every(split), split) for split in SPLITS}
    kinds = [kind for kind in found["train"] if kind != "labels"]
    return {kind: _regression({s: (part[kind], part["labels"]) for s, part in found.items()}) for kind in kinds}


def _vectors(module: LoRAModule, loader: Iterable[Mapping[str, Tensor]], split: str) -> dict[str, Tensor]:
    """By kind of vector, those of all rows, and their labels."""
    parts: dict[str, list[Tensor]] = {}
    for batch in tqdm(loader, desc=f"linear probe, {split}", leave=False):
        on_device = {key: value.to(module.device) for key, value in batch.items()}
        vectors = {"probe": features(module.backbone, module.task, on_device).cpu(), "labels": batch["labels"]}
        if PIXELS in batch:
            vectors["pixels"] = pixels(batch[PIXELS])
        for kind, values in vectors.items():
            parts.setdefault(kind, []).append(values)
    return {kind: torch.cat(values) for kind, values in parts.items()}


def _regression(vectors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Fitted on train, the accuracy on the other splits. How much it is regularised, a fifth of train decides."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, ShuffleSplit
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = (part.numpy() for part in vectors["train"])
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=STRENGTHS[0]))
    if vectors["train"][1].bincount().min() >= FEW:
        held_out = ShuffleSplit(1, test_size=0.2, random_state=0)
        probe = GridSearchCV(probe, {"logisticregression__C": STRENGTHS}, cv=held_out)
    probe.fit(x, y)
    return {s: float(probe.score(x.numpy(), y.numpy())) for s, (x, y) in vectors.items() if s != "train"}


RAW_SIDE = 28
"""To so many pixels a side images are averaged before a probe on them: MNIST's own, and near CIFAR's 32."""


def head_of(backbone: nn.Module) -> str:
    """Name of the last linear layer of the output head, or of the head itself where it has none.

    Raises:
        LoRAError: the model has no head that could be found.
    """
    heads = output_head(backbone)
    if not heads:
        raise LoRAError(
            f"{type(backbone).__name__} has no output head that could be found, and a probe is fitted on what the head"
            " is given: drop Baselines from trainer.callbacks"
        )
    head = heads[-1].partition(f".{COPY}")[0]  # of a head that is trained in full, the frozen original
    inside = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and COPY not in name.split(".") and f"{name}.".startswith(f"{head}.")
    ]
    return inside[-1] if inside else head


@torch.no_grad()
def features(backbone: nn.Module, task: Task, batch: Mapping[str, Any]) -> Tensor:
    """(n, d) in float32: of texts the mean of the last hidden states, of anything else what the head is given.

    That is the pooled map of a convolutional network and the class token of a ViT (in DINOv2 beside the mean of its
    patches); maps that come unpooled are averaged.
    """
    if is_transformers(backbone) and "attention_mask" in batch:
        with torch.no_grad():
            hidden = backbone(**inputs_of(batch, "labels"), output_hidden_states=True).hidden_states[-1].float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return (hidden * mask).sum(1) / mask.sum(1)
    given: list[Tensor] = []
    head = backbone.get_submodule(head_of(backbone))
    hook = head.register_forward_pre_hook(lambda _, args: given.append(args[0].detach().float()))
    try:
        backbone(**task.inputs(backbone, batch))
    finally:
        hook.remove()
    if not given:
        raise LoRAError(
            f"the forward of {type(backbone).__name__} goes past its head: drop Baselines from the callbacks"
        )
    found = given[-1]
    return found.mean(tuple(range(2, found.dim()))) if found.dim() == 4 else found.flatten(1)


def pixels(images: Tensor) -> Tensor:
    """Images (n, channels, h, w) averaged to at most 28 x 28 pixels, as vectors."""
    size = (min(RAW_SIDE, images.shape[-2]), min(RAW_SIDE, images.shape[-1]))
    return F.adaptive_avg_pool2d(images.float(), size).flatten(1)
