"""The sizes of Wan-Animate's face branch (checkpoint-formats 1.5). Pure data."""

from __future__ import annotations

from dataclasses import dataclass, field

Shape = tuple[int, ...]

FACE_PIXELS = 512
"""Side of the face crops that the motion encoder reads; seven halvings lead to 4."""
FACE_STAGES = 7
MOTION_LAYERS = 5
"""Linear layers behind the motion encoder's convolutions."""

ADAPTERS = "face_adapter.fuser_blocks."
ENCODERS = ("motion_encoder.", "face_encoder.")
KEPT_LEAVES = ("linear1_q.", "linear2.", "q_norm.")
"""What of an adapter every step needs; the rest makes keys and values, once for a clip."""
FACE_SCOPE = "face."
"""How names begin, inside a block that a face adapter follows, that are the adapter's."""


@dataclass(frozen=True, slots=True)
class FaceSpec:
    """Motion encoder, face encoder, and an adapter after every `every`-th transformer block."""

    widths: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    """Channels of the motion encoder after its first convolution and after each of its residual blocks."""
    style: int = 512
    """Width of the linear layers behind them."""
    directions: int = 20
    """Numbers that describe the motion of a face."""
    motion: int = 512
    """Width of a motion vector: the sum of so many directions."""
    hidden: int = 1024
    """Width of the face encoder."""
    heads: int = 4
    """Tokens that the face encoder makes of a step; a learned one is added to them."""
    every: int = 5
    split_kv: bool = field(default=False, compare=False)
    """Whether the file holds keys and values of the adapters as two matrices, as diffusers does. Not a size: specs
    that differ in nothing else are equal."""

    @property
    def tokens(self) -> int:
        """Tokens of one latent slot."""
        return self.heads + 1

    def encoder_shapes(self, dim: int) -> dict[str, Shape]:
        """Native names of the motion and the face encoder of a transformer of width `dim`.

        The authors' files also hold 14 constant blur filters, `*.kernel`, which need not be stored.
        """
        convs = "motion_encoder.enc.net_app.convs"
        shapes: dict[str, Shape] = {
            f"{convs}.0.0.weight": (self.widths[0], 3, 1, 1),
            f"{convs}.0.1.bias": (1, self.widths[0], 1, 1),
        }
        for n in range(1, FACE_STAGES + 1):
            before, after = self.widths[n - 1 : n + 1]
            shapes |= {
                f"{convs}.{n}.conv1.0.weight": (before, before, 3, 3),
                f"{convs}.{n}.conv1.1.bias": (1, before, 1, 1),
                f"{convs}.{n}.conv2.1.weight": (after, before, 3, 3),
                f"{convs}.{n}.conv2.2.bias": (1, after, 1, 1),
                f"{convs}.{n}.skip.1.weight": (after, before, 1, 1),
            }
        shapes[f"{convs}.{FACE_STAGES + 1}.weight"] = (self.style, self.widths[-1], 4, 4)
        for n in range(MOTION_LAYERS):
            out = self.style if n < MOTION_LAYERS - 1 else self.directions
            shapes |= {
                f"motion_encoder.enc.fc.{n}.weight": (out, self.style),
                f"motion_encoder.enc.fc.{n}.bias": (out,),
            }
        shapes["motion_encoder.dec.direction.weight"] = (self.motion, self.directions)
        for name, out, into in (
            ("conv1_local", self.heads * self.hidden, self.motion),
            ("conv2", self.hidden, self.hidden),
            ("conv3", self.hidden, self.hidden),
        ):
            shapes |= {
                f"face_encoder.{name}.conv.weight": (out, into, 3),
                f"face_encoder.{name}.conv.bias": (out,),
            }
        return shapes | {
            "face_encoder.out_proj.weight": (dim, self.hidden),
            "face_encoder.out_proj.bias": (dim,),
            "face_encoder.padding_tokens": (1, 1, 1, dim),
        }

    def adapter_shapes(self, dim: int, head_dim: int) -> dict[str, Shape]:
        """Native names of one adapter, relative to `face_adapter.fuser_blocks.N.`; keys before values in `linear1_kv`."""
        kv = {"linear1_k": dim, "linear1_v": dim} if self.split_kv else {"linear1_kv": 2 * dim}
        shapes: dict[str, Shape] = {}
        for name, out in (kv | {"linear1_q": dim, "linear2": dim}).items():
            shapes |= {f"{name}.weight": (out, dim), f"{name}.bias": (out,)}
        return shapes | {"q_norm.weight": (head_dim,), "k_norm.weight": (head_dim,)}
