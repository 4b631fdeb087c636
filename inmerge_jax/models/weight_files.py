"""Reads and writes files of PyTorch weights: safetensors, and PyTorch's own pickles."""

import argparse
import importlib
import io
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core import multiarray

from inmerge_jax.buckets import as_path
from inmerge_jax.errors import UsageError
from inmerge_jax.files import check_target, write_bytes, write_errors

_SUFFIXES = (".safetensors", ".pth", ".pt")
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
_SAVE_AGAIN = "save model.state_dict() alone, best as .safetensors"
_FLOATS = ("float64", "float32", "float16", "bfloat16")


def read_state_dict(path: Path | str) -> dict[str, Any]:
    """Reads the state dict in a file of PyTorch weights, for `from_state_dict`.

    The content decides how the file is read, so it may have any name: safetensors, or what
    `torch.save` wrote. PyTorch reads the latter with `weights_only=True`, which runs no code.
    Wrappers such as {"state_dict": ...} are removed, see `unwrapped`.

    Raises:
      UsageError: the file is missing, damaged or of another kind, holds no weights, or a required
        package is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no file {path}; give a file of PyTorch weights")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    state_dict = unwrapped(content) if isinstance(content, Mapping) else {}
    others = [key for key, value in state_dict.items() if not hasattr(value, "shape")]
    if not state_dict or others:
        inside = f"{others[0]!r} in it is no tensor" if others else "it holds no dict of tensors"
        raise UsageError(f"{path} is not a state dict: {inside}; {_SAVE_AGAIN}")
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
      UsageError: the file exists and `overwrite` is False, its suffix is unknown, a required
        package is not installed, or the file cannot be written; an existing one is unchanged.
    """
    path = as_path(path)
    check_weight_file(path, overwrite=overwrite)
    if path.suffix == ".safetensors":
        data = _package("safetensors.numpy", path).save(dict(state_dict), {"format": "pt"})
    else:
        torch = _package("torch", path)
        tensors = {key: torch.from_numpy(value) for key, value in state_dict.items()}
        buffer = io.BytesIO()
        torch.save({wrapped: tensors} if wrapped else tensors, buffer)
        data = buffer.getvalue()
    with write_errors(path, begun=False):
        write_bytes(path, data)


def check_weight_file(path: Path, *, overwrite: bool) -> None:
    """Checks that `write_state_dict` can write to `path`; creates its folder.

    Raises:
      UsageError: the suffix is unknown, or see `files.check_target`.
    """
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"{path}: name a file that ends in one of {', '.join(_SUFFIXES)}")
    check_target(path, overwrite=overwrite)


def unwrapped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in a training checkpoint, such as {"epoch": 3, "state_dict": ...}.

    Wrappers are the keys of common training loops, among them those of Lightning ("state_dict") and
    the MedMNIST benchmark ("net"); one may be in another.
    """
    for _ in range(2):
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        content = inner[0] if inner else content
    return content


def as_float32(key: str, value: Any) -> np.ndarray:
    """A floating-point entry of a state dict as a float32 array.

    Raises:
      UsageError: it has another dtype, such as float8 or int8, whose values need scales.
    """
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in _FLOATS:
        raise UsageError(
            f"{key} has the dtype {dtype}, which has no meaning without its scales: convert the "
            "weights to float32, float16 or bfloat16"
        )
    if hasattr(value, "detach"):  # a PyTorch tensor, whose bfloat16 NumPy does not know
        value = value.detach().cpu().float().numpy()
    return np.asarray(value, np.float32)


# ---- kinds of files


def _is_safetensors(path: Path) -> bool:
    """Whether the content is safetensors', rather than PyTorch's.

    Raises:
      UsageError: it is neither, or it is no state dict.
    """
    with open(path, "rb") as file:
        head = file.read(256)
    reason = None
    if not head:
        reason = "it is empty; write or download it again"
    elif head.startswith(b"version https://git-lfs"):
        reason = "it is a pointer of Git LFS, not the weights; run git lfs pull"
    elif head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        reason = "it is a web page (HTML or XML); download the file behind the page"
    elif head.startswith(b"\x89HDF"):
        reason = f"it is an HDF5 file, as Keras writes it; {_SAVE_AGAIN} in PyTorch"
    elif head.startswith(b"PK"):
        reason = _problem_of_archive(path)
    elif head[8:9] != b"{" and not head.startswith(b"\x80"):
        reason = "its content is neither safetensors nor PyTorch's; write or download it again"
    if reason:
        raise UsageError(f"{path} can't be read as weights: {reason}")
    return head[8:9] == b"{"


def _problem_of_archive(path: Path) -> str | None:
    """Why a zip archive is no state dict of PyTorch's; None if it may be one."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile:
        return "it is truncated or damaged; write or download it again"
    if "constants.pkl" in names:
        return (
            "it is a TorchScript archive; in PyTorch, load it with torch.jit.load, then "
            f"{_SAVE_AGAIN}"
        )
    return None if "data.pkl" in names else "it is a zip archive that PyTorch did not write"


def _read_safetensors(path: Path) -> dict[str, Any]:
    safetensors = _package("safetensors", path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}
            if low := [key for key, dtype in dtypes.items() if dtype.startswith(("F8", "F4"))]:
                raise UsageError(
                    f"{path} can't be read as weights: {low[0]} has the dtype {dtypes[low[0]]}, "
                    "which has no meaning without its scales: convert the weights to float32, "
                    "float16 or bfloat16"
                )
            return {key: file.get_tensor(key) for key in dtypes}
    except safetensors.SafetensorError as error:
        raise UsageError(
            f"{path} is not a complete safetensors file: {error}; write or download it again"
        ) from error


def _read_pickle(path: Path) -> Any:
    torch = _package("torch", path)
    # PyTorch's messages are not passed on: they advise to load without safeguards.
    try:
        # Only zip archives, PyTorch's newer format, can be memory-mapped, and only by their name,
        # by whose ending PyTorch decides. A Namespace, which training loops store with their
        # options, has no code to run.
        mapped = zipfile.is_zipfile(path) and path.suffix != ".safetensors"
        # Nor have NumPy's numbers, which they store as their best metric.
        safe = [argparse.Namespace, multiarray.scalar, np.dtype]
        safe += [(multiarray.scalar, "numpy.core.multiarray.scalar")]
        safe += [type(np.dtype(code)) for code in "?bhilqBHILQefd"]
        with open(path, "rb") as file, torch.serialization.safe_globals(safe):
            source = path if mapped else file
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        inside = f"an object of {found[1]}" if found else "more than weights"
        raise UsageError(
            f"{path} holds {inside}, or is damaged, and was not unpickled; {_SAVE_AGAIN}"
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError) as error:
        # Exceptions of PyTorch's unpickler on damaged files.
        raise UsageError(
            f"{path} can't be read as weights: it is truncated or damaged; write or download it "
            "again"
        ) from error


def _package(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{path} needs the package {error.name}, which is not installed: pip install "
            f'"inmerge-jax[torch]"'
        ) from error
