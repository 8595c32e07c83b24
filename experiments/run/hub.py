"""Weights of the Hugging Face Hub: `hf:owner/name` or `hf:owner/name/file`, fetched by the huggingface_hub package."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from types import ModuleType

from experiments.run.program import UsageError

PREFIX = "hf:"
_USUAL = ("model.safetensors", "pytorch_model.bin")  # as timm and transformers name the only file of weights
_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")


def fetch(source: str) -> pathlib.Path:
    """The local copy of the file that `source` names, from the package's cache where it is there already.

    Raises UsageError where the package or the network is missing, or there is no such file.
    """
    owner, _, rest = source.removeprefix(PREFIX).partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise UsageError(f"--source={source} is not of the form {PREFIX}owner/name or {PREFIX}owner/name/file")
    repository, hub = f"{owner}/{name}", _package(source)
    # HTTPError of the library that the package fetches with, whichever that is in its version.
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        return pathlib.Path(hub.hf_hub_download(repository, file or _choose(hub.list_repo_files(repository), source)))
    except (OSError, ValueError, EntryNotFoundError, HTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"--source={source} cannot be fetched: {reason}. Check the name and the network, or download the file elsewhere "
            "and give its path"
        ) from error


def _package(source: str) -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--source={source} needs the package huggingface_hub ({error.name} is missing): python -m pip install "
            "huggingface_hub, or download the file elsewhere and give its path"
        ) from error
    return huggingface_hub


def _choose(files: Sequence[str], source: str) -> str:
    """The file of weights of a repository. UsageError where it is not one alone that could be meant."""
    for usual in _USUAL:
        if usual in files:
            return usual
    found = [file for file in files if file.endswith(_ENDINGS)]
    if len(found) != 1:
        listed = ", ".join(found or files) or "nothing"
        raise UsageError(f"--source={source}: say which file, {source}/<file>; the repository has {listed}")
    return found[0]
