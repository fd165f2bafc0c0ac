"""What goes wrong in one process of several, at a known step, as the environment says."""

import dataclasses
import os
import resource
import signal
import time

import torch
from lightning.pytorch import Callback


class Fault(Callback):
    """FAULT is `KIND:RANKS:STEP`, such as `kill:0,1:7`: before the first batch after step 7, in the processes 0 and 1.

    Several have a + between them; step -1 is the validation before training.
    """

    def __init__(self, faults: str = ""):
        faults = faults or os.environ.get("FAULT", "")
        self.waiting = [part.split(":") for part in faults.split("+") if part]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.strike(trainer, pl_module, trainer.global_step)

    def on_sanity_check_start(self, trainer, pl_module):
        self.strike(trainer, pl_module, -1)

    def strike(self, trainer, module, now):
        for fault in list(self.waiting):
            kind, ranks, step = fault
            if str(trainer.global_rank) in ranks.split(",") and now == int(step):
                self.waiting.remove(fault)
                getattr(self, kind)(trainer, module)

    def kill(self, trainer, module):
        os.kill(os.getpid(), signal.SIGKILL)

    def term(self, trainer, module):
        os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, trainer, module):
        """By a scheduler that knows only the process it has started."""
        os.kill(os.getppid(), signal.SIGTERM)

    def error(self, trainer, module):
        raise ZeroDivisionError("a fault of one's own")

    def stuck(self, trainer, module):
        """As in a collective that never ends: no Python code of this thread runs."""
        time.sleep(1000)

    def w0(self, trainer, module):
        module.backbone.bert.embeddings.word_embeddings.weight.data[0, 0] += 1

    def nan(self, trainer, module):
        layer = module.backbone.bert.encoder.layer[1].output.dense
        layer.register_forward_hook(lambda _, __, out: out * float("nan"))

    def gradient(self, trainer, module):
        name = "bert.encoder.layer.0.attention.self.query"
        module.backbone.get_submodule(name).register_forward_hook(lambda _, __, out: out.detach())

    def overflow(self, trainer, module):
        name = "bert.encoder.layer.0.attention.self.query"
        module.backbone.get_submodule(name).lora_B.register_hook(lambda grad: grad * float("inf"))

    def disk(self, trainer, module):
        """No checkpoint can be written, as on a full disk."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

    def loss(self, trainer, module):
        """Infinite, with gradients that are not."""
        step = module.task.step

        def spoiled(*args):
            out = step(*args)
            return dataclasses.replace(out, loss=out.loss + torch.inf)

        module.task.step = spoiled
