"""What a video will be, while it is made: the model's guess of the finished latent, as small pictures.

A linear map from the channels of a latent to red, green and blue shows shapes, colours and movement; it costs nothing.
`presets/previews.toml` says where each map comes from.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lowvram.errors import UsageError
from lowvram.quant.spec import VaeSpec
from lowvram.sampling.presets import preview_maps

Pixels = NDArray[np.uint8]
LEAST_SIDE = 256
"""Pixels of the longer side of a picture that is written; smaller latents are enlarged."""


@dataclass(frozen=True, slots=True)
class Colours:
    """A linear map from a latent's channels, normalised as the transformer knows them, to RGB in -1..1."""

    factors: Tensor
    """[C, 3]"""
    bias: Tensor
    """[3]"""
    first: Colours | None = None
    """The map of the first latent frame, where it is another."""

    def __call__(self, latent: Tensor) -> Pixels:
        """[C, H, W] on the host -> [H, W, 3] uint8."""
        rgb = torch.einsum("chw,cr->hwr", latent, self.factors) + self.bias
        return ((rgb + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy()


def colours_of(vae: VaeSpec) -> Colours:
    """The map of a VAE. UsageError if none is known for it."""
    for known in preview_maps():
        if (known.version, known.decoder_base, known.z) == (vae.version, vae.decoder_base, vae.z):
            first = None
            if known.first_factors:
                first = Colours(torch.tensor(known.first_factors), torch.tensor(known.first_bias))
            return Colours(torch.tensor(known.factors), torch.tensor(known.bias), first)
    raise UsageError(
        "no preview is known for this model's VAE",
        where="--preview",
        expected="the VAE of Wan 2.1 or 2.2, or nano's",
        advice="leave --preview out",
    )


def pictures(x: Tensor, v: Tensor, sigma: float, colours: Colours) -> Iterator[Pixels]:
    """A picture [h, w, 3] of each latent frame of x - sigma * v, what the model takes the finished latent for.

    x, v: latent and velocity [C, F, h, w] float32 on any device; frame by frame, so that nothing of their size is made.
    """
    for n in range(x.shape[1]):
        colour = colours.first if n == 0 and colours.first is not None else colours
        yield colour(x[:, n].cpu() - sigma * v[:, n].cpu())


def animated(frames: Sequence[Pixels], milliseconds: int) -> bytes:
    """A WebP that shows the frames again and again, each so long."""
    height, width = frames[0].shape[:2]
    times = max(1, LEAST_SIDE // max(width, height))
    size = width * times, height * times
    first, *others = (Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames)
    file = io.BytesIO()
    first.save(
        file, "WEBP", save_all=True, append_images=others, duration=milliseconds, loop=0, quality=80, method=2
    )
    return file.getvalue()


@dataclass(slots=True)
class Preview:
    """Shows what becomes of a latent, every so many steps. Whatever goes wrong with that stops no job."""

    colours: Colours
    every: int
    show: Callable[[int, Sequence[Pixels]], None]
    """Is given the number of steps that are done, and a picture of every latent frame."""
    problem: str = ""
    """Why nothing is shown any more."""

    def step(self, done: int, x: Tensor, v: Tensor, sigma: float) -> None:
        """Another step is done: see `pictures`."""
        if self.problem or done % self.every:
            return
        try:
            self.show(done, list(pictures(x, v, sigma, self.colours)))
        except Exception as problem:  # noqa: BLE001 a preview is never worth a job
            self.problem = f"no more previews: {problem}"
