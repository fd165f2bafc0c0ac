"""What Lightning, torch and jsonargparse say of mistakes that a user can mend, and what to do about them."""

from __future__ import annotations

import re
from collections.abc import Callable

from lora_lightning.lora.errors import did_you_mean

KNOWN: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"(?s)conditioned on metric `([^`]+)` which is not available.*following: (.*)",
        lambda found: f"EarlyStopping monitors '{found[1]}', which is not logged{_logged(found[1], found[2])}",
    ),
    (
        r"(?s)monitor='([^']+)'\) could not find the monitored key in the returned metrics: \[(.*?)\]",
        lambda found: f"ModelCheckpoint monitors '{found[1]}', which is not logged{_logged(found[1], found[2])}",
    ),
    (
        r"(?s)ReduceLROnPlateau conditioned on metric ([^ ]+) which is not available. Available metrics are: \[(.*?)\]",
        lambda found: f"ReduceLROnPlateau monitors '{found[1]}', which is not logged{_logged(found[1], found[2])}",
    ),
    (
        r"selected an invalid accelerator name: `accelerator='(.*?)'`.*names are: ([^.]*)",
        lambda found: (
            f"no accelerator '{found[1]}'{did_you_mean(found[1], ['gpu', *found[2].split(', ')])}"
            f" (there are {', '.join(sorted(['gpu', *found[2].split(', ')]))})"
        ),
    ),
    (
        r"No supported gpu backend found",
        lambda found: (
            "--trainer.accelerator gpu, and torch sees no GPU here: leave it at auto, or see lora-lightning doctor"
        ),
    ),
    (
        r"`(\w+)Accelerator` can not run on your system",
        lambda found: f"--trainer.accelerator {found[1].lower()}, and torch sees none here: leave it at auto",
    ),
    (
        r"Requirement '([\w.-]+)[^']*' not met\. HINT: Try running `(pip install [^`]*)`",
        lambda found: f"{found[1]} is not installed: {found[2]}",
    ),
    (
        r"(-?\d+) is not in bounds, numpy accepts from (\d+) to (\d+)",
        lambda found: f"seed_everything must be from {found[2]} to {found[3]}, got {found[1]}",
    ),
    (
        r"(?s)requested gpu: (\[.*?\]).*machine only has: (\[.*?\])",
        lambda found: (
            f"--trainer.devices asks for the GPUs {found[1]}, and there are {found[2]}: give as many as there are"
        ),
    ),
    (
        r"`devices` selected with `CPUAccelerator`|value is not a valid input using (\w+) accelerator",
        lambda found: "--trainer.devices must be a whole number above 0, a list of devices such as [0, 1], -1 or auto",
    ),
    (
        r"argument after \*\* must be a mapping, not (\w+)",
        lambda found: (
            "a section that holds keys, such as data.split, is set to"
            f" {'null' if found[1] == 'NoneType' else f'a {found[1]}'}: leave it out for its defaults, or give it keys"
        ),
    ),
    (
        r"^Invalid (?:learning rate|beta parameter at index \d"
        r"|(?:\w+_decay|alpha|epsilon|eta|momentum|rho) values?): .*",
        lambda found: f"the optimizer says: {found[0]}; see model.optimizer.init_args",
    ),
    (
        r"`val_check_interval` \((\S+)\) must be less than or equal to the number of the training batches \((\d+)\)",
        lambda found: (
            f"--trainer.val_check_interval {found[1]} is beyond an epoch's {found[2]} batches: give at most {found[2]},"
            " or count over epochs by --trainer.check_val_every_n_epoch null"
        ),
    ),
    (
        r"Target (-?\d+) is out of bounds",
        lambda found: (
            f"a batch has the label {found[1]}, for which the model has no output: number the data's labels from 0, or"
            " raise num_classes and the head's outputs"
        ),
    ),
    (
        r"device-side assert triggered",
        lambda found: (
            "a number was out of its range on the GPU, most often a label beyond num_classes or a token beyond the"
            " vocabulary: the same command with --trainer.accelerator cpu says which"
        ),
    ),
    (
        r"(?i)out of memory",
        lambda found: (
            "the device's memory is full: lower the data's batch_size (and raise trainer.accumulate_grad_batches by as"
            " much), or set model.activation_checkpointing, or precision bf16-base"
        ),
    ),
    (
        r"(?i)EADDRINUSE|address already in use",
        lambda found: (
            "the port of an earlier or another run is still taken: set MASTER_PORT to another one, or leave it unset"
        ),
    ),
)
"""What Lightning and torch say of mistakes that a user can mend, and what to do."""


def _logged(wanted: str, listed: str) -> str:
    names = re.findall(r"[\w/.@-]+", listed)
    return f"{did_you_mean(wanted, names)} (logged are {', '.join(names)})"


def meaning(text: str) -> str | None:
    """What an exception's message, on one line, means for the user; None where it is none of these."""
    for pattern, said in KNOWN:
        if found := re.search(pattern, text):
            return said(found)
    return None
