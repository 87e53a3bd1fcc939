"""Shards that lie on the Hugging Face hub, fetched one by one when they are needed."""

from __future__ import annotations

import fnmatch
import itertools
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub import constants as hf_constants
from huggingface_hub.errors import HfHubHTTPError

from geofm.download import explain_disk_error
from geofm.errors import DataNotFoundError, DownloadError

__all__ = ["HUB", "HubShard", "shards_at", "shards_from_hub"]

logger = logging.getLogger(__name__)

HUB: Final = "hf://datasets/"
"""What the address of shards on the hub begins with."""

_ADDRESS = re.compile(HUB + r"([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# The base of all errors of the HTTP library below huggingface_hub: requests, httpx or httpx2.
_TransportError: type[BaseException] = HfHubHTTPError.__bases__[0]
# ValueError: an impossible name, or no network. RuntimeError: hf_xet.
_FAILURES = (_TransportError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True, slots=True)
class HubShard:
    """A shard on the hub.

    Attributes:
        repo_id: The data set's repository, ``"owner/name"``.
        filename: Path in the repository.
        revision: Branch, tag or commit.
    """

    repo_id: str
    filename: str
    revision: str

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.filename.rpartition("/")[2]

    def __str__(self) -> str:
        return f"hf://datasets/{self.repo_id}@{self.revision}/{self.filename}"

    def fetch(self) -> Path:
        """The shard in Hugging Face's cache, downloaded if it is not there.

        Returns:
            Its path.

        Raises:
            DownloadError: It is neither in the cache nor can it be fetched.
        """
        logger.debug("opening %s", self)
        try:
            with explain_disk_error(Path(hf_constants.HF_HUB_CACHE) / "file", str(self), "HF_HOME"):
                return Path(
                    hf_hub_download(
                        self.repo_id, self.filename, revision=self.revision, repo_type="dataset"
                    )
                )
        except DownloadError:
            raise
        except _FAILURES as error:
            raise DownloadError(
                f"{self} is not in the cache ({hf_constants.HF_HUB_CACHE}) and could not be "
                f"fetched: {_first_line(error.__cause__ or error)}"
            ) from error


def shards_from_hub(
    repo_id: str, pattern: str, revision: str | None = None
) -> tuple[HubShard, ...]:
    """Name the shards of a data set on the hub; nothing is downloaded yet.

    Every loading process fetches the shards of its own share, each when its turn comes, into
    Hugging Face's cache, and finds them there the next time, without a network too.

    Args:
        repo_id: The data set's repository, ``"owner/name"``.
        pattern: Numbered files, ``"train/trees-{000000..000629}.tar"``, for which the hub is not
            asked; or a glob over the repository's paths, ``"train/*.tar"``, in which ``*`` also
            stands for ``/``: the hub is asked for the list, and the shards keep to the commit it
            then names.
        revision: Branch, tag or commit; None for ``main``. Only a commit always means the same
            files.

    Returns:
        The shards in a fixed order: by number, or by path.

    Raises:
        DataNotFoundError: No file of the repository matches.
        DownloadError: The list cannot be fetched.
        ValueError: A range of numbers runs backwards.
    """
    if _RANGE.search(pattern):
        return tuple(HubShard(repo_id, name, revision or "main") for name in _numbered(pattern))
    try:
        info = HfApi().dataset_info(repo_id, revision=revision)
    except _FAILURES as error:
        raise DownloadError(
            f"the list of files of the data set {repo_id} could not be fetched: "
            f"{_first_line(error)}. Without a network, number the shards instead of giving a "
            f"glob: 'name-{{000000..000099}}.tar'"
        ) from error
    files = sorted(sibling.rfilename for sibling in info.siblings or ())
    found = [file for file in files if fnmatch.fnmatchcase(file, pattern)]
    if not found:
        raise DataNotFoundError(
            f"none of the {len(files)} files of the data set {repo_id} matches {pattern!r}; among "
            f"them are {', '.join(files[:5]) or 'none'}"
        )
    return tuple(HubShard(repo_id, name, info.sha or revision or "main") for name in found)


def shards_at(address: str) -> tuple[HubShard, ...]:
    """`shards_from_hub` for one line of text, as a recipe's ``data.path``.

    Args:
        address: ``hf://datasets/<owner>/<name>@<revision>/<pattern>``; without a revision ``main``.

    Returns:
        The shards in a fixed order.

    Raises:
        DataNotFoundError: It is no such address, or as in `shards_from_hub`.
        DownloadError: As in `shards_from_hub`.
        ValueError: As in `shards_from_hub`.
    """
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        raise DataNotFoundError(
            f"{address!r} names no shards: expected {HUB}<owner>/<name>@<revision>/<pattern>, for "
            f"example {HUB}owner/trees@main/train/trees-{{000000..000099}}.tar"
        )
    return shards_from_hub(parts[1], parts[3], parts[2])


def _numbered(pattern: str) -> list[str]:
    """A name for each combination of the numbers in ``{first..last}``, zeros kept."""
    parts = _RANGE.split(pattern)
    ranges = []
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        if int(last) < int(first):
            raise ValueError(f"{{{first}..{last}}} in {pattern!r} runs backwards")
        ranges.append([f"{k:0{len(first)}d}" for k in range(int(first), int(last) + 1)])
    texts = parts[::3]
    return [
        texts[0] + "".join(n + text for n, text in zip(numbers, texts[1:], strict=True))
        for numbers in itertools.product(*ranges)
    ]


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
