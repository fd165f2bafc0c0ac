"""PEFT's name of a task, and the heads that PEFT trains in full for its sake whatever the config says."""

from __future__ import annotations

import warnings

from torch import nn

from lora_lightning.lora.errors import AdapterError, AdapterWarning, did_you_mean, some
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import SavedCopy

CLASSIFIERS = ("classifier", "score")
TASKS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": CLASSIFIERS,
    "TOKEN_CLS": CLASSIFIERS,
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_2_SEQ_LM": (),
    "CAUSAL_LM": (),
    "FEATURE_EXTRACTION": (),
}
"""By task, the ends of names of what `PeftModel` adds to `modules_to_save` (0.21.2, peft_model.py)."""


def task_for_peft(model: nn.Module, task_type: str | None) -> str | None:
    """The task as it may stand in the file: None where PEFT would look for a head that this adapter does not bring.

    Raises:
        AdapterError: PEFT has no such task.
    """
    if task_type is None:
        return None
    if task_type not in TASKS:
        raise AdapterError(
            f"task_type must be one of {', '.join(TASKS)}, got '{task_type}'{did_you_mean(task_type, TASKS)}"
        )
    brought = {inner for _, saved in grafted_modules(model, SavedCopy) for inner in saved.modules()}
    ends = TASKS[task_type]
    missed = [n for n, m in model.named_modules() if ends and n.endswith(ends) and m not in brought]
    if not missed:
        return task_type
    warnings.warn(
        f"PEFT takes {some([repr(name) for name in missed])} for trained in full wherever task_type is {task_type}, and"
        f" this adapter brings no values for that: task_type is left out of its config, so that"
        f" PeftModel.from_pretrained opens it; to keep it, train the head: modules_to_save",
        AdapterWarning,
        stacklevel=3,
    )
    return None
