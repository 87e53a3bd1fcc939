"""Samples out of tar files that nobody vouches for: damage is told, code is not run."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from geofm.checkpoints import DAMAGE
from geofm.errors import GeofmError, UnsafeFileError

__all__ = ["MEMBERS", "Group", "ShardError", "Share", "groups", "read_tensor"]

MEMBERS: Final = ("images.pth", "text.json", "auxiliary.json")
"""What a sample consists of."""

# A sample's tensor takes 24 KB; what is a thousand times larger is something else.
_LARGEST: Final = 32 << 20
# What reading a damaged or truncated tar, plain or compressed, may raise.
_TAR_DAMAGE: Final = (tarfile.TarError, EOFError, OSError, zlib.error)
# What damaged bytes may raise.
_TENSOR_DAMAGE: Final = (*DAMAGE, zipfile.BadZipFile, zlib.error)


class ShardError(GeofmError, ValueError):
    """A shard or a sample in it is damaged or not in GlobalGeoTree's format.

    Attributes:
        reason: In a word or two, for counting: ``"truncated tar"``, ``"missing member"`` ...
    """

    def __init__(self, message: str, reason: str = "damaged") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ShardError], tuple[str, str]]:
        # A DataLoader's worker sends it to the main process.
        return (type(self), (str(self), self.reason))


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a shard that one process reads: every `step`-th sample from `offset` on.

    Attributes:
        shard: Index of the shard among all paths.
        path: The tar file.
        offset: First sample, below `step`.
        step: 1 for the whole shard.
    """

    shard: int
    path: Path
    offset: int = 0
    step: int = 1


@dataclass(slots=True)
class Group:
    """The members of one sample.

    Attributes:
        index: Index of the sample in its shard.
        key: What the members' names begin with.
        members: Contents by kind, as in `MEMBERS`.
        problem: What is wrong with them: a word or two for counting, and the rest of a sentence.
    """

    index: int
    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    problem: tuple[str, str] | None = None


def groups(share: Share, first: int = 0) -> Iterator[Group]:
    """Read the samples of a share; those of others are passed over without being read.

    Args:
        share: What to read.
        first: Index in the shard of the first sample wanted.

    Yields:
        Samples, whole ones of a damaged shard included.

    Raises:
        ShardError: The shard is no tar, or is truncated or damaged.
    """
    group: Group | None = None
    damage: BaseException | str | None = None
    try:
        tar = tarfile.open(share.path, "r:*")  # noqa: SIM115 (closed below)
    except _TAR_DAMAGE as error:
        raise ShardError(f"shard {share.path} is no tar file: {error}", "no tar file") from error
    with tar:
        while True:
            try:
                info = tar.next()
                # The list of all members is only for random access, and grows without end.
                tar.members.clear()  # type: ignore[attr-defined]
                if info is None:
                    damage = _missing_end(tar)
                    break
                named = _split(info.name) if info.isfile() else None
                if named is None:
                    continue
                key, kind = named
                if group is None or key != group.key:
                    if group is not None and _wanted(share, first, group.index):
                        yield group
                    group = Group(0 if group is None else group.index + 1, key)
                if _wanted(share, first, group.index):
                    _take(tar, info, kind, group)
            except _TAR_DAMAGE as error:
                damage = error
                break
    # The sample in which a file breaks off is incomplete because of that, not by itself.
    if (
        group is not None
        and _wanted(share, first, group.index)
        and (damage is None or len(group.members) == len(MEMBERS))
    ):
        yield group
    if damage is not None:
        where = f"at or after key {group.key!r}" if group is not None else "before its first sample"
        raise ShardError(
            f"shard {share.path} is truncated or damaged {where}: {damage}. Fetch it again",
            "truncated tar",
        ) from (damage if isinstance(damage, BaseException) else None)


def _wanted(share: Share, first: int, index: int) -> bool:
    return index >= first and index % share.step == share.offset


def _split(name: str) -> tuple[str, str] | None:
    """Key and kind of a member; None for one that is no part of a sample.

    A key may itself hold dots, in a coordinate; so it ends where a known kind begins.
    """
    for kind in MEMBERS:
        if name.endswith(f".{kind}"):
            return name[: -len(kind) - 1], kind
    return None


def _take(tar: tarfile.TarFile, info: tarfile.TarInfo, kind: str, group: Group) -> None:
    if kind in group.members:
        group.problem = ("double member", f"has two members {kind}")
        return
    group.members[kind] = b""
    if info.size > _LARGEST:
        group.problem = ("oversized member", f"has {info.size:,} bytes of {kind}")
        return
    file = tar.extractfile(info)
    content = b"" if file is None else file.read()
    if len(content) != info.size:
        del group.members[kind]
        raise tarfile.ReadError(f"{kind} has {len(content):,} of {info.size:,} bytes")
    group.members[kind] = content


def _missing_end(tar: tarfile.TarFile) -> str | None:
    """What is wrong with the end of a tar, which `tarfile` itself does not check.

    It takes a file that breaks off between two members, and one with a damaged header after the
    first, for complete ones.
    """
    file: Any = tar.fileobj
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return f"it ends at byte {tar.offset + len(block):,} without the mark that closes a tar"
    return f"byte {tar.offset:,} begins no member" if any(block) else None


def read_tensor(content: bytes, where: str) -> Any:
    """Read what ``torch.save`` wrote, without executing anything in it.

    Args:
        content: The file.
        where: Shard and key, for messages.

    Returns:
        What was saved; a tensor if all is well.

    Raises:
        ShardError: The bytes are damaged or were not written by ``torch.save``.
        UnsafeFileError: They hold what only executing code could rebuild.
    """
    try:
        if content.startswith(b"PK"):
            _check_sums(content)
        with warnings.catch_warnings():
            # Of newer pickle protocols, TorchScript, sparse tensors: each is an error here anyway.
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused or _is_pickle(content):
            what = f" ({refused[1]})" if refused else ""
            raise UnsafeFileError(
                f"{where}: images.pth holds objects that only running foreign code could "
                f"rebuild{what}. Nothing was executed. Do not use this shard unless you trust "
                f"its author; a tensor saved with torch.save would be read"
            ) from error
        raise _damaged(where, error) from error
    except _TENSOR_DAMAGE as error:
        if "TorchScript" in str(error):
            raise UnsafeFileError(
                f"{where}: images.pth is a TorchScript program, not a tensor. Nothing was executed"
            ) from error
        raise _damaged(where, error) from error


def _check_sums(content: bytes) -> None:
    """Refuse an archive of which a bit has flipped, which torch itself does not notice."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            if entry.file_size > _LARGEST:
                raise ValueError(f"{entry.filename} would take {entry.file_size:,} bytes")
            # 0: written without a sum, as torch.serialization.set_crc32_options(False) does.
            if entry.CRC:
                archive.read(entry)


def _damaged(where: str, error: BaseException) -> ShardError:
    first = (str(error).strip() or "no message").splitlines()[0]
    return ShardError(
        f"{where}: images.pth is damaged or was not written by torch.save "
        f"({type(error).__name__}: {first})",
        "bad tensor",
    )


def _is_pickle(content: bytes) -> bool:
    """Whether the bytes are a complete pickle, or an archive that holds one."""
    if content.startswith(b"PK"):
        return True
    try:
        for _ in pickletools.genops(content):
            pass
    except _TENSOR_DAMAGE:
        return False
    return True
