"""Images and their descriptions, for two-tower models such as CLIP and SigLIP."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Literal

import datasets
import torch
from transformers import AutoProcessor

from lora_lightning.backbones.tokenizers import load_processor
from lora_lightning.data.images.rows import PIXELS, Rows
from lora_lightning.data.images.table import ImageCells
from lora_lightning.data.io.tables import values_of
from lora_lightning.data.pairs import groups_of
from lora_lightning.data.text import tokenize_cut


class ImageTextData(ImageCells):
    """Rows of an image and a text to batches of `pixel_values`, `input_ids` and the processor's other results.

    Images are opened as they are needed, and texts tokenized with them. Rows with the same text, or that agree in
    `group_column`, are not used as each other's negatives.

    Args:
        path: a table (CSV, TSV, JSONL, Parquet), tables by split, a saved `datasets` directory, or a set on the hub
            with an `Image` column. A file to predict on needs both columns.
        processor: of the model: a hub name, a directory or `package:NAME/path`.
        image_column: the image: a path, bytes, or an image of `datasets`.
        text_column: its description.
        group_column: rows that agree in it belong together.
        max_length: tokens per text at most; the tokenizer's limit by default.
        padding: to the `longest` text of a batch, or to `max_length`, as SigLIP was trained.
        images: arguments of `ImageCells` and `TableData` by name. A larger `batch_size` gives more negatives.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        processor: str,
        image_column: str = "image",
        text_column: str = "text",
        group_column: str | None = None,
        max_length: int | None = None,
        padding: Literal["longest", "max_length"] = "longest",
        **images: Any,
    ) -> None:
        super().__init__(path, **images)
        self.processor_name, self.image_column, self.text_column = processor, image_column, text_column
        self.group_column, self.max_length, self.padding = group_column, max_length, padding
        self.image_columns, self.input_columns = [image_column], [image_column, text_column]
        self.target_columns = [group_column]

    @cached_property
    def processor(self) -> Any:
        """The processor, loaded on first use; an export saves it beside the model."""
        return load_processor(AutoProcessor, self.processor_name)

    @property
    def tokenizer(self) -> Any:
        """The processor, which handles images too."""
        return self.processor

    @property
    def pad_token_id(self) -> int | None:
        """The id of the padding token."""
        return self.processor.tokenizer.pad_token_id  # type: ignore[no-any-return]

    def check(self, table: datasets.Dataset, split: str) -> None:
        super().check(table, split)
        self.check_texts(table, split, [self.text_column], blank=False)

    def encode(self, table: datasets.Dataset, split: str) -> Any:
        named = list(values_of(table, self.group_column)) if self.group_column and split != "predict" else None
        texts = list(values_of(table, self.text_column))
        _, cut = tokenize_cut(self.processor.tokenizer, self.max_length, text=texts)
        self.cut_shares[split] = {"texts cut": sum(cut) / len(cut)}
        return Rows(self.cells(table, split, self.image_column), text=texts, group=groups_of(texts, None, named))

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        limit = {} if self.max_length is None else {"max_length": self.max_length}
        made = partial(self.processor, return_tensors="pt", padding=self.padding, truncation=True, **limit)
        return partial(collate_pairs, processor=made)


def collate_pairs(rows: list[dict[str, Any]], *, processor: Callable[..., Any]) -> dict[str, Any]:
    """Images and texts through the processor, and the groups as `labels` (n, 1)."""
    made = processor(images=[row[PIXELS] for row in rows], text=[row["text"] for row in rows])
    return {**made, "labels": torch.tensor([row["group"] for row in rows])}
