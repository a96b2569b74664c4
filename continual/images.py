"""Images as tensors: decoded by Pillow, cut square, resized and scaled, always in the same way.

There is no augmentation: a sample is the same whenever it is served. Pixels are in [0, 1] before mean and std.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from continual.order import Indices
from relora.errors import ConfigError

Pixels = npt.NDArray[Any]
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in grey. Source: ITU-R BT.601, as in Pillow."""
CONTENT_BYTES = 64 << 20
"""Encoded images up to this size in all are told apart by their content, above it by names and sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageForm:
    """How images become tensors."""

    size: int | None = None
    """Pixels of a side; None: as they are."""
    channels: int | None = None
    """1: grey, 3: colour; None: as they are, or colour for files."""
    mean: float = 0.0
    std: float = 1.0

    def scaled(self, pixels: npt.NDArray[np.float32]) -> dict[str, torch.Tensor]:
        """A model's arguments from pixels in [0, 1]. Shapes: (B, channels, H, W)."""
        return {"pixel_values": (torch.from_numpy(pixels) - self.mean) / self.std}


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayImages:
    """Images in memory, all of one size."""

    pixels: Pixels
    """uint8, or float32 in [0, 1]. Shapes: (N, channels, H, W)"""
    form: ImageForm

    def shapes(self, index: Indices) -> set[tuple[int, int, int]]:
        """Channels, height and width of what is served, of all that occur."""
        _, channels, height, width = self.pixels.shape
        size = self.form.size
        return {(self.form.channels or channels, size or height, size or width)}

    def inputs(self, index: Indices) -> dict[str, torch.Tensor]:
        """These images."""
        pixels = self.pixels[index]
        if self.form.size is not None and pixels.shape[2:] != (self.form.size, self.form.size):
            pixels = np.stack([self._resized(image, self.form.size) for image in pixels])
        scaled = pixels.astype(np.float32) / (255.0 if pixels.dtype == np.uint8 else 1.0)
        return self.form.scaled(_with_channels(scaled, self.form.channels or scaled.shape[1]))

    def digest(self, index: Indices) -> str:
        """Of the content and the form."""
        content = np.ascontiguousarray(self.pixels[index])
        return blake2b(repr((content.shape, self.form)).encode() + content.tobytes(), digest_size=16).hexdigest()

    @staticmethod
    def _resized(image: Pixels, size: int) -> Pixels:
        return np.stack([np.asarray(_square(Image.fromarray(channel), size)) for channel in image])


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedImages:
    """Image files, or what would be in them, decoded whenever they are served."""

    sources: Sequence[Path | bytes]
    names: Sequence[str]
    """Of the files within the set."""
    form: ImageForm

    def shapes(self, index: Indices) -> set[tuple[int, int, int]]:
        """Channels, height and width of what is served, of all that occur; without a size, looks at every file.

        Raises: ConfigError
        """
        channels = self.form.channels or 3
        if self.form.size is not None:
            return {(channels, self.form.size, self.form.size)}
        found = set()
        for number in index:
            with self._opened(number) as image:
                found.add((channels, image.height, image.width))
        return found

    def inputs(self, index: Indices) -> dict[str, torch.Tensor]:
        """These images.

        Raises: ConfigError
        """
        return self.form.scaled(np.stack([self._decoded(number) for number in index]))

    def digest(self, index: Indices) -> str:
        """Of names, content and form; of large sets, sizes in place of content."""
        sources = [self.sources[number] for number in index]
        sizes = [len(one) if isinstance(one, bytes) else one.stat().st_size for one in sources]
        names = [self.names[number] for number in index]
        digest = blake2b(repr((names, sizes, self.form)).encode(), digest_size=16)
        if sum(sizes) <= CONTENT_BYTES:
            for one in sources:
                digest.update(one if isinstance(one, bytes) else one.read_bytes())
        return digest.hexdigest()

    def _opened(self, number: int) -> Image.Image:
        source = self.sources[number]
        try:
            return Image.open(BytesIO(source) if isinstance(source, bytes) else source)
        except (UnidentifiedImageError, OSError) as error:
            raise ConfigError(
                f"{self.names[number]} cannot be read as an image ({error}): mend or remove it"
            ) from error

    def _decoded(self, number: int) -> npt.NDArray[np.float32]:
        with self._opened(number) as opened:
            try:
                image = opened.convert("L" if self.form.channels == 1 else "RGB")
            except OSError as error:
                raise ConfigError(f"{self.names[number]} is a damaged image ({error}): mend or remove it") from error
        if self.form.size is not None:
            image = _square(image, self.form.size)
        pixels = np.asarray(image, dtype=np.float32) / 255.0
        return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _square(image: Image.Image, size: int) -> Image.Image:
    """Cut to a square about the middle, then resized."""
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def _with_channels(pixels: npt.NDArray[np.float32], channels: int) -> npt.NDArray[np.float32]:
    if pixels.shape[1] == channels:
        return pixels
    if channels == 3:
        return pixels.repeat(3, axis=1)
    grey: npt.NDArray[np.float32] = np.einsum("bchw,c->bhw", pixels, GREY)[:, None]
    return grey
