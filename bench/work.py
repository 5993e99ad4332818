"""How much arithmetic a case is, counted from the sizes of the networks (no measurement)."""

from __future__ import annotations

from dataclasses import dataclass

from lowvram.bench.cases import Case
from lowvram.quant.spec import ModelSpec, numel


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs; a multiplication with an addition counts as two."""

    linears: float
    attention: float

    @property
    def flops(self) -> float:
        return self.linears + self.attention

    def __mul__(self, times: float) -> Work:
        return Work(self.linears * times, self.attention * times)

    def seconds(self, matmul: float, attention: float) -> float:
        """Ideal time at the rates `matmul` and `attention`, FLOP/s."""
        return self.linears / matmul + self.attention / attention


def forward_work(spec: ModelSpec, width: int, height: int, frames: int) -> Work:
    """One evaluation of a transformer for one prompt: its blocks, with `text_len` rows of text at most.

    Linears of tokens and of text keys and values; logits and weighted sums of both attentions.
    """
    d, f, n = spec.dit.dim, spec.dit.ffn, spec.dit.text_len
    t = spec.tokens(width, height, frames)
    linears = 2 * t * (6 * d * d + 2 * d * f) + 4 * n * d * d
    return Work(spec.dit.layers * linears, spec.dit.layers * (4 * t * t * d + 4 * t * n * d))


def decode_work(spec: ModelSpec, width: int, height: int, frames: int) -> Work:
    """Latent to frames, untiled: 31.1 TFLOP a latent frame of 160x90 for the 2.1 VAE, others in proportion of width."""
    latent = spec.latent_shape(width, height, frames)
    return Work(31.1e12 * numel(latent[1:]) / (90 * 160) * (spec.vae.decoder_base / 96) ** 2, 0.0)


def case_work(case: Case, spec: ModelSpec) -> Work:
    """What the timed part of a case multiplies; of text and of a hand-over, nothing is counted."""
    size = (case.width, case.height, case.frames)
    match case.what:
        case "forward":
            return forward_work(spec, *size)
        case "step":
            return forward_work(spec, *size) * 2
        case "decode":
            return decode_work(spec, *size)
        case "pair" | "job":
            forwards = forward_work(spec, *size) * (2 if case.what == "pair" else 4)
            return Work(forwards.linears + decode_work(spec, *size).linears, forwards.attention)
        case _:
            return Work(0.0, 0.0)
