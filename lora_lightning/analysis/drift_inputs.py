"""The inputs on which a drift is measured: this package's neutral texts, the texts of a set, or the run's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from lora_lightning.analysis.drift import Batch
from lora_lightning.data.io.splits import kind_of
from lora_lightning.data.io.tables import check_names, read_tables, source_of, values_of
from lora_lightning.data.text import pad_batch
from lora_lightning.lora.errors import LoRAError
from lora_lightning.tasks.base import Task
from lora_lightning.tasks.losses.linear_cross_entropy import IGNORED
from lora_lightning.tasks.losses.lm_head import shift_labels
from lora_lightning.tasks.positions import is_packed, learned_positions

NEUTRAL, RUN = "neutral", "run"
"""Options in place of a file: this package's texts, and the run's validation inputs."""
MOST = 200
"""Default number of texts."""
ROWS = 8
"""Texts in a batch."""
LONGEST = 512
"""Largest number of tokens of a text, where neither the model nor the data has a smaller limit."""
CAUSAL, SEQ2SEQ = "CAUSAL_LM", "SEQ_2_SEQ_LM"


def choose_texts(
    source: str | None, task: Task, data: Any, *, column: str = "text", most: int = MOST
) -> tuple[str, list[str] | None]:
    """A description of what the drift is measured on, and its texts, which are None for the run's inputs.

    Args:
        source: a file or set, `neutral` or `run`; by default `neutral` for a causal language model, else `run`.
        data: the run's DataModule.

    Raises:
        LoRAError: the data have no tokenizer to read texts with, or the texts cannot be read.
    """
    source = source or (NEUTRAL if task.peft_task_type == CAUSAL else RUN)
    if source == RUN:
        return "the run's validation inputs", None
    if getattr(data, "tokenizer", None) is None:
        raise LoRAError(f"the run's data have no tokenizer to read texts with: measure its drift on {RUN}")
    if source == NEUTRAL:
        return "neutral text of this package", pick_evenly(neutral_texts(), most)
    return source, read_texts(source, column, most)


def neutral_texts() -> list[str]:
    """Paragraphs on everyday topics, written for this package and under its license."""
    text = Path(__file__).with_name("neutral.txt").read_text(encoding="utf-8")
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def read_texts(source: str, column: str = "text", most: int = MOST) -> list[str]:
    """At most `most` texts of a file (.txt by lines, CSV, TSV, JSONL, Parquet), a directory or a set on the hub.

    Blank texts are left out. Of a set with splits, the test split is read, else validation, else train.

    Raises:
        LoRAError: there is no such set or column, a value is no text, or all texts are blank.
    """
    tables = read_tables(source)
    split = next((name for kind in ("test", "validation", "train") for name in tables if kind_of(name) == kind), None)
    if split is None:
        raise LoRAError(f"'{source}' has no set of texts (it has {', '.join(tables) or 'none'})")
    table, where = tables[split], source_of(source, split)
    check_names(table.column_names, [column], where, {"drift_column": column})
    values = list(values_of(table, column))
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise LoRAError(f"{where}, row {number}, column '{column}': expected text, got {value!r:.80}")
    texts = [value for value in values if value.strip()]
    if not texts:
        raise LoRAError(f"{where}: expected texts in column '{column}', all are blank")
    return pick_evenly(texts, most)


def pick_evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spaced."""
    if len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def text_batches(
    texts: Sequence[str], tokenizer: Any, task: Task, backbone: nn.Module, longest: int | None = None
) -> list[Batch]:
    """Batches of texts for the backbone, sorted by length and cut at `longest` tokens, at most `LONGEST`.

    Raises:
        LoRAError: the task's model maps a text to a text.
    """
    if task.peft_task_type == SEQ2SEQ:
        raise LoRAError(f"a model from text to text has a target for each text: measure its drift on {RUN}")
    limit = min(longest or LONGEST, LONGEST, learned_positions(backbone) or LONGEST)
    rows = [tokenizer(text, truncation=True, max_length=limit, verbose=False) for text in texts]
    order = sorted((i for i in range(len(rows)) if rows[i]["input_ids"]), key=lambda i: len(rows[i]["input_ids"]))
    batches = []
    for start in range(0, len(order), ROWS):
        numbers = order[start : start + ROWS]
        padded = pad_batch([rows[i] for i in numbers], pad_token_id=tokenizer.pad_token_id or 0)
        inputs = move_data_to_device(padded, next(backbone.parameters()).device)
        batches.append(Batch(inputs, _labels(inputs) if task.peft_task_type == CAUSAL else None, numbers))
    return batches


def _labels(inputs: Mapping[str, Tensor]) -> Tensor:
    """The label of each output: the next token of its text."""
    return shift_labels(inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED))


def run_batches(
    batches: Iterable[Any], task: Task, backbone: nn.Module, tokenizer: Any = None, most: int = MOST
) -> tuple[list[Batch], list[str]]:
    """Evenly spaced batches of a run with about `most` rows, and a name for each row.

    For a language model, the tokens that its task trains on are compared. A row's name is its decoded text, or
    `input 1` and so on without a tokenizer.
    """
    every = list(batches)
    rows = sum(task.examples(batch) for batch in every)
    wanted = min(len(every), max(1, -(-most * len(every) // max(rows, 1))))
    chosen: list[Batch] = []
    names: list[str] = []
    for batch in pick_evenly(every, wanted):
        inputs, labels = dict(task.inputs(backbone, batch)), None
        if task.peft_task_type == CAUSAL:
            labels = _labels(inputs) if is_packed(batch) else shift_labels(batch["labels"])
        elif task.peft_task_type == SEQ2SEQ:
            labels = batch["labels"]
        rows = next(len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim())
        numbers = range(len(names), len(names) + rows)
        chosen.append(Batch(inputs, labels, numbers))
        if tokenizer is not None and isinstance(inputs.get("input_ids"), Tensor):
            names += tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        else:
            names += [f"input {number + 1}" for number in numbers]
    return chosen, names
