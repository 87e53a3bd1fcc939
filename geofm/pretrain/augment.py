"""Augmentations of digital numbers, on batches of tensors wherever they are.

Source: Plekhanova et al., SSL4Eco (arXiv 2504.18256), and the transforms of its published code,
which hold for any number of bands and any scale of values. Every sample has its own parameters,
and they are tensors, so a batch takes a handful of operations on its device. All that is random is
in the numbers a caller passes (`uniforms`): the same numbers give the same view, whatever the other
samples of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from geofm.errors import PixelError
from geofm.pretrain.method import random_of

__all__ = [
    "Photometric",
    "RandomResizedCrop",
    "crop_resize",
    "flip",
    "gaussian_blur",
    "grey",
    "jitter",
    "uniforms",
]

Numbers = NDArray[np.float64]

# Standard deviations of the widest blur after which all kernels end, as OpenCV's for floats.
_REACH = 4


def uniforms(draws: Sequence[int], stream: int, views: int, count: int) -> Numbers:
    """Random numbers for several views of each sample.

    Args:
        draws: One integer per sample, as in a batch's ``"draw"``.
        stream: Purpose of the numbers, see `random_of`.
        views: Views of a sample.
        count: Numbers that a view takes.

    Returns:
        (views, N, count), from 0 to below 1.
    """
    blocks = [random_of(draw, stream).random((views, count)) for draw in draws]
    return np.stack(blocks, axis=1)


@dataclass(frozen=True, slots=True)
class RandomResizedCrop:
    """Cut a random part out of every image and bring it to one size.

    Sizes and shapes are drawn as torchvision's ``RandomResizedCrop`` draws them: up to ten times,
    until the part fits into the image; else the largest part in the middle that the ratios allow.

    Attributes:
        size: Side of the result, in px.
        scale: Least and greatest share of the image's area.
        ratio: Least and greatest width / height.
    """

    size: int = 224
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    _ATTEMPTS: ClassVar[int] = 10
    numbers: ClassVar[int] = 2 * _ATTEMPTS + 2
    """Random numbers that a crop takes."""

    def boxes(self, numbers: Numbers, height: int, width: int) -> NDArray[np.int64]:
        """Which part of each image to cut out.

        Args:
            numbers: (N, `numbers`), from 0 to below 1.
            height: Of the images, in px.
            width: Of the images, in px.

        Returns:
            (N, 4): top, left, height, width, in px.
        """
        areas, shapes, place = np.split(numbers, [self._ATTEMPTS, 2 * self._ATTEMPTS], axis=1)
        area = height * width * _between(areas, *self.scale)
        ratio = np.exp(_between(shapes, math.log(self.ratio[0]), math.log(self.ratio[1])))
        high = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        wide = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        fits = (high > 0) & (wide > 0) & (high <= height) & (wide <= width)
        first = fits.argmax(axis=1)
        rows = np.arange(len(numbers))
        size = np.stack([high[rows, first], wide[rows, first]], axis=1)
        corner = place * (np.array([height, width]) - size + 1)
        none = ~fits.any(axis=1)
        size[none] = _largest(height, width, self.ratio)
        corner[none] = (np.array([height, width]) - size[none]) // 2
        return np.concatenate([np.floor(corner).astype(np.int64), size], axis=1)

    def __call__(self, images: Tensor, numbers: Numbers) -> Tensor:
        """Cut and resize.

        Args:
            images: (N, C, H, W) floats.
            numbers: (N, `numbers`), from 0 to below 1.

        Returns:
            (N, C, size, size).
        """
        height, width = images.shape[-2:]
        return crop_resize(images, self.boxes(numbers, height, width), self.size)


@dataclass(frozen=True, slots=True)
class Photometric:
    """Brightness and contrast, grey, blur, mirror: each at random, in this order.

    Values are not clipped: digital numbers have no upper end, and brighter ones stay distinct.

    Attributes:
        brightness: Values are multiplied by 1 ± this at most.
        contrast: Differences from the band's mean over the image likewise.
        jitter: Probability of brightness and contrast (one coin for both).
        grey: Probability that every band becomes the mean of all bands.
        blur: Probability of Gaussian blur.
        sigma: Least and greatest standard deviation of the blur, in px.
        mirror: Probability of a horizontal flip.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    jitter: float = 0.8
    grey: float = 0.2
    blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    mirror: float = 0.5

    numbers: ClassVar[int] = 7
    """Random numbers that an image takes."""

    def __call__(self, images: Tensor, numbers: Numbers) -> Tensor:
        """Augment.

        Args:
            images: (N, C, H, W) floats.
            numbers: (N, 7), from 0 to below 1.

        Returns:
            (N, C, H, W).
        """
        changed = numbers[:, 0] < self.jitter
        brightness = _between(numbers[:, 1], 1 - self.brightness, 1 + self.brightness)
        contrast = _between(numbers[:, 2], 1 - self.contrast, 1 + self.contrast)
        greyed, mirrored = numbers[:, 3] < self.grey, numbers[:, 6] < self.mirror
        factors = [np.where(changed, brightness, 1), np.where(changed, contrast, 1)]
        # One copy to the device for all that every sample needs.
        table = _on(np.stack([*factors, greyed, mirrored]), images)
        images = grey(jitter(images, table[0], table[1]), table[2] > 0)
        blurred = np.flatnonzero(numbers[:, 4] < self.blur)
        if len(blurred):
            rows = torch.from_numpy(blurred).to(images.device, non_blocking=True)
            sigma = _between(numbers[blurred, 5], *self.sigma)
            # One radius for all, so that no image's rounding depends on its neighbours.
            radius = math.ceil(_REACH * self.sigma[1])
            soft = gaussian_blur(images.index_select(0, rows), sigma, radius)
            images = images.index_copy(0, rows, soft)
        return flip(images, table[3] > 0)


def crop_resize(images: Tensor, boxes: NDArray[np.int64], size: int) -> Tensor:
    """Cut a part out of each image and resize it.

    Bilinear without antialiasing, as OpenCV's resize in the published pretraining; nothing outside
    the part is used. From 256 px to 224 px pixels shrink by a factor of 1.14 at most, where
    antialiasing makes little difference; bring much larger images closer to `size` first.

    Args:
        images: (N, C, H, W) floats.
        boxes: (N, 4): top, left, height, width, in px, within the images.
        size: Side of the result, in px.

    Returns:
        (N, C, size, size).

    Raises:
        PixelError: A part reaches out of its image or is empty.
    """
    _check_images(images)
    height, width = images.shape[-2:]
    corner, extent = boxes[:, :2], boxes[:, 2:]
    if (corner < 0).any() or (extent < 1).any() or (corner + extent > (height, width)).any():
        raise PixelError(f"a part reaches out of images of {height}×{width} px: {boxes.tolist()}")
    rows = _positions(boxes[:, 0], boxes[:, 2], height, size)
    columns = _positions(boxes[:, 1], boxes[:, 3], width, size)
    places = _on(np.stack([columns, rows]), images)
    shape = (len(images), size, size)
    x, y = places[0][:, None, :].expand(shape), places[1][:, :, None].expand(shape)
    grid = torch.stack([x, y], dim=3)
    # "border": rounding may put an outermost place a hair beyond the image.
    return F.grid_sample(images, grid, padding_mode="border", align_corners=True)


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Scale values, then their differences from the mean of each band.

    Args:
        images: (N, C, H, W) floats.
        brightness: (N,) factors.
        contrast: (N,) factors.

    Returns:
        (N, C, H, W); unchanged where both factors are 1.
    """
    brightness, contrast = brightness.view(-1, 1, 1, 1), contrast.view(-1, 1, 1, 1)
    mean = images.mean((2, 3), keepdim=True)
    # (b·x - b·mean)·c + b·mean, in one pass over the pixels.
    return torch.addcmul(mean * (brightness * (1 - contrast)), images, brightness * contrast)


def grey(images: Tensor, chosen: Tensor) -> Tensor:
    """Replace every band by the mean of all bands.

    Args:
        images: (N, C, H, W) floats.
        chosen: (N,) bool, which images.

    Returns:
        (N, C, H, W).
    """
    return torch.where(chosen.view(-1, 1, 1, 1), images.mean(1, keepdim=True), images)


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror left and right.

    Args:
        images: (N, C, H, W).
        chosen: (N,) bool, which images.

    Returns:
        (N, C, H, W).
    """
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def gaussian_blur(images: Tensor, sigma: Numbers, radius: int) -> Tensor:
    """Blur each image by its own Gaussian, mirroring pixels at the border.

    Args:
        images: (N, C, H, W) floats.
        sigma: (N,) standard deviations, in px, above 0.
        radius: Reach of all kernels to either side, in px; less where an image is smaller.

    Returns:
        (N, C, H, W).

    Raises:
        PixelError: A standard deviation is not above 0.
    """
    _check_images(images)
    if not (sigma > 0).all():
        raise PixelError(f"standard deviations must be above 0, got {sigma.tolist()}")
    count, channels, height, width = images.shape
    planes = images.reshape(1, count * channels, height, width)
    # Rows, then columns: each image's planes are groups of a convolution with its own kernel.
    for axis, length in ((2, height), (3, width)):
        reach = min(radius, length - 1)
        kernel = _on(_gaussian(sigma, reach), images).repeat_interleave(channels, 0)
        along = (-1, 1, 2 * reach + 1, 1) if axis == 2 else (-1, 1, 1, 2 * reach + 1)
        pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        planes = F.pad(planes, pad, mode="reflect")
        planes = F.conv2d(planes, kernel.view(along), groups=count * channels)
    return planes.view(count, channels, height, width)


def _gaussian(sigma: Numbers, reach: int) -> Numbers:
    """(N, 2·reach + 1) weights that add up to 1."""
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma[:, None]) ** 2)
    normalised: Numbers = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def _positions(start: Any, extent: Any, length: int, size: int) -> Numbers:
    """Where along an axis the pixels of a resized part lie, -1 and 1 being the outer centres."""
    pixel = (np.arange(size) + 0.5) * (extent[:, None] / size) - 0.5
    pixel = start[:, None] + np.clip(pixel, 0, extent[:, None] - 1)
    return np.asarray(2 * pixel / max(length - 1, 1) - 1, np.float64)


def _largest(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest part whose shape the ratios allow."""
    if width / height < ratio[0]:
        return min(height, round(width / ratio[0])), width
    if width / height > ratio[1]:
        return height, min(width, round(height * ratio[1]))
    return height, width


def _between(numbers: Numbers, low: float, high: float) -> Numbers:
    return low + (high - low) * numbers


def _on(values: NDArray[Any], images: Tensor) -> Tensor:
    """Numbers computed here, in the images' type and on their device."""
    return torch.from_numpy(values).to(images.dtype).to(images.device, non_blocking=True)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise PixelError(f"expected (N, C, H, W) floats, got {tuple(images.shape)} {images.dtype}")
