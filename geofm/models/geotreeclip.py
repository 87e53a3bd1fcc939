"""GeoTreeCLIP: a year of satellite images and the environment of a place, against species names.

Source: Mu et al., GlobalGeoTree, 2025 (arXiv 2505.12513) and its code. The observation tower embeds
each month with a CLIP vision transformer, lets the months attend to each other, and fuses the
result with 27 environmental variables; the text tower is CLIP's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from geofm.auxiliary import Variable, auxiliary_table
from geofm.errors import ModelError, PixelError

__all__ = ["AUXILIARY_GROUPS", "VARIANTS", "AuxiliaryEncoder", "GeoTreeCLIP", "SeriesEncoder"]

MONTHS = 12
# The side to which each month's 5×5 pixels are resized: one patch of the vision transformer.
_PATCH = 16
# CLIP's, in both towers.
_LAYER_NORM_EPS = 1e-5
# Of the batch normalization, in the code of the paper.
_RANGE_EPS = 1e-6
# Cosine similarities are multiplied by this before the softmax.
_PUBLISHED_LOGIT_SCALE = 100.0

# The four groups of environmental variables, each with an encoder of its own.
AUXILIARY_GROUPS: dict[str, tuple[str, ...]] = {
    "geo": ("longitude", "latitude", "elevation"),
    "terrain": ("slope", "aspect"),
    "soil": ("soil_moisture_0_5cm", "soil_moisture_5_15cm", "soil_moisture_15_30cm"),
    "bio": tuple(f"bio{i:02d}" for i in range(1, 20)),
}
_AUXILIARY_WIDTH = 256


def _linear_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU())


class SeriesEncoder(nn.Module):
    """Twelve monthly images to one vector.

    Args:
        bands: Channels of an image.
        width: Width of the vision transformer.
        depth: Its layers.
        heads: Its heads.
    """

    def __init__(self, bands: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.trunk = VisionTransformer(
            img_size=_PATCH,
            patch_size=_PATCH,
            in_chans=bands,
            num_classes=0,
            global_pool="token",
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            pre_norm=True,
            final_norm=False,
            act_layer="quick_gelu",
            norm_layer="layernorm",
        )
        for module in self.trunk.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = _LAYER_NORM_EPS
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, images: Tensor, present: Tensor) -> Tensor:
        """Embed normalized series.

        Args:
            images: (N, 12, bands, h, w), normalized; missing months may hold anything.
            present: (N, 12), True where a month was observed. Missing months are not computed;
                their features are 0, and take part in the attention and in the mean as such.

        Returns:
            (N, width).
        """
        observed = images[present]
        tile = F.interpolate(observed, size=(_PATCH, _PATCH), mode="bilinear", align_corners=False)
        features = images.new_zeros(*present.shape, self.trunk.embed_dim)
        features = features.to(tile.dtype)
        if observed.shape[0] > 0:
            tokens: Tensor = self.trunk.forward_features(tile)
            features = features.to(tokens.dtype)
            features = features.masked_scatter(present[..., None], tokens[:, 0])
        mixed, _ = self.attention(features, features, features, need_weights=False)
        out: Tensor = mixed.mean(dim=1)
        return out


class AuxiliaryEncoder(nn.Module):
    """Environmental variables to one vector.

    Args:
        groups: Names of the variables of each group.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.sizes = [len(names) for names in groups.values()]
        self.groups = nn.ModuleDict(
            {name: _linear_block(len(names), _AUXILIARY_WIDTH) for name, names in groups.items()}
        )
        self.fusion = _linear_block(len(groups) * _AUXILIARY_WIDTH, _AUXILIARY_WIDTH)

    def forward(self, auxiliary: Tensor) -> Tensor:
        """Embed normalized variables.

        Args:
            auxiliary: (N, variables), group after group; 0 where missing.

        Returns:
            (N, 256).
        """
        parts = torch.split(auxiliary, self.sizes, dim=1)
        encoded = [encode(p) for encode, p in zip(self.groups.values(), parts, strict=True)]
        out: Tensor = self.fusion(torch.cat(encoded, dim=1))
        return out


class TextEncoder(TextTransformer):  # type: ignore[misc]
    """open_clip's text transformer, for token sequences of any length up to 77.

    Attention is causal and the embedding is read at the end-of-text token, so what follows changes
    nothing and need not be computed.
    """

    def forward(self, text: Tensor) -> Tensor:
        """Embed token sequences.

        Args:
            text: Token ids, (N, tokens).

        Returns:
            (N, width).
        """
        length = text.shape[1]
        assert self.attn_mask is not None
        x = self.token_embedding(text) + self.positional_embedding[:length]
        x = self.transformer(x, attn_mask=self.attn_mask[:length, :length])
        # The end-of-text token has the highest number.
        end = text.argmax(dim=-1)
        out: Tensor = self.ln_final(x[torch.arange(len(x), device=x.device), end])
        return out


class GeoTreeCLIP(nn.Module):
    """Observations and species names in one space.

    Args:
        in_chans: Bands of the monthly images.
        embed_dim: Dimensions of the common space.
        vision_width: Width of the vision transformer.
        vision_depth: Its layers.
        vision_heads: Its heads.
        text_width: Width of the text transformer; it has to equal `embed_dim`, as there is no
            projection after it.
        text_depth: Its layers.
        text_heads: Its heads.
        image_range: Lowest and highest DN of each band, for the fixed normalization; None: −1, 1.
        variables: The environmental variables, group after group, with their training ranges for
            the fixed normalization; None: those of the paper, from −1 to 1.
        normalization: ``"fixed"``: to (−1, 1) by these ranges, so that a sample's features do not
            depend on its neighbours. ``"batch"``: by the minimum and maximum over the batch, as
            published; there a result depends on its neighbours and a batch of one means nothing.

    Raises:
        ModelError: An argument is impossible.
    """

    # Every parameter has to be in a checkpoint.
    head_prefixes: tuple[str, ...] = ("no head",)

    image_low: Tensor
    image_high: Tensor
    auxiliary_low: Tensor
    auxiliary_high: Tensor

    def __init__(
        self,
        in_chans: int = 10,
        embed_dim: int = 512,
        vision_width: int = 768,
        vision_depth: int = 12,
        vision_heads: int = 12,
        text_width: int = 512,
        text_depth: int = 12,
        text_heads: int = 8,
        image_range: Sequence[tuple[float, float]] | None = None,
        variables: Sequence[Variable] | None = None,
        normalization: str = "fixed",
    ) -> None:
        super().__init__()
        if text_width != embed_dim:
            raise ModelError(f"text_width {text_width} must equal embed_dim {embed_dim}")
        if normalization not in ("fixed", "batch"):
            raise ModelError(f"normalization must be 'fixed' or 'batch', got {normalization!r}")
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.normalization = normalization
        self.variables = tuple(variables or _plain_variables())
        groups: dict[str, list[str]] = {}
        for variable in self.variables:
            groups.setdefault(variable.group, []).append(variable.name)
        if {k: tuple(v) for k, v in groups.items()} != AUXILIARY_GROUPS:
            raise ModelError(f"variables must be {AUXILIARY_GROUPS}, in this order; got {groups}")

        self.series = SeriesEncoder(in_chans, vision_width, vision_depth, vision_heads)
        self.auxiliary = AuxiliaryEncoder(AUXILIARY_GROUPS)
        self.image_projection = _linear_block(vision_width, embed_dim)
        self.auxiliary_projection = _linear_block(_AUXILIARY_WIDTH, embed_dim)
        self.fusion = _linear_block(2 * embed_dim, embed_dim)
        self.text = TextEncoder(
            width=text_width,
            heads=text_heads,
            layers=text_depth,
            output_dim=None,
            act_layer=QuickGELU,
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(_PUBLISHED_LOGIT_SCALE)))
        self.tokenizer = SimpleTokenizer()

        places = [(v.low, v.high) for v in self.variables]
        for name, ranges, count in (
            ("image", list(image_range or [(-1.0, 1.0)] * in_chans), in_chans),
            ("auxiliary", places, len(places)),
        ):
            if len(ranges) != count or any(low >= high for low, high in ranges):
                raise ModelError(f"{name} ranges must be {count} pairs, low < high; got {ranges}")
            for end, values in zip(("low", "high"), zip(*ranges, strict=True), strict=True):
                # Not in the state dict: they are the card's, not the checkpoint's.
                self.register_buffer(f"{name}_{end}", torch.tensor(values), persistent=False)

    @classmethod
    def arguments_in(cls, state: dict[str, Tensor]) -> dict[str, Any]:
        """Constructor arguments that a state dict implies.

        Args:
            state: Names and tensors of such a model.

        Returns:
            ``in_chans``, ``embed_dim``, and widths and depths of both towers.

        Raises:
            KeyError: A layer that every such model has is absent; its name.
        """

        def depth(prefix: str) -> int:
            return len({k[len(prefix) :].split(".")[0] for k in state if k.startswith(prefix)})

        kernel = state["series.trunk.patch_embed.proj.weight"]
        return {
            "in_chans": kernel.shape[1],
            "embed_dim": state["fusion.0.weight"].shape[0],
            "vision_width": kernel.shape[0],
            "vision_depth": depth("series.trunk.blocks."),
            "text_width": state["text.ln_final.weight"].shape[0],
            "text_depth": depth("text.transformer.resblocks."),
        }

    def normalize_images(self, images: Tensor, present: Tensor) -> Tensor:
        """Bring DN to the range of the training data, (−1, 1).

        Args:
            images: (N, 12, bands, h, w), DN.
            present: (N, 12), True where a month was observed.

        Returns:
            Normalized images, 0 in missing months.
        """
        mask = present[:, :, None, None, None]
        if self.normalization == "batch":
            low, high = _image_extremes(images, mask)
        else:
            low, high = self.image_low, self.image_high
        return _to_unit(images, low, high, dim=2).masked_fill(~mask, 0.0)

    def normalize_auxiliary(self, auxiliary: Tensor, present: Tensor) -> Tensor:
        """Bring environmental variables to the range of the training data, (−1, 1).

        Args:
            auxiliary: (N, variables), each in the unit on the card.
            present: (N, variables), True where a value is known.

        Returns:
            Normalized variables, 0 where missing.
        """
        if self.normalization == "batch":
            low, high = _auxiliary_extremes(auxiliary, present)
        else:
            low, high = self.auxiliary_low, self.auxiliary_high
        return _to_unit(auxiliary, low, high, dim=1).masked_fill(~present, 0.0)

    @torch.no_grad()
    def fit_normalization(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Estimate the ranges of the fixed normalization from data of one's own.

        The range of a band or variable becomes the median, over batches, of the lowest and of the
        highest value in the batch: what the published normalization used, in the middle.

        Args:
            batches: Dictionaries with ``images`` and ``auxiliary``, and optionally ``image_mask``
                and ``auxiliary_mask``, as for `encode_image`; batches like those of training (192
                places) give ranges like those of training.

        Raises:
            ModelError: There are no batches, or a band or variable is the same everywhere.
        """
        images, places = [], []
        for batch in batches:
            pixels, present, values, known = self._inputs(
                batch["images"],
                batch["auxiliary"],
                batch.get("image_mask"),
                batch.get("auxiliary_mask"),
            )
            images.append(torch.stack(_image_extremes(pixels, present[:, :, None, None, None])))
            places.append(torch.stack(_auxiliary_extremes(values, known)))
        if not images:
            raise ModelError("fit_normalization needs at least one batch")
        for name, extremes in (("image", images), ("auxiliary", places)):
            low, high = torch.stack(extremes).median(dim=0).values
            if bool((low >= high).any()):
                flat = (low >= high).nonzero().flatten().tolist()
                raise ModelError(f"{name} channels {flat} are the same everywhere")
            getattr(self, f"{name}_low").copy_(low)
            getattr(self, f"{name}_high").copy_(high)

    def encode_image(
        self,
        images: Tensor,
        auxiliary: Tensor | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        image_mask: Tensor | None = None,
        auxiliary_mask: Tensor | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """Embed observations.

        Args:
            images: (N, 12, bands, h, w), monthly median DN, January first; NaN in missing months.
            auxiliary: (N, variables) in the order of `variables`, or a dict of columns, or a list
                of dicts; None or NaN where missing.
            image_mask: (N, 12), True where a month was observed; None: where the month has no NaN.
            auxiliary_mask: (N, variables), True where a value is known; None: where it is finite.
            normalize: Scale to unit length.

        Returns:
            (N, embed_dim).

        Raises:
            PixelError: The images have a wrong shape.
            AuxiliaryError: A variable is unknown or cannot be in its unit.
        """
        pixels, present, values, known = self._inputs(images, auxiliary, image_mask, auxiliary_mask)
        return self._encode_normalized(
            self.normalize_images(pixels, present),
            present,
            self.normalize_auxiliary(values, known),
            normalize,
        )

    def _inputs(
        self,
        images: Tensor,
        auxiliary: Any,
        image_mask: Tensor | None,
        auxiliary_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images, which months are there, variables, which values are there."""
        pixels = self._as_images(images)
        present = torch.isfinite(pixels).all(dim=(2, 3, 4))
        if image_mask is not None:
            present = present & torch.as_tensor(image_mask).to(present.device).bool()
        # By a batch's own extremes any linear unit comes out alike, so there none is checked.
        values = auxiliary_table(
            auxiliary, self.variables, check_units=self.normalization == "fixed"
        ).to(pixels.device)
        known = torch.isfinite(values)
        if auxiliary_mask is not None:
            known = known & torch.as_tensor(auxiliary_mask).to(known.device).bool()
        if len(pixels) != len(values):
            raise ModelError(f"{len(pixels)} image series, but auxiliary data of {len(values)}")
        return pixels, present, values, known

    def _encode_normalized(
        self, images: Tensor, present: Tensor, auxiliary: Tensor, normalize: bool
    ) -> Tensor:
        kind = self.logit_scale.dtype
        series = self.image_projection(self.series(images.to(kind), present))
        place = self.auxiliary_projection(self.auxiliary(auxiliary.to(kind)))
        features: Tensor = self.fusion(torch.cat((series, place), dim=1))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor | str | Sequence[Any], normalize: bool = False) -> Tensor:
        """Embed names.

        Args:
            text: Token ids, (N, tokens); or prompts, taxa or dicts as in `tokenize`.
            normalize: Scale to unit length.

        Returns:
            (N, embed_dim). Tokens after the longest text of the batch are not computed.
        """
        tokens = text if isinstance(text, Tensor) else self.tokenize(text)
        tokens = tokens.to(self.logit_scale.device)
        if tokens.shape[0] == 0:
            return self.logit_scale.new_zeros(0, self.embed_dim)
        length = int(tokens.argmax(dim=-1).max()) + 1
        features: Tensor = self.text(tokens[:, :length])
        return F.normalize(features, dim=-1) if normalize else features

    def tokenize(self, text: str | Sequence[Any]) -> Tensor:
        """Token ids of prompts.

        Args:
            text: A prompt or several; or taxa, anything with a ``prompt``; or dicts with the four
                levels as GlobalGeoTree writes them (``level0`` … ``level3_species``).

        Returns:
            (N, 77), padded with 0.
        """
        texts = [text] if isinstance(text, str | Mapping) else list(text)
        prompts = [_prompt(item) for item in texts]
        out: Tensor = self.tokenizer(prompts)
        return out

    def forward(
        self,
        images: Tensor | None = None,
        auxiliary: Any = None,
        text: Tensor | str | Sequence[Any] | None = None,
        image_mask: Tensor | None = None,
        auxiliary_mask: Tensor | None = None,
    ) -> dict[str, Tensor | None]:
        """Embed observations, names, or both, to unit length, as open_clip's models do.

        Args:
            images: As in `encode_image`; None to embed text only.
            auxiliary: As in `encode_image`.
            text: As in `encode_text`; None to embed observations only.
            image_mask: As in `encode_image`.
            auxiliary_mask: As in `encode_image`.

        Returns:
            ``image_features``, ``text_features`` and ``logit_scale`` (the factor itself).
        """
        image_features = None
        if images is not None:
            image_features = self.encode_image(
                images, auxiliary, image_mask, auxiliary_mask, normalize=True
            )
        return {
            "image_features": image_features,
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }

    def _as_images(self, images: Tensor) -> Tensor:
        images = torch.as_tensor(images)
        if images.ndim == 4:
            images = images[None]
        if images.ndim != 5 or images.shape[1:3] != (MONTHS, self.in_chans):
            raise PixelError(
                f"images must be (N, {MONTHS}, {self.in_chans}, h, w): {MONTHS} months of "
                f"{self.in_chans} bands; got {tuple(images.shape)}"
            )
        return images.to(self.logit_scale.device, torch.float32)


def _prompt(item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        levels = ("level0", "level1_family", "level2_genus", "level3_species")
        missing = [level for level in levels if level not in item]
        if missing:
            raise ModelError(f"a text without {', '.join(missing)}: {dict(item)}")
        return " / ".join(str(item[level]) for level in levels)
    return str(item.prompt)


def _image_extremes(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each band; missing months count as 0, as published."""
    images = images.masked_fill(~mask, 0.0)
    return images.amin(dim=(0, 1, 3, 4)), images.amax(dim=(0, 1, 3, 4))


def _auxiliary_extremes(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest known value of each variable; 0 where none is known."""
    low = values.masked_fill(~known, torch.inf).amin(dim=0)
    high = values.masked_fill(~known, -torch.inf).amax(dim=0)
    nowhere = ~known.any(dim=0)
    return low.masked_fill(nowhere, 0.0), high.masked_fill(nowhere, 0.0)


def _plain_variables() -> list[Variable]:
    return [
        Variable(name, unit="", group=group, low=-1.0, high=1.0)
        for group, names in AUXILIARY_GROUPS.items()
        for name in names
    ]


def _to_unit(values: Tensor, low: Tensor, high: Tensor, dim: int) -> Tensor:
    high = torch.where(high == low, low + 1, high)
    shape = [1] * values.ndim
    shape[dim] = -1
    low, high = low.to(values).view(shape), high.to(values).view(shape)
    return 2 * (values - low) / (high - low + _RANGE_EPS) - 1


# The published size, and smaller ones for own pretraining.
VARIANTS: dict[str, dict[str, Any]] = {
    "geotreeclip": {},
    "geotreeclip_small": {
        "embed_dim": 384,
        "vision_width": 384,
        "vision_depth": 6,
        "vision_heads": 6,
        "text_width": 384,
        "text_depth": 6,
        "text_heads": 6,
    },
    "geotreeclip_tiny": {
        "embed_dim": 192,
        "vision_width": 192,
        "vision_depth": 4,
        "vision_heads": 3,
        "text_width": 192,
        "text_depth": 4,
        "text_heads": 3,
    },
}
