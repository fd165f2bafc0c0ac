"""Small files of every kind that is read."""

import csv
import json

import datasets


def write(path, rows):
    """Rows as CSV, TSV, JSONL or Parquet, by the file's name."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def ready(cls, path, tokenizer, **kwargs):
    """A DataModule of `cls` that is set up."""
    path = {split: str(file) for split, file in path.items()} if isinstance(path, dict) else str(path)
    data = cls(path, str(tokenizer), **{"batch_size": 4, **kwargs})
    data.prepare_data()
    data.setup("fit")
    return data
