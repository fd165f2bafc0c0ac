"""Merge a model that is larger than memory: from its files to new ones, tensor by tensor.

At most one module's tensors of W0 are in memory. Tensors that the adapter does not change are copied bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError, MergeError, first_few
from lora_lightning.lora.formats.atomic_dir import write_bytes
from lora_lightning.lora.formats.peft.load import AdapterFiles, load_files
from lora_lightning.lora.formats.provenance import warn_of_no_fingerprint
from lora_lightning.lora.formats.tensor_files import DTYPES, Checkpoint, Stored, as_bytes, file_pieces, sort_entries
from lora_lightning.lora.frozen.dtype import refuse_overflow
from lora_lightning.lora.frozen.tensors import full_name
from lora_lightning.lora.frozen.tied_weights import shared_parameters, untie_config, untied_since
from lora_lightning.lora.inject import grafted_modules
from lora_lightning.lora.layers import AdaptedLayer, Grafted, SavedCopy, TokenRows, TrainedBias
from lora_lightning.lora.merge import fold
from lora_lightning.lora.merge_refusals import refuse
from lora_lightning.lora.meta.empty_model import adapted_names, make_adapter_real, start_from_present
from lora_lightning.lora.meta.key_mapping import Base, BaseCheck, Group, names_by_tensor, swap_tensors


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
        groups: Sequence[Group],
        adapter: AdapterFiles,
        *,
        dtype: torch.dtype | None = None,
        allow_other_base: bool = False,
        alphas: Mapping[str, float] | None = None,
    ) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        self.plain, self.model = make(), make()
        self.base = Base(checkpoint, groups, self.plain)
        for either in (self.plain, self.model):
            self.base.untie_unequal(either)
        options: dict[str, Any] = {"allow_other_base": allow_other_base, "alphas": alphas}
        load_files(self.model, adapter, read=self.base, make_real=make_adapter_real, **options)
        self.check: BaseCheck | None = None
        if adapter.record is None:
            warn_of_no_fingerprint()
        else:
            buffers, expected = dict(self.plain.named_buffers()), adapter.record.base.tensors
            self.check = BaseCheck(expected, self.base, buffers, allow_other_base=allow_other_base)
        refuse(self.model)
        self.kept: dict[str, float] = {}
        """By module, the share of the update that rounding kept; filled while tensors are computed."""
        self.makers: dict[str, Callable[[], dict[str, Tensor]]] = {}
        """By a tensor's name in the model, the function that computes it and those that belong together with it."""
        parts: dict[str, Hashable] = {}
        for path, module in grafted_modules(self.model):
            parts |= self._find_changes(path, module)
        self.untied = self._untie(parts)
        self._plan()

    def _untie(self, parts: Mapping[str, Hashable]) -> list[str]:
        """Give the plain model the merged one's ties and config, as in `merge`; returns the modules that it untied.

        A tensor that is adapted or replaced is no longer shared, but with those of an equal identity in `parts`.
        """
        ties, before = shared_parameters(self.plain), dict(self.plain.named_parameters(remove_duplicate=False))
        fresh = dict[Hashable, Tensor]()
        replaced = {name: part for name, part in parts.items() if name in before}  # else a buffer, which is not tied
        new = {name: fresh.setdefault(part, torch.empty_like(before[name])) for name, part in replaced.items()}
        swap_tensors(self.plain, new)
        if untied := untied_since(self.plain, ties):
            untie_config(self.plain)
        return untied

    def _find_changes(self, path: str, module: Grafted) -> dict[str, Hashable]:
        """Add a module's tensors to `makers`; returns, for each that a merge replaces, the identity of the new one."""
        if isinstance(module, SavedCopy):
            copies = {full_name(path, k): t for k, t in module.lora_copy.state_dict(keep_vars=True).items()}
            self.makers |= {name: functools.partial(dict, {name: copy.detach()}) for name, copy in copies.items()}
            return {name: id(copy) for name, copy in copies.items()}
        parts: dict[str, Hashable] = {}
        if isinstance(module, AdaptedLayer):
            parts |= {name: (id(module), key) for key, name in adapted_names(path, module).items()}
            parts |= {full_name(path, "bias"): id(module)} if module.lora_B_bias is not None else {}
        if isinstance(module, TrainedBias):
            parts[full_name(path, "bias")] = id(module.lora_trained_bias)
        names = [*parts, full_name(path, "weight")] if isinstance(module, TokenRows) else [*parts]
        self.makers |= dict.fromkeys(names, functools.partial(self._fold, path, module, names))
        return parts

    @torch.no_grad()
    def _fold(self, path: str, module: Grafted, names: list[str]) -> dict[str, Tensor]:
        """The merged tensors with these names of one module, whose W0 is loaded for the moment; rounded once."""
        weights = adapted_names(path, module).values() if isinstance(module, AdaptedLayer) else ()
        W0 = {name: self._must_read(name, wide=name not in weights) for name in names}
        before = swap_tensors(self.model, W0)
        try:
            if isinstance(module, AdaptedLayer):
                start_from_present(module)
            share = fold(path, module, {}, self.dtype)
            if isinstance(module, AdaptedLayer) and share is not None:
                self.kept[module.lora_name(path)] = share
        finally:
            merged = swap_tensors(self.model, before)
        return {name: tensor.detach() for name, tensor in merged.items()}

    def _must_read(self, name: str, *, wide: bool) -> Tensor:
        """W0's tensor; with `wide` in the wider of its dtype and the results', so that it is rounded once."""
        tensor = self.base(name)
        if tensor is None:
            raise MergeError(f"the files have no '{name}', which the adapter changes")
        return tensor.to(torch.promote_types(tensor.dtype, self.dtype)) if wide and self.dtype else tensor

    def _plan(self) -> None:
        """Decide the keys of each file, and which tensors change."""
        state = self.plain.state_dict(keep_vars=True)
        self.changed: dict[str, str] = {}
        """By name, the key in `makers` that computes it: the name itself, or one that it is tied to."""
        self.new: list[str] = []
        missing: list[str] = []
        for names in names_by_tensor(self.plain):
            maker = next((name for name in names if name in self.makers), None)
            self.changed |= {} if maker is None else dict.fromkeys(names, maker)
            if any(name in self.base.of_name for name in names):
                continue
            if maker is not None or self.base.source(names[0]) is not None:
                self.new.append(names[0])
            elif isinstance(state[names[0]], nn.Parameter):
                missing.append(names[0])
        if missing:
            without = f"{len(missing)} tensors of {type(self.plain).__name__}"
            raise LoRAError(f"the base's files and the adapter have no values for {without}: {first_few(missing)}")
        self.base.refuse_other_shapes(state, brought=self.changed.keys())
        keys = {file: list(keys) for file, keys in self.checkpoint.files.items()}
        list(keys.values())[-1].extend(self.new)
        self.files = {file: sort_entries(self._entry(key, state) for key in each) for file, each in keys.items()}
        grouped = {name for group in self.base.of_key.values() if self._is_changed(group) for name in group.names}
        self.wanted = (grouped | {*self.new}) & self.changed.keys()
        """The changed names that are written."""
        self.made: dict[str, Tensor] = {}
        self.waiting: dict[str, Tensor] = {}
        """Tensors that were computed with another one and not written yet: by name in the model (`made`), and by key
        in the files (`waiting`)."""

    def _entry(self, key: str, state: Mapping[str, Tensor]) -> Stored:
        """The header's entry of a key in the new files; a key that the base's files lack is the tensor's name."""
        at, group = self.checkpoint.stored.get(key), self.base.of_key.get(key)
        if at is not None and at.dtype not in DTYPES:
            return at
        dtype = state[key].dtype if at is None else DTYPES[at.dtype]
        dtype = self.dtype if self.dtype is not None and dtype.is_floating_point else dtype
        like = state[key] if at is None else at
        if group is not None and group.is_alone and self._is_changed(group):  # a head may have another shape now
            like = state[group.names[0]]
        return Stored.of(key, dtype, like.shape)

    @property
    def size(self) -> int:
        """Bytes that will be written, headers apart."""
        return sum(entry.size for entries in self.files.values() for entry in entries.values())

    def write(self, folder: Path, progress: Callable[[int], None] = lambda _: None) -> StreamReport:
        """Write every file into `folder`; an AdapterError where the base is another, whose files are then useless."""
        for file, entries in self.files.items():
            bytes_of = functools.partial(self._bytes, entries, progress)
            write_bytes(folder / file, file_pieces(entries, self.checkpoint.metadata[file], bytes_of))
            if self.check is not None:
                self.check.refuse(whole=file == list(self.files)[-1])
        keys = [key for entries in self.files.values() for key in entries]
        changed = sum(key in self.new or self._is_changed(self.base.of_key.get(key)) for key in keys)
        return StreamReport(
            kept=self.kept,
            untied=self.untied,
            new=self.new,
            copied=len(keys) - changed,
            changed=changed,
            size=self.size,
            base_checked=self.check is not None and self.check.is_the_base,
            files={file: list(entries) for file, entries in self.files.items()},
        )

    def _is_changed(self, group: Group | None) -> bool:
        return group is not None and any(name in self.changed for name in group.names)

    def _bytes(self, entries: Mapping[str, Stored], progress: Callable[[int], None], key: str) -> Tensor:
        """The bytes to write for a key."""
        entry = entries[key]
        data = self._tensor(key, entry)
        if data.dtype != torch.uint8 or entry.dtype == "U8":
            refuse_overflow(f"'{key}'", data, DTYPES[entry.dtype])
            data = as_bytes(data.to(DTYPES[entry.dtype]))
        assert data.numel() == entry.size, key
        progress(entry.size)
        return data

    def _tensor(self, key: str, entry: Stored) -> Tensor:
        """The tensor to write for a key; as bytes where it is copied."""
        group, at = self.base.of_key.get(key), self.checkpoint.stored.get(key)
        if group is not None and self.check is not None:
            self.check.see(group)
        if at is None:
            return self._value(key)
        if group is None or not self._is_changed(group):
            if group is not None and self.check is not None and len(group.stored) == 1:
                return group.store(self.base.load(group))[key]  # it is in memory
            return at.read_bytes() if at.dtype == entry.dtype else at.read()
        if key not in self.waiting:
            self.waiting |= group.store({name: self._value(name) for name in group.names})
        return self.waiting.pop(key)

    def _value(self, name: str) -> Tensor:
        """The merged tensor with this name in the model, in the dtype in which it was computed."""
        maker = self.changed.get(name)
        if maker is None:
            return self._must_read(name, wide=False)
        if name not in self.made:
            merged = self.makers[maker]()
            self.base.forget()
            self.made |= {n: merged[source] for n in self.wanted if (source := self.changed[n]) in merged}
        return self.made.pop(name)
