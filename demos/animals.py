"""Ten kinds of animals as silhouettes of 28 x 28 pixels: `animal-mnist` on PyPI (MIT)."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct  # type: ignore[attr-defined]

from lora_lightning.lora.errors import LoRAError

FILES = ("animal_data_version_3.gz", "animal_label_version_3.gz")

ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # numpy 1's name for it
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
"""What a pickled array is made of, and all that is unpickled."""


class ArrayUnpickler(pickle.Unpickler):
    """Makes numpy arrays and nothing else: any other name in a pickle could be a function that it then calls."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise LoRAError(f"a pickle that asks for {module}.{name} holds more than an array: it is not opened")
        return ALLOWED[module, name]


def read_array(file: Path) -> np.ndarray[Any, Any]:
    """The array in a gzipped pickle.

    Raises:
        LoRAError: there is no such file, or it holds anything else.
    """
    if not file.is_file():
        raise LoRAError(f"no file {file}")
    with gzip.open(file) as opened:
        try:
            found = ArrayUnpickler(opened).load()
        except LoRAError as error:
            raise LoRAError(f"{file}: {error}") from None
        except Exception as error:  # a torn pickle fails in as many ways as there are opcodes
            raise LoRAError(f"{file} is no pickled array ({str(error) or type(error).__name__})") from error
    if not isinstance(found, np.ndarray):
        raise LoRAError(f"{file}: expected an array, got a {type(found).__name__}")
    return found


def read_animals(path: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Images (10000, 28, 28) of uint8 and labels (10000,) in 0 to 9, a `reader` for `ImageData`.

    Args:
        path: the folder of the two files, `package:animal_mnist/data/Animal_MNIST`.
    """
    images, labels = (read_array(Path(path) / name) for name in FILES)
    return images, labels
