"""What is learned: one small class per task, from (backbone, batch) to loss and metrics."""

from lora_lightning.tasks.base import StepOutput, Task
from lora_lightning.tasks.sequence_classification import SequenceClassification

__all__ = ["SequenceClassification", "StepOutput", "Task"]
