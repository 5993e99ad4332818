"""The sizes of a Wan model: what the networks, the planner and the identifier agree on.

Pure data. Every spec can list the native tensor names and shapes it is made of, so a plan needs no weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowvram.quant.face_spec import FaceSpec

Shape = tuple[int, ...]

HEAD_DIM = 128
"""Channels per attention head in every Wan transformer."""

CLIP_TOKENS = 257
"""What CLIP makes of one picture. Models for first and last frame take twice as many."""
CLIP_HEAD_DIM = 80
"""Channels per attention head of the CLIP that Wan uses."""

LATENT_MEAN_21 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD_21 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
LATENT_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DitSpec:
    """One diffusion transformer (an A14B model has two of the same spec)."""

    dim: int
    """Width of the residual stream, a multiple of 128."""
    ffn: int
    """Width of the feed-forward layer."""
    layers: int
    in_channels: int
    """Latent channels given to the patch embedding, conditioning included."""
    out_channels: int
    text_dim: int = 4096
    freq_dim: int = 256
    text_len: int = 512
    """Rows of text context; rows past the prompt are zeros and *are* attended."""
    image_tokens: int = 0
    """CLIP tokens before the text: 257 for 2.1 I2V, 514 for FLF2V, 0 for none."""
    image_dim: int = 1280
    face: FaceSpec | None = None
    """Wan-Animate's face branch; such a transformer takes a pose latent of `out_channels` too."""

    @property
    def heads(self) -> int:
        return self.dim // HEAD_DIM

    @property
    def face_blocks(self) -> range:
        """Numbers of the blocks that a face adapter follows: adapter n comes after the n-th of them."""
        return range(0, self.layers, self.face.every) if self.face else range(0)

    def block_shapes(self) -> dict[str, Shape]:
        """Native names of one transformer block, relative to `blocks.N.`."""
        d, f = self.dim, self.ffn
        shapes: dict[str, Shape] = {"modulation": (1, 6, d)}
        for attention in ("self_attn", "cross_attn"):
            for leaf in ("q", "k", "v", "o"):
                shapes[f"{attention}.{leaf}.weight"] = (d, d)
                shapes[f"{attention}.{leaf}.bias"] = (d,)
            shapes[f"{attention}.norm_q.weight"] = (d,)
            shapes[f"{attention}.norm_k.weight"] = (d,)
        if self.image_tokens:
            for leaf in ("k_img", "v_img"):
                shapes[f"cross_attn.{leaf}.weight"] = (d, d)
                shapes[f"cross_attn.{leaf}.bias"] = (d,)
            shapes["cross_attn.norm_k_img.weight"] = (d,)
        shapes |= {"norm3.weight": (d,), "norm3.bias": (d,)}
        shapes |= {"ffn.0.weight": (f, d), "ffn.0.bias": (f,), "ffn.2.weight": (d, f), "ffn.2.bias": (d,)}
        return shapes

    def outer_shapes(self) -> dict[str, Shape]:
        """Native names outside the blocks."""
        d = self.dim
        shapes: dict[str, Shape] = {
            "patch_embedding.weight": (d, self.in_channels, 1, 2, 2),
            "patch_embedding.bias": (d,),
            "text_embedding.0.weight": (d, self.text_dim),
            "text_embedding.0.bias": (d,),
            "text_embedding.2.weight": (d, d),
            "text_embedding.2.bias": (d,),
            "time_embedding.0.weight": (d, self.freq_dim),
            "time_embedding.0.bias": (d,),
            "time_embedding.2.weight": (d, d),
            "time_embedding.2.bias": (d,),
            "time_projection.1.weight": (6 * d, d),
            "time_projection.1.bias": (6 * d,),
            "head.modulation": (1, 2, d),
            "head.head.weight": (4 * self.out_channels, d),
            "head.head.bias": (4 * self.out_channels,),
        }
        if self.image_tokens:
            i = self.image_dim
            shapes |= {"img_emb.proj.0.weight": (i,), "img_emb.proj.0.bias": (i,)}
            shapes |= {"img_emb.proj.1.weight": (i, i), "img_emb.proj.1.bias": (i,)}
            shapes |= {"img_emb.proj.3.weight": (d, i), "img_emb.proj.3.bias": (d,)}
            shapes |= {"img_emb.proj.4.weight": (d,), "img_emb.proj.4.bias": (d,)}
            if self.image_tokens == 2 * CLIP_TOKENS:
                shapes["img_emb.emb_pos"] = (1, self.image_tokens, i)
        if self.face:
            shapes["pose_patch_embedding.weight"] = (d, self.out_channels, 1, 2, 2)
            shapes["pose_patch_embedding.bias"] = (d,)
        return shapes

    def face_shapes(self) -> dict[str, Shape]:
        """Native names of the face branch."""
        if self.face is None:
            return {}
        adapter = self.face.adapter_shapes(self.dim, HEAD_DIM)
        return self.face.encoder_shapes(self.dim) | {
            f"face_adapter.fuser_blocks.{n}.{k}": s
            for n in range(len(self.face_blocks))
            for k, s in adapter.items()
        }

    def shapes(self) -> dict[str, Shape]:
        """Every native tensor name and its shape."""
        blocks = {f"blocks.{n}.{k}": s for n in range(self.layers) for k, s in self.block_shapes().items()}
        return self.outer_shapes() | blocks | self.face_shapes()


@dataclass(frozen=True, slots=True)
class VaeSpec:
    """A Wan video autoencoder. `version` is "2.1" (stride 4x8x8) or "2.2" (patchified, stride 4x16x16)."""

    version: str = "2.1"
    base: int = 96
    """Channels of the encoder's first stage."""
    decoder_base: int = 96
    """Channels of the decoder's last stage."""
    z: int = 16
    res_blocks: int = 2
    """Residual blocks per encoder stage; a decoder stage has one more."""
    mean: tuple[float, ...] = LATENT_MEAN_21
    std: tuple[float, ...] = LATENT_STD_21
    """Latent statistics: model latent = (mu - mean) / std."""

    @property
    def patch(self) -> int:
        """Pixels folded into channels on each side before the first convolution."""
        return 1 if self.version == "2.1" else 2

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels per latent."""
        return (4, 8 * self.patch, 8 * self.patch)

    def shapes(self) -> dict[str, Shape]:
        """Every native tensor name and its shape, encoder and decoder."""
        return self._encoder_shapes() | self._decoder_shapes()

    def _encoder_shapes(self) -> dict[str, Shape]:
        """`encoder.*` and the `conv1` that splits it into mean and log variance."""
        top, pixels = 4 * self.base, 3 * self.patch**2
        shapes = _conv("encoder.conv1", self.base, pixels, 3, 3, 3)
        before, flat = self.base, 0
        for stage, after in enumerate((self.base, 2 * self.base, 4 * self.base, 4 * self.base)):
            names = self._stage_names("encoder.downsamples", stage, self.res_blocks + (stage < 3), flat)
            flat += len(names)
            for name in names[: self.res_blocks]:
                shapes |= _res_block(name, before, after)
                before = after
            if stage < 3:
                shapes |= _conv(f"{names[-1]}.resample.1", after, after, 3, 3)
            if stage in (1, 2):
                shapes |= _conv(f"{names[-1]}.time_conv", after, after, 3, 1, 1)
        shapes |= _middle("encoder.middle", top)
        shapes |= {"encoder.head.0.gamma": (top, 1, 1, 1)} | _conv("encoder.head.2", 2 * self.z, top, 3, 3, 3)
        return shapes | _conv("conv1", 2 * self.z, 2 * self.z, 1, 1, 1)

    def _decoder_shapes(self) -> dict[str, Shape]:
        """`conv2` and `decoder.*`."""
        low, top, pixels = self.decoder_base, 4 * self.decoder_base, 3 * self.patch**2
        shapes = _conv("conv2", self.z, self.z, 1, 1, 1) | _conv("decoder.conv1", top, self.z, 3, 3, 3)
        shapes |= _middle("decoder.middle", top)
        before, flat = top, 0
        for stage, after in enumerate((top, top, 2 * low, low)):
            names = self._stage_names("decoder.upsamples", stage, self.res_blocks + 1 + (stage < 3), flat)
            flat += len(names)
            for name in names[: self.res_blocks + 1]:
                shapes |= _res_block(name, before, after)
                before = after
            if stage < 3:
                # The 2.1 upsampler halves the channels, the 2.2 one keeps them.
                before = after // 2 if self.version == "2.1" else after
                shapes |= _conv(f"{names[-1]}.resample.1", before, after, 3, 3)
            if stage in (0, 1):
                shapes |= _conv(f"{names[-1]}.time_conv", 2 * after, after, 3, 1, 1)
        return (
            shapes | {"decoder.head.0.gamma": (low, 1, 1, 1)} | _conv("decoder.head.2", pixels, low, 3, 3, 3)
        )

    def _stage_names(self, root: str, stage: int, count: int, flat: int) -> list[str]:
        """Names of a stage's modules: one flat list over all stages in 2.1, a list per stage in 2.2."""
        if self.version == "2.1":
            return [f"{root}.{flat + n}" for n in range(count)]
        return [f"{root}.{stage}.{root.rpartition('.')[2]}.{n}" for n in range(count)]


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A UMT5 encoder (UMT5-XXL by default)."""

    vocab: int = 256384
    dim: int = 4096
    heads: int = 64
    head_dim: int = 64
    ffn: int = 10240
    layers: int = 24

    def layer_shapes(self) -> dict[str, Shape]:
        """Native names of one layer, relative to `blocks.N.`."""
        d, inner = self.dim, self.heads * self.head_dim
        return {
            "norm1.weight": (d,),
            "attn.q.weight": (inner, d),
            "attn.k.weight": (inner, d),
            "attn.v.weight": (inner, d),
            "attn.o.weight": (d, inner),
            "pos_embedding.embedding.weight": (32, self.heads),
            "norm2.weight": (d,),
            "ffn.gate.0.weight": (self.ffn, d),
            "ffn.fc1.weight": (self.ffn, d),
            "ffn.fc2.weight": (d, self.ffn),
        }

    def shapes(self) -> dict[str, Shape]:
        """Every native tensor name and its shape."""
        layers = {f"blocks.{n}.{k}": s for n in range(self.layers) for k, s in self.layer_shapes().items()}
        return {"token_embedding.weight": (self.vocab, self.dim), "norm.weight": (self.dim,)} | layers


@dataclass(frozen=True, slots=True)
class ClipSpec:
    """The picture half of a CLIP (ViT-H/14 by default). Wan uses what the last layer but one puts out."""

    dim: int = 1280
    ffn: int = 5120
    layers: int = 32
    patch: int = 14
    tokens: int = CLIP_TOKENS
    """One for the whole picture, then one for each patch."""

    @property
    def heads(self) -> int:
        return self.dim // CLIP_HEAD_DIM

    @property
    def side(self) -> int:
        """Pixels on each side of the square it looks at."""
        return math.isqrt(self.tokens - 1) * self.patch

    def layer_shapes(self) -> dict[str, Shape]:
        """Names of one layer, relative to `blocks.N.`."""
        d, f = self.dim, self.ffn
        shapes: dict[str, Shape] = {}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
        for leaf in "qkvo":
            shapes |= {f"attn.{leaf}.weight": (d, d), f"attn.{leaf}.bias": (d,)}
        return shapes | {
            "mlp.0.weight": (f, d),
            "mlp.0.bias": (f,),
            "mlp.2.weight": (d, f),
            "mlp.2.bias": (d,),
        }

    def shapes(self) -> dict[str, Shape]:
        """Every tensor name and its shape, the unused last layer and norm included."""
        d = self.dim
        layers = {f"blocks.{n}.{k}": s for n in range(self.layers) for k, s in self.layer_shapes().items()}
        outer: dict[str, Shape] = {
            "class_embedding": (d,),
            "patch_embedding.weight": (d, 3, self.patch, self.patch),
            "position_embedding.weight": (self.tokens, d),
        }
        for norm in ("pre_norm", "post_norm"):
            outer |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
        return outer | layers


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole model: its networks and the defaults its authors trained or recommend."""

    variant: str
    """"t2v", "i2v" (channels for a picture), "ti2v" (frames may differ in noise), "animate"."""
    dit: DitSpec
    vae: VaeSpec
    text: TextSpec
    experts: int
    """1, or 2 for a high-noise and a low-noise transformer."""
    boundary: float
    """Expert switch: steps with t >= boundary * 1000 use the high-noise expert. 0 with one expert."""
    fps: int
    width: int
    height: int
    frames: int
    steps: int
    shift: float
    guidance: tuple[float, float]
    """Guidance scale of the (high, low) expert."""
    negative: str
    """Negative prompt used when none is given."""
    shift_480p: float | None = None
    """Of videos of at most 832 x 480 pixels, where the authors use another."""
    prompt: str = ""
    """Prompt used when none is given."""
    clip: ClipSpec | None = None
    """What looks at the picture, where the transformer has a branch for it."""

    def expert_names(self) -> tuple[str, ...]:
        return ("high", "low") if self.experts == 2 else ("single",)

    def latent_shape(self, width: int, height: int, frames: int) -> tuple[int, int, int, int]:
        """[z, F, H, W] of the latent of a video of that size in pixels and frames."""
        t, h, w = self.vae.stride
        return (self.vae.z, (frames - 1) // t + 1, height // h, width // w)

    def denoised_shape(self, width: int, height: int, frames: int) -> tuple[int, int, int, int]:
        """[z, F, H, W] of what the transformer denoises: `latent_shape`, for Animate behind the reference picture's."""
        z, f, h, w = self.latent_shape(width, height, frames)
        return (z, f + (self.variant == "animate"), h, w)

    def tokens(self, width: int, height: int, frames: int) -> int:
        """Sequence length of the transformer for a video of that size."""
        _, f, h, w = self.denoised_shape(width, height, frames)
        return f * (h // 2) * (w // 2)


def _conv(name: str, out: int, into: int, *kernel: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out, into, *kernel), f"{name}.bias": (out,)}


def _res_block(name: str, before: int, after: int) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {f"{name}.residual.0.gamma": (before, 1, 1, 1)}
    shapes |= _conv(f"{name}.residual.2", after, before, 3, 3, 3)
    shapes |= {f"{name}.residual.3.gamma": (after, 1, 1, 1)}
    shapes |= _conv(f"{name}.residual.6", after, after, 3, 3, 3)
    return shapes if before == after else shapes | _conv(f"{name}.shortcut", after, before, 1, 1, 1)


def _middle(name: str, width: int) -> dict[str, Shape]:
    shapes = _res_block(f"{name}.0", width, width) | {f"{name}.1.norm.gamma": (width, 1, 1)}
    shapes |= _conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
    shapes |= _conv(f"{name}.1.proj", width, width, 1, 1)
    return shapes | _res_block(f"{name}.2", width, width)


def numel(shape: Shape) -> int:
    """Number of elements of a shape, as a Python integer (never overflows)."""
    n = 1
    for size in shape:
        n *= size
    return n
