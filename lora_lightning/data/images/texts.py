"""Images and the texts that say what is on them, for models of two towers such as CLIP and SigLIP."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import AutoProcessor

import lora_lightning.data.images.decoding  # noqa: F401  (first, for it says what to install)

# isort: split
from PIL import Image

from lora_lightning.backbones.locate import resolve
from lora_lightning.data.base import TableData
from lora_lightning.data.io.rows import ROW, cells_of, tokenize_cut, values_of
from lora_lightning.data.pairs import GROUP, groups_of
from lora_lightning.lora.errors import LoRAError

IMAGE_FORMS = "an image, its bytes or the path of its file"


class ImageTextData(TableData):
    """Rows of an image and a text to batches of `pixel_values`, `input_ids` and whatever else the processor makes.

    Images are opened as they are needed, texts tokenised with them. Rows with the same text, or that agree in
    `group_column`, are not taken for one another's negatives.

    Args:
        path: a table (CSV, TSV, JSONL, Parquet), tables by split, a saved `datasets` directory, or a set on the hub
            with an `Image` column. A file to predict on needs both columns.
        processor: of the model: a hub name, a directory or `package:NAME/path`.
        image_column: the image: a path, bytes, or what `datasets` holds as an image.
        text_column: what is on it.
        group_column: rows that agree in it belong together.
        image_root: what relative paths start from; the table's own folder by default.
        max_length: tokens per text at most; the tokenizer's own limit by default.
        padding: to the `longest` text of a batch, or to `max_length`, as SigLIP was trained.
        batch_size: pairs per batch and process in training: the more, the more negatives.
        table: arguments of `TableData` by name.

    Raises:
        LoRAError: a missing file or column, an image that does not open, an empty text, with file, row and column.
    """

    def __init__(
        self,
        path: str | dict[str, str],
        processor: str,
        image_column: str = "image",
        text_column: str = "text",
        group_column: str | None = None,
        image_root: str | None = None,
        max_length: int | None = None,
        padding: Literal["longest", "max_length"] = "longest",
        batch_size: int = 32,
        **table: Any,
    ) -> None:
        super().__init__(path, batch_size=batch_size, length_grouped=False, num_proc=None, **table)
        self.processor_name, self.image_column, self.text_column = processor, image_column, text_column
        self.group_column, self.image_root = group_column, image_root
        self.max_length, self.padding = max_length, padding
        self._processor: Any = None

    @property
    def processor(self) -> Any:
        """Loaded on first use; an export saves it beside the model."""
        if self._processor is None:
            try:
                self._processor = AutoProcessor.from_pretrained(resolve(self.processor_name))  # type: ignore[no-untyped-call]
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise LoRAError(f"no processor '{self.processor_name}': {reason}") from error
        return self._processor

    @property
    def tokenizer(self) -> Any:
        """The processor, images and all."""
        return self.processor

    @property
    def pad_token_id(self) -> int | None:
        """The number that fills short texts up."""
        number = self.processor.tokenizer.pad_token_id
        return None if number is None else int(number)

    def read(self) -> dict[str, datasets.Dataset]:
        """Tables with their images undecoded: one that does not open is to be named by its row."""
        return {split: self._undecoded(table) for split, table in super().read().items()}

    def _undecoded(self, table: datasets.Dataset) -> datasets.Dataset:
        feature = table.features.get(self.image_column)
        return (
            table.cast_column(self.image_column, datasets.Image(decode=False))
            if isinstance(feature, datasets.Image)
            else table
        )

    def columns(self, split: str) -> Sequence[str | None]:
        return [self.image_column, self.text_column, None if split == "predict" else self.group_column]

    def check(self, table: datasets.Dataset, split: str) -> None:
        """Raise at an image whose file is not there or whose header is none, and at an empty text."""
        for row, text in cells_of(table, ROW, self.text_column):
            if not isinstance(text, str) or not text.strip():
                raise self.bad_cell(split, row, self.text_column, "a text with words in it", text)
        for row, cell in zip(values_of(table, ROW), table[self.image_column], strict=True):  # one image at a time
            self.opened(split, row, cell).close()

    def encode(self, table: datasets.Dataset, split: str) -> datasets.Dataset:
        """The rows as they are, with their groups: pixels would take more room than the files."""
        named = list(values_of(table, self.group_column)) if self.group_column and split != "predict" else None
        texts = list(values_of(table, self.text_column))
        _, cut = tokenize_cut(self.processor.tokenizer, self.max_length, text=texts)
        self._cut_shares[split] = {"texts cut": sum(cut) / len(cut)}
        return table.add_column(GROUP, groups_of(texts, None, named)).add_column("__split__", [split] * len(table))

    def lengths(self, table: datasets.Dataset) -> None:
        return None

    @property
    def collate(self) -> Callable[[list[Any]], Any]:
        # Workers that are started anew get a copy of what this function belongs to, and need no trainer or table.
        twin = copy.copy(self)
        twin.trainer, twin._tables, twin._encoded = None, None, {}
        return twin.batch

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Images and texts through the processor, and the groups as `labels` (n, 1)."""
        images = [self._pixels(row) for row in rows]
        limit = {} if self.max_length is None else {"max_length": self.max_length}
        texts = [row[self.text_column] for row in rows]
        made = self.processor(
            images=images, text=texts, return_tensors="pt", padding=self.padding, truncation=True, **limit
        )
        return {**made, "labels": torch.tensor([row[GROUP] for row in rows])}

    def _pixels(self, row: dict[str, Any]) -> Image.Image:
        image = self.opened(row["__split__"], row[ROW], row[self.image_column])
        try:
            return image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise self._unreadable(row["__split__"], row[ROW], row[self.image_column], error) from error

    def opened(self, split: str, row: int, cell: Any) -> Image.Image:
        """The image of a cell, its header read.

        Raises:
            LoRAError: it is none, with its row.
        """
        source = cell
        if isinstance(cell, dict):
            source = cell.get("bytes") or cell.get("path")
        if isinstance(source, Image.Image):
            return source
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        elif isinstance(source, str):
            source = self._root(split) / resolve(source)
            if not source.is_file():
                raise self.bad_cell(split, row, self.image_column, f"an image at {source}", cell, "; there is no file")
        else:
            raise self.bad_cell(split, row, self.image_column, IMAGE_FORMS, cell)
        try:
            return Image.open(source)
        except (OSError, ValueError) as error:
            raise self._unreadable(split, row, cell, error) from error

    def _unreadable(self, split: str, row: int, cell: Any, error: Exception) -> LoRAError:
        shown = cell.get("path") if isinstance(cell, dict) else cell
        return self.bad_cell(split, row, self.image_column, "an image that opens", shown, f" ({error})")

    def _root(self, split: str) -> Path:
        if self.image_root is not None:
            return Path(resolve(self.image_root))
        path = self.path.get(split, next(iter(self.path.values()))) if isinstance(self.path, dict) else self.path
        found = Path(resolve(path))
        return found if found.is_dir() else found.parent
