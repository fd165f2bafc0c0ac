"""What goes wrong in one process of several, at a known step: a callback that a config names, told by the environment."""

import os
import resource
import signal
import time

import torch
from lightning.pytorch import Callback


class Fault(Callback):
    """FAULT is `KIND:RANKS:STEP`, such as `kill:0,1:7`: before the first batch after step 7, in the processes 0 and 1."""

    def __init__(self):
        kind, ranks, step = os.environ.get("FAULT", "none::0").split(":")
        self.kind, self.ranks, self.step = kind, [int(r) for r in ranks.split(",") if r], int(step)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank in self.ranks and trainer.global_step == self.step:
            self.ranks = []
            getattr(self, self.kind)(trainer, pl_module)

    def kill(self, trainer, module):
        os.kill(os.getpid(), signal.SIGKILL)

    def term(self, trainer, module):
        os.kill(os.getpid(), signal.SIGTERM)

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

    def disk(self, trainer, module):
        """No file can grow above a few bytes, as on a full disk."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))

    def loss(self, trainer, module):
        """Infinite, with gradients that are not."""
        step = module.task.step

        def spoiled(*args):
            out = step(*args)
            out.loss = out.loss + float("inf") if hasattr(out, "__dict__") else out._replace(loss=out.loss + torch.inf)
            return out

        module.task.step = spoiled
