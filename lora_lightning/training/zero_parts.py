"""Which process steps which numbers under DeepSpeed, and an optimizer's state in the form of a single process.

DeepSpeed lays the parameters of a group in a row. In stage 2 each process has a stretch of that row; in stage 3 it has
a stretch of every parameter, and its row is made of these. An optimizer holds one tensor for each row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lora_lightning.training.distributed import processes, rank


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter in a process's row."""

    parameter: nn.Parameter
    shape: torch.Size
    """Of the whole parameter, also where it is not there as a whole."""
    begin: int
    """Of the stretch, in the parameter's own numbers."""
    at: int
    """And in the row."""
    count: int


@dataclass(frozen=True)
class Row:
    """What each process's optimizer holds of one group: this process's numbers, and the pieces of all of them."""

    group: int
    held: Tensor
    pieces: Sequence[Sequence[Piece]]
    """By process."""


def rows_of_stage_2(zero: Any) -> list[Row]:
    """Of DeepSpeed's optimizer: stretches of one row."""
    held = zero.single_partition_of_fp32_groups
    return [
        Row(number, held[number], [_stretch(group, r, zero.partition_size[number]) for r in range(processes())])
        for number, group in enumerate(zero.bit16_groups)
    ]


def _stretch(group: Sequence[nn.Parameter], of: int, size: int) -> list[Piece]:
    found, offset, first, last = [], 0, of * size, (of + 1) * size
    for p in group:
        begin, end = max(offset, first), min(offset + p.numel(), last)
        if begin < end:
            found.append(Piece(p, p.shape, begin - offset, begin - first, end - begin))
        offset += p.numel()
    return found


def rows_of_stage_3(zero: Any) -> list[Row]:
    """Of DeepSpeed's optimizer: rows of stretches."""
    held = zero.fp32_partitioned_groups_flat
    return [
        Row(zero.sub_group_to_group_id[number], held[number], [_shares(group, r) for r in range(processes())])
        for number, group in enumerate(zero.fp16_groups)
    ]


def _shares(group: Sequence[Any], of: int) -> list[Piece]:
    found, at = [], 0
    for p in group:
        size = p.partition_numel()
        count = min(size, max(p.ds_numel - of * size, 0))
        if count:
            found.append(Piece(p, p.ds_shape, of * size, at, count))
        at += size
    return found


def numbered(optimizer: Optimizer, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The optimizer's groups with the numbers that a single process's state gives to their parameters."""
    count, groups = 0, []
    for number, group in enumerate(optimizer.param_groups):
        own = sum(len(_in_order(row)) for row in rows if row.group == number)
        groups.append({k: v for k, v in group.items() if k != "params"} | {"params": list(range(count, count + own))})
        count += own
    return groups


def _in_order(row: Row) -> dict[int, Piece]:
    """A row's parameters, by their id."""
    every = [piece for pieces in row.pieces for piece in pieces]
    return {id(piece.parameter): piece for piece in every}


def places(optimizer: Optimizer, rows: Sequence[Row]) -> dict[int, int]:
    """The number of each parameter, by its id."""
    found: dict[int, int] = {}
    for number in range(len(optimizer.param_groups)):
        for row in rows:
            for one in _in_order(row) if row.group == number else ():
                found[one] = len(found)
    return found


def whole_state(optimizer: Optimizer, rows: Sequence[Row]) -> dict[str, Any]:
    """The state that one process would have, in process 0, on the CPU; {} in the others. All must call it."""
    place, state = places(optimizer, rows), dict[int, dict[str, Any]]()
    for row in rows:
        for name, value in optimizer.state.get(row.held, {}).items():
            if isinstance(value, Tensor) and value.shape == row.held.shape:
                parts = gathered_rows(value)
                if parts is not None:
                    _spread(row, parts, name, place, state)
            else:
                for one in _in_order(row):
                    kept = value.detach().cpu().clone() if isinstance(value, Tensor) else value
                    state.setdefault(place[one], {})[name] = kept
    if rank():
        return {}
    return {"state": {i: state[i] for i in sorted(state)}, "param_groups": numbered(optimizer, rows)}


def _spread(
    row: Row, parts: Sequence[Tensor], name: str, place: Mapping[int, int], state: dict[int, dict[str, Any]]
) -> None:
    for part, pieces in zip(parts, row.pieces, strict=True):
        for piece in pieces:
            own = state.setdefault(place[id(piece.parameter)], {})
            if name not in own:
                own[name] = torch.zeros(piece.shape, dtype=part.dtype)
            own[name].view(-1)[piece.begin : piece.begin + piece.count] = part[piece.at : piece.at + piece.count].cpu()


def gathered_rows(own: Tensor) -> list[Tensor] | None:
    """Every process's row of equal length, in process 0."""
    if processes() == 1:
        return [own]
    parts = [torch.empty_like(own) for _ in range(processes())] if rank() == 0 else None
    distributed.gather(own.contiguous(), parts, dst=0)
    return parts


def load_state(optimizer: Optimizer, rows: Sequence[Row], saved: Mapping[str, Any]) -> None:
    """Put a single process's state into this process's rows."""
    place = places(optimizer, rows)
    groups, count = [], 0
    state: dict[int, dict[str, Any]] = {}
    for number, group in enumerate(saved["param_groups"]):
        own = [row for row in rows if row.group == number]
        groups.append({**group, "params": list(range(count, count + len(own)))})
        for row in own:
            if found := _as_row(row, place, saved["state"]):
                state[count] = found
            count += 1
    with holding(optimizer, rows):
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _as_row(row: Row, place: Mapping[int, int], saved: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """A row has all that any of its parameters has, also where none of them reaches this process."""
    every = {one: (piece.shape, saved.get(place[one], {})) for one, piece in _in_order(row).items()}
    found = {
        name: torch.zeros_like(row.held, dtype=value.dtype, requires_grad=False)
        for shape, own in every.values()
        for name, value in own.items()
        if isinstance(value, Tensor) and value.dim() and value.shape == shape
    }
    for piece in row.pieces[rank()]:
        own = every[id(piece.parameter)][1]
        for name in found.keys() & own.keys():
            stretch = own[name].reshape(-1)[piece.begin : piece.begin + piece.count]
            found[name][piece.at : piece.at + piece.count] = stretch
    return found | _counts((own for _, own in every.values()), set(found))


def _counts(every: Iterable[Mapping[str, Any]], rows: set[str]) -> dict[str, Any]:
    """What is one number for each parameter, as the steps taken, and for a row one for all."""
    found: dict[str, Any] = {}
    for name, value in (item for own in every for item in own.items()):
        if name in rows or (isinstance(value, Tensor) and value.dim()):
            continue
        if name not in found or value is None:
            found[name] = value
        elif float(value) != float(found[name]):
            rank_zero_warn(
                f"the checkpoint counts '{name}' for each parameter by itself, and DeepSpeed for all of a group"
                " together: the fit goes on with the largest"
            )
            found[name] = max(value, found[name])
    return found


@contextmanager
def holding(optimizer: Optimizer, rows: Sequence[Row]) -> Iterator[None]:
    """The optimizer with its rows for parameters; DeepSpeed's stage 3 takes them out between steps."""
    before = [group["params"] for group in optimizer.param_groups]
    for number, group in enumerate(optimizer.param_groups):
        group["params"] = [row.held for row in rows if row.group == number]
    try:
        yield
    finally:
        for group, params in zip(optimizer.param_groups, before, strict=True):
            group["params"] = params
