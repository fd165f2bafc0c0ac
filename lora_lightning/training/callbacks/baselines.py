"""What an accuracy has to be compared with: the most common label, and a linear probe on the frozen backbone."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lora_lightning.data.text_classification import TextClassificationData
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.inject import disabled
from lora_lightning.tasks.sequence_classification import mean_features
from lora_lightning.training import run
from lora_lightning.training.merged import is_transformers
from lora_lightning.training.module import LoRAModule


class Baselines(Callback):
    """After fit: the majority class, and logistic regression on the frozen backbone's mean-pooled features.

    Needs scikit-learn (`pip install lora_lightning[demo]`) and a transformers backbone.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say what is missing before the fit and not after it."""
        if stage != "fit":
            return
        try:
            import sklearn.linear_model  # noqa: F401
        except ImportError as error:
            raise LoRAError("Baselines needs scikit-learn: pip install 'lora_lightning[demo]'") from error
        if not isinstance(trainer.datamodule, TextClassificationData):  # type: ignore[attr-defined]
            raise LoRAError("Baselines needs TextClassificationData: drop it from trainer.callbacks")
        missing = {"validation", "test"} - set(trainer.datamodule.tables)  # type: ignore[attr-defined]
        if missing:
            raise LoRAError(f"Baselines compares on validation and test, and the set has no {min(missing)} split")
        if not isinstance(pl_module, LoRAModule) or not is_transformers(pl_module.backbone):
            raise LoRAError("Baselines takes its features from a transformers backbone: drop it from trainer.callbacks")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute both on validation and test and put them into the run's report."""
        folder = run.run_dir(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, LoRAModule)
        data: TextClassificationData = trainer.datamodule  # type: ignore[attr-defined]
        probe = linear_probe(trainer, pl_module, data)
        values = {
            "probe_accuracy": probe["validation"],
            "probe_test_accuracy": probe["test"],
            "majority_accuracy": data.majority_share("validation"),
            "majority_test_accuracy": data.majority_share("test"),
        }
        run.update_report(folder, values)


def linear_probe(trainer: Trainer, module: LoRAModule, data: TextClassificationData) -> dict[str, float]:
    """Accuracy of logistic regression on the frozen backbone's features, by split."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    module.backbone.eval()
    with disabled(module.backbone), trainer.precision_plugin.forward_context():
        features = {s: _features(module, data.every(s), s) for s in ("train", "validation", "test")}
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.01))
    probe.fit(features["train"][0].numpy(), features["train"][1].numpy())
    return {s: float(probe.score(x.numpy(), y.numpy())) for s, (x, y) in features.items() if s != "train"}


def _features(module: LoRAModule, loader: DataLoader[Any], split: str) -> tuple[Tensor, Tensor]:
    features, labels = [], []
    for batch in tqdm(loader, desc=f"linear probe, {split}", leave=False):
        on_device = {key: value.to(module.device) for key, value in batch.items()}
        features.append(mean_features(module.backbone, on_device).cpu())
        labels.append(batch["labels"])
    return torch.cat(features), torch.cat(labels)
