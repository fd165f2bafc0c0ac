"""Where files are: on disk, inside an installed package, in a GGUF file, or on the Hugging Face hub."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lora_lightning.lora.errors import LoRAError, near_misses

SCHEME = "package:"

FILES = {"model": "config.json", "dataset": "README.md"}
"""The file whose presence on the hub is checked; any file would do."""


def resolve(path: str) -> str:
    """The path of `package:NAME/inner/path` in that installed package, without importing it; other paths unchanged.

    Raises:
        LoRAError: the package is not installed, or holds no such file.
    """
    if not path.startswith(SCHEME):
        return path
    name, _, inner = path.removeprefix(SCHEME).partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise LoRAError(f"'{path}' names the package '{name}', which is not installed: pip install it")
    folder = Path(spec.submodule_search_locations[0]) / inner
    if not folder.exists():
        raise LoRAError(f"the package '{name}' holds no '{inner}'")
    return str(folder)


def directory_and_file(name: str) -> tuple[str, dict[str, str]]:
    """The file's directory and the `gguf_file` argument with which transformers opens it; other names unchanged.

    Args:
        name: a hub name, a directory, or a GGUF file.

    Raises:
        LoRAError: it is a GGUF file and the package that reads them is missing.
    """
    file = Path(name)
    if file.suffix != ".gguf":
        return name, {}
    if not file.is_file():
        raise LoRAError(f"no file {name}")
    if find_spec("gguf") is None:
        raise LoRAError(f"{file.name} needs the package that reads GGUF files: pip install 'lora_lightning[lm]'")
    return str(file.parent), {"gguf_file": file.name}


def refuse_not_there(kind: str, name: str) -> None:
    """Raise where neither this disk nor the hub has `name`, after one request to the hub.

    Without it `from_pretrained` and `load_dataset` would try file after file, for half a minute each. A name that is in
    the hub's cache, at least in part, passes.

    Args:
        kind: model, tokenizer or set, for the error.
        name: a file or folder, or a name on the hub.

    Raises:
        LoRAError: `name` can only be on this disk and is not, or the hub cannot be reached.
    """
    if Path(name).exists() or "://" in name:
        return
    # Imported here, since they take seconds and most callers pass a file on this disk.
    import datasets
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    repo_type = "dataset" if kind == "set" else "model"
    try:
        url = hf_hub_url(name, FILES[repo_type], repo_type=repo_type)
    except HFValidationError as error:  # such as a path that begins with a dot
        raise LoRAError(f"no {kind} '{name}': there is no such folder{_near(name)}") from error
    caches = [Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=repo_type)]
    if kind == "set":
        caches.append(Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___"))  # the set as Arrow files
    if any(cache.is_dir() for cache in caches):
        return
    nowhere = f"no {kind} '{name}': there is no such folder here{_near(name, ' (', ')')}"
    if constants.is_offline_mode():
        raise LoRAError(f"{nowhere}, nor is it in the hub's cache, and HF_HUB_OFFLINE is set: unset it to ask the hub")
    try:
        get_hf_file_metadata(url)
    except HfHubHTTPError:  # the hub answers with an error, which the loader reports, or avoids with its token
        return
    except Exception as error:  # the type depends on the HTTP client of the hub's package
        raise LoRAError(
            f"{nowhere}, and the hub cannot be reached ({' '.join(str(error).split()) or type(error).__name__}): give a"
            " folder on this disk, or set HF_ENDPOINT to a mirror"
        ) from error


def _near(name: str, before: str = "; ", after: str = "") -> str:
    """Suggest paths on this disk with a similar name, in the same folder or in one with a similar name."""
    path = Path(name).expanduser()
    folders = [path.parent]
    if not path.parent.is_dir():
        beside = [folder.name for folder in path.parent.parent.glob("*/")]
        folders = [path.parent.with_name(n) for n in near_misses(path.parent.name, beside, 2)]
    inside = {folder: [inner.name for inner in folder.glob("*/")] for folder in folders}
    nearest = [f"'{folder / n}'" for folder, names in inside.items() for n in near_misses(path.name, names, 2)]
    return f"{before}did you mean {' or '.join(nearest)}?{after}" if nearest else ""
