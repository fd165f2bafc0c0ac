"""`analyze --drift` and `--scales`: the texts, a run's own inputs and validation set, and the record in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from rich.progress import track
from torch.utils.data import DataLoader, IterableDataset

from lora_lightning.analysis.drift import measure_drift
from lora_lightning.analysis.drift_inputs import MOST, choose_texts, run_batches, text_batches
from lora_lightning.analysis.strength import (
    GROUPS,
    Strength,
    Strengths,
    choose,
    random_groups,
    validation_metrics,
)
from lora_lightning.analysis.tables import drift_tables
from lora_lightning.cli.build import Run
from lora_lightning.data.io.tables import lengths_of
from lora_lightning.export.probe_batch import loaders_of
from lora_lightning.lora.bank.strength import scaled
from lora_lightning.lora.errors import LoRAError
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.reports.html import DRIFT, DRIFT_FIGURE, write_page


def drift_of_run(
    run: Run | None,
    source: str | None,
    scales: Sequence[float] = (),
    *,
    column: str = "text",
    most: int = MOST,
    notes: Sequence[str] = (),
) -> Strengths:
    """The drift of a run's adapter, and where several strengths are requested its validation metric at each.

    Args:
        run: None where the model could not be opened.
        source: as in `choose_texts`, with `column` and `most`.
        scales: the strengths; only the trained one without any.
        notes: why the model could not be opened.

    Raises:
        LoRAError: there is no run, or it lacks the inputs.
    """
    if run is None or run.trainer is None:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise LoRAError(
            f"drift runs the model, and there is none here{why}: name a run's folder or checkpoint and no --base_model"
        )
    if run.data is None:
        raise LoRAError("drift reads the run's data or its tokenizer, and its config has no data section: add one")
    data, task, backbone = run.data, run.module.task, run.module.backbone
    forward = run.trainer.precision_plugin.forward_context
    run.module.to(run.trainer.strategy.root_device)
    try:
        name, texts = choose_texts(source, task, data, column=column, most=most)
        tokenizer = getattr(data, "tokenizer", None)
        if texts is None:
            batches, texts = run_batches((b for _, b in validation_batches(run)), task, backbone, tokenizer, most)
        else:
            batches = text_batches(texts, tokenizer, task, backbone, getattr(data, "max_length", None))
        watched = track(batches, "drift", transient=True)
        drifts = measure_drift(backbone, watched, texts, scales or (1.0,), forward=forward)
        if not scales:
            return Strengths(source=name, found=[Strength(scale=1.0, drift=drifts[1.0])])
        found = []
        for scale, drift in track(list(drifts.items()), "validation", transient=True):
            with scaled(backbone, scale):
                metrics = validation_metrics(backbone, task, validation_batches(run), forward=forward)
            found.append(Strength(scale=scale, drift=drift, metrics=metrics))
    finally:
        run.module.cpu()
    metric = task.monitor.partition("/")[2]
    shown = metric if metric in found[0].metrics else "loss"
    return choose(name, found, shown, task.better(f"val/{shown}") or "min")


def validation_batches(run: Run) -> Iterator[tuple[int, Any]]:
    """Batches of the first validation set on the module's device, each with its group.

    A group is a random tenth of the rows, sorted by length within it, so that texts of similar length are padded
    together. A stream's batches are assigned to the groups in turn.
    """
    assert run.data is not None
    assert run.trainer is not None
    loader = _validation_loader(run.data)
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not loader.batch_size:
        batches = ((number % GROUPS, batch) for number, batch in enumerate(loader))
    else:
        groups = enumerate(random_groups(len(dataset)))
        parts = [(group, part) for group, rows in groups for part in _parts(loader, rows)]
        regrouped: Any = DataLoader(dataset, batch_sampler=[rows for _, rows in parts], collate_fn=loader.collate_fn)
        batches = ((part[0], batch) for part, batch in zip(parts, regrouped, strict=True))
    for group, batch in batches:
        yield group, run.trainer.precision_plugin.convert_input(move_data_to_device(batch, run.module.device))


def _validation_loader(data: Any) -> Any:
    """The loader of the first validation set; the data are set up once."""
    if not hasattr(data, "drift_is_set_up"):
        if getattr(data, "packing", False):
            data.packing = False  # one row for each text
        data.prepare_data()
        data.setup("fit")
        data.drift_is_set_up = True
    if getattr(data, "has_validation", True) is False:
        raise LoRAError("the run's data have no validation set: give --drift a file of texts, and leave --scales out")
    loader = next(loaders_of(data))
    return loader[0] if isinstance(loader, list | tuple) else loader


def _parts(loader: Any, rows: list[int]) -> list[list[int]]:
    """A group's rows in batches, sorted by length where the rows are token ids."""
    if "input_ids" in getattr(loader.dataset, "column_names", []):
        lengths = lengths_of(loader.dataset)
        rows = sorted(rows, key=lambda row: lengths[row])
    return [rows[start : start + loader.batch_size] for start in range(0, len(rows), loader.batch_size)]


def write_record(folder: Path, drift: Strengths, figure: bytes | None) -> None:
    """Write the drift into the run's folder, for its page, in place of an earlier one."""
    short, long = drift_tables(drift)
    record = {**asdict(drift), "tables": [asdict(table) for table in short + long]}
    try:
        write_bytes(folder / DRIFT, (json.dumps(record) + "\n").encode())
        if figure is not None:
            write_bytes(folder / DRIFT_FIGURE, figure)
        else:
            (folder / DRIFT_FIGURE).unlink(missing_ok=True)
        write_page(folder)
    except OSError as error:
        rank_zero_warn(f"the drift is measured, and the run's page in '{folder}' is as it was: {error.strerror}")
