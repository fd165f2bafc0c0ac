"""Several adapters over one frozen base: one of them is in the model at a time, or each row of a batch has one.

The layers do not depend on the bank. An inactive adapter is stored outside the model with its classes, settings and
tensors (`detached.py`), so that two adapters may differ in everything: rank, targets, options, heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_lightning.lora.bank import combine, detached
from lora_lightning.lora.bank.combine import Combination
from lora_lightning.lora.bank.detached import Share
from lora_lightning.lora.bank.mixed_batch import Batch, mixed_batch
from lora_lightning.lora.errors import AdapterError, LoRAError, did_you_mean
from lora_lightning.lora.formats.peft.load import load_adapter
from lora_lightning.lora.formats.peft.save import save_adapter
from lora_lightning.lora.frozen.fingerprint import base_versions, refuse_moved
from lora_lightning.lora.frozen.quantization import hold_packing
from lora_lightning.lora.inject import disabled, inject
from lora_lightning.lora.layers import Grafted
from lora_lightning.lora.report import InjectionReport


class AdapterBank:
    """Many adapters for `model`, whose W0 is never copied and never written into.

    At most one adapter is in the model, the active one: `model(x)` computes with it, an optimizer trains it, `merge`
    and `save_adapter` use it, as if it were the only one.

    Args:
        model: plain, or adapted: its adapter is then the bank's first, and active.
        first: the name of that first adapter.
        device: where inactive adapters are stored; left out, they stay where they are.
    """

    def __init__(self, model: nn.Module, *, first: str = "default", device: torch.device | str | None = None) -> None:
        model = model._modules.get("_orig_mod") or model  # torch.compile(model) is a wrapper
        self.model = model
        self.device = None if device is None else torch.device(device)
        self._held: dict[str, list[Share]] = {}
        self._active: str | None = None
        self._within: str | None = None
        self._batch_first: set[str] = set()
        hold_packing(model)  # which would round the base, also while it is plain
        self._base = base_versions(model)
        if detached.find_adapter(model):
            self.add(first)

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy`, of a bank whose W0 has not moved: the copy watches the W0 of its own model."""
        refuse_moved(self.model, self._base)
        return {name: value for name, value in vars(self).items() if name != "_base"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._base = base_versions(self.model)

    @property
    def names(self) -> list[str]:
        """The names of all adapters, in the order in which they were added."""
        return list(self._held)

    @property
    def active(self) -> str | None:
        """The adapter that the model computes with; None for the plain base."""
        self._check_model()
        return self._active

    def load(
        self,
        name: str,
        directory: str | Path,
        *,
        allow_other_base: bool = False,
        alphas: Mapping[str, float] | None = None,
    ) -> InjectionReport:
        """Read a PEFT directory as `load_adapter` does, and add it to the bank. The active adapter stays active.

        Args:
            allow_other_base, alphas: as for `load_adapter`.

        Raises:
            AdapterError: as `load_adapter`; or the name is taken. The bank is then unchanged.
        """
        self._refuse_taken(name)
        with self._plain_model("load"):
            report = load_adapter(self.model, directory, allow_other_base=allow_other_base, alphas=alphas)
            self._held[name] = detached.take_out(self.model, self.device)
        return report

    def save(
        self,
        name: str,
        directory: str | Path,
        *,
        base_model_name_or_path: str | None = None,
        task_type: str | None = None,
        serving: Literal["vllm"] | None = None,
    ) -> Path:
        """Write an adapter as `save_adapter` does, with the same options. The active adapter stays active."""
        self._find(name)
        with self._plain_model("save"):
            self._switch(name)
            named = base_model_name_or_path
            return save_adapter(
                self.model, directory, base_model_name_or_path=named, task_type=task_type, serving=serving
            )

    def add(self, name: str) -> None:
        """Add the adapter that the model has now, which becomes the active one.

        Raises:
            LoRAError: the model has no adapter, or the bank has it already.
        """
        self._refuse_taken(name)
        self._refuse_within("add")
        refuse_moved(self.model, self._base)
        held = detached.find_adapter(self.model)
        if not held:
            raise LoRAError("the model has no adapter to add: inject(model, config) first, or load a directory")
        if self._active is not None and self._in_place(self._active):
            raise LoRAError(f"the model's adapter is held already, as '{self._active}'")
        self._held[name], self._active = held, name

    def activate(self, name: str | None) -> None:
        """Put the adapter `name` into the model in place of the active one; None leaves the plain base.

        Nothing is loaded, allocated or initialized: parameters are the same objects as when it was last active, so that
        trained values stay, and an optimizer of them can go on. Child modules of the adapter get the mode (train or
        eval) of the modules they belong to.

        Raises:
            LoRAError: no such adapter; the base moved; the model has an adapter that the bank does not hold.
        """
        self._refuse_within("activate")
        if name is not None:
            self._find(name)
        self._switch(name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes as the plain base."""
        self._refuse_within("disabled")
        self._check_model()
        with self._block("disabled"), disabled(self.model):
            yield

    @contextmanager
    def rows(self, names: Sequence[str | None], *, repeats: int = 1) -> Iterator[None]:
        """Within the block row i of each batch is computed with the adapter `names[i]`, or with the base for None.

        For eval mode and without gradients. Rows must be the first dimension of every adapted layer's input; a layer
        with another input, such as rows and positions flattened into one dimension, is refused by name when it runs.

        Args:
            names: one for each row of the batch.
            repeats: how often each row is repeated consecutively, as beams and returned sequences are in `generate`.

        Raises:
            LoRAError: no such adapter; train mode; an adapter or a model that cannot be computed row by row. In a
                forward: a layer whose first dimension is not that of the rows.
        """
        if isinstance(names, str) or not list(names):
            raise LoRAError(f"rows must name an adapter or None for every row of the batch, got {names!r}")
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise LoRAError(f"repeats must be a whole number of at least 1, got {repeats!r}")
        several = len(set(names)) > 1  # else the one adapter is activated for all rows
        sources = {name: self._find(name) for name in names if name is not None}
        sources = sources if several else {}
        with self._plain_model("rows"):
            self._switch(None if several else names[0])
            try:
                for held in sources.values():
                    detached.to_modules(held)
                with self._block("rows"), mixed_batch(self.model, sources, Batch(names, repeats, self._batch_first)):
                    yield
            finally:
                for held in sources.values():
                    detached.to_device(held, self.device)

    def remove(self, name: str) -> None:
        """Remove an adapter from the bank; if it was active, the model is the plain base."""
        self._refuse_within("remove")
        self._find(name)
        if self.active == name:
            self._switch(None)
        del self._held[name]

    def combine(
        self,
        name: str,
        weights: Mapping[str, float],
        method: str = "concat",
        *,
        rank: int | None = None,
        **removed: Any,
    ) -> Combination:
        """Add a new adapter made of others: the weighted sum `sum_i w_i s_i B_i A_i` of their updates.

        A module that only some of them adapt gets the sum of those. A head that trained in full is copied where all
        adapters that have it agree.

        Args:
            method: `concat` is exact, and its rank is the sum of the ranks; `svd` is the best approximation of `rank`.
            removed: options of methods in earlier versions, each refused.

        Raises:
            LoRAError: there is no such adapter, or these cannot be combined so. The bank is then unchanged.
        """
        self._refuse_taken(name)
        combine.check_request(weights, self.names, method, rank, removed)
        with self._plain_model("combine"):
            sources = {}
            for source in weights:
                self._switch(source)
                sources[source] = combine.read_adapter(source, self.model)
            self._switch(None)
            combined = combine.combine_adapters(sources, weights, rank)
            inject(self.model, combine.config_of(combined), run_init=False, any_rank=True)
            try:
                combine.fill(self.model, combined)
            finally:
                held = detached.take_out(self.model, self.device)
            self._held[name] = held
        return combine.report(combined, method)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        tensors = {name: {t for share in held for t in share.tensors()} for name, held in self._held.items()}
        sizes = ", ".join(f"{name} ({sum(t.nbytes for t in own) / 2**20:.1f} MiB)" for name, own in tensors.items())
        return f"AdapterBank({sizes or 'empty'}; active: {self._active})"

    # Adapters in and out of the model.

    @contextmanager
    def _plain_model(self, what: str) -> Iterator[None]:
        """Within the block the model is plain; afterwards the active adapter is back. `what` names the caller."""
        self._refuse_within(what)
        before = self.active
        self._switch(None)
        try:
            yield
        finally:
            self._switch(before)

    @contextmanager
    def _block(self, what: str) -> Iterator[None]:
        """Within the block the bank refuses what changes the model."""
        self._within = what
        try:
            yield
        finally:
            self._within = None

    def _switch(self, name: str | None) -> None:
        self._check_model()
        if name == self._active:
            return
        if name is not None:
            detached.refuse_replaced(self.model, self._held[name])  # before the active adapter is taken out
        before, self._active = self._active, None
        if before is not None:
            self._held[before] = detached.take_out(self.model, self.device)
        if name is None:
            return
        try:
            detached.put_in(self.model, self._held[name])
        except BaseException:
            detached.to_device(self._held[name], self.device)
            if before is not None:
                detached.put_in(self.model, self._held[before])
                self._active = before
            raise
        self._active = name

    def _check_model(self) -> None:
        """Raise unless the model is as the bank left it: W0 unchanged, its adapter the active one."""
        refuse_moved(self.model, self._base)
        if not any(isinstance(module, Grafted) for module in self.model.modules()):
            self._active = None  # remove(model) took it out; the bank still has it
            hold_packing(self.model)
        elif not self._within and not (self._active and self._in_place(self._active)):
            raise AdapterError("the model has an adapter that the bank does not hold: bank.add(name), or remove(model)")

    def _in_place(self, name: str) -> bool:
        return all(share.holds_same() for share in self._held[name])

    def _refuse_within(self, what: str) -> None:
        if self._within:
            raise LoRAError(f"{what}: not within `with bank.{self._within}(...)`: leave the block first")

    def _refuse_taken(self, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise AdapterError(f"an adapter's name must be a text, got {name!r}")
        if name in self._held:
            raise AdapterError(f"the bank holds '{name}' already: remove it first, or take another name")

    def _find(self, name: str) -> list[Share]:
        if name not in self._held:
            known = ", ".join(self._held) or "none"
            raise AdapterError(f"the bank holds no '{name}', it has {known}{did_you_mean(str(name), self._held)}")
        return self._held[name]
