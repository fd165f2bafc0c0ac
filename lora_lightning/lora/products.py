"""Products with the frozen W0 by torch or by oneDNN: whichever is clearly quicker here, by measurement.

torch's float32 product on a CPU is MKL's, which on AMD takes up to twice as long as oneDNN's; its bfloat16 one is
oneDNN's own with the bias in a pass beside it. So the choice is measured at the first product of each kind in a
process: in float32 whether torch is slow on this CPU at all, then for each shape of W0 and number of rows. In bfloat16
both give the same bits.

W0 is multiplied as it lies: it is never packed or copied, so nothing has to be kept up with it. Weights packed by
oneDNN beforehand were 0 to 4% quicker at 2,048 rows, for a second copy of W0 and, for `g W0` in backward, a third.
That product reads W0 against its order in memory; where this is slow, W0 is turned for the call and let go.

Shapes: rows (..., k), matrix (m, k), in memory row by row or column by column; bias (m,).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Prepare = Literal["auto", "off", "on"]
"""`auto` measures, `off` is torch's own, `on` is oneDNN's wherever it can be had: for benchmarks and tests."""
Way = Literal["torch", "oneDNN", "oneDNN, W0 turned"]

CLEARLY = 1.25
"""How many times quicker oneDNN must be in float32, where it rounds in another way than torch, to be taken at all."""
SOMEWHAT = 1.05
"""The same for one shape, where it is so or gives the same bits as torch, as in bfloat16."""
SMALL = 2**24
"""Multiplications below which a product takes a fraction of a millisecond, and torch's own is taken."""
ROWS = {torch.float32: 128, torch.bfloat16: 512}
"""Rows at most that are measured with; the time of more is reckoned from it."""
ROUNDS = 5
TURNED = 1024
"""Rows from which turning W0 costs little beside the product, for `on`."""


class Kind(NamedTuple):
    """Products that are alike: measured once."""

    dtype: torch.dtype
    m: int
    k: int
    by_rows: bool
    """Whether the matrix lies row by row in memory."""
    has_bias: bool
    rows: int
    """The power of two above the number of rows."""
    threads: int


_chosen: dict[Kind, Way] = {}


def frozen_product(
    rows: Tensor, matrix: Tensor, bias: Tensor | None = None, *, prepare: Prepare, onto: Tensor | None = None
) -> Tensor | None:
    """`rows matrix^T + bias (+ onto)` by oneDNN, a new tensor; None where torch's own product is to be used."""
    if prepare == "off" or not _can(rows, matrix) or (prepare == "auto" and rows.numel() * len(matrix) < SMALL):
        return None
    way = _way(rows, matrix, bias, prepare)
    return None if way == "torch" else _product(way, rows, matrix, bias, onto)


def choices() -> dict[str, str]:
    """What was chosen in this process so far, in words: by kind of product (rows, k, m), what computes it.

    W0 is read by columns in the backward pass of a linear layer.
    """
    return {
        f"{str(kind.dtype).removeprefix('torch.')} {kind.rows} x {kind.k} x {kind.m}"
        f"{', bias' if kind.has_bias else ''}{'' if kind.by_rows else ', W0 by columns'}, {kind.threads} threads": way
        for kind, way in sorted(_chosen.items(), key=str)
    }


def saved_choices() -> dict[str, Any]:
    """The choices as plain data for a checkpoint: another process may measure otherwise, and round otherwise."""
    chosen = [[str(kind.dtype).removeprefix("torch."), *kind[1:], way] for kind, way in _chosen.items()]
    return {"machine": _machine(), "chosen": chosen}


def take_choices(saved: dict[str, Any]) -> None:
    """Choose as the process did that saved them, where that ran on such a machine."""
    if saved.get("machine") == _machine():
        _chosen.update({Kind(getattr(torch, dtype), *rest): way for dtype, *rest, way in saved["chosen"]})


def _way(rows: Tensor, matrix: Tensor, bias: Tensor | None, prepare: Prepare) -> Way:
    """As measured, once for each kind of product."""
    n, by_rows = rows.numel() // rows.shape[-1], matrix.stride(1) == 1
    if prepare == "on":
        return "oneDNN" if by_rows or n < TURNED else "oneDNN, W0 turned"
    power, threads, (m, k) = 1 << (n - 1).bit_length(), torch.get_num_threads(), matrix.shape
    kind = Kind(rows.dtype, m, k, by_rows, bias is not None, power, threads)
    if kind not in _chosen:
        may_gain = _torch_is_slow(threads) if kind.dtype == torch.float32 else kind.has_bias
        _chosen[kind] = _measured(matrix, bias, power, SOMEWHAT) if may_gain else "torch"
    return _chosen[kind]


@functools.cache
def _torch_is_slow(threads: int) -> bool:
    """Whether torch's float32 product is slow on this CPU: ten milliseconds for a look that saves others."""
    matrix = torch.ones(512, 512, dtype=torch.float32, device="cpu")
    return _measured(matrix, None, ROWS[torch.float32], CLEARLY) != "torch"


def _measured(matrix: Tensor, bias: Tensor | None, n: int, times_quicker: float) -> Way:
    """The quickest way for n rows; torch's unless another is so many times quicker."""
    few = min(n, ROWS[matrix.dtype])
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(few, matrix.shape[1], generator=random, device="cpu", dtype=torch.float32).to(matrix.dtype)
    turned = matrix.contiguous()
    calls: dict[str, Callable[[], Tensor]] = {
        "torch": lambda: _torchs(rows, matrix, bias),
        "oneDNN": lambda: _product("oneDNN", rows, matrix, bias),
    }
    if turned is not matrix:
        calls["oneDNN, W0 turned"] = lambda: _product("oneDNN", rows, turned, bias)
        calls["turning"] = matrix.contiguous
    try:
        passes = [{name: _seconds(call) for name, call in calls.items()} for _ in range(1 + ROUNDS)]
    except RuntimeError:  # such as bfloat16 on a CPU without it
        return "torch"
    seconds = {name: min(one[name] for one in passes[1:]) for name in calls}  # the first warms up
    times = {name: s * n / few for name, s in seconds.items() if name != "turning"}
    if "turning" in seconds:
        times["oneDNN, W0 turned"] += seconds["turning"]
    own = times.pop("torch")
    best = min(times, key=times.__getitem__)
    return best if own > times_quicker * times[best] else "torch"  # type: ignore[return-value]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _torchs(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rows, matrix, bias)


def _product(way: Way, rows: Tensor, matrix: Tensor, bias: Tensor | None, onto: Tensor | None = None) -> Tensor:
    matrix, linear = matrix if way == "oneDNN" else matrix.contiguous(), _operator()
    assert linear is not None
    found: Tensor = (
        linear(rows, matrix, bias, "none", [], "") if onto is None else linear.binary(rows, onto, matrix, bias, "add")
    )
    return found


@functools.cache
def _operator() -> Any:
    """oneDNN's linear layer, which torch's own compiler calls; None in builds without it."""
    try:
        return torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return None


def _can(rows: Tensor, matrix: Tensor) -> bool:
    """Whether oneDNN can compute this, and to the precision of its dtype."""
    return (
        rows.device.type == "cpu"
        and matrix.device.type == "cpu"
        and rows.dtype == matrix.dtype
        and (rows.dtype == torch.bfloat16 or (rows.dtype == torch.float32 and _is_strict()))
        and 1 in matrix.stride()
        and rows.numel() > 0
        and matrix.numel() > 0
        and _operator() is not None
        and torch._C._get_mkldnn_enabled()
    )


def _is_strict() -> bool:
    """Whether float32 is float32: a user may allow oneDNN bfloat16 inside, and torch's own product then takes it."""
    return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]


@functools.cache
def _machine() -> str:
    """What choices depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
