"""What is learned: one small class per task, from (backbone, batch) to loss and metrics."""

from lora_lightning.tasks.base import StepOutput, Task

__all__ = ["StepOutput", "Task"]
