"""Random changes of training images, on the device."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images; all are off by default.

    Attributes:
      crop: Pad images by this many black pixels, then crop a random window.
      rotate: Rotate images by up to this many degrees (bilinear).
      brightness: Multiply brightness by a factor of up to 1 ± this.
      contrast: Multiply contrast by a factor of up to 1 ± this.
    """

    crop: int = 0
    rotate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0

    @property
    def is_off(self) -> bool:
        """Whether nothing is changed."""
        return not (self.crop or self.rotate or self.brightness or self.contrast)


NO_AUGMENTATION = AugmentConfig()


def augment(
    images: jax.Array, index: jax.Array, key: jax.Array, config: AugmentConfig
) -> jax.Array:
    """Crops, rotates, brightens and changes the contrast of each image, in this order.

    Args:
      images: uint8 (n, h, w, c).
      index: int32 (n,), the images' positions in the split. An image's draws are folded from it,
        so that they do not depend on the batch or the device.
      key: key of the step.
      config: the changes.

    Returns:
      float32 (n, h, w, c), 0 to 255. Pixels from outside the image are 0.
    """

    def one(image: jax.Array, i: jax.Array) -> jax.Array:
        crop, rotate, brightness, contrast = jax.random.split(jax.random.fold_in(key, i), 4)
        x = _moved(image.astype(jnp.float32), crop, rotate, config)
        if config.brightness:
            x = x * _factor(brightness, config.brightness)
            x = jnp.clip(x, 0, 255)
        if config.contrast:
            x = with_contrast(x, _factor(contrast, config.contrast))
        return x

    return jax.vmap(one)(images, index)


def augment_masks(
    masks: jax.Array, index: jax.Array, key: jax.Array, config: AugmentConfig
) -> jax.Array:
    """Crops and rotates masks as `augment` does their images, by the nearest pixel.

    Args:
      masks: uint8 (n, h, w) of class indices.
      index: as for `augment`.
      key: as for `augment`.
      config: the changes; brightness and contrast leave masks as they are.

    Returns:
      uint8 (n, h, w). Pixels from outside the mask are 0, the background.
    """

    def one(mask: jax.Array, i: jax.Array) -> jax.Array:
        crop, rotate, *_ = jax.random.split(jax.random.fold_in(key, i), 4)
        return _moved(mask[..., None].astype(jnp.float32), crop, rotate, config, order=0)[..., 0]

    return jax.vmap(one)(masks, index).astype(jnp.uint8)


def _moved(
    image: jax.Array, crop: jax.Array, rotate: jax.Array, config: AugmentConfig, order: int = 1
) -> jax.Array:
    if config.crop:
        shift = jax.random.randint(crop, (2,), -config.crop, config.crop + 1)
        image = _shifted(image, shift, config.crop)
    if config.rotate:
        limit = jnp.deg2rad(config.rotate)
        image = rotated(image, jax.random.uniform(rotate, minval=-limit, maxval=limit), order)
    return image


def _factor(key: jax.Array, width: float) -> jax.Array:
    return jax.random.uniform(key, minval=1 - width, maxval=1 + width)


def _shifted(image: jax.Array, shift: jax.Array, most: int) -> jax.Array:
    padded = jnp.pad(image, ((most, most), (most, most), (0, 0)))
    return jax.lax.dynamic_slice(padded, (*(shift + most), 0), image.shape)


def rotated(image: jax.Array, angle: jax.Array, order: int = 1) -> jax.Array:
    """The image (h, w, c) rotated counterclockwise about its centre by `angle` radians.

    Pixels are interpolated: bilinearly for order 1, from the nearest for order 0.
    """
    height, width = image.shape[:2]
    y, x = jnp.mgrid[:height, :width]
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    rows = jnp.cos(angle) * y + jnp.sin(angle) * x + (height - 1) / 2
    columns = jnp.cos(angle) * x - jnp.sin(angle) * y + (width - 1) / 2

    def sampled(channel: jax.Array) -> jax.Array:
        return jax.scipy.ndimage.map_coordinates(channel, [rows, columns], order=order)

    return jax.vmap(sampled, in_axes=2, out_axes=2)(image)


def with_contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """The image (h, w, c), 0 to 255, mixed with its mean luma, as in torchvision."""
    grey = image @ jnp.array(_LUMA) if image.shape[-1] == 3 else image
    return jnp.clip(grey.mean() + factor * (image - grey.mean()), 0, 255)
