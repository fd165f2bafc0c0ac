"""metrics.csv of a resumed fit, and of a repeated test."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lora_lightning.lora.formats.atomic_dir import write_bytes


class _Writer(ExperimentWriter):
    """Lightning's writer, which leaves an earlier log alone until there is a row, or goes on with it."""

    def __init__(self, log_dir: str, goes_on: bool) -> None:
        super().__init__(log_dir)
        self.replaces = not goes_on
        self.metrics_keys = whole_rows(Path(self.metrics_file_path))[0] if goes_on else []

    def _check_log_dir_exists(self) -> None:
        """Accept an existing folder, and delete nothing yet."""

    def save(self) -> None:
        if self.metrics and self.replaces:
            Path(self.metrics_file_path).unlink(missing_ok=True)
            self.replaces = False
        super().save()


class RepeatedCSVLogger(CSVLogger):
    """Lightning's CSVLogger, which leaves an earlier log alone until there is a row to put in its place.

    Lightning deletes it before it reads a checkpoint: a refused `test` would lose the last one's metrics.
    """

    goes_on = False

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self.goes_on)
        return self._experiment  # type: ignore[return-value]


class ContinuedCSVLogger(RepeatedCSVLogger):
    """Lightning's CSVLogger, which appends to an existing file in place of deleting it."""

    goes_on = True

    @rank_zero_only
    def go_on_from(self, step: int) -> None:
        """Drop what an interrupted fit wrote from `step`, which the fit logs next, on."""
        self.save()
        keep_before(Path(self.experiment.metrics_file_path), step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Drop repeated rows, such as the counts at each start."""
        super().finalize(status)
        if self._experiment is not None:
            keep_before(Path(self.experiment.metrics_file_path), None)


def whole_rows(file: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header and the rows of a CSV file, without what is incomplete at its end."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    rows = [row for row in reader if None not in row and None not in row.values()]
    return list(reader.fieldnames or []), rows


def keep_before(file: Path, step: int | None) -> None:
    """Keep each whole row of the steps before `step`, or of all steps, once."""
    header, rows = whole_rows(file)
    past = [row for row in rows if step is None or (row["step"].isdigit() and int(row["step"]) < step)]
    if not header:
        file.unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header)
    writer.writeheader()
    writer.writerows({tuple(row.items()): row for row in past}.values())
    write_bytes(file, text.getvalue().encode())
