"""Small files of every kind that is read."""

import csv
import json

import datasets
import torch

from lora_lightning.data.io.splits import SplitConfig

ALL = SplitConfig(validation=0.0, test=0.0)
"""All rows are for training."""


def write(path, rows):
    """Rows as CSV, TSV, JSON, JSONL or Parquet, by the file's name."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def save(folder, features=None, **tables):
    made = {split: datasets.Dataset.from_list(rows, features=features) for split, rows in tables.items()}
    datasets.DatasetDict(made).save_to_disk(folder)
    return folder


def ready(cls, path, tokenizer=None, **options):
    path = {split: str(file) for split, file in path.items()} if isinstance(path, dict) else str(path)
    data = cls(path, *([] if tokenizer is None else [str(tokenizer)]), **{"batch_size": 4, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def sizes(data):
    return {split: len(table) for split, table in data.tables.items()}


def everything(data):
    """Of images, all training rows as one batch."""
    batches = list(data.every("train"))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def rows_of(data, split="train"):
    return data.collate([data.encoded_rows(split)[i] for i in range(len(data.encoded_rows(split)))])
