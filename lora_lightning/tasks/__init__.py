"""Tasks: one small class for each, from (backbone, batch) to loss and metrics."""

from lora_lightning.tasks.base import StepOutput, Task

__all__ = ["StepOutput", "Task"]
