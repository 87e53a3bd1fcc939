"""Reading checkpoint files without executing anything in them."""

from __future__ import annotations

import logging
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from geofm.errors import LayoutError, UnsafeFileError

__all__ = ["read_checkpoint"]

logger = logging.getLogger(__name__)

# Containers of plain settings that training scripts save beside the weights. None is imported or
# called: each is replaced by `_Inert`, which keeps nothing.
_HARMLESS = (
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
)


class _Inert:
    """Stands in for a harmless object of a checkpoint and forgets what it is given."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(path: Path) -> Any:
    """Read what a checkpoint file holds.

    Safetensors files hold tensors only. PyTorch files are read with ``weights_only``: tensors,
    numbers, strings and plain containers; an ``argparse.Namespace`` or a path is skipped.

    Args:
        path: A ``.safetensors`` file or one written by ``torch.save``, whatever its suffix.

    Returns:
        The dictionary in the file, tensors on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        LayoutError: The file is empty, truncated, a web page, or no checkpoint.
        UnsafeFileError: It holds objects that only executing code could rebuild.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    if size == 0:
        raise LayoutError(f"{path} is empty")
    if head.lstrip().startswith(b"<"):
        raise LayoutError(
            f"{path} is a web page, not a checkpoint (it begins with "
            f"{head.lstrip()[:40].decode('utf-8', 'replace')!r}): the server probably answered "
            f"with a login or error page"
        )
    if len(head) > 8 and int.from_bytes(head[:8], "little") < size and head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise LayoutError(
            f"{path} is truncated ({size:,} bytes): its table of contents is missing. Fetch it again"
        )
    return _read_torch(path, head)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise LayoutError(f"{path} is a damaged safetensors file: {error}") from error


def _read_torch(path: Path, head: bytes) -> Any:
    if head.startswith(b"PK"):
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise LayoutError(
                f"{path} was not written by torch.save ({error}); export its state dict with "
                f"torch.save(model.state_dict(), ...) or as safetensors"
            ) from error
        unsafe = sorted(set(names) - set(_HARMLESS))
        if unsafe:
            raise _unsafe(path, ", ".join(unsafe))
    stand_ins: list[Any] = [(_Inert, name) for name in _HARMLESS]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = str(error)
        if "GLOBAL" in message or "Unsupported" in message:
            raise _unsafe(path, message.splitlines()[0]) from error
        raise LayoutError(f"{path} is not a checkpoint: {message.splitlines()[0]}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise LayoutError(f"{path} is damaged or not a checkpoint: {error}") from error


def _unsafe(path: Path, what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{path} holds objects that only running foreign code could rebuild: {what}. Nothing was "
        f"executed. Open it where it was made and save its state dict alone: "
        f"safetensors.torch.save_file(model.state_dict(), ...)"
    )
