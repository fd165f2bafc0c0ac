"""What to adapt and how: one frozen, keyword-only dataclass, checked once.

Names are PEFT's less the `lora_` prefix, so that a config carries over by reading it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from lora_lightning.lora.errors import ConfigError, did_you_mean
from lora_lightning.lora.targets.fused_projections import Slices, SliceSpec, refuse_spec
from lora_lightning.lora.targets.patterns import regex_refusal

ALL_LINEAR = "all-linear"
INITS = ("gaussian", "kaiming", "orthogonal", "pissa", "olora", "eva", "loftq", "lora_ga")
FAST_PISSA = re.compile(r"pissa_niter_(\d+)")
"""PiSSA by a randomized SVD of this many iterations."""
Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which modules get `h = W0 x + s B A x`, with which rank and scale.

    The method is Hu et al. 2021 (arXiv 2106.09685). The scale s is `alpha / r`, or `alpha / sqrt(r)`
    with `use_rslora`.

    Raises:
        ConfigError: a field has an invalid value; the error says what was expected.
    """

    r: int = 8
    """Rank of the update: A is (r, in), B is (out, r)."""

    alpha: float | None = None
    """Numerator of the scale alpha / r. Left out, it is 2 r."""

    dropout: float = 0.0
    """Probability with which an entry of the adapter's input is zeroed in training; the input of W0 is not dropped."""

    target_modules: str | list[str] = ALL_LINEAR
    """Modules to adapt: `all-linear` (the output head left out); `query-value`, `attention` or `mlp` of a common
    transformers architecture, query and value as parts where one fused layer holds them; a list of names that a
    module's full name equals or ends in; or one regular expression that a full name matches as a whole."""

    exclude_modules: str | list[str] | None = None
    """Modules to leave alone though `target_modules` selects them; written like `target_modules`."""

    layers_to_transform: int | list[int] | None = None
    """Indices of the repeated blocks to adapt: the first number in a module's full name. Left out, all."""

    modules_to_save: list[str] | None = None
    """Modules trained in full beside the adapters, such as a new head: exact full names, or a last part that is
    unique in the model. A copy is trained; the original does not change."""

    slices: dict[str, SliceSpec] = field(default_factory=dict)
    """Parts of fused projections to adapt, each with its own A and B, by module name or regular expression; the
    longest that matches wins. `{c_attn: [q, v]}` where the layout is known (GPT-2, GPT-NeoX, Bloom, Phi-3, timm,
    nn.MultiheadAttention); elsewhere `{qkv: {of: [q, k, v], take: [q, v]}}`, with `sizes: [rows, ...]` where
    the parts differ and `heads: N` where they alternate in N blocks. Left out, a fused layer is adapted as one.
    A PEFT directory holds the parts as one adapter, of the rank of all together and with zeros, which is the same."""

    target_parameters: list[str] | None = None
    """Bare parameters to adapt, matrices or stacks of them such as experts: full names, or dotted ends of them."""

    trainable_token_indices: list[int | str] | dict[str, list[int | str]] | None = None
    """Rows of the input embedding that train in full, by token number, or by name for tokens of `huggingface`'s
    `add_tokens`; or by the embedding's name, a list for each. A head that is tied to the embedding follows."""

    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from `r`, by module name or regular expression; the longest pattern that matches wins."""

    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas that differ from `alpha`, by module name or regular expression; the longest that matches wins."""

    dropout_pattern: dict[str, float] = field(default_factory=dict)
    """Dropouts that differ from `dropout`, by module name or regular expression; the longest that matches wins."""

    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023, arXiv 2312.03732)."""

    use_dora: bool = False
    """Train a magnitude per output channel beside the direction W0 + s B A (Liu et al. 2024, arXiv 2402.09353)."""

    bias: Bias = "none"
    """Biases to train: `none`, `lora_only` (of the adapted layers) or `all` (of every module outside
    `modules_to_save`), where a bias is a parameter named `bias`, as in PEFT: `in_proj_bias`, `bias_k` and `bias_v` of
    `nn.MultiheadAttention` stay frozen. Copies are trained; the originals do not change."""

    lora_bias: bool = False
    """Give B a trained bias, scaled like B, on layers with a bias that a merge can add it to. Not with `use_dora`."""

    init: str = "gaussian"
    """How A and B start. With B zero: `gaussian`, A from N(0, 1/in), the paper's choice, scaled so that A x is as
    large as x whatever the width and the rank (PEFT's N(0, 1/r^2) is larger in wide layers and wants a smaller
    learning rate); `kaiming`, A uniform in +-1/sqrt(in), what loralib and PEFT draw; `eva`, A from the data's main
    directions. With B A not zero and subtracted, so that W0 and the first output stay: `orthogonal`; `pissa` or the
    quicker `pissa_niter_4` (any number of iterations), W0's main directions; `olora`, W0's QR; `lora_ga`, the
    gradient's main directions. `loftq` starts at the error of the base's quantization, so the first output moves
    towards the unquantized model's. `eva`, `lora_ga` and `loftq` need `inject(model, config, data=...)`."""

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern", "dropout_pattern", "slices"):
            self._set(name, _as_patterns(name, getattr(self, name)))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                _refuse_bad_regex(name, value, is_end=False)
            else:
                self._set(name, _as_list(name, value))
        for name in ("target_parameters", "modules_to_save"):
            self._set(name, _as_list(name, getattr(self, name)))
        for name, rank in self._values_of("r", "rank_pattern"):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {rank!r}")
        if self.alpha is None:
            self._set("alpha", 2.0 * self.r)
        for name, alpha in self._values_of("alpha", "alpha_pattern"):
            if not _is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:
                raise ConfigError(f"{name} must be a finite number above 0, got {alpha!r}")
        for name, dropout in self._values_of("dropout", "dropout_pattern"):
            if not _is_number(dropout) or not 0.0 <= dropout < 1.0:
                raise ConfigError(f"{name} must be at least 0 and below 1, got {dropout!r}")
        for name in ("use_rslora", "use_dora", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.init not in INITS and not FAST_PISSA.fullmatch(str(self.init)):
            raise ConfigError(
                f"init must be one of {', '.join(INITS)} or pissa_niter_<n>, got {self.init!r}"
                f"{did_you_mean(str(self.init), INITS)}"
            )
        if self.bias not in get_args(Bias):
            raise ConfigError(f"bias must be one of {', '.join(get_args(Bias))}, got {self.bias!r}")
        if self.use_dora and self.lora_bias:
            raise ConfigError(
                "use_dora and lora_bias exclude each other (no format holds both): switch one of them off"
            )
        self._refuse_bad_tokens()
        if not (self.target_modules or self.target_parameters or self.trainable_token_indices):
            raise ConfigError(f"target_modules selects nothing: write '{ALL_LINEAR}' or a list of names")
        if (layers := self.layers_to_transform) is not None:
            numbers = list(layers) if isinstance(layers, Sequence) else [layers]
            if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
                raise ConfigError(f"layers_to_transform must be block numbers from 0 on, got {layers!r}")
            self._set("layers_to_transform", numbers)
        for pattern, spec in self.slices.items():
            refuse_spec(pattern, spec)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # past the frozen dataclass, which is being made

    def _values_of(self, name: str, patterns: str) -> Iterator[tuple[str, Any]]:
        """A field's value and the values of its patterns, each with its name for errors."""
        yield name, getattr(self, name)
        for pattern, value in getattr(self, patterns).items():
            yield f"{patterns}['{pattern}']", value

    def _refuse_bad_tokens(self) -> None:
        tokens = self.trainable_token_indices
        for numbers in tokens.values() if isinstance(tokens, dict) else [tokens] if tokens is not None else []:
            wrong = isinstance(numbers, str) or not isinstance(numbers, Sequence) or not numbers
            if wrong or not all(isinstance(n, str) or (type(n) is int and n >= 0) for n in numbers):
                raise ConfigError(
                    f"trainable_token_indices must be token numbers from 0 on, got {numbers!r} (or names of add_tokens)"
                )
            if len(set(numbers)) < len(numbers):
                raise ConfigError(f"trainable_token_indices holds a token twice: {numbers!r}")

    @property
    def scaling_alpha(self) -> float:
        """`alpha` as a number: `__post_init__` has filled it in."""
        assert self.alpha is not None
        return float(self.alpha)

    def scale(self, r: int, alpha: float) -> float:
        """s in `h = W0 x + s B A x` for one layer's rank and alpha."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, as they go into a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoRAConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown field, with the nearest known one.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"LoRAConfig has no field '{name}'{did_you_mean(name, known)}")
        return cls(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_list(name: str, value: Any) -> list[str] | None:
    """Names of modules, each once, in the user's order; None stays None."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise ConfigError(f"{name} must be a list of module names, got {value!r}")
    names = sorted(value, key=str) if isinstance(value, set | frozenset) else value  # a set has no stable order
    for entry in names:
        if not isinstance(entry, str) or not entry:
            raise ConfigError(f"{name} must hold module names, got {entry!r} in {value!r}")
    return list(dict.fromkeys(names))


def _as_patterns(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must map module names or regular expressions to numbers, got {value!r}")
    for pattern in value:
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"{name} must map module names or regular expressions, got {pattern!r}")
        _refuse_bad_regex(name, pattern, is_end=True)
    return dict(value)


def _refuse_bad_regex(name: str, pattern: str, *, is_end: bool) -> None:
    if refused := regex_refusal(pattern, is_end=is_end):
        raise ConfigError(f"{name}: '{pattern}' {refused}; any text is '.*' in one")


@dataclass(frozen=True, kw_only=True)
class LayerSettings:
    """One layer's share of the config, resolved."""

    r: int
    alpha: float
    scale: float
    """s in `h = W0 x + s B A x`."""
    dropout: float
    init: str
    use_dora: bool = False
    lora_bias: bool = False
    slices: Slices | None = None
    """The parts of a fused weight that are adapted, each with its own A and B; None adapts it as one."""
    parameter: str = ""
    """The parameter that is adapted, where it is no module's `weight`."""
