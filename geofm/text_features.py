"""Names to text features, once: shared beginnings are computed once, and results can be kept.

Thousands of prompts such as "Deciduous Broadleaf / Fagaceae / Quercus / Quercus robur" differ only
in their last few tokens. The text transformer is causal, so what it computes for the beginning of a
prompt does not depend on how the prompt goes on. Sorted prompts are therefore packed as trees into
one token sequence, where every token sees only its own prompt's beginning.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["encode_prompts", "evaluating", "text_key"]

logger = logging.getLogger(__name__)

# Tokens of a pack. Longer packs repeat fewer beginnings but attend over more tokens in vain.
_PACK = 128
# Raise when what is computed for a prompt changes, so that older cache files are not used.
_CACHE_VERSION = "1"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, then every module back as it was.

    Args:
        model: Any module.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def encode_prompts(
    model: Any,
    prompts: Sequence[str],
    batch_size: int = 256,
    cache: str | Path | None = None,
) -> Tensor:
    """Encode prompts to unit length.

    Args:
        model: Has ``tokenize`` and ``encode_text``, as `GeoTreeCLIP` has.
        prompts: Any number, in any order; repeated ones are computed once.
        batch_size: Sets how much is computed, and held, at a time: as many tokens as this number of
            prompts padded to 77 would have. The result's last digits depend on it.
        cache: Folder for the features; they are kept there under the text tower's weights and the
            prompts, and taken from there when both are the same. None keeps nothing.

    Returns:
        (prompts, embed_dim) float32, on the CPU.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    unique = list(dict.fromkeys(prompts))
    path = key = None
    features = None
    if cache is not None:
        key = text_key(model, unique)
        path = Path(cache) / f"{key}.safetensors"
        features = _read(path, key, len(unique))
    if features is None:
        with evaluating(model), torch.inference_mode():
            features = _encode(model, unique, batch_size)
        # Out of inference mode, so that a caller may use them in training.
        features = features.clone()
        if path is not None and key is not None:
            _write(path, key, features)
    row = {prompt: i for i, prompt in enumerate(unique)}
    return features[torch.tensor([row[prompt] for prompt in prompts], dtype=torch.long)]


def _encode(model: Any, prompts: Sequence[str], batch_size: int) -> Tensor:
    if not prompts:
        out: Tensor = model.encode_text([], normalize=True)
        return out.float().cpu()
    tokens: Tensor = model.tokenize(list(prompts))
    tower = getattr(model, "text", None)
    if _is_causal(tower):
        # As many tokens at a time as the batch would have if it were padded.
        packs_per_batch = max(1, batch_size * tokens.shape[1] // _PACK)
        features = _encode_trees(tower, tokens, packs_per_batch)
        return F.normalize(features.float(), dim=-1)
    # Another kind of tower: batches of similar length, which encode_text trims to their longest.
    order = tokens.argmax(dim=-1).argsort(stable=True)
    parts = [
        model.encode_text(tokens[batch], normalize=True).float().cpu()
        for batch in torch.split(order, batch_size)
    ]
    features = torch.cat(parts)
    return torch.empty_like(features).index_copy_(0, order, features)


def _is_causal(tower: Any) -> bool:
    """Whether a tower is what `_encode_trees` computes: CLIP's, read at the last token."""
    return (
        isinstance(tower, TextTransformer)
        and tower.attn_mask is not None
        and tower.cls_emb is None
        and tower.text_projection is None
        and tower.transformer.batch_first
        and all(type(b) is ResidualAttentionBlock for b in tower.transformer.resblocks)
    )


def _encode_trees(tower: Any, tokens: Tensor, packs_per_batch: int) -> Tensor:
    packs = _pack(tokens)
    # Packs of a batch are padded to its largest.
    packs.sort(key=lambda pack: len(pack.ids))
    out = torch.empty(len(tokens), tower.ln_final.weight.shape[0])
    for start in range(0, len(packs), packs_per_batch):
        batch = packs[start : start + packs_per_batch]
        ids = _padded([pack.ids for pack in batch])
        depth = _padded([pack.depth for pack in batch])
        last = _padded([pack.last for pack in batch])
        seen = _seen(_padded([pack.end for pack in batch]))
        features = _encode_batch(tower, ids, depth, last, seen).float().cpu()
        for pack, own in zip(batch, features, strict=True):
            out[torch.tensor(pack.rows)] = own[: len(pack.rows)]
    return out


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _encode_batch(tower: Any, ids: Tensor, depth: Tensor, last: Tensor, seen: Tensor) -> Tensor:
    """Run the transformer on trees.

    Args:
        tower: The text transformer.
        ids: (B, T) tokens.
        depth: (B, T) their positions.
        last: (B, R) the nodes to read.
        seen: (B, T, T), as from `_seen`.

    Returns:
        (B, R, width).
    """
    device = tower.positional_embedding.device
    x = tower.token_embedding(ids.to(device)) + tower.positional_embedding[depth.to(device)]
    *blocks, final = tower.transformer.resblocks
    mask = _additive(seen, final.attn.num_heads).to(device, x.dtype)
    for block in blocks:
        x = block(x, attn_mask=mask)
    # After the last attention only the nodes to read matter.
    width = x.shape[-1]
    read = x.gather(1, last.to(device)[..., None].expand(-1, -1, width))
    rows = seen.gather(1, last[..., None].expand(-1, -1, seen.shape[-1]))
    mask = _additive(rows, final.attn.num_heads).to(device, x.dtype)
    keys = final.ln_1(x)
    read = read + final.ls_1(final.attention(final.ln_1(read), keys, keys, attn_mask=mask))
    read = read + final.ls_2(final.mlp(final.ln_2(read)))
    features: Tensor = tower.ln_final(read)
    return features


def _seen(end: Tensor) -> Tensor:
    """What each node of a tree in depth-first order sees: its ancestors and itself.

    Args:
        end: (B, T), the place after the last descendant of each node; 0 in padding.

    Returns:
        (B, T, T) bool.
    """
    place = torch.arange(end.shape[1])
    below = (place[None, :] <= place[:, None]) & (place[:, None] < end[:, None, :])
    # Padding sees itself, as a softmax over nothing is not a number; nobody sees it.
    return below | torch.eye(end.shape[1], dtype=torch.bool)


def _additive(seen: Tensor, heads: int) -> Tensor:
    """Attention mask: 0 where seen, else −inf; (B · heads, queries, keys)."""
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    return mask.repeat_interleave(heads, dim=0)


class _Pack:
    """Some prompts as a tree of tokens, in depth-first order.

    Attributes:
        ids: Token of each node.
        depth: Its position in its prompt.
        end: The place after its last descendant.
        rows: The prompts in the pack.
        last: The node of each prompt's last token.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.depth: list[int] = []
        self.end: list[int] = []
        self.rows: list[int] = []
        self.last: list[int] = []
        self._path: list[int] = []

    def shared(self, prompt: list[int]) -> int:
        """How many of the prompt's first tokens the latest prompt of the pack has too."""
        count = 0
        for node, token in zip(self._path, prompt, strict=False):
            if self.ids[node] != token:
                break
            count += 1
        return count

    def add(self, row: int, prompt: list[int]) -> None:
        shared = self.shared(prompt)
        self.close(shared)
        for depth in range(shared, len(prompt)):
            self._path.append(len(self.ids))
            self.ids.append(prompt[depth])
            self.depth.append(depth)
            self.end.append(0)
        self.rows.append(row)
        self.last.append(self._path[-1])

    def close(self, keep: int = 0) -> None:
        """End the subtrees below the first `keep` nodes of the path."""
        for node in self._path[keep:]:
            self.end[node] = len(self.ids)
        del self._path[keep:]


def _pack(tokens: Tensor) -> list[_Pack]:
    """Pack prompts, those with the longest common beginnings together."""
    lengths = (tokens.argmax(dim=-1) + 1).tolist()
    texts = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    packs = [_Pack()]
    for row in sorted(range(len(texts)), key=texts.__getitem__):
        text = texts[row]
        pack = packs[-1]
        if pack.ids and len(pack.ids) + len(text) - pack.shared(text) > _PACK:
            pack.close()
            pack = _Pack()
            packs.append(pack)
        pack.add(row, text)
    packs[-1].close()
    return packs


def text_key(model: Any, prompts: Sequence[str]) -> str:
    """What text features depend on, as a name.

    Args:
        model: As in `encode_prompts`. Its weights are read, not the name of the checkpoint they
            came from: they may have been trained further.
        prompts: The prompts, in order.

    Returns:
        A sha256 over the text tower's shape and parameters and over the prompts, in hexadecimal.
    """
    tower = getattr(model, "text", None)
    module = tower if isinstance(tower, nn.Module) else model
    digest = hashlib.sha256(f"{_CACHE_VERSION}\n{module!r}\n".encode())
    for part in module.modules():
        # Heads are in no parameter's shape.
        if isinstance(part, nn.MultiheadAttention):
            digest.update(f"{part.num_heads} ".encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for prompt in prompts:
        digest.update(prompt.encode() + b"\0")
    return digest.hexdigest()


def _read(path: Path, key: str, count: int) -> Tensor | None:
    """Features from a cache file; None if there is none that can be used."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                warnings.warn(
                    f"{path} was made from other weights or prompts than its name says; the names "
                    f"are encoded anew",
                    stacklevel=3,
                )
                return None
            features: Tensor = file.get_tensor("features")
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{path} cannot be read ({error}); the names are encoded anew", stacklevel=3)
        return None
    if features.ndim != 2 or len(features) != count:
        warnings.warn(
            f"{path} holds {tuple(features.shape)}, not {count} names; the names are encoded anew",
            stacklevel=3,
        )
        return None
    logger.info("text features of %d names from %s", count, path)
    return features


def _write(path: Path, key: str, features: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    # Whole or not at all: another process may read it.
    try:
        save_file({"features": features.contiguous()}, temporary, metadata={"key": key})
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
