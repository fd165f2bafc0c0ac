"""Commands as functions, whose signatures and docstrings are their `--help`."""

from __future__ import annotations

from typing import Literal

from jsonargparse.typing import PositiveInt
from rich.console import Console

from lora_lightning.lora.frozen.dtype import DType
from lora_lightning.lora.meta.merge_files import StreamReport
from lora_lightning.reports.table import Table


def merge(
    base_model: str,
    adapter: str,
    output_dir: str,
    dtype: DType = "auto",
    allow_other_base: bool = False,
    alphas: dict[str, float] | None = None,
) -> None:
    """Write a Hugging Face model with an adapter merged in, shard by shard, without loading the model.

    Peak memory is a few of the model's largest tensors, however large the model is.

    Args:
        base_model: directory of the base in the hub's layout, or `package:NAME/path` inside an installed package.
        adapter: directory of the adapter, as PEFT and this package write it.
        output_dir: a new or empty directory for the merged model, or that of an earlier merge, which is replaced.
        dtype: of the written weights; `auto` keeps each tensor's dtype. The sum is taken in float32 or wider.
        allow_other_base: merge also where the adapter was made on another base.
        alphas: by full module name, where PEFT's `alpha_pattern` leaves one in doubt: the error names the modules.
    """
    from lora_lightning.export.merge_on_disk import merge_on_disk

    report = merge_on_disk(
        base_model, adapter, output_dir, dtype=dtype, allow_other_base=allow_other_base, alphas=alphas
    )
    Console().print(merge_table(report, output_dir))


def analyze(
    adapters: list[str],
    output_dir: str = "analysis",
    base_model: str = "auto",
    truncate: float | None = None,
    layers: str | None = None,
    plots: bool = True,
    allow_other_base: bool = False,
    alphas: dict[str, float] | None = None,
    drift: str | None = None,
    drift_column: str = "text",
    drift_texts: PositiveInt = 200,
    scales: str | None = None,
) -> None:
    """How much of its rank an adapter uses, which directions several share, and how far it moved its model.

    Writes analysis.json, index.html and each figure as PNG and SVG. Adapters are directories as PEFT and this package
    write them, run folders, or checkpoints.

    Args:
        adapters: one or more.
        output_dir: a new or empty folder, or that of an earlier analysis.
        base_model: directory of W0 in the hub's layout, for measures relative to W0; `auto` takes what the adapter or
            the run names, where it exists, and `none` leaves them out.
        truncate: a share of the energy, such as 0.95: write the adapter of the smallest ranks that keep it in each
            layer to output_dir/truncated, and measure the loss of quality.
        layers: a regular expression on full names: the layers in the figures of shared directions.
        plots: draw the figures; needs matplotlib.
        allow_other_base: analyze also where the adapter was made on another base.
        alphas: by full module name, where PEFT's `alpha_pattern` leaves one in doubt: the error names the modules.
        drift: measure how far a run's model moved from its base, on texts: a file (.txt, CSV, JSONL, Parquet), a set,
            `run` for the run's validation inputs, `neutral` for this package's text, or `auto`: `neutral` for a causal
            language model, `run` for others. It is shown in the run's report.html too.
        drift_column: the column with the texts.
        drift_texts: number of texts at most, spread over the file.
        scales: strengths of the update, such as 0,0.25,0.5,0.75,1,1.25: the validation metric and the drift at each,
            and the smallest sufficient strength, for `export --scale`. Implies `--drift auto`.
    """
    from pathlib import Path

    from lora_lightning.commands import analyze as analysis

    result = analysis.analyze(
        adapters,
        Path(output_dir),
        base_model=base_model,
        truncate=truncate,
        layers=layers,
        plots=plots,
        allow_other_base=allow_other_base,
        alphas=alphas,
        drift=drift,
        drift_column=drift_column,
        drift_texts=drift_texts,
        scales=scales,
    )
    for rows in analysis.screens(result):
        Console().print(rows)
    Console().print(f"numbers, page and figures: {Path(output_dir) / analysis.PAGE}", soft_wrap=True)


def sweep(
    fit: list[str],
    grid: list[str] | None = None,
    range: list[str] | None = None,
    sampler: Literal["grid", "random", "tpe"] = "grid",
    trials: int | None = None,
    pruner: Literal["none", "median", "hyperband"] = "none",
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
    jobs: int = 1,
    seeds: str | None = None,
    budget: int | None = None,
    storage: str | None = None,
    together: bool = False,
    halving: int | None = None,
    rungs: str = "1/8,1/4,1/2",
    name: str | None = None,
    runs_dir: str = "runs",
    plots: bool = True,
) -> None:
    """Fit one config with other values of some flags, and rank the results. All other flags are those of fit.

    Args:
        fit: flags of fit, the same for every trial.
        grid: `KEY=V1,V2,...` for any flag of fit, as often as wanted; lists in brackets:
            `"model.lora.target_modules=[query],[query,value],all-linear"`.
        range: `KEY=LOW..HIGH`, or `KEY=LOW..HIGH:log`, for a sampler to draw from; whole numbers where both ends are.
        sampler: every combination (grid), or Optuna's random or tpe, which also draw among the values of a grid.
        trials: how many combinations a sampler tries.
        pruner: Optuna's median or hyperband stops a fit whose validations fall behind; none fits all to the end.
        metric: ranks the fits, such as val/loss; by default what the config's best checkpoint is chosen by.
        mode: whether the best is the smallest or the largest.
        jobs: fits at once; each gets its part of the cores and of the GPUs.
        seeds: `1,2,3`: fit every combination with each, and rank by the mean.
        budget: trainable parameters: for each set of target_modules take the r that comes nearest to it.
        storage: of Optuna's study, so that several processes or machines work on it: a file for its journal, or a
            database such as postgresql+psycopg://user@host/name; by default a journal in the sweep's folder.
        together: all points of the grid in one process over one W0, taking turns on each batch; the results equal those
            of separate fits to the byte. For flags of model.lora, model.optimizer, model.lr_scheduler and gradient
            clipping.
        halving: with together: at each rung the better 1 / N go on, and those that are not significantly worse; 2 keeps
            the better half.
        rungs: shares of the steps after which members are compared on the validation set.
        name: of the sweep's folder in runs_dir; by default the config's name with -sweep behind it.
        runs_dir: folder of all runs.
        plots: draw the figures; needs matplotlib.
    """
    from lora_lightning.commands.sweep.command import run_on_screen

    run_on_screen(
        fit=fit,
        grid=grid or [],
        ranges=range or [],
        sampler=sampler,
        trials=trials,
        pruner=pruner,
        metric=metric,
        goal=mode,
        jobs=jobs,
        seeds=seeds,
        budget=budget,
        storage=storage,
        together=together,
        halving=halving,
        rungs=rungs.split(","),
        name=name,
        runs_dir=runs_dir,
        plots=plots,
    )


def plan(
    fit: list[str],
    batch_size: PositiveInt | None = None,
    length: PositiveInt | None = None,
    num_labels: PositiveInt | None = None,
    precisions: list[Literal["float32", "bf16-mixed", "16-mixed", "bf16-base", "nf4-base"]] | None = None,
    processes: PositiveInt | None = None,
    json: bool | str = False,
) -> None:
    """Show what a config trains and costs: counts, files, memory in each precision and strategy, operations.

    Takes the config and the flags of fit; reads no weights and no data.

    Args:
        fit: flags of fit.
        batch_size: rows, over the config's.
        length: tokens, over data.max_length.
        num_labels: labels, where the config names none.
        precisions: overlays to compare; all by default, and the config's in any case.
        processes: of DDP and FSDP2; trainer.devices, or 2.
        json: print the plan as JSON and nothing else; with a name, write it to that file.
    """
    from lora_lightning.commands.plan.command import plan_on_screen

    sizes = {"batch_size": batch_size, "length": length, "num_labels": num_labels}
    plan_on_screen(fit, json=json, **sizes, precisions=precisions, processes=processes)


def merge_table(report: StreamReport, output_dir: str) -> Table:
    """A table of a merge's facts."""
    rows = []
    rows.append(("tensors that hold the update", f"{report.changed:,}"))
    rows.append(("tensors copied to the bit", f"{report.copied:,}"))
    rows.append(("size", f"{report.size / 1e6:,.1f} MB in {len(report.files)} files"))
    checked = "is the one that the adapter was made on" if report.base_checked else "not checked"
    rows.append(("base", checked))
    if report.new:
        rows.append(("new tensors", ", ".join(report.new)))
    if report.kept:
        name, share = min(report.kept.items(), key=lambda item: item[1])
        rows.append(("update kept after rounding", f"{share:.1%} at least ({name})"))
    return Table(title=f"Merged into {output_dir}", rows=rows)
