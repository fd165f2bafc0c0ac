"""Merge a model that is larger than memory: from its files to new ones, tensor after tensor.

Of W0 at most one module's tensors are in memory. What the adapter does not change is copied to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_lightning.lora.errors import AdapterError, LoRAError, some
from lora_lightning.lora.formats.peft.load import AdapterFiles
from lora_lightning.lora.formats.provenance import Record, check_base, unknown_format
from lora_lightning.lora.formats.tensor_files import DTYPES, NAMES, Stored, as_bytes, sort_entries, write_file
from lora_lightning.lora.frozen.dtype import refuse_overflow
from lora_lightning.lora.meta.changes import Changes, part_as_merged
from lora_lightning.lora.meta.checkpoint import Checkpoint
from lora_lightning.lora.meta.inject import load_on_meta
from lora_lightning.lora.meta.key_mapping import Base, BaseCheck, Group, warn_of_other_base


@dataclass(frozen=True, kw_only=True)
class StreamReport:
    """What a merge from files to files did."""

    kept: dict[str, float]
    """By module, the share of the update that rounding kept, as in `MergeReport`."""
    untied: list[str]
    """Modules whose weight was shared with another module and is now their own."""
    new: list[str]
    """Keys that the base's files did not have: a head, or an untied matrix."""
    copied: int
    """Tensors that are the base's to the bit."""
    changed: int
    """Tensors that hold an update, or that the adapter brought whole."""
    size: int
    """Bytes of all tensors."""
    base_checked: bool
    """False where the adapter has no fingerprint of its base, or this is another one, which was allowed."""
    files: dict[str, list[str]] = field(default_factory=dict)
    """The keys of each file."""


class StreamedMerge:
    """One merge, planned from headers alone; `write` is what reads and writes tensors.

    Args:
        make: gives the plain model on the meta device, anew each time.
        groups: how the files' tensors make up the model's.
        dtype: of the floating-point tensors that are written; None keeps each tensor's own.
        alphas: as in `load_adapter`.

    Raises:
        AdapterError: the adapter does not fit the model.
        MergeError: it cannot be folded in.
        LoRAError: a tensor of the files has another shape than the model's, or is missing.
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
        for one in (self.plain, model):
            self.base.part_unequal(one)
        load_on_meta(model, adapter, self.base, allow_other_base=allow_other_base, alphas=alphas)
        self.check = self._check_of(adapter.record, allow_other_base=allow_other_base)
        self.changes = Changes.of(model, self.base, dtype)
        self.untied = part_as_merged(self.plain, self.changes.parts)
        self._plan()

    def _check_of(self, record: Record | None, *, allow_other_base: bool) -> BaseCheck | None:
        """What compares the base with the adapter's record of it; None, with a notice, where that cannot be done."""
        if record is None:
            check_base(None, self.plain, allow_other_base=allow_other_base)
            return None
        if unknown := unknown_format(record.base):
            if not allow_other_base:
                raise AdapterError(f"{unknown}; allow_other_base does without")
            warn_of_other_base(unknown)
            return None
        buffers = {name for name, _ in self.plain.named_buffers()}
        return BaseCheck(record.base.tensors, self.base, buffers, allow_other_base=allow_other_base)

    def _plan(self) -> None:
        """Which key goes where, and which tensors change."""
        state = {n: t for n, t in self.plain.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        shared: dict[int, list[str]] = {}
        for name, tensor in state.items():
            shared.setdefault(id(tensor), []).append(name)
        self.changed: dict[str, str] = {}
        """Name to the name of the maker that computes it: its own, or that of one that it is tied to."""
        self.new: list[str] = []
        missing: list[str] = []
        for names in shared.values():
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
                f" adapter brings none: {some(missing)}"
            )
        self.base.refuse_other_shapes(state, brought=self.changed.keys())
        files = {file: {key: self._header(key, state) for key in keys} for file, keys in self.checkpoint.files.items()}
        last = list(files)[-1]
        files[last] |= {name: self._sized(state[name].dtype, tuple(state[name].shape)) for name in self.new}
        self.files = {file: sort_entries(entries) for file, entries in files.items()}
        groups = {id(g): g for g in self.base.of_name.values()}.values()
        wanted = [name for group in groups if self._is_changed(group) for name in group.names] + self.new
        makers = [self.changed[name] for name in wanted if name in self.changed]
        self.uses = {maker: makers.count(maker) for maker in makers}
        self.made: dict[str, Tensor] = {}
        self.waiting: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        """Bytes that will be written, headers apart."""
        return sum(entry.size for entries in self.files.values() for entry in entries.values())

    def write(self, folder: Path, progress: Callable[[int], None] = lambda _: None) -> StreamReport:
        """Write every file into `folder`.

        Raises:
            AdapterError: the adapter was made on another base; the files in `folder` are then of no use.
        """
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
        own = DTYPES.get(at.dtype)
        if own is None:
            return Stored(dtype=at.dtype, shape=at.shape, size=at.size)
        alone = len(names) == 1 and len(self.base.of_key[key].stored) == 1 and names[0] in self.changed
        return self._sized(own, tuple(state[names[0]].shape) if alone else at.shape)

    def _sized(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Stored:
        dtype = self._rounded(dtype)
        return Stored(dtype=NAMES[dtype], shape=shape, size=torch.Size(shape).numel() * dtype.itemsize)

    def _rounded(self, dtype: torch.dtype) -> torch.dtype:
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

    def _tensor(self, key: str) -> Tensor:
        """What is written for a key; as bytes where it is copied."""
        group = self.base.of_key.get(key)
        if group is not None and self.check is not None:
            self.check.see(group)
        if group is None and key in self.new:
            return self._value(key)
        if group is None or not self._is_changed(group):
            dtype = DTYPES.get(self.checkpoint.stored[key].dtype)
            if group is not None and self.base.has(group) and len(group.stored) == 1:
                return group.store(self.base.load(group))[key]
            same = dtype is None or self._rounded(dtype) == dtype
            return self.checkpoint.read_bytes(key) if same else self.checkpoint.read(key)
        if key not in self.waiting:
            self.waiting |= group.store({name: self._value(name) for name in group.names})
        return self.waiting.pop(key)

    def _value(self, name: str) -> Tensor:
        """The merged tensor of a name in the model, in the dtype that its maker gives."""
        maker = self.changed.get(name)
        if maker is None:
            W0 = self.base(name)
            assert W0 is not None, name
            return W0
        if maker not in self.made:
            self.made |= self.changes.makers[maker]()
            self.base.forget()
        self.uses[maker] -= 1
        return self.made[maker] if self.uses[maker] else self.made.pop(maker)
