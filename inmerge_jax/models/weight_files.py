"""Reads and writes files of PyTorch weights: `.safetensors`, and PyTorch's own pickles."""

import importlib
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from inmerge_jax.errors import UsageError
from inmerge_jax.files import as_path, write_bytes

_SUFFIXES = (".safetensors", ".pth", ".pt")


def read_state_dict(path: Path | str) -> dict[str, Any]:
    """Reads the state dict in a `.safetensors`, `.pth` or `.pt` file, for `from_state_dict`.

    PyTorch reads `.pth` and `.pt` files with `weights_only=True`, which runs no code. The wrapper
    {"net": ...} of a MedMNIST checkpoint is removed.

    Raises:
      UsageError: the file is missing or damaged, has an unknown suffix or no weights, or a required
        package is not installed.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise UsageError(f"there is no file {path}; give one that ends in {', '.join(_SUFFIXES)}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    state_dict = unwrapped(content) if isinstance(content, Mapping) else {}
    others = [key for key, value in state_dict.items() if not hasattr(value, "shape")]
    if not state_dict or others:
        inside = f"{others[0]!r} in it is no tensor" if others else "it holds no dict of tensors"
        raise UsageError(f"{path} is not a state dict: {inside}; save model.state_dict() alone")
    return dict(state_dict)


def write_state_dict(
    path: Path | str,
    state_dict: Mapping[str, np.ndarray],
    *,
    overwrite: bool = False,
    wrapped: str | None = None,
) -> None:
    """Writes a state dict to a `.safetensors`, `.pth` or `.pt` file, atomically.

    Args:
      path: path of the file.
      state_dict: C-contiguous arrays.
      overwrite: replace an existing file.
      wrapped: write {wrapped: state_dict} to a `.pth` or `.pt` file, as the MedMNIST benchmark
        does with "net".

    Raises:
      UsageError: the file exists and `overwrite` is False, its suffix is unknown, or a required
        package is not installed.
      OSError: the file cannot be written; an existing one is unchanged.
    """
    path = as_path(path)
    check_target(path, overwrite=overwrite)
    if path.suffix == ".safetensors":
        data = _package("safetensors.numpy", path).save(dict(state_dict), {"format": "pt"})
    else:
        torch = _package("torch", path)
        tensors = {key: torch.from_numpy(value) for key, value in state_dict.items()}
        buffer = io.BytesIO()
        torch.save({wrapped: tensors} if wrapped else tensors, buffer)
        data = buffer.getvalue()
    write_bytes(path, data)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Checks that `write_state_dict` would write to `path`.

    Raises:
      UsageError: the suffix is unknown, or the file exists and `overwrite` is False.
    """
    _check_suffix(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; choose another name, or give `overwrite` to replace it")


def unwrapped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Removes the wrapper {"net": ...} of the MedMNIST benchmark's checkpoints."""
    net = content.get("net")
    return net if isinstance(net, Mapping) else content


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    safetensors = _package("safetensors", path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except safetensors.SafetensorError as error:
        raise UsageError(
            f"{path} is not a complete safetensors file: {error}; write it again"
        ) from error


def _read_pickle(path: Path) -> Any:
    torch = _package("torch", path)
    try:
        # Only zip archives, PyTorch's newer format, can be memory-mapped.
        mapped = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} holds more than weights, or is damaged, and was not unpickled; save "
            f"model.state_dict() alone, best as .safetensors ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError) as error:
        # Exceptions of PyTorch's unpickler on files that are no pickles.
        reason = str(error).splitlines()[0] if str(error) else "it is empty"
        raise UsageError(f"{path} can't be read as weights: {reason}; write it again") from error


def _check_suffix(path: Path) -> None:
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"{path}: name a file that ends in one of {', '.join(_SUFFIXES)}")


def _package(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{path} needs the package {error.name}, which is not installed: pip install "
            f'"inmerge-jax[torch]"'
        ) from error
