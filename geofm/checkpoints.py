"""Reading checkpoint files without executing anything in them."""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from geofm.errors import GeofmError, LayoutError, UnsafeFileError

__all__ = ["DAMAGE", "read_checkpoint"]

# What torch.save wrote before its files were zip archives begins with this number, pickled.
_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
# Safetensors' own limit on the length of its header.
_LONGEST_HEADER = 100_000_000
# What torch's error names: an import it refuses, or an instruction of a newer pickle protocol.
_REFUSED = re.compile(r"GLOBAL ([\w.]+)|Unsupported operand (\d+)")
# What torch's unpickler may raise on damaged bytes: it follows whatever instructions it meets.
DAMAGE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)


class _Inert:
    """Stands in for a harmless object of a checkpoint and forgets what it is given."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# Plain settings that training scripts save beside the weights. None of these is imported or called:
# each is replaced by a stand-in that runs nothing.
_STAND_INS: dict[str, type] = {
    "argparse.Namespace": _Inert,
    "pathlib.PosixPath": _Inert,
    "pathlib.PurePosixPath": _Inert,
    "pathlib.WindowsPath": _Inert,
    "pathlib._local.PosixPath": _Inert,
    # A best score or a learning rate that was a NumPy number.
    "numpy.core.multiarray.scalar": _Inert,
    "numpy._core.multiarray.scalar": _Inert,
    "numpy.dtype": _Inert,
    "_codecs.encode": _Inert,
    # Hyperparameters of Lightning checkpoints: dictionaries, which torch fills item by item.
    "lightning_fabric.utilities.data.AttributeDict": OrderedDict,
    "lightning.fabric.utilities.data.AttributeDict": OrderedDict,
    "pytorch_lightning.utilities.parsing.AttributeDict": OrderedDict,
}


def read_checkpoint(path: Path) -> Any:
    """Read what a checkpoint file holds.

    Safetensors files hold tensors only. PyTorch files are read with ``weights_only``: tensors,
    numbers, strings and plain containers; settings beside them (``argparse.Namespace``, paths,
    NumPy numbers, Lightning's hyperparameters) are skipped.

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
    # First, because the bytes of the header's length can look like the beginning of a web page.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return _read_safetensors(path)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        raise LayoutError(
            f"{path} is a web page, not a checkpoint (it begins with "
            f"{text[:40].decode('utf-8', 'replace')!r}): the server probably answered with a login "
            f"or error page"
        )
    if head.startswith(b"PK"):
        _check_archive(path, size)
    else:
        _check_pickle(path, legacy=_LEGACY in head[:32])
    return _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise LayoutError(f"{path} is a damaged safetensors file: {error}") from error


def _check_archive(path: Path, size: int) -> None:
    """Refuse a zip archive that is damaged or names foreign code; torch itself checks no sums."""
    try:
        if not zipfile.is_zipfile(path):
            raise LayoutError(
                f"{path} is truncated ({size:,} bytes): its table of contents is missing. Fetch "
                f"it again"
            )
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                # 0: written without a sum, as torch.serialization.set_crc32_options(False) does.
                if entry.CRC:
                    with archive.open(entry) as file:
                        while file.read(1 << 20):
                            pass
    except LayoutError:
        raise
    except (OSError, zipfile.BadZipFile, zlib.error, *DAMAGE) as error:
        raise LayoutError(f"{path} is damaged ({error}). Fetch it again") from error
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from error
    except DAMAGE as error:
        raise LayoutError(
            f"{path} was not written by torch.save ({_first_line(error)}); export its state dict "
            f"with torch.save(model.state_dict(), ...) or as safetensors"
        ) from error
    unsafe = sorted(set(names) - set(_STAND_INS))
    if unsafe:
        raise _unsafe(path, ", ".join(unsafe))


def _check_pickle(path: Path, legacy: bool) -> None:
    """Refuse what is neither complete nor torch's; disassembling a pickle executes nothing."""
    names: list[str] = []
    strings: list[str] = []
    try:
        with path.open("rb") as file:
            # Torch's own: number, version and system information come before the object.
            for _ in range(4 if legacy else 1):
                for instruction, argument, _ in pickletools.genops(file):
                    if instruction.name in ("GLOBAL", "INST"):
                        names.append(str(argument).replace(" ", "."))
                    elif instruction.name == "STACK_GLOBAL":
                        names.append(".".join(strings[-2:]))
                    elif isinstance(argument, str):
                        strings.append(argument)
    except DAMAGE as error:
        what = "a truncated or damaged" if legacy else "no"
        raise LayoutError(
            f"{path} is {what} checkpoint ({_first_line(error)}): expected a safetensors file or "
            f"one written by torch.save"
        ) from error
    if not legacy:
        if names:
            raise _unsafe(path, ", ".join(sorted(set(names))))
        raise LayoutError(
            f"{path} is no checkpoint: expected a safetensors file or one written by torch.save"
        )


def _read_torch(path: Path) -> Any:
    stand_ins: list[Any] = [(kind, name) for name, kind in _STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            # That a newer pickle protocol might not be understood: then it is an error anyway.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise _refusal(path, error) from error


def _refusal(path: Path, error: BaseException) -> GeofmError:
    if not isinstance(error, pickle.UnpicklingError):
        return LayoutError(f"{path} is damaged or no checkpoint: {_first_line(error)}")
    refused = _REFUSED.search(str(error))
    if refused is None:
        return _unsafe(path, "something that torch's weights_only refuses")
    return _unsafe(path, refused[1] or f"pickle instruction {refused[2]}")


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _unsafe(path: Path, what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{path} holds objects that only running foreign code could rebuild: {what}. Nothing was "
        f"executed. Open it where it was made and save its state dict alone: "
        f"safetensors.torch.save_file(model.state_dict(), ...)"
    )
