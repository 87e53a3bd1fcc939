"""MP-MAE: masked autoencoding of satellite tiles with many pretext targets.

Source: Nedungadi et al., MMEarth, ECCV 2024 (arXiv 2405.02771), and the outputs of its published
code. The published encoder runs on sparse tensors: a site exists only where its patch is visible.
The same numbers come out of plain tensors here. What works on single sites (norms, linear layers,
GRN) and within a patch (stem, downsampling) runs on the visible sites alone, laid out one site per
row; only the depthwise 7×7 convolution, whose window crosses patches, runs on the whole grid, with
zeros at the removed ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from geofm.errors import BandError, ModelError
from geofm.layouts import mmearth
from geofm.models.mpmae import LAYER_NORM_EPS, MPMAE, Block
from geofm.pretrain._strict import near
from geofm.pretrain.masked_encoder import decode, encode_visible
from geofm.pretrain.method import Exported, Method, draws_of, random_of
from geofm.pretrain.pretext import (
    MODALITIES,
    Kind,
    Modality,
    UncertaintyWeighting,
    cross_entropy,
    means,
    patch_error,
    squared_error,
    summary,
    zeroed,
)
from geofm.pretrain.visible import Visible
from geofm.registry import architecture
from geofm.spectral import refuse_string

__all__ = ["BANDS", "MaskedAutoencoder"]

BANDS: Final = tuple("B1 B2 B3 B4 B5 B6 B7 B8A B8 B9 B11 B12".split())
"""Channels of the modality ``sentinel2``, in MMEarth's order: B8A comes before B8."""

# The sparse pretraining encoder's; the decoder's block is the dense one with its own 1e-4.
_ENCODER_GRN_EPS = 1e-6
# Purposes of a sample's random numbers (`random_of`).
_CROP, _MASK = 0, 1


class MaskedAutoencoder(Method):
    """Pretrain an MP-MAE encoder: hide most patches, predict every modality.

    The encoder is that of ``geofm.create_model(encoder_name)`` and its weights load there as they
    are. Named as published: ``mask_token``, ``proj``, ``pred_dict``, ``layer_norm_tmp``,
    ``loss_fn.log_vars``; the block that the published ``decoder_dict`` lists once per modality is
    one module, ``decoder``, computed once. `load_state_dict` also takes the published layout.

    Args:
        encoder_name: ``"mpmae_atto"`` and the like.
        patch_size: Side of a patch in px, a multiple of 8: 8 for tiles of 56 px, 16 for 112 px.
        modalities: Targets: names out of `MODALITIES`, or a `Modality` of your own (or a mapping
            of its fields, as in a recipe). The name of the input stands for as many channels as
            `input_bands` has.
        loss: ``"uncertainty"``: learned weights; ``"equal"``: plain sum.
        grn_scope: Over which visible sites the encoder's global response normalization goes:
            ``"sample"``: each sample's own, so a sample does not depend on its batch; ``"batch"``:
            those of all samples of the batch, as published.
        mask_ratio: Share of patches to remove; the visible ones are rounded down.
        size: Side of the crop, in px; 7 patches by default.
        input: Key of the batch that the encoder sees.
        bands: Bands of the input to use, by name; None for all.
        input_bands: All bands of the input in the batch, in order.
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        flips: Flip and turn tiles at random (as one, all pixel targets with them).
        missing: What NaN and infinities in a ``"pixels"`` target count as: ``"zero"``: the value
            0, as published; ``"exclude"``: no error there, nor at values of exactly 0, which
            normalized data hold where something is missing.
        tile_targets: What ``"vector"``, ``"category"`` and ``"summary"`` targets are told from by
            one linear layer: the ``"decoder"``'s mean, as published, or the ``"encoder"``'s pooled
            features, the very ones that the trained encoder gives its users.

    Raises:
        ModelError: An argument is out of its range.
        BandError: A band of `bands` is not among `input_bands`.
    """

    def __init__(
        self,
        encoder_name: str = "mpmae_atto",
        *,
        patch_size: int = 8,
        modalities: Sequence[str | Modality | Mapping[str, Any]] = tuple(MODALITIES),
        loss: Literal["uncertainty", "equal"] = "uncertainty",
        grn_scope: Literal["sample", "batch"] = "sample",
        mask_ratio: float = 0.6,
        size: int | None = None,
        input: str = "sentinel2",
        bands: Sequence[str] | None = None,
        input_bands: Sequence[str] = BANDS,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        flips: bool = False,
        missing: Literal["zero", "exclude"] = "zero",
        tile_targets: Literal["decoder", "encoder"] = "decoder",
    ) -> None:
        super().__init__()
        _check_choice("loss", loss, ("uncertainty", "equal"))
        _check_choice("grn_scope", grn_scope, ("sample", "batch"))
        _check_choice("missing", missing, ("zero", "exclude"))
        _check_choice("tile_targets", tile_targets, ("decoder", "encoder"))
        if not 0 < mask_ratio < 1:
            raise ModelError(f"mask_ratio must lie between 0 and 1, got {mask_ratio!r}")
        self.size = 7 * patch_size if size is None else size
        if self.size < patch_size or self.size % patch_size:
            raise ModelError(f"size {self.size} is not a multiple of patch_size {patch_size}")
        self.encoder_name = encoder_name
        self.patch_size = patch_size
        self.grn_scope = grn_scope
        self.mask_ratio = mask_ratio
        self.input = input
        self.flips = flips
        self.missing = missing
        self.tile_targets = tile_targets
        for name, given in {"bands": bands, "input_bands": input_bands}.items():
            refuse_string(given or (), name)
        self.input_bands = tuple(input_bands)
        self.bands = self.input_bands if bands is None else tuple(bands)
        self._channels = _positions(self.bands, self.input_bands)
        self.modalities = _modalities(modalities, input, len(self.input_bands))

        self.encoder = _encoder(encoder_name, len(self.bands), patch_size, self.size)
        width = self.encoder.num_features
        self.mask_token = nn.Parameter(torch.zeros(1, decoder_dim, 1, 1))
        self.proj = nn.Conv2d(width, decoder_dim, 1)
        self.decoder = nn.Sequential(*(Block(decoder_dim) for _ in range(decoder_depth)))
        self.layer_norm_tmp = nn.LayerNorm(decoder_dim, eps=LAYER_NORM_EPS)
        tile_width = decoder_dim if tile_targets == "decoder" else width
        self.pred_dict = nn.ModuleDict(
            {
                m.name: _head(m, decoder_dim if m.per_pixel else tile_width, patch_size)
                for m in self.modalities
            }
        )
        self.loss_fn = UncertaintyWeighting(len(self.modalities)) if loss == "uncertainty" else None
        tiles = not all(m.per_pixel for m in self.modalities)
        if tile_targets == "encoder" and not any(m.per_pixel for m in self.modalities):
            raise ModelError(
                "with tile_targets='encoder' and no target per pixel there is nothing to decode; "
                "add a modality of kind 'pixels' or 'classes'"
            )
        # A parameter without gradient stops distributed training.
        self.layer_norm_tmp.requires_grad_(tiles and tile_targets == "decoder")
        if not (tiles and tile_targets == "encoder"):
            # The norm of the classification head has no part in the published pretraining.
            self.encoder.norm = nn.Identity()
        self._init_decoder()
        self.register_load_state_dict_pre_hook(_from_published)  # type: ignore[no-untyped-call]

    def _init_decoder(self) -> None:
        for part in (self.proj, self.decoder, self.pred_dict):
            for module in part.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.mask_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """As published, nothing is exempt but biases and vectors; the mask token counts as one.

        Returns:
            The names of what is stored with more axes than it has.
        """
        names = {name for name, _ in self.named_parameters() if ".grn." in name}
        return names | {"mask_token"}

    def random_mask(self, batch: Mapping[str, Any], count: int, grid: int) -> Tensor:
        """Which patches to remove.

        Args:
            batch: For its ``"draw"``.
            count: Number of samples.
            grid: Patches along a side.

        Returns:
            (count, grid²) bool, True where removed, row by row.
        """
        keep = _kept(grid, self.mask_ratio)
        mask = torch.ones(count, grid * grid, dtype=torch.bool)
        for row, draw in zip(mask, draws_of(batch, count), strict=True):
            row[torch.from_numpy(random_of(draw, _MASK).permutation(grid * grid)[:keep])] = False
        return mask

    def encode(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """Features of the visible patches.

        Args:
            pixels: Prepared input, (N, in_chans, H, W), H and W the same multiple of `patch_size`.
            mask: (N, h·w) or (N, h, w), True or 1 where a patch is removed; as many visible
                patches in every sample.

        Returns:
            (N, C, h, w), zero at removed patches.

        Raises:
            ModelError: A shape does not fit, or samples differ in their number of visible patches.
        """
        grid = self._grid_of(pixels)
        visible = Visible.of(mask.to(pixels.device), len(pixels), grid)
        rows = encode_visible(self.encoder, pixels, visible, self.grn_scope)
        return visible.to_grid(rows, side=1).contiguous()

    def _grid_of(self, pixels: Tensor) -> int:
        channels, (height, width) = self.encoder.in_chans, pixels.shape[-2:]
        if pixels.ndim != 4 or pixels.shape[1] != channels:
            raise ModelError(f"expected (N, {channels}, H, W), got {tuple(pixels.shape)}")
        if height != width or height % self.patch_size or not height:
            raise ModelError(
                f"tiles must be squares of a multiple of {self.patch_size} px, the patch size; "
                f"got {height}×{width}"
            )
        return int(height) // self.patch_size

    def losses(
        self, targets: Mapping[str, Any], encoded: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Decode and compare with the targets.

        Args:
            targets: Each modality as its `Modality` says; tiles as large as the encoder's input.
            encoded: From `encode`, (N, C, h, w).
            mask: As given to `encode`.

        Returns:
            A scalar for each modality and ``"total"``. A modality without any known value in the
            batch is 0 and adds nothing.

        Raises:
            ModelError: A modality is absent from `targets` or its shape does not fit.
        """
        count, _, grid, _ = encoded.shape
        visible = Visible.of(mask.to(encoded.device), count, grid)
        rows = encoded.permute(0, 2, 3, 1).flatten(0, 2)[visible.patches]
        return self._losses(targets, rows, visible)

    def _losses(
        self, targets: Mapping[str, Any], rows: Tensor, visible: Visible
    ) -> dict[str, Tensor]:
        for m in self.modalities:
            self._check_target(m, targets, visible.count, visible.grid * self.patch_size)
        proj = F.linear(rows, self.proj.weight.flatten(1), self.proj.bias)
        token = self.mask_token.to(proj.dtype).flatten().expand(len(visible.removed), -1)
        grid = proj.new_empty(visible.count * visible.grid**2, proj.shape[1])
        grid = grid.index_copy(0, visible.patches, proj).index_copy(0, visible.removed, token)
        decoded = decode(self.decoder, visible.map_of(grid, 1))
        # Pixels are compared at removed patches only, so they are predicted only there.
        hidden = decoded.flatten(0, 2)[visible.removed]
        pooled = None
        if self.layer_norm_tmp.weight.requires_grad:
            pooled = self.layer_norm_tmp(decoded).mean((1, 2))
        elif self.tile_targets == "encoder":
            pooled = self.encoder.norm(rows.view(visible.count, -1, rows.shape[1]).mean(1))
        sums, counts = [], []
        for m in self.modalities:
            source = hidden if m.per_pixel else pooled
            assert source is not None
            predicted = self._predict(m, source)
            # Squares of half-precision numbers overflow.
            with torch.autocast(predicted.device.type, enabled=False):
                error, count = self._loss(m, predicted.float(), targets[m.key], visible)
            sums.append(m.weight * error)
            counts.append(count)
        values, present = means(sums, counts, everywhere=self.training)
        total = values.sum() if self.loss_fn is None else self.loss_fn(values, present)
        names = [m.name for m in self.modalities]
        return {**dict(zip(names, values.unbind(), strict=True)), "total": total}

    def _predict(self, m: Modality, source: Tensor) -> Tensor:
        head = self.pred_dict[m.name]
        return F.linear(source, head.weight.flatten(1), head.bias)  # type: ignore[operator, arg-type]

    def _check_target(self, m: Modality, targets: Mapping[str, Any], count: int, side: int) -> None:
        if m.key not in targets:
            raise ModelError(
                f"the batch lacks the modality {m.key!r}; it has {', '.join(targets)}. Give "
                f"modalities= without it to train without it"
            )
        target = targets[m.key]
        channels = 1 if m.kind == "classes" else m.channels
        expected = (count, channels, side, side) if m.is_map else (count, channels)
        if tuple(target.shape) != expected:
            way = (
                "bands that differ are named by input_bands=[...]"
                if m.key == self.input
                else f"another number of channels is said with {{name: {m.name}, kind: {m.kind}, "
                f"channels: ...}} in modalities="
            )
            raise ModelError(f"{m.name} should be {expected}, found {tuple(target.shape)}; {way}")
        # On a GPU, looking would mean waiting for it.
        if (
            m.kind == "classes"
            and target.device.type == "cpu"
            and not torch.compiler.is_compiling()
        ):
            low, high = (int(value) for value in target.aminmax())
            if low < -1 or high >= m.channels:
                raise ModelError(
                    f"{m.name} holds class {high if high >= m.channels else low}, expected 0 to "
                    f"{m.channels - 1}, or -1 where it is not known: bring its codes to this legend"
                )

    def _loss(
        self, m: Modality, predicted: Tensor, target: Tensor, visible: Visible
    ) -> tuple[Tensor, Tensor]:
        """Sum of errors and the number of values it is over."""
        if m.kind == "summary":
            target = summary(target, self.missing)
        if m.kind in ("vector", "summary"):
            return squared_error(predicted, target)
        if m.kind == "category":
            known = target.sum(1) > 0
            return cross_entropy(predicted, torch.where(known, target.argmax(1), -1))
        target = visible.hidden_patches(target, self.patch_size)
        predicted = predicted.view(len(predicted), -1, m.channels)
        if m.kind == "classes":
            # Classes before pixels: torch's softmax over a short last axis is five times slower.
            return cross_entropy(predicted.transpose(1, 2), target[:, 0].long())
        return patch_error(predicted, target.transpose(1, 2), m.patch_norm, self.missing)

    def forward(self, batch: Mapping[str, Any], mask: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of a batch: crop, mask, encode, decode, compare.

        Args:
            batch: The input and each modality, in tiles of at least `size` px; larger ones are
                cropped, all pixel targets alike: at random in training, else in the centre.
            mask: As in `encode`; None to draw one.

        Returns:
            As `losses`.

        Raises:
            ModelError: As `encode` and `losses`, or tiles are smaller than `size`.
        """
        batch, pixels, visible = self._prepare(batch, mask)
        rows = encode_visible(self.encoder, pixels, visible, self.grn_scope)
        return self._losses(batch, rows, visible)

    # What is left to chance and what depends on it is no part of a compiled graph.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prepare(
        self, batch: Mapping[str, Any], mask: Tensor | None
    ) -> tuple[dict[str, Any], Tensor, Visible]:
        """The cropped batch, the encoder's input, and which patches it sees."""
        self._check_input(batch)
        cropped = self._crop(batch)
        pixels = zeroed(cropped[self.input])
        if self._channels is not None:
            pixels = pixels[:, self._channels]
        grid = self._grid_of(pixels)
        if mask is None:
            mask = self.random_mask(batch, len(pixels), grid)
            return cropped, pixels, Visible.of(mask, len(pixels), grid).to(pixels.device)
        return cropped, pixels, Visible.of(mask.to(pixels.device), len(pixels), grid)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Refuse data without the input or a target, or of other shapes.

        Args:
            batch: As `forward` gets them.

        Raises:
            ModelError: As `forward`.
        """
        self._check_input(batch)
        cropped = self._crop(batch)
        for m in self.modalities:
            self._check_target(m, cropped, len(cropped[self.input]), self.size)

    def _check_input(self, batch: Mapping[str, Any]) -> None:
        if self.input not in batch:
            raise ModelError(f"the batch lacks the input {self.input!r}; it has {', '.join(batch)}")
        shape = tuple(batch[self.input].shape)
        if len(shape) != 4 or not shape[0]:
            raise ModelError(
                f"{self.input} should be (N, C, H, W) with N at least 1, found {shape}"
            )
        if shape[1] != len(self.input_bands):
            raise ModelError(
                f"{self.input} has {shape[1]} bands, expected {len(self.input_bands)}: "
                f"{', '.join(self.input_bands)}. Give input_bands=[...], the names of those it has"
            )

    def _crop(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        names = {self.input, *(m.key for m in self.modalities if m.is_map and m.key in batch)}
        count, _, height, width = batch[self.input].shape
        if min(height, width) < self.size:
            raise ModelError(
                f"tiles of {height}×{width} px are smaller than the crop of {self.size} px"
            )
        out = dict(batch)
        if (height, width) == (self.size, self.size) and not (self.flips and self.training):
            return out
        places = self._places(batch, count, height, width).to(batch[self.input].device)
        for name in names:
            channels = batch[name].shape[1]
            if tuple(batch[name].shape[-2:]) != (height, width):
                raise ModelError(
                    f"{name} has {tuple(batch[name].shape[-2:])} px and {self.input} "
                    f"{(height, width)}; they must cover the same pixels"
                )
            taken = batch[name].flatten(2).gather(2, places[:, None].expand(-1, channels, -1))
            out[name] = taken.unflatten(2, (self.size, self.size))
        return out

    def _places(self, batch: Mapping[str, Any], count: int, height: int, width: int) -> Tensor:
        """Of each sample, which pixels of a tile make its crop: (N, size²)."""
        corner = np.arange(self.size)[:, None] * width + np.arange(self.size)
        down, right = height - self.size, width - self.size
        if not self.training:
            middle = corner + (down // 2) * width + right // 2
            return torch.from_numpy(middle.flatten()).expand(count, -1)
        rows = []
        for draw in draws_of(batch, count):
            random = random_of(draw, _CROP)
            crop = corner + random.integers(down + 1) * width + random.integers(right + 1)
            if self.flips:
                # One of the eight ways a square can lie.
                turn = int(random.integers(8))
                crop = np.rot90(crop[:, ::-1] if turn >= 4 else crop, turn % 4)
            rows.append(crop.flatten())
        return torch.from_numpy(np.stack(rows))

    def export(self) -> Exported:
        """The encoder, as ``geofm.create_model`` takes it.

        Returns:
            Its name, arguments and weights, without head.
        """
        return Exported(
            self.encoder_name,
            {
                "in_chans": self.encoder.in_chans,
                "patch_size": self.patch_size,
                "img_size": self.size,
            },
            {name: value.detach() for name, value in self.encoder.state_dict().items()},
        )


def _kept(grid: int, mask_ratio: float) -> int:
    """Visible patches: 19 of 49 at 60 %. At least one, and at least one removed."""
    return min(max(1, int(grid * grid * (1 - mask_ratio))), grid * grid - 1)


def _modalities(
    modalities: Sequence[str | Modality | Mapping[str, Any]], input: str, channels: int
) -> tuple[Modality, ...]:
    refuse_string(modalities if isinstance(modalities, str) else (), "modalities", ModelError)
    found = []
    for m in modalities:
        if isinstance(m, Mapping):
            m = _from_fields(m)
        elif isinstance(m, str):
            if m not in MODALITIES:
                raise ModelError(
                    f"unknown modality {m!r}{near(m, list(MODALITIES))}; known are "
                    f"{', '.join(MODALITIES)}"
                )
            m = MODALITIES[m]
            if m.name == input:
                # The same array, so the same bands.
                m = replace(m, channels=channels)
        found.append(m)
    names = [m.name for m in found]
    if not names or len(set(names)) < len(names):
        raise ModelError(f"modalities must be at least one and each only once, got {names}")
    reserved = [name for name in names if hasattr(nn.ModuleDict, name) or "." in name or not name]
    if reserved:
        raise ModelError(f"{reserved[0]!r} cannot name a modality; choose another name")
    return tuple(found)


def _from_fields(given: Mapping[str, Any]) -> Modality:
    known = {field.name: field for field in fields(Modality)}
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        raise ModelError(
            f"modality {dict(given)}: unknown field {unknown[0]}{near(unknown[0], list(known))}; "
            f"known are {', '.join(known)}"
        )
    absent = [name for name in ("name", "kind", "channels") if name not in given]
    if absent:
        raise ModelError(f"modality {dict(given)} lacks {', '.join(absent)}")
    _check_choice(f"kind of modality {given['name']!r}", given["kind"], get_args(Kind))
    return Modality(**given)


def _positions(bands: tuple[str, ...], available: tuple[str, ...]) -> list[int] | None:
    absent = [band for band in bands if band not in available]
    if absent or not bands:
        raise BandError(
            f"bands {', '.join(absent) or 'none'}: the input has {', '.join(available)}"
        )
    return None if bands == available else [available.index(band) for band in bands]


def _encoder(name: str, in_chans: int, patch_size: int, size: int) -> MPMAE:
    found = architecture(name)
    if found.build is not MPMAE:
        raise ModelError(f"{name} is no MP-MAE encoder; expected mpmae_atto or the like")
    model = MPMAE(
        in_chans=in_chans,
        patch_size=patch_size,
        img_size=size,
        stem_padding="aligned",
        grn_eps=_ENCODER_GRN_EPS,
        **found.arguments,
    )
    return model


def _head(m: Modality, width: int, patch_size: int) -> nn.Module:
    if m.per_pixel:
        return nn.Conv2d(width, patch_size**2 * m.channels, 1)
    return nn.Linear(width, m.outputs)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ModelError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _from_published(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rewrite a state dict of the published pretraining code, in place."""
    assert isinstance(module, MaskedAutoencoder)
    names = [key for key in state if key.startswith(prefix)]
    mine = {key.removeprefix(prefix): state[key] for key in names}
    sparse = {key: value for key, value in mine.items() if key.startswith("encoder.")}
    published = mmearth.matches(sparse) or any(key.startswith("decoder_dict.") for key in mine)
    if mmearth.matches(sparse):
        for key in sparse:
            del state[prefix + key]
        state.update(
            {f"{prefix}encoder.{key}": value for key, value in mmearth.convert(sparse).items()}
        )
    for key, value in mine.items():
        parts = key.split(".")
        if parts[0] == "decoder_dict":
            # All modalities share one decoder, which the published code lists under each.
            del state[prefix + key]
            state[".".join([prefix + "decoder", *parts[2:]])] = value
    weights = prefix + "loss_fn.log_vars"
    if weights in state and module.loss_fn is None:
        # The published code keeps them also where it does not use them.
        del state[weights]
    elif weights in state and published:
        own, known = module.loss_fn.log_vars.detach(), list(MODALITIES)  # type: ignore[union-attr]
        if len(state[weights]) == len(known):
            # One for each published modality; those of others stay as they are.
            state[weights] = torch.stack(
                [
                    state[weights][known.index(m.name)].to(own) if m.name in known else value
                    for m, value in zip(module.modalities, own, strict=True)
                ]
            )
