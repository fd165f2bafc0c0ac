"""DeepSpeed's ZeRO-3 for `LoRAModule`: W0 and the adapter lie in parts too, and modules are gathered as they run."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lora_lightning.lora.errors import LoRAError, some
from lora_lightning.lora.frozen.quantization import scheme
from lora_lightning.lora.inject import saved_copies
from lora_lightning.training.distributed import processes, rank
from lora_lightning.training.strategies.evaluation import EvaluatesTogether
from lora_lightning.training.strategies.wrapping import is_sharded, local
from lora_lightning.training.zero2_strategy import ZeRO2Strategy, same_everywhere
from lora_lightning.training.zero_engine import engine_for
from lora_lightning.training.zero_parts import Row, rows_of_stage_3
from lora_lightning.training.zero_whole import PARTITIONED, zero_part, zero_whole


class ZeRO3Strategy(EvaluatesTogether, ZeRO2Strategy):
    """As `ZeRO2Strategy`; of W0 and of the adapter too each process keeps a part, and gathers module by module.

    Raises:
        LoRAError: an option that is not there.
    """

    stage = 3
    zero_stage_3 = True
    """What `RankTelemetry` asks."""

    def rows(self) -> list[Row]:
        """What each process's optimizer holds."""
        return rows_of_stage_3(self._zero)

    def setup(self, trainer: Trainer) -> None:
        """Cut the model into parts, in evaluation too."""
        self._refuse()
        backbone = self._module.backbone
        gather_whole(narrowed_copies(backbone))
        if trainer.state.fn == TrainerFn.FITTING:
            super().setup(trainer)
        else:
            assert self.accelerator is not None
            self.accelerator.setup(trainer)
            self.precision_plugin.convert_module(self._module)
            self.model_to_device()
            self.configure_ddp()
            self._local_rank()
            self._engine = engine_for(self._module, None, self._config())
            self.setup_precision_plugin()
        PARTITIONED.add(backbone)
        generates_together(backbone)
        if trainer.state.fn == TrainerFn.FITTING:
            self._module.w0_fingerprint()  # by all: later one process may ask alone

    def teardown(self) -> None:
        """The model stays in parts."""
        if self.lightning_module is not None:
            self._module.backbone.__dict__.pop("generate", None)
        super().teardown()

    def _refuse(self) -> None:
        backbone = self._module.backbone
        quantised = [name for name, m in backbone.named_modules() if scheme(m) is not None]
        if quantised:
            raise LoRAError(f"ZeRO-3 cuts plain weights, and {some(quantised)} are quantised: train with ddp or ZeRO-2")
        scalars = [name for name, p in backbone.named_parameters() if not p.dim()]
        if scalars:
            raise LoRAError(f"ZeRO-3 cannot cut what is one number: {some(scalars)}; take FSDP2, which leaves it whole")

    def model_to_device(self) -> None:
        """Parameters go there one by one, as they are cut."""
        for buffer in self._module.buffers():
            buffer.data = buffer.data.to(self.root_device)

    def configure_ddp(self) -> None:
        """DeepSpeed sends the first process's parameters to all, as it cuts them."""
        same_everywhere(self._module.buffers())

    def on_train_start(self) -> None:
        """Step from what was put into the parts since, as by what goes back to the start after a few steps."""
        for row in self.rows():
            for piece in row.pieces[rank()]:
                row.held.data[piece.at : piece.at + piece.count] = local(piece.parameter)[: piece.count]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the other steps."""
        return self._called("training_step", *args, **kwargs)

    def _called(self, step: str, *args: Any, **kwargs: Any) -> Any:
        """As a call of the module, by which DeepSpeed sees what is asked for outside of its submodules' own calls."""
        with self.precision_plugin.forward_context():
            return self._forward_redirection(self._module, self._module, step, *args, **kwargs)

    def own_gradients(self) -> list[tuple[str, Tensor]]:
        """Of the last step's sums, this process's stretch of each parameter."""
        sums = self._zero.averaged_gradients
        return [
            (self._names[id(p)], part)
            for number, own in enumerate(self._zero.fp16_groups)
            for p, part in zip(own, sums.get(number) or (), strict=False)
        ]

    def stepped(self) -> list[nn.Parameter]:
        """All that DeepSpeed has rows of."""
        return [p for group in self._zero.fp16_groups for p in group]

    def _give_zeros(self, parameter: Any) -> None:
        """As large as the whole, which is not there; torch compares the sizes."""
        held = parameter.data
        parameter.data = held.new_zeros(()).expand(parameter.ds_shape)
        parameter.grad = held.new_zeros(parameter.ds_shape)
        parameter.data = held

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains, whole and in process 0 only."""
        state = super().lightning_module_state_dict()
        own = self._module.state_dict(keep_vars=True)
        cut = {key: zero_whole(own[key], 0) for key in state if zero_part(own[key]) is not None}
        return state | {key: None if value is None else value.cpu().clone() for key, value in cut.items()}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Where the model lies in parts from an earlier loop, they are put together for it."""
        if not is_sharded(self._module.backbone):
            super().load_model_state_dict(checkpoint, strict)
            return
        from deepspeed.runtime.zero import GatheredParameters

        trained = [p for p in self._module.parameters() if p.requires_grad]
        with GatheredParameters(trained, modifier_rank=0):
            super().load_model_state_dict(checkpoint, strict)


def narrowed_copies(backbone: nn.Module) -> list[nn.Module]:
    """Modules whose trained copy is wider than they are: they hand it its values, rounded, and call it with these."""
    return [
        saved
        for _, saved in saved_copies(backbone)
        if any(p.dtype != saved.get_parameter(name).dtype for name, p in saved.lora_copy.named_parameters())
    ]


def gather_whole(modules: Iterable[nn.Module]) -> None:
    """Let DeepSpeed gather all that is in a module at the module's own call, and not at those of its parts."""
    from deepspeed.utils import set_z3_leaf_module

    for module in modules:
        set_z3_leaf_module(module, True)


def generates_together(backbone: Any) -> None:
    """Let all processes run the model until the last has its text: transformers knows so of its own DeepSpeed only."""
    from transformers import GenerationMixin

    if isinstance(backbone, GenerationMixin) and processes() > 1:
        backbone.generate = functools.partial(type(backbone).generate, backbone, synced_gpus=True)  # type: ignore[method-assign]


StrategyRegistry.register("zero3", ZeRO3Strategy, description="W0 and the adapter in parts, by DeepSpeed")
