"""Merge a model that is larger than memory: from its files to new ones, tensor by tensor.

At most one module's tensors of W0 are in memory. Tensors that the adapter does not change are copied bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError, MergeError, first_few
from lora_lightning.lora.formats.peft.load import AdapterFiles, load_files
from lora_lightning.lora.formats.peft.resolve import Read
from lora_lightning.lora.formats.provenance import warn_of_no_fingerprint
from lora_lightning.lora.formats.tensor_files import DTYPES, NAMES, Stored, as_bytes, sort_entries, write_file
from lora_lightning.lora.frozen.dtype import refuse_overflow
from lora_lightning.lora.frozen.tensors import full_name
from lora_lightning.lora.frozen.tied_weights import shared_parameters, untie_config, untied_since
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import AdaptedLayer, Grafted, SavedCopy, TokenRows, TrainedBias
from lora_lightning.lora.merge import fold
from lora_lightning.lora.merge_refusals import refuse, refuse_codes
from lora_lightning.lora.meta.checkpoint import Checkpoint
from lora_lightning.lora.meta.inject import adapted_names, hold_tensors, make_adapter_real, place_of, start_from_present
from lora_lightning.lora.meta.key_mapping import Base, BaseCheck, Group, names_by_tensor


@dataclass(frozen=True, kw_only=True)
class StreamReport:
    """The result of a merge from files to files."""

    kept: dict[str, float]
    """By module, the share of the update that rounding kept, as in `MergeReport`."""
    untied: list[str]
    """Modules that shared a weight with another module and no longer do."""
    new: list[str]
    """Keys that the base's files did not have: a head, or an untied matrix."""
    copied: int
    """The number of tensors that equal the base's, bit for bit."""
    changed: int
    """The number of tensors with an update, or that the adapter holds whole."""
    size: int
    base_checked: bool
    """False where the adapter has no fingerprint of its base, or another base was allowed."""
    files: dict[str, list[str]] = field(default_factory=dict)


class StreamedMerge:
    """One merge, planned from the files' headers; only `write` reads and writes tensors.

    Args:
        make: makes a new plain model on the meta device.
        groups: how the files' tensors make up the model's.
        dtype: of the written floating-point tensors; None keeps each tensor's.

    Raises:
        LoRAError: the adapter does not fit the model or cannot be folded, or a tensor of the files is not the model's.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        checkpoint: Checkpoint,
        groups: list[Group],
        adapter: AdapterFiles,
        *,
        dtype: torch.dtype | None = None,
        allow_other_base: bool = False,
        alphas: Mapping[str, float] | None = None,
    ) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.plain, model = make(), make()
        self.base = Base(checkpoint, groups, self.plain)
        for either in (self.plain, model):
            self.base.untie_unequal(either)
        options: dict[str, Any] = {"allow_other_base": allow_other_base, "alphas": alphas}
        load_files(model, adapter, read=self.base, make_real=make_adapter_real, **options)
        self.check: BaseCheck | None = None
        if adapter.record is None:
            warn_of_no_fingerprint()
        else:
            buffers = {name for name, _ in self.plain.named_buffers()}
            expected = adapter.record.base.tensors
            self.check = BaseCheck(expected, self.base, buffers, allow_other_base=allow_other_base)
        self.changes = Changes(model, self.base, dtype)
        self.untied = apply_ties(self.plain, self.changes.parts)
        self._plan()

    def _plan(self) -> None:
        """Decide the keys of each file, and which tensors change."""
        state = self.plain.state_dict(keep_vars=True)
        self.changed: dict[str, str] = {}
        """By name, the key in `changes.makers` that computes it: the name itself, or one that it is tied to."""
        self.new: list[str] = []
        missing: list[str] = []
        for names in names_by_tensor(self.plain):
            maker = next((name for name in names if name in self.changes.makers), None)
            self.changed |= {} if maker is None else dict.fromkeys(names, maker)
            if any(name in self.base.of_name for name in names):
                continue
            if maker is not None or self.base.source(names[0]) is not None:
                self.new.append(names[0])
            elif isinstance(state[names[0]], nn.Parameter):
                missing.append(names[0])
        if missing:
            raise LoRAError(
                f"the base's files have no values for {len(missing)} tensors of {type(self.plain).__name__}, and the"
                f" adapter brings none: {first_few(missing)}"
            )
        self.base.refuse_other_shapes(state, brought=self.changed.keys())
        files = {file: {key: self._header(key, state) for key in keys} for file, keys in self.checkpoint.files.items()}
        last = list(files)[-1]
        files[last] |= {name: self._stored_size(state[name].dtype, tuple(state[name].shape)) for name in self.new}
        self.files = {file: sort_entries(entries) for file, entries in files.items()}
        groups = {id(group): group for group in self.base.of_name.values()}.values()
        written = [name for group in groups if self._is_changed(group) for name in group.names] + self.new
        self.wanted = [name for name in written if name in self.changed]
        """The changed names that are written, each once."""
        self.made: dict[str, Tensor] = {}
        self.waiting: dict[str, Tensor] = {}
        """Tensors that were computed with another one and not written yet: by name in the model (`made`), and by key
        in the files (`waiting`)."""

    @property
    def size(self) -> int:
        """Bytes that will be written, headers apart."""
        return sum(entry.size for entries in self.files.values() for entry in entries.values())

    def write(self, folder: Path, progress: Callable[[int], None] = lambda _: None) -> StreamReport:
        """Write every file into `folder`; an AdapterError where the base is another, whose files are then useless."""
        for file, entries in self.files.items():
            write_file(folder / file, entries, self.checkpoint.metadata[file], self._bytes(entries), progress)
            if self.check is not None:
                self.check.refuse(whole=file == list(self.files)[-1])
        changed = sum(any(n in self.changed for n in self._names(key)) for e in self.files.values() for key in e)
        return StreamReport(
            kept=self.changes.kept,
            untied=self.untied,
            new=self.new,
            copied=sum(map(len, self.files.values())) - changed,
            changed=changed,
            size=self.size,
            base_checked=self.check is not None and self.check.is_the_base,
            files={file: list(entries) for file, entries in self.files.items()},
        )

    def _header(self, key: str, state: dict[str, Tensor]) -> Stored:
        at, names = self.checkpoint.stored[key], self._names(key)
        dtype = DTYPES.get(at.dtype)
        if dtype is None:
            return Stored(dtype=at.dtype, shape=at.shape, size=at.size)
        alone = len(names) == 1 and len(self.base.of_key[key].stored) == 1 and names[0] in self.changed
        return self._stored_size(dtype, tuple(state[names[0]].shape) if alone else at.shape)

    def _stored_size(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Stored:
        dtype = self._target_dtype(dtype)
        return Stored(dtype=NAMES[dtype], shape=shape, size=torch.Size(shape).numel() * dtype.itemsize)

    def _target_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def _names(self, key: str) -> tuple[str, ...]:
        group = self.base.of_key.get(key)
        return group.names if group else (key,) if key in self.new else ()

    def _is_changed(self, group: Group) -> bool:
        return any(name in self.changed for name in group.names)

    def _bytes(self, entries: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
        for key, entry in entries.items():
            data = self._tensor(key)
            if data.dtype != torch.uint8 or entry.dtype == "U8":
                refuse_overflow(f"'{key}'", data, DTYPES[entry.dtype])
                data = as_bytes(data.to(DTYPES[entry.dtype]))
            yield key, data
            del data

    def _tensor(self, key: str) -> Tensor:
        """The tensor to write for a key; as bytes where it is copied."""
        group = self.base.of_key.get(key)
        if group is not None and self.check is not None:
            self.check.see(group)
        if group is None and key in self.new:
            return self._value(key)
        if group is None or not self._is_changed(group):
            dtype = DTYPES.get(self.checkpoint.stored[key].dtype)
            if group is not None and self.base.has(group) and len(group.stored) == 1:
                return group.store(self.base.load(group))[key]
            same = dtype is None or self._target_dtype(dtype) == dtype
            return self.checkpoint.read_bytes(key) if same else self.checkpoint.read(key)
        if key not in self.waiting:
            self.waiting |= group.store({name: self._value(name) for name in group.names})
        return self.waiting.pop(key)

    def _value(self, name: str) -> Tensor:
        """The merged tensor with this name in the model, in the dtype in which it was computed."""
        maker = self.changed.get(name)
        if maker is None:
            W0 = self.base(name)
            assert W0 is not None, name
            return W0
        if name not in self.made:
            merged = self.changes.makers[maker]()
            self.base.forget()
            self.made |= {n: merged[source] for n in self.wanted if (source := self.changed[n]) in merged}
        return self.made.pop(name)


class Changes:
    """The tensors that a merge changes, computed one module at a time by the arithmetic of `merge`.

    The model is on the meta device and has a real adapter; results are rounded once, to `dtype` or each tensor's own.
    """

    def __init__(self, model: nn.Module, read: Read, dtype: torch.dtype | None) -> None:
        refuse(model)
        self.model, self.read, self.dtype = model, read, dtype
        self.kept: dict[str, float] = {}
        """By module, the share of the update that rounding kept; filled while tensors are computed."""
        self.makers: dict[str, Callable[[], dict[str, Tensor]]] = {}
        """By a tensor's name in the model, the function that computes it and those that belong together with it."""
        self.parts: dict[str, Hashable] = {}
        """For each tensor that a merge replaces, the identity of the new one: names with equal values stay tied."""
        for path, module in grafted_modules(model):
            if not isinstance(module, SavedCopy):
                self._add(path, module)
                continue
            for key, tensor in module.lora_copy.state_dict(keep_vars=True).items():
                name = full_name(path, key)
                self.makers[name] = lambda n=name, t=tensor: {n: t.detach()}  # type: ignore[misc]
                self.parts[name] = id(tensor)

    def _add(self, path: str, module: Grafted) -> None:
        parts: dict[str, Hashable] = {}
        if isinstance(module, AdaptedLayer):
            parts |= {name: (id(module), key) for key, name in adapted_names(path, module).items()}
            parts |= {full_name(path, "bias"): id(module)} if module.lora_B_bias is not None else {}
        if isinstance(module, TrainedBias):
            parts[full_name(path, "bias")] = id(module.lora_trained_bias)
        names = [*parts, full_name(path, "weight")] if isinstance(module, TokenRows) else [*parts]
        self.parts |= parts
        self.makers |= dict.fromkeys(names, lambda: self._fold(path, module, names))

    @torch.no_grad()
    def _fold(self, path: str, module: Grafted, names: list[str]) -> dict[str, Tensor]:
        """The merged tensors with these names of one module, whose W0 is loaded for the moment."""
        weights = adapted_names(path, module).values() if isinstance(module, AdaptedLayer) else ()
        W0 = {name: self._must_read(name, wide=name not in weights) for name in names}
        with hold_tensors(self.model, W0):
            if isinstance(module, AdaptedLayer):
                refuse_codes(module.lora_name(path), module)
                start_from_present(module)
            share = fold(path, module, {}, self.dtype)
            if isinstance(module, AdaptedLayer) and share is not None:
                self.kept[module.lora_name(path)] = share
            places = {name: place_of(self.model, name) for name in names}
            return {name: store[key].detach() for name, (store, key) in places.items()}

    def _must_read(self, name: str, *, wide: bool) -> Tensor:
        """W0's tensor; with `wide` in the wider of its dtype and the results', so that it is rounded once."""
        tensor = self.read(name)
        if tensor is None:
            raise MergeError(f"the files have no '{name}', which the adapter changes")
        return tensor.to(torch.promote_types(tensor.dtype, self.dtype)) if wide and self.dtype else tensor


def apply_ties(plain: nn.Module, parts: Mapping[str, Hashable]) -> list[str]:
    """Give a plain model on the meta device the merged model's ties and config; returns the modules that it untied.

    As in `merge`, a tensor that is adapted or replaced is no longer shared; `parts` as in `Changes`.
    """
    ties = shared_parameters(plain)
    fresh: dict[Hashable, nn.Parameter] = {}
    for name, part in parts.items():
        module, _, key = name.rpartition(".")
        place = plain.get_submodule(module)._parameters
        before = place.get(key)
        if before is not None:  # else a buffer, which is not tied
            place[key] = fresh.setdefault(part, nn.Parameter(torch.empty_like(before), requires_grad=False))
    untied = untied_since(plain, ties)
    if untied:
        untie_config(plain)
    return untied
