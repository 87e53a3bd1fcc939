"""Contrastive language-image pretraining of GeoTreeCLIP.

An observation (a year of images and the environment of a place) is to be nearer to the name of its
species than to the other names of the batch, and a name nearer to its observation than to the
others. Sources: Radford et al. 2021 (arXiv 2103.00020); Mu et al. 2025 (arXiv 2505.12513) for the
temperature and the rates of the towers.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from geofm.checkpoints import read_checkpoint
from geofm.errors import LayoutError, ModelError
from geofm.factory import create_model
from geofm.models.geotreeclip import GeoTreeCLIP
from geofm.pretrain.method import Exported, Method

__all__ = ["ContrastiveLanguageImage", "towers_from_clip"]

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

# CLIP's limit: cosine similarities are not multiplied by more.
_LARGEST_SCALE: Final = 100.0
_DUPLICATES: Final = ("negatives", "ignore", "positives")


class ContrastiveLanguageImage(Method):
    """Symmetric InfoNCE between observations and names, over the batches of all ranks.

    A batch holds ``image``, (N, 12, bands, h, w), monthly digital numbers, NaN in missing months;
    ``auxiliary``, (N, variables), in the order and units of the model's `variables`, NaN where
    missing; and ``prompt``, a list of N strings (or taxa, or token ids): what
    `geofm.datasets.globalgeotree_stream.GlobalGeoTreeStream` delivers. Both inputs are normalized
    here, on the batch's device, with the fixed ranges of the model's card; units are the data
    set's to check. All ranks need batches of one size.

    With ``arguments={"normalization": "batch"}`` the ranges are those of each rank's batch, as
    published; then the loss is not that of one process with the whole batch.

    Args:
        model: A GeoTreeCLIP architecture.
        arguments: Arguments of that architecture, for example a smaller ``vision_depth``.
        temperature: Cosine similarities are divided by this; published: 0.07.
        learn_temperature: Train it, from there, as CLIP does, down to 0.01 at most. Published:
            fixed; then the exported model keeps the factor of 100 that it predicts with.
        text_lr_scale: Factor on the learning rate of the text tower; published: 0.1.
        duplicates: What a batch's other observations of a species are to its name, and other
            copies of the name to the observation: ``"negatives"``, as published, which pushes
            apart what belongs together; ``"ignore"``: left out; ``"positives"``: the target is
            shared equally among them.
        init: A file with the weights of an OpenAI or open_clip ViT-B/16 under open_clip's names
            (safetensors, or written by ``torch.save``), to start both towers from: see
            `towers_from_clip`. None: random.

    Raises:
        ModelError: An argument is impossible.
        LayoutError: The file holds no CLIP of the model's size.
    """

    model: GeoTreeCLIP

    starting_points = ("init",)

    def __init__(
        self,
        model: str = "geotreeclip",
        *,
        arguments: Mapping[str, Any] | None = None,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        text_lr_scale: float = 0.1,
        duplicates: str = "negatives",
        init: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if not 1 / _LARGEST_SCALE <= temperature < math.inf:
            raise ModelError(f"temperature must be at least {1 / _LARGEST_SCALE}; {temperature=}")
        if text_lr_scale < 0:
            raise ModelError(f"text_lr_scale must not be negative, got {text_lr_scale}")
        if duplicates not in _DUPLICATES:
            raise ModelError(f"duplicates must be one of {_DUPLICATES}, got {duplicates!r}")
        foreign = set(arguments or {}) - set(inspect.signature(GeoTreeCLIP.__init__).parameters)
        if foreign:
            raise ModelError(f"arguments are GeoTreeCLIP's own; it has no {sorted(foreign)}")
        built = create_model(model, **dict(arguments or {}))
        if not isinstance(built, GeoTreeCLIP):
            raise ModelError(f"{model} is no GeoTreeCLIP: it has no text tower to train against")
        self.model = built
        self.name = model.partition(".")[0]
        self.arguments = dict(arguments or {})
        self.temperature = temperature
        self.learn_temperature = learn_temperature
        self.text_lr_scale = text_lr_scale
        self.duplicates = duplicates
        built.logit_scale.requires_grad_(learn_temperature)
        if learn_temperature:
            with torch.no_grad():
                built.logit_scale.fill_(-math.log(temperature))
        if init is not None:
            _start_from(built, Path(init))

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            batch: ``image``, ``auxiliary`` and ``prompt``, as the class describes.

        Returns:
            ``total``, the mean of ``image`` (finding the name of an observation) and ``text`` (the
            observation of a name); ``accuracy``, the share of this rank's observations whose most
            similar name in the whole batch is that of their species; ``temperature``. Each rank's
            losses are over its own samples against those of all, so that their mean over the
            ranks, and that of their gradients, is what one process with all samples computes.
        """
        tokens = self._tokens_of(batch)
        image = self._encode_observations(batch["image"], batch["auxiliary"])
        names = self.model.encode_text(tokens)
        # A temperature of 0.07 magnifies what half precision rounds off.
        precise = torch.promote_types(image.dtype, torch.float32)
        with torch.autocast(image.device.type, enabled=False):
            image = F.normalize(image.to(precise), dim=-1)
            names = F.normalize(names.to(precise), dim=-1)
            return self._losses(image, names, tokens)

    # Words are no part of a compiled graph: each would make another.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _tokens_of(self, batch: Mapping[str, Any]) -> Tensor:
        text = batch["prompt"]
        tokens = text if isinstance(text, Tensor) else self.model.tokenize(text)
        if len(tokens) != len(batch["image"]):
            raise ModelError(f"{len(batch['image'])} images, but {len(tokens)} prompts")
        return tokens.to(batch["image"].device)

    def export(self) -> Exported:
        """The trained model: both towers and the fusion.

        Returns:
            Its name, arguments and weights.
        """
        state = {name: value.detach() for name, value in self.model.state_dict().items()}
        if self.learn_temperature:
            state["logit_scale"] = state["logit_scale"].clamp(0, math.log(_LARGEST_SCALE))
        return Exported(self.name, self.arguments, state)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides biases and vectors: the positions.

        Returns:
            Their names.
        """
        trunk = {f"model.series.trunk.{name}" for name in ("pos_embed", "cls_token")}
        return trunk | {"model.text.positional_embedding"}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters as the optimizer takes them: each tower decayed and not.

        Args:
            weight_decay: Of matrices and kernels; biases, norms and positions have none.

        Returns:
            Groups with ``"lr_scale"``, the factor on the learning rate: that of the text tower is
            smaller.
        """
        kept = self.no_weight_decay()
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decayed = parameter.ndim > 1 and name not in kept
                groups.setdefault((name.startswith("model.text."), decayed), []).append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": self.text_lr_scale if of_text else 1.0,
            }
            for (of_text, decayed), parameters in sorted(groups.items())
        ]

    def _encode_observations(self, images: Tensor, auxiliary: Tensor) -> Tensor:
        # Not `encode_image`: its checks of the units look at every value by itself, on the CPU.
        model = self.model
        images, auxiliary = images.float(), auxiliary.float()
        if images.ndim != 5 or images.shape[2] != model.in_chans:
            raise ModelError(
                f"image must be (N, 12, {model.in_chans}, h, w); got {tuple(images.shape)}"
            )
        present = torch.isfinite(images).all(dim=(2, 3, 4))
        return model._encode_normalized(
            model.normalize_images(images, present),
            present,
            model.normalize_auxiliary(auxiliary, torch.isfinite(auxiliary)),
            normalize=False,
        )

    def _losses(self, image: Tensor, names: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        rank, world_size = _place()
        features = torch.stack((image, names))
        if world_size > 1:
            features = _Gather.apply(features)
            tokens = _gathered(tokens[None])[0]
        every_image, every_name = features
        own = rank * len(image) + torch.arange(len(image), device=image.device)
        species = torch.unique(tokens, dim=0, return_inverse=True)[1]
        same = species[own, None] == species
        scale = self._scale()
        by_image = scale * image @ every_name.T
        by_name = scale * names @ every_image.T
        losses = {
            "image": self._cross_entropy(by_image, own, same),
            "text": self._cross_entropy(by_name, own, same),
        }
        found = same.gather(1, by_image.argmax(dim=1, keepdim=True))
        return {
            "total": (losses["image"] + losses["text"]) / 2,
            **{name: loss.detach() for name, loss in losses.items()},
            "accuracy": found.float().mean(),
            "temperature": 1 / scale.detach(),
        }

    def _scale(self) -> Tensor:
        """What cosine similarities are multiplied by."""
        own = self.model.logit_scale
        if not self.learn_temperature:
            return torch.full_like(own, 1 / self.temperature)
        # In place, as CLIP does: one that stays beyond the limit would have no gradient back.
        with torch.no_grad():
            own.clamp_(0, math.log(_LARGEST_SCALE))
        return own.exp()

    def _cross_entropy(self, logits: Tensor, own: Tensor, same: Tensor) -> Tensor:
        """Mean loss of rows: `own` is each row's partner, `same` all partners of its species."""
        if self.duplicates == "positives":
            return F.cross_entropy(logits, same / same.sum(dim=1, keepdim=True).to(logits.dtype))
        if self.duplicates == "ignore":
            others = same.scatter(1, own[:, None], False)
            logits = logits.masked_fill(others, -torch.inf)
        return F.cross_entropy(logits, own)


# --- all ranks ---------------------------------------------------------------------------------


def _place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _gathered(values: Tensor) -> Tensor:
    """(k, n, d) of each rank to (k, ranks * n, d) on all."""
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts, dim=1)


class _Gather(torch.autograd.Function):
    """`_gathered` with gradients.

    Every rank's loss depends on every rank's features, so their gradient is the sum over the ranks.
    DistributedDataParallel then takes the mean over the ranks, as the whole loss is the mean of
    theirs.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.count = values.shape[1]
        return _gathered(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        first = dist.get_rank() * ctx.count
        return whole[:, first : first + ctx.count]


# --- weights of CLIP ---------------------------------------------------------------------------

# What CLIP has and GeoTreeCLIP has not: the projections into CLIP's space and what goes with them.
_UNUSED: Final = (
    "visual.proj",
    "visual.ln_post.",
    "text_projection",
    "logit_scale",
    "logit_bias",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
)
_VISION_NAMES: Final = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
}
_TEXT_NAMES: Final = ("token_embedding.", "positional_embedding", "ln_final.", "transformer.")
# Parts of a layer of the vision transformer: open_clip's name and timm's.
_LAYER: Final = {
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


def towers_from_clip(state: Mapping[str, Tensor], channels: int) -> State:
    """Both towers of GeoTreeCLIP from the weights of a CLIP ViT.

    The text tower is taken over as it is; so is the vision transformer, but for two layers:

    * The patch embedding sees `channels` bands instead of three colours: each band gets the mean of
      the colours' kernels, times 3 / `channels`, so that a grey image makes the same tokens.
    * An image is one patch instead of 14 x 14: the class token keeps its position embedding, the
      patch gets the mean of the 196.

    Attention of the months, environment, projections and fusion have no counterpart. Both towers
    have the "quick" GELU of OpenAI's weights; those of open_clip's own training (LAION, DataComp)
    mostly were trained with the exact one, which the file does not tell.

    Args:
        state: Names (open_clip's, which are OpenAI's) and tensors.
        channels: Bands of the monthly images.

    Returns:
        Names (GeoTreeCLIP's, ``series.trunk.*`` and ``text.*``) and float32 tensors.

    Raises:
        LayoutError: A name is not one of a CLIP with a vision transformer.
    """
    out: State = {}
    strange = []
    for key, value in state.items():
        # Of DistributedDataParallel; and open_clip's models with a separate text tower.
        name = key.removeprefix("module.").removeprefix("text.")
        if name.startswith(_UNUSED):
            continue
        ours = _name_of(name)
        if ours is None:
            strange.append(key)
        else:
            out[ours] = value.float()
    kernel, positions = "series.trunk.patch_embed.proj.weight", "series.trunk.pos_embed"
    absent = [name for name in (kernel, positions, "series.trunk.cls_token") if name not in out]
    if strange or absent:
        raise LayoutError(
            f"no weights of a CLIP vision transformer under open_clip's names: unknown "
            f"{', '.join(strange[:4]) or 'none'}; missing {', '.join(absent) or 'none'}"
        )
    colours = out[kernel]
    mean = colours.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)
    out[kernel] = mean * (colours.shape[1] / channels)
    embedded = out[positions]
    out[positions] = torch.stack((embedded[0], embedded[1:].mean(dim=0)))[None]
    out["series.trunk.cls_token"] = out["series.trunk.cls_token"].reshape(1, 1, -1)
    return out


def _name_of(name: str) -> str | None:
    """GeoTreeCLIP's name for one of CLIP's."""
    if name.startswith(_TEXT_NAMES):
        return f"text.{name}"
    part = name.removeprefix("visual.")
    if part in _VISION_NAMES:
        return f"series.trunk.{_VISION_NAMES[part]}"
    number, _, rest = part.removeprefix("transformer.resblocks.").partition(".")
    if part != name and number.isdecimal():
        for theirs, ours in _LAYER.items():
            if rest.startswith(theirs):
                return f"series.trunk.blocks.{number}.{ours}{rest.removeprefix(theirs)}"
    return None


def _start_from(model: GeoTreeCLIP, path: Path) -> None:
    """Load the towers from a file; every name and shape of both must match."""
    content = read_checkpoint(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise LayoutError(f"{path} holds no state dict: no plain mapping of names to tensors")
    try:
        found = towers_from_clip(content, model.in_chans)
    except LayoutError as error:
        raise LayoutError(f"{path}: {error}") from error
    own = {k: v for k, v in model.state_dict().items() if k.startswith(("series.trunk.", "text."))}
    missing = [name for name in own if name not in found]
    unknown = [name for name in found if name not in own]
    shapes = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in found and found[name].shape != value.shape
    ]
    if missing or unknown or shapes:
        raise LayoutError(
            f"{path} is of another size than the model's towers (published: ViT-B/16): "
            f"{len(missing)} missing, {len(unknown)} unknown, {len(shapes)} of another shape: "
            f"{'; '.join([*shapes[:2], *missing[:2], *unknown[:2]])}"
        )
    model.load_state_dict(found, strict=False)
    logger.info("both towers start from %s", path)
