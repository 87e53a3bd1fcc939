"""Upload a run's weights and card to the Hugging Face hub."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from geofm.cards import WeightCard, read_card
from geofm.errors import GeofmError, WeightsNotFoundError
from geofm.hub import sha256_of
from geofm.tables import card_text

__all__ = ["Pushed", "UploadError", "push_run"]

logger = logging.getLogger(__name__)

# The base of all errors of the HTTP library below huggingface_hub: requests, httpx or httpx2.
_TransportError: type[BaseException] = HfHubHTTPError.__bases__[0]


class UploadError(GeofmError, OSError):
    """Weights could not be uploaded."""


@dataclass(frozen=True)
class Pushed:
    """Where a run's weights lie now.

    Attributes:
        repo: The repository.
        revision: Its commit.
        source: The section ``[source]`` of a weight card that fetches them from there.
    """

    repo: str
    revision: str
    source: str


def push_run(folder: str | Path, repo: str, private: bool = False) -> Pushed:
    """Upload weights, weight card and a README of an exported run, in one commit.

    Args:
        folder: Of the run, or any folder with one weight card and its file.
        repo: ``"owner/name"`` on the hub; made if it is not there.
        private: Whether a new repository is private.

    Returns:
        Where they are.

    Raises:
        WeightsNotFoundError: The folder does not hold one exported model.
        UploadError: The hub cannot be reached or refuses.
    """
    folder = Path(folder)
    card = _only_card(folder)
    assert card.source.filename
    weights = folder / card.source.filename
    if not weights.is_file() or sha256_of(weights) != card.source.sha256:
        raise WeightsNotFoundError(
            f"{weights} is not the file that {card.path.name} describes; export the run again: "
            f"geofm pretrain ... --export-only"
        )
    files: dict[str, str | bytes] = {
        weights.name: str(weights),
        card.path.name: str(card.path),
        "README.md": _readme(card, repo).encode(),
    }
    if (folder / "recipe.yaml").is_file():
        files["recipe.yaml"] = str(folder / "recipe.yaml")
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(path_in_repo=n, path_or_fileobj=f) for n, f in files.items()],
            commit_message=f"{card.name}, {card.training.get('steps', '?')} steps",
        )
    except HFValidationError as error:
        raise UploadError(f"{repo!r} is no name of a repository: {error}") from error
    except LocalTokenNotFoundError as error:
        raise UploadError("uploading needs a token of your account: hf auth login") from error
    except (_TransportError, OSError) as error:
        raise UploadError(f"uploading to {repo} failed: {_explained(error)}") from error
    source = "\n".join(
        f"{key} = {json.dumps(value)}"
        for key, value in {
            "kind": "huggingface",
            "repo": repo,
            "revision": commit.oid,
            "filename": weights.name,
            "sha256": card.source.sha256,
        }.items()
    )
    return Pushed(repo, commit.oid, f"[source]\n{source}")


def _only_card(folder: Path) -> WeightCard:
    cards = sorted(folder.glob("*.toml"))
    if len(cards) != 1:
        raise WeightsNotFoundError(
            f"{folder} holds {len(cards)} weight cards (*.toml), expected 1. A run that is not "
            f"finished has none: geofm pretrain ... --export-only writes it from the checkpoints"
        )
    card = read_card(cards[0])
    if not card.bundled:
        raise WeightsNotFoundError(f"the weights of {card.path} lie elsewhere: {card.source}")
    return card


def _explained(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if status in (401, 403):
        return f"{first} (is the token one that may write there? hf auth login)"
    return first


def _readme(card: WeightCard, repo: str) -> str:
    licence = card.licence.weights
    known = licence.lower() if licence.lower() in _LICENCES else "other"
    model, tag = card.model, card.tag
    return f"""---
library_name: geofm
license: {known}
tags: [earth-observation, sentinel-2, {model}]
---

# {card.title}

```python
import geofm
from huggingface_hub import snapshot_download

model = geofm.create_model("{model}", pretrained=snapshot_download("{repo}"))
```

All facts, as in the weight card [{model}.{tag}.toml]({model}.{tag}.toml):

```
{card_text(card)}
```

Licence of the weights: {licence}. Training data: {card.training.get("data", "not stated")} \
(licence: {card.licence.data}).

Trained with `{card.training.get("command", "not stated")}`; the whole recipe is in `recipe.yaml`.
"""


# Those that the hub knows by these names and that weights are likely to have.
_LICENCES = (
    "apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "bsd-3-clause",
)  # fmt: skip
