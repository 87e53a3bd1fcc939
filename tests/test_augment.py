"""Augmentations of digital numbers, against torchvision's operations sample by sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv

from geofm.errors import PixelError
from geofm.pretrain.augment import (
    Photometric,
    RandomResizedCrop,
    crop_resize,
    flip,
    gaussian_blur,
    grey,
    jitter,
    uniforms,
)


def tiles(count: int = 4, side: int = 40, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Digital numbers, as different between neighbours as noise is."""
    return (
        torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))
        * 4000
    )


def test_a_resized_crop_is_torchvisions_without_antialiasing() -> None:
    images = tiles(4, 40)[..., :36]
    # Enlarged, whole, at the far corner, shrunk.
    boxes = np.array([[3, 5, 11, 9], [0, 0, 40, 36], [31, 20, 9, 16], [1, 2, 37, 33]])
    found = crop_resize(images, boxes, 24)
    for image, box, actual in zip(images, boxes.tolist(), found, strict=True):
        expected = tv.resized_crop(image, *box, size=[24, 24], antialias=False)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0.05)


def test_a_crop_of_the_wanted_size_keeps_every_pixel() -> None:
    images = tiles(1)
    found = crop_resize(images, np.array([[7, 9, 16, 16]]), 16)
    torch.testing.assert_close(found, images[:, :, 7:23, 9:25], rtol=1e-5, atol=0.05)


def test_a_part_out_of_the_image_is_refused() -> None:
    with pytest.raises(PixelError, match="reaches out of images of 40×40 px"):
        crop_resize(tiles(1), np.array([[30, 0, 11, 40]]), 8)


def test_crops_have_the_areas_shapes_and_places_asked_for() -> None:
    crop = RandomResizedCrop(scale=(0.2, 1.0))
    numbers = np.random.default_rng(0).random((4000, RandomResizedCrop.numbers))
    top, left, high, wide = crop.boxes(numbers, 200, 100).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + high <= 200).all() and (left + wide <= 100).all()
    area, ratio = high * wide / 20_000, wide / high
    assert area.min() == pytest.approx(0.2, abs=0.01)
    assert ratio.min() == pytest.approx(3 / 4, abs=0.02)
    assert ratio.max() == pytest.approx(4 / 3, abs=0.02)
    # Both ends of the image are reached.
    assert top.min() == 0 and (top + high).max() == 200

    areas = np.prod(crop.boxes(numbers, 256, 256)[:, 2:], axis=1) / 256**2
    # Uniform from 0.2 to 1, but for large ones that do not fit in their drawn shape.
    assert 0.5 < areas.mean() < 0.6


def test_an_image_that_no_shape_fits_is_cut_in_the_middle() -> None:
    numbers = np.full((1, RandomResizedCrop.numbers), 0.999)
    wide = RandomResizedCrop(scale=(0.9, 1.0)).boxes(numbers, 10, 100)
    high = RandomResizedCrop(scale=(0.9, 1.0)).boxes(numbers, 100, 10)
    np.testing.assert_array_equal(wide, [[0, 43, 10, 13]])
    np.testing.assert_array_equal(high, [[43, 0, 13, 10]])


def test_blur_is_torchvisions_with_each_samples_own_width() -> None:
    images = tiles(3, 30)
    sigma = np.array([0.1, 0.9, 2.0])
    found = gaussian_blur(images, sigma, radius=8)
    for image, width, actual in zip(images, sigma.tolist(), found, strict=True):
        expected = tv.gaussian_blur(image, [17, 17], [width, width])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0.05)
    assert found[2].std() < 0.3 * images[2].std()


def test_images_smaller_than_the_kernel_can_be_blurred() -> None:
    found = gaussian_blur(tiles(1, 5), np.array([2.0]), radius=8)
    assert found.shape == (1, 3, 5, 5)
    assert torch.isfinite(found).all()


def test_a_blur_without_width_is_refused() -> None:
    with pytest.raises(PixelError, match="above 0"):
        gaussian_blur(tiles(2), np.array([1.0, 0.0]), radius=8)


def test_brightness_then_contrast_about_each_bands_mean() -> None:
    images = tiles(3)
    brightness, contrast = torch.tensor([0.6, 1.4, 1.0]), torch.tensor([1.3, 0.7, 1.0])
    found = jitter(images, brightness, contrast)
    for i, image in enumerate(images):
        bright = image * brightness[i]
        mean = bright.mean((1, 2), keepdim=True)
        expected = (bright - mean) * contrast[i] + mean
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=0.05)
    assert torch.equal(found[2], images[2])


def test_grey_is_the_mean_of_all_bands_in_every_band() -> None:
    images = tiles(2, channels=5)
    found = grey(images, torch.tensor([True, False]))
    torch.testing.assert_close(found[0], images[0].mean(0, keepdim=True).expand(5, -1, -1))
    assert torch.equal(found[1], images[1])


def test_flip_mirrors_the_chosen_images() -> None:
    images = tiles(2)
    found = flip(images, torch.tensor([False, True]))
    assert torch.equal(found[0], images[0])
    assert torch.equal(found[1], tv.horizontal_flip(images[1]))


def test_photometric_applies_its_parts_in_the_published_order() -> None:
    images = tiles(1)
    # Every coin falls; brightness 0.8, contrast 1.2, sigma 1.05.
    numbers = np.array([[0.0, 0.25, 0.75, 0.0, 0.0, 0.5, 0.0]])
    image = images[0] * 0.8
    mean = image.mean((1, 2), keepdim=True)
    image = ((image - mean) * 1.2 + mean).mean(0, keepdim=True).expand(3, -1, -1)
    expected = tv.horizontal_flip(tv.gaussian_blur(image, [17, 17], [1.05, 1.05]))
    torch.testing.assert_close(Photometric()(images, numbers)[0], expected, rtol=1e-5, atol=0.05)


def test_photometric_leaves_an_image_alone_when_no_coin_falls() -> None:
    images = tiles(2)
    assert torch.equal(Photometric()(images, np.full((2, 7), 0.999)), images)


def test_photometric_changes_as_many_images_as_the_probabilities_say() -> None:
    images = tiles(1, 6).expand(2000, -1, -1, -1)
    numbers = np.random.default_rng(1).random((2000, 7))
    for only, index, probability in (("jitter", 0, 0.8), ("grey", 3, 0.2), ("blur", 4, 0.5)):
        off = {name: 0.0 for name in ("jitter", "grey", "blur", "mirror") if name != only}
        found = Photometric(sigma=(1.0, 2.0), **off)(images, numbers)
        changed = (found != images).flatten(1).any(1)
        assert changed.float().mean().item() == pytest.approx(probability, abs=0.04)
        np.testing.assert_array_equal(changed.numpy(), numbers[:, index] < probability)


def test_a_view_follows_from_its_draw_and_not_from_its_neighbours() -> None:
    crop, change = RandomResizedCrop(16), Photometric()
    images, draws = tiles(6), [5, 6, 7, 8, 2**61, 10]

    def views(rows: list[int]) -> torch.Tensor:
        numbers = uniforms([draws[i] for i in rows], 20, 1, RandomResizedCrop.numbers + 7)[0]
        cut = crop(images[rows], numbers[:, :-7])
        return change(cut, numbers[:, -7:])

    together = views([0, 1, 2, 3, 4, 5])
    assert torch.equal(together, views([0, 1, 2, 3, 4, 5]))
    for i in range(6):
        torch.testing.assert_close(views([i])[0], together[i], rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(views([4, 2]), together[[4, 2]], rtol=1e-6, atol=1e-3)


def test_views_of_a_sample_and_samples_have_numbers_of_their_own() -> None:
    numbers = uniforms([3, 4], 20, 2, 5)
    assert numbers.shape == (2, 2, 5)
    assert len(np.unique(numbers)) == numbers.size
    assert numbers.min() >= 0 and numbers.max() < 1
    np.testing.assert_array_equal(numbers[:, 1], uniforms([4], 20, 2, 5)[:, 0])
