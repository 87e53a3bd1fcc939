"""SeCo and MoCo v2: an encoder learns which views show the same place.

Source: Plekhanova et al., SSL4Eco, EarthVision at CVPR 2025 (arXiv 2504.18256), after Mañas et al.,
Seasonal Contrast, ICCV 2021 (arXiv 2103.16607) and Chen et al., MoCo v2 (arXiv 2003.04297). A query
encoder learns by gradient to recognise a query's key among negatives; keys come from a second
encoder that follows the first slowly, and the keys of past steps wait in a queue as negatives.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from geofm.errors import ModelError, PixelError
from geofm.factory import create_model
from geofm.pretrain.augment import Numbers, Photometric, RandomResizedCrop, uniforms
from geofm.pretrain.method import Exported, Method, draws_of
from geofm.registry import architecture

__all__ = ["MomentumContrast", "SeasonContrast"]

# Purpose of a sample's random numbers (`random_of`): where its views are cut and how they change.
_VIEWS = 20
# The first queue is noise that all processes draw alike.
_QUEUE_SEED = 0
# Arguments of `create_model` that would make an encoder return something else than features.
_NO_FEATURES = ("num_classes", "features_only", "out_indices")


class _MomentumLearner(Method):
    """What SeCo and MoCo share: two encoders, a head and a queue for each embedding subspace.

    Named as published: ``encoder_q``, ``encoder_k``, ``heads_q``, ``heads_k``, ``queue``
    (subspaces, projection, length) and ``queue_ptr``. So `geofm.create_model` reads a ResNet's
    encoder out of such a state dict too.
    """

    spaces: ClassVar[int]
    """Embedding subspaces, and views that are keys."""
    seasons: ClassVar[int]
    """Dates of a place that the views are made of."""

    starting_points = ("arguments.pretrained",)

    def __init__(
        self,
        encoder: str | nn.Module = "ssl4eco_resnet50",
        *,
        arguments: Mapping[str, Any] | None = None,
        projection: int = 128,
        hidden: int | None = None,
        features: int | None = None,
        queue: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        size: int = 224,
        scale: float = 255.0,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ModelError(f"momentum must be from 0 to 1, got {momentum!r}")
        for name, value in {"temperature": temperature, "scale": scale}.items():
            if not value > 0:
                raise ModelError(f"{name} must be above 0, got {value!r}")
        for name, value in {"queue": queue, "projection": projection, "size": size}.items():
            if value < 1:
                raise ModelError(f"{name} must be at least 1, got {value!r}")
        self.encoder_name = encoder if isinstance(encoder, str) else None
        self.arguments = dict(arguments or {})
        self.momentum = momentum
        self.temperature = temperature
        self.scale = scale
        self.crop = RandomResizedCrop(size)
        self.photometric = Photometric()

        self.encoder_q = _encoder(encoder, self.arguments)
        self.features = _width(self.encoder_q, features)
        self.heads_q = nn.ModuleList(
            _head(self.features, hidden or self.features, projection) for _ in range(self.spaces)
        )
        # The keys' side begins as a copy and never sees a gradient.
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.heads_k = copy.deepcopy(self.heads_q).requires_grad_(False)
        # Bands of the encoder's input; of somebody's own module they are not known.
        self.in_chans = None if isinstance(encoder, nn.Module) else self._first_conv().in_channels
        noise = torch.randn(
            self.spaces, projection, queue, generator=torch.Generator().manual_seed(_QUEUE_SEED)
        )
        self.queue: Tensor
        self.queue_ptr: Tensor
        self.register_buffer("queue", F.normalize(noise, dim=1))
        self.register_buffer("queue_ptr", torch.zeros(self.spaces, 1, dtype=torch.long))
        # Read by DistributedDataParallel, which would send them around in every step: they are
        # alike on all ranks by construction, and 100 MB.
        self._ddp_params_and_buffers_to_ignore = ["queue", "queue_ptr"]

    def no_weight_decay(self) -> set[str]:
        """The encoder's own exceptions: a Vision Transformer's tokens and positions.

        Returns:
            Their names.
        """
        exceptions: set[str] = getattr(self.encoder_q, "no_weight_decay", set)()
        return {f"encoder_q.{name}" for name in exceptions}

    def views(self, images: Tensor, draws: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Make the query's and the keys' images.

        Args:
            images: (N, seasons, C, H, W) digital numbers.
            draws: One integer per sample, which all randomness follows from.

        Returns:
            The query's view and one for each key, (N, C, size, size), divided by `scale`.

        Raises:
            PixelError: The shape is another, or there are too few seasons.
        """
        self._check_images(images)
        count = RandomResizedCrop.numbers + Photometric.numbers
        numbers = uniforms(draws, _VIEWS, self.spaces + 1, count)
        # In half precision, digital numbers would lose their last digits.
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            made = self._views(images, numbers)
            query, *keys = (view / self.scale for view in made)
        return query, tuple(keys)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse data without images, or with too few seasons or other bands.

        Args:
            batch: As `forward` gets them.

        Raises:
            PixelError: As `forward`.
            ModelError: The encoder takes another number of bands.
        """
        self._check_images(self._images_of(batch))

    def _images_of(self, batch: Mapping[str, Any]) -> Tensor:
        images = batch.get("image")
        if not isinstance(images, Tensor):
            raise PixelError(f"the batch lacks a tensor 'image'; it has {', '.join(batch)}")
        return images

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 5 or images.shape[1] < self.seasons or not len(images):
            raise PixelError(
                f"expected (N, seasons, C, H, W) with at least {self.seasons} seasons of one or "
                f"more samples, got {tuple(images.shape)}"
            )
        self._check_bands(images.shape[2])

    def _check_bands(self, count: int) -> None:
        if self.in_chans is not None and count != self.in_chans:
            raise ModelError(
                f"{self.encoder_name} takes {self.in_chans} bands, the images have {count}: choose "
                f"the data's bands (data.options.bands), or make the encoder for them "
                f"(arguments={{'bands': [...]}})"
            )

    def _views(self, images: Tensor, numbers: Numbers) -> list[Tensor]:
        """The query's view and one for each key, in digital numbers."""
        raise NotImplementedError

    def _cropped(self, image: Tensor, numbers: Numbers) -> Tensor:
        return self.crop(image.float(), numbers[:, : RandomResizedCrop.numbers])

    def _changed(self, image: Tensor, numbers: Numbers) -> Tensor:
        return self.photometric(image.float(), numbers[:, RandomResizedCrop.numbers :])

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Make views of a batch and take one step.

        Args:
            batch: ``"image"``: (N, seasons, C, H, W) digital numbers, at least `seasons` dates of
                each place, of which the first `seasons` are used.

        Returns:
            As `step`.

        Raises:
            PixelError: There is no such tensor, or it has too few seasons.
            ModelError: As `step`.
        """
        return self.step(*self._views_of(batch))

    # What is left to chance is no part of a compiled graph: each draw would make another.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _views_of(self, batch: Mapping[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        images = self._images_of(batch)
        return self.views(images, draws_of(batch, len(images)))

    def step(self, query: Tensor, keys: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
        """One step of the learner: the keys' side follows, losses, and the keys enter the queue.

        In training mode every call is a step, also under gradient accumulation (the keys' side then
        follows the same weights several times over) and under ``no_grad``. In evaluation mode
        nothing changes: neither the keys' side nor the queue.

        Args:
            query: Prepared images, (N, C, H, W), or features of the query encoder, (N, features).
            keys: One view for each subspace, as `query`; features are the key encoder's. A single
                one may come as a tensor.

        Returns:
            Scalars: ``"subspace0"`` … the cross-entropies, ``"total"`` their sum, and ``"top1_0"``
            … the shares of queries that find their key first.

        Raises:
            ModelError: Views are too many, too few or differ in shape, or the queue is no multiple
                of the batch of all processes.
        """
        views = (keys,) if isinstance(keys, Tensor) else tuple(keys)
        self._check(query, views)
        if self.training:
            self._follow()
        encoded = self._encoded(self.encoder_q, query)
        with torch.no_grad():
            found = [self._encoded_keys(view) for view in views]
            # Subspace by subspace, its own key first.
            own = [
                [_unit(head(found[j])) for j in self._order(i)]
                for i, head in enumerate(self.heads_k)
            ]
            everyone = self._from_all_ranks(own)
        out: dict[str, Tensor] = {}
        for i, head in enumerate(self.heads_q):
            # The copy that cat makes leaves the queue free to change before the gradient is taken.
            negatives = torch.cat([self.queue[i], *(key.T for key in everyone[i][1:])], dim=1)
            loss, right = self._compare(_unit(head(encoded)), own[i][0], negatives)
            out[f"subspace{i}"], out[f"top1_{i}"] = loss, right
        if self.training:
            self._enqueue(torch.stack([keys_of[0] for keys_of in everyone]))
        out["total"] = torch.stack([out[f"subspace{i}"] for i in range(self.spaces)]).sum()
        return out

    def _order(self, space: int) -> list[int]:
        """Views whose keys a subspace compares with, its own first.

        Subspace 0 is invariant to all that views differ in. In the others, the keys of the other
        views are negatives too: of a query's own place as well, which is what they have to tell
        apart.
        """
        return [space, *(j for j in range(self.spaces) if j != space and space > 0)]

    def _compare(self, query: Tensor, key: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of finding the key, and how often it comes first."""
        with torch.autocast(query.device.type, enabled=False):
            positive = (query * key).sum(1, keepdim=True)
            logits = torch.cat([positive, query @ negatives], dim=1) / self.temperature
            # The key is always class 0.
            target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            loss = F.cross_entropy(logits, target)
        return loss, (logits.detach().argmax(1) == 0).float().mean()

    def _encoded(self, encoder: nn.Module, view: Tensor) -> Tensor:
        if view.ndim == 2:
            return view
        found: Tensor = encoder(view)
        if tuple(found.shape) != (len(view), self.features):
            raise ModelError(
                f"the encoder returned {tuple(found.shape)}, expected ({len(view)}, "
                f"{self.features}): it must pool and have no head"
            )
        return found

    def _encoded_keys(self, view: Tensor) -> Tensor:
        if view.ndim == 2 or _world() == 1 or not self.training or not _has_batch_norm(self):
            return self._encoded(self.encoder_k, view)
        # A query and its key in one batch share its statistics, which would give the key away; so
        # each process encodes a random part of all keys.
        order = torch.randperm(len(view) * _world())
        order = order.to(view.device)
        dist.broadcast(order, src=0)
        mine = order.view(_world(), -1)[dist.get_rank()]
        found = _gather(self._encoded(self.encoder_k, _gather(view)[mine]))
        return found[order.argsort().view(_world(), -1)[dist.get_rank()]]

    def _from_all_ranks(self, own: list[list[Tensor]]) -> list[list[Tensor]]:
        """Every key with those of the other processes, in one message."""
        if _world() == 1:
            return own
        flat = [key for keys in own for key in keys]
        rows = iter(_gather(torch.stack(flat, dim=1)).unbind(1))
        return [[next(rows) for _ in keys] for keys in own]

    @torch.no_grad()
    def _follow(self) -> None:
        """Key parameters = momentum · key + (1 - momentum) · query."""
        for query, key in ((self.encoder_q, self.encoder_k), (self.heads_q, self.heads_k)):
            leaders: list[Tensor] = list(query.parameters())
            followers: list[Tensor] = list(key.parameters())
            if followers:
                torch._foreach_lerp_(followers, leaders, 1 - self.momentum)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Put keys (subspaces, N, projection) in place of the oldest ones."""
        # Computed on the device: reading the pointer would wait for it.
        place = torch.arange(keys.shape[1], device=keys.device) + self.queue_ptr[0]
        length = self.queue.shape[2]
        self.queue.index_copy_(2, place % length, keys.transpose(1, 2))
        self.queue_ptr.copy_((self.queue_ptr + keys.shape[1]) % length)

    def _check(self, query: Tensor, views: tuple[Tensor, ...]) -> None:
        shapes = [tuple(view.shape) for view in (query, *views)]
        if len(views) != self.spaces:
            raise ModelError(
                f"{type(self).__name__} takes {self.spaces} view(s) as keys, got {len(views)}"
            )
        if query.ndim not in (2, 4) or len(set(shapes)) > 1:
            raise ModelError(
                f"query and keys must all be (N, C, H, W) images or all (N, {self.features}) "
                f"features, of one shape; got {', '.join(map(str, shapes))}"
            )
        if query.ndim == 2 and query.shape[1] != self.features:
            raise ModelError(f"expected {self.features} features of a sample, got {query.shape[1]}")
        if query.ndim == 4:
            self._check_bands(query.shape[1])
        count, length = len(query) * _world(), self.queue.shape[2]
        if count == 0 or length % count:
            raise ModelError(
                f"a queue of {length} is no multiple of the batch of all processes, {count}: "
                f"change queue= or the batch size"
            )

    def export(self) -> Exported:
        """The query encoder, as ``geofm.create_model`` takes it.

        Returns:
            Its name, arguments and weights, without heads and queue.

        Raises:
            ModelError: The learner was made with a module instead of a name.
        """
        if self.encoder_name is None:
            raise ModelError(
                f"this encoder is a {type(self.encoder_q).__name__} without a registered name; "
                f"build the learner with a name (encoder='ssl4eco_resnet50', arguments={{...}}), "
                f"or save encoder_q.state_dict() yourself"
            )
        of_factory = inspect.signature(create_model).parameters
        own = {key: value for key, value in self.arguments.items() if key not in of_factory}
        state = {name: value.detach() for name, value in self.encoder_q.state_dict().items()}
        return Exported(self.encoder_name, {**own, "in_chans": self.in_chans}, state)

    def _first_conv(self) -> nn.Conv2d:
        assert self.encoder_name is not None
        first = self.encoder_q.get_submodule(architecture(self.encoder_name).first_conv)
        assert isinstance(first, nn.Conv2d)
        return first


class SeasonContrast(_MomentumLearner):
    """SeCo: three embedding subspaces, so that seasons stay apart where they should.

    Of three dates of a place, the query is the first. Key 0 is the second, augmented: subspace 0 is
    invariant to season and augmentation. Key 1 is the third as it is: subspace 1 is invariant to
    the season alone. Key 2 is the first, augmented: subspace 2 is invariant to the augmentation
    alone. Subspaces 1 and 2 take the keys of the other two views as negatives beside the queue.
    Every view is a random part, resized; what is augmented was so before, on the whole tile.

    Args:
        encoder: A registered architecture, or a module that returns (N, features).
        arguments: For ``geofm.create_model`` where `encoder` is a name: ``bands``, ``img_size``,
            ``pretrained`` and the like.
        projection: Width of the embeddings that are compared.
        hidden: Width inside the heads; None for as many as features.
        features: Width of a module's output; None for its ``num_features``.
        queue: Keys of past steps kept as negatives; a multiple of the batch of all processes.
        momentum: How much of the keys' side a step keeps.
        temperature: What similarities are divided by.
        size: Side of a view, in px.
        scale: What digital numbers are divided by, as the last transform.

    Raises:
        ModelError: An argument is out of its range, or an encoder's width is not known.
        UnknownModelError: No architecture is called `encoder`.
    """

    spaces = 3
    seasons = 3

    def _views(self, images: Tensor, numbers: Numbers) -> list[Tensor]:
        first, second, third = images[:, 0], images[:, 1], images[:, 2]
        return [
            self._cropped(first, numbers[0]),
            self._cropped(self._changed(second, numbers[1]), numbers[1]),
            self._cropped(third, numbers[2]),
            self._cropped(self._changed(first, numbers[3]), numbers[3]),
        ]


class MomentumContrast(_MomentumLearner):
    """MoCo v2 between seasons: query and key are two dates of a place, both augmented.

    A view is a random part, resized and then augmented, as published.

    Arguments and errors are those of `SeasonContrast`.
    """

    spaces = 1
    seasons = 2

    def _views(self, images: Tensor, numbers: Numbers) -> list[Tensor]:
        return [
            self._changed(self._cropped(images[:, i], numbers[i]), numbers[i]) for i in range(2)
        ]


def _encoder(encoder: str | nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    if isinstance(encoder, nn.Module):
        if arguments:
            raise ModelError(
                f"arguments ({', '.join(arguments)}) are for building an encoder by name; this one "
                f"is built already"
            )
        return encoder
    refused = [key for key in _NO_FEATURES if key in arguments]
    if refused:
        raise ModelError(
            f"{', '.join(refused)}: contrastive learning needs an encoder that returns pooled "
            f"features; leave it out"
        )
    return create_model(encoder, **arguments)


def _width(encoder: nn.Module, features: int | None) -> int:
    width = features if features is not None else getattr(encoder, "num_features", None)
    if not isinstance(width, int) or width < 1:
        raise ModelError(
            f"{type(encoder).__name__} does not tell how many features it returns; say features=..."
        )
    return width


def _head(features: int, hidden: int, projection: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, projection))


def _unit(embedding: Tensor) -> Tensor:
    """Rows of length 1, in float32 also under autocast."""
    return F.normalize(embedding.float(), dim=1)


def _has_batch_norm(model: _MomentumLearner) -> bool:
    """Whether the encoder's statistics are those of one process's batch."""
    return any(
        isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        for module in model.encoder_k.modules()
    )


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(rows: Tensor) -> Tensor:
    """Rows of all processes, in the order of their ranks; no gradient."""
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(_world())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
