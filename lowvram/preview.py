"""What a video will be, while it is made: the model's guess of the finished latent, as small pictures.

A linear map from the channels of a latent to red, green and blue shows shapes, colours and movement; it costs nothing.
`presets/previews.toml` says where each map comes from. A small decoder (`lowvram.models.tae`) shows the frames themselves,
sharp: its weights and scratch are part of the plan.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lowvram.errors import FileError, UsageError
from lowvram.model import Group
from lowvram.models import tae
from lowvram.models.tae import TaeSpec
from lowvram.offload.io import FileReader
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.files.header import StoredTensor, shown
from lowvram.quant.files.shards import open_checkpoint_files
from lowvram.quant.refs import Part, TensorRef
from lowvram.quant.spec import Shape, VaeSpec
from lowvram.sampling.presets import preview_maps
from lowvram.stages.weights import Dense

Pixels = NDArray[np.uint8]
LEAST_SIDE = 256
"""Pixels of the longer side of a picture that is written; smaller latents are enlarged."""
MOST_SIDE = 512
"""Pixels of the longer side of a decoded picture at most: larger ones are averaged, by a whole number."""


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


@dataclass(frozen=True, slots=True)
class Decoder:
    """A small decoder in a file."""

    spec: TaeSpec
    weights: Group

    def factor(self, plane: tuple[int, int]) -> int:
        """Pixels on each side that become one of a picture, for latents of `plane` (rows, columns)."""
        return -(-8 * self.spec.patch * max(plane) // MOST_SIDE)

    def pictures_bytes(self, latents: int, plane: tuple[int, int]) -> int:
        """Bytes of RAM of all pictures of a clip, with Pillow's copies of 4 bytes a pixel while they are written."""
        side, factor = 8 * self.spec.patch, self.factor(plane)
        rows, columns = (-(-side * n // factor) for n in plane)
        return (4 * latents - 3) * rows * columns * (3 + 4)


def open_decoder(path: Path, vae: VaeSpec) -> Decoder:
    """The small decoder in the file `path`, for the latents of `vae`; its header is read. FileError for another file."""
    spec = TaeSpec(vae.z, vae.patch)
    name = "taew2_1" if vae.version == "2.1" else "taew2_2"
    if "lighttae" in path.name.lower():
        raise FileError(
            "a LightTAE decoder, which expects latents of another scale",
            where=str(path),
            expected=f"{name}.safetensors of madebyollin/taehv",
            advice="give that file, as ComfyUI has it in models/vae_approx",
        )
    if not path.is_file():
        raise FileError(
            "there is no such file", where=str(path), advice="check the path of --preview-decoder"
        )
    headers = open_checkpoint_files(path, FileReader)
    if [header.path for header in headers] != [path]:
        raise FileError(
            "a checkpoint in shards",
            where=str(path),
            expected=f"{name}.safetensors of madebyollin/taehv",
            advice="give that file, as ComfyUI has it in models/vae_approx",
        )
    stored = {t.name: t for t in headers[0].tensors}
    refs = tuple(_checked(stored.get(n), n, shape, path, name) for n, shape in spec.shapes().items())
    return Decoder(spec, Group(refs, {}))


def _checked(tensor: StoredTensor | None, name: str, shape: Shape, path: Path, file: str) -> TensorRef:
    """A tensor of the decoder as it is stored; FileError if it is missing, or not of this shape."""
    found = ""
    if tensor is None:
        found = f"no tensor {name}"
    elif tensor.dtype not in ("F16", "BF16", "F32"):
        found = f"{name} is stored as {shown(tensor.dtype)}"
    elif tensor.shape != shape and not (
        name in tae.GROWING and tensor.shape[1:] == shape[1:] and tensor.shape[0] > shape[0]
    ):
        found = f"{name} is {list(tensor.shape)}, not {list(shape)}"
    if tensor is None or found:
        raise FileError(
            f"not the preview decoder of this model: {found}",
            where=str(path),
            expected=f"{file}.safetensors of madebyollin/taehv, in fp16, bf16 or fp32",
            advice="give that file with --preview-decoder, or leave it out for previews by a linear map",
        )
    part = Part("weight", path, tensor.offset, tensor.nbytes, tensor.dtype, tensor.shape)
    return TensorRef(name, tensor.shape, Plain(tensor.dtype), (part,))


def decoded(x: Tensor, v: Tensor, sigma: float, decoder: Decoder, w: Dense) -> Iterator[Tensor]:
    """As `pictures`, of every frame of the video, by a decoder whose weights are `w`: uint8 on the device of x."""
    factor = decoder.factor((x.shape[2], x.shape[3]))
    latents = ((x[:, n] - sigma * v[:, n])[None].to(w.dtype) for n in range(x.shape[1]))
    for frame in tae.decode(decoder.spec, w, latents):
        small = functional.avg_pool2d(frame, factor, ceil_mode=True, count_include_pad=False)
        yield small[0].permute(1, 2, 0).float().mul_(255).round_().to(torch.uint8)


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

    by: Colours | Decoder
    every: int
    show: Callable[[int, Sequence[Pixels]], None]
    """Is given the number of steps that are done, and a picture of every latent frame, or of every frame if a decoder
    makes them."""
    before: int = 0
    """Latent frames at the beginning that are no part of the video."""
    problem: str = ""
    """Why nothing is shown any more."""

    @property
    def decoder(self) -> Decoder | None:
        """Whose weights `step` needs, if a decoder's."""
        return self.by if isinstance(self.by, Decoder) else None

    def step(self, done: int, x: Tensor, v: Tensor, sigma: float, weights: Dense | None = None) -> None:
        """Another step is done: see `pictures`, and `decoded` for a decoder with its weights on the device of x."""
        if self.problem or done % self.every:
            return
        try:
            shown = x[:, self.before :], v[:, self.before :]
            self.show(done, self._pictures(*shown, sigma, weights))
        except Exception as problem:  # noqa: BLE001 a preview is never worth a job
            self.problem = f"no more previews: {problem}"

    def _pictures(self, x: Tensor, v: Tensor, sigma: float, weights: Dense | None) -> list[Pixels]:
        if isinstance(self.by, Colours):
            return list(pictures(x, v, sigma, self.by))
        assert weights is not None, "a decoder without its weights"
        return [picture.cpu().numpy() for picture in decoded(x, v, sigma, self.by, weights)]
