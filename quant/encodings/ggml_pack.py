"""Numbers -> GGUF blocks: one function per type, from float32 [n, elements] to uint8 [n, bytes of a block].

The simple types give the bytes of gguf-py. The K and IQ types, whose rounding is a matter of choice, look for the
scale that loses least among a few: a plain search for the smallest squared error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowvram.quant.encodings.base import finite_peak
from lowvram.quant.encodings.ggml_unpack import IQ4_LEVELS

_TRIALS = 9
"""Scales tried for a group of weights, from half a level less than its range to half a level more."""


def _half_bytes(values: Tensor) -> Tensor:
    """float32 [n, 1] -> the two bytes of each as fp16 [n, 2]; NonFiniteError if one is too large for fp16."""
    halves = values.to(torch.float16)
    if halves.numel():
        finite_peak(halves)
    return halves.view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for a scale of 0."""
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _pack_fields(q: Tensor, bits: int) -> Tensor:
    """uint8 fields [..., 8/bits, m] -> bytes [..., m], the first field lowest: the inverse of `fields`."""
    packed = q.select(-2, 0).clone()
    for n in range(1, 8 // bits):
        packed |= q.select(-2, n) << bits * n
    return packed


def _extreme(x: Tensor) -> Tensor:
    """The number of largest magnitude along the last dimension, with its sign (kept dimension)."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))


def _codes(values: Tensor, largest: int) -> Tensor:
    return values.clamp_(0, largest).to(torch.uint8)


def _fifth_bits(q: Tensor) -> Tensor:
    """Bit 4 of the codes [n, 32] as the 4 bytes of a uint32."""
    return _pack_fields((q >> 4).view(-1, 4, 8).transpose(1, 2), 1)


def _nibble_bytes(q: Tensor) -> Tensor:
    """The low nibbles of codes [n, 32]: the first 16 low, the others high."""
    return _pack_fields((q & 15).view(-1, 2, 16), 4)


def _symmetric_codes(x: Tensor, centre: int) -> tuple[Tensor, Tensor]:
    scale = _extreme(x) / -centre
    return scale, _codes((x * _inverse(scale)).add_(centre + 0.5).trunc_(), 2 * centre - 1)


def _affine_codes(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    low = x.amin(1, keepdim=True)
    scale = (x.amax(1, keepdim=True) - low) / levels
    return scale, low, _codes(((x - low) * _inverse(scale)).add_(0.5).trunc_(), levels)


def q4_0(x: Tensor) -> Tensor:
    scale, q = _symmetric_codes(x, 8)
    return torch.cat([_half_bytes(scale), _nibble_bytes(q)], 1)


def q4_1(x: Tensor) -> Tensor:
    scale, low, q = _affine_codes(x, 15)
    return torch.cat([_half_bytes(scale), _half_bytes(low), _nibble_bytes(q)], 1)


def q5_0(x: Tensor) -> Tensor:
    scale, q = _symmetric_codes(x, 16)
    return torch.cat([_half_bytes(scale), _fifth_bits(q), _nibble_bytes(q)], 1)


def q5_1(x: Tensor) -> Tensor:
    scale, low, q = _affine_codes(x, 31)
    return torch.cat([_half_bytes(scale), _half_bytes(low), _fifth_bits(q), _nibble_bytes(q)], 1)


def q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    q = x * _inverse(scale)
    # Halves go away from zero, as in C's roundf; torch.round would take them to even.
    whole = q.trunc()
    whole += ((q - whole).abs() >= 0.5) * q.sign()
    return torch.cat([_half_bytes(scale), whole.to(torch.int8).view(torch.uint8)], 1)


def _best_affine(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and offset (both >= 0) [..., 1] of x ~ scale * q - offset, q in 0..levels, for groups x [..., m]."""
    low = x.amin(-1, keepdim=True).clamp_(max=0)
    span = x.amax(-1, keepdim=True) - low
    best_scale, best_low = span / levels, low
    best = torch.full_like(low, torch.inf)
    for trial in range(_TRIALS):
        inverse = _inverse(span / (levels - 0.5 + trial / (_TRIALS - 1)))
        q = ((x - low) * inverse).round_().clamp_(0, levels)
        # Least squares for scale and offset with these codes; an offset of the wrong sign is held at 0.
        mean_q, mean_x = q.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
        variance = (q * q).mean(-1, keepdim=True) - mean_q * mean_q
        covariance = (q * x).mean(-1, keepdim=True) - mean_q * mean_x
        scale = covariance * _inverse(variance)
        bottom = mean_x - scale * mean_q
        alone = (q * x).mean(-1, keepdim=True) * _inverse((q * q).mean(-1, keepdim=True))
        scale = torch.where(bottom > 0, alone, scale).clamp_(min=0)
        bottom = bottom.clamp_(max=0)
        error = (scale * q + bottom - x).square_().sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_low = torch.where(better, bottom, best_low)
    return best_scale, -best_low


def _shared(values: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Group values >= 0 [n, g] as codes 0..largest [n, g] times one fp16 number [n, 1]."""
    unit = (values.amax(1, keepdim=True) / largest).to(torch.float16).to(torch.float32)
    return unit, (values * _inverse(unit)).round_().clamp_(0, largest)


def _affine_groups(x: Tensor, levels: int, largest: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, dmin [n, 1], the codes of scales and minima [n, g], and q [n, g, m] of groups x [n, g, m]."""
    scale, offset = _best_affine(x, levels)
    (d, scales), (dmin, minima) = _shared(scale.squeeze(2), largest), _shared(offset.squeeze(2), largest)
    true_scale, true_offset = (d * scales).unsqueeze(2), (dmin * minima).unsqueeze(2)
    q = _codes(((x + true_offset) * _inverse(true_scale)).round_(), levels)
    return d, dmin, scales.to(torch.uint8), minima.to(torch.uint8), q


def q2_k(x: Tensor) -> Tensor:
    d, dmin, scales, minima, q = _affine_groups(x.view(-1, 16, 16), 3, 15)
    packed = _pack_fields(q.view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([scales | minima << 4, packed, _half_bytes(d), _half_bytes(dmin)], 1)


def _pack_scales_and_minima(scales: Tensor, minima: Tensor) -> Tensor:
    """8 + 8 codes of 6 bits -> 12 bytes, as `_scales_and_minima` of the decoder reads them."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minima[:, :4] | minima[:, 4:] >> 4 << 6
    return torch.cat([first, second, (scales[:, 4:] & 15) | minima[:, 4:] << 4], 1)


def q4_k(x: Tensor) -> Tensor:
    d, dmin, scales, minima, q = _affine_groups(x.view(-1, 8, 32), 15, 63)
    packed = _pack_fields(q.view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([_half_bytes(d), _half_bytes(dmin), _pack_scales_and_minima(scales, minima), packed], 1)


def q5_k(x: Tensor) -> Tensor:
    d, dmin, scales, minima, q = _affine_groups(x.view(-1, 8, 32), 31, 63)
    head = [_half_bytes(d), _half_bytes(dmin), _pack_scales_and_minima(scales, minima)]
    low = _pack_fields((q & 15).view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([*head, _pack_fields(q >> 4, 1), low], 1)


def _best_symmetric(x: Tensor, centre: int) -> Tensor:
    """Scale [..., 1], of either sign, of x ~ scale * q, q in -centre..centre-1, for groups x [..., m]."""
    extreme = _extreme(x)
    best_scale, best = extreme / -centre, torch.full_like(extreme, torch.inf)
    for trial in range(_TRIALS):
        inverse = _inverse(extreme / -(centre - 0.5 + trial / (_TRIALS - 1)))
        q = (x * inverse).round_().clamp_(-centre, centre - 1)
        scale = (q * x).sum(-1, keepdim=True) * _inverse((q * q).sum(-1, keepdim=True))
        error = (scale * q - x).square_().sum(-1, keepdim=True)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
    return best_scale


def _shared_signed(values: Tensor, centre: int) -> tuple[Tensor, Tensor]:
    """Group values [n, g] as codes -centre..centre-1 [n, g] times one fp16 number [n, 1]."""
    unit = (_extreme(values) / -centre).to(torch.float16).to(torch.float32)
    return unit, (values * _inverse(unit)).round_().clamp_(-centre, centre - 1)


def _symmetric_groups(x: Tensor, centre: int, scale_centre: int) -> tuple[Tensor, Tensor, Tensor]:
    """d [n, 1], the signed codes of the scales [n, g], and q + centre [n, g, m] of groups x [n, g, m]."""
    d, scales = _shared_signed(_best_symmetric(x, centre).squeeze(2), scale_centre)
    q = (x * _inverse((d * scales).unsqueeze(2))).round_()
    return d, scales, _codes(q.add_(centre), 2 * centre - 1)


def q3_k(x: Tensor) -> Tensor:
    d, scales, q = _symmetric_groups(x.view(-1, 16, 16), 4, 32)
    codes = (scales + 32).to(torch.uint8)
    low = _pack_fields((codes & 15).view(-1, 2, 8), 4)
    high = _pack_fields((codes >> 4).view(-1, 4, 4), 2)
    mask = _pack_fields((q >> 2).view(-1, 8, 32), 1)
    packed = _pack_fields((q & 3).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([mask, packed, low, high, _half_bytes(d)], 1)


def q6_k(x: Tensor) -> Tensor:
    d, scales, q = _symmetric_groups(x.view(-1, 16, 16), 32, 128)
    low = _pack_fields((q & 15).view(-1, 2, 2, 64), 4).flatten(1)
    high = _pack_fields((q >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([low, high, scales.to(torch.int8).view(torch.uint8), _half_bytes(d)], 1)


def _level_codes(values: Tensor) -> Tensor:
    """uint8 codes of the IQ4 levels nearest to `values`."""
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=values.device)
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)


def _near_levels(values: Tensor) -> Tensor:
    """The IQ4 levels nearest to `values` once they are rounded to whole numbers: a look-up, where a search takes long."""
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=values.device)
    whole = torch.arange(-128, 128, dtype=torch.float32, device=values.device)
    table = levels[_level_codes(whole).to(torch.int32)]
    places = values.round().clamp_(-128, 127).add_(128).flatten().to(torch.int32)
    return table.index_select(0, places).view(values.shape)


def _best_levels(x: Tensor) -> Tensor:
    """Scale [..., 1] of x ~ scale * level for groups x [..., m]: the extreme meets an end of the table, or nearly."""
    extreme = _extreme(x)
    best_scale, best = torch.zeros_like(extreme), torch.full_like(extreme, torch.inf)
    for end in (IQ4_LEVELS[0], IQ4_LEVELS[-1]):
        for stretch in (0.94, 0.97, 1.0, 1.03, 1.06):
            level = _near_levels(x * _inverse(extreme / (end * stretch)))
            scale = (level * x).sum(-1, keepdim=True) * _inverse((level * level).sum(-1, keepdim=True))
            error = (scale * level - x).square_().sum(-1, keepdim=True)
            better = error < best
            best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
    return best_scale


def iq4_nl(x: Tensor) -> Tensor:
    scale = _best_levels(x).to(torch.float16).to(torch.float32)
    codes = _level_codes(x * _inverse(scale))
    return torch.cat([_half_bytes(scale), _nibble_bytes(codes)], 1)


def iq4_xs(x: Tensor) -> Tensor:
    groups = x.view(-1, 8, 32)
    d, scales = _shared_signed(_best_levels(groups).squeeze(2), 32)
    codes = _level_codes(groups * _inverse((d * scales).unsqueeze(2)))
    scale_codes = (scales + 32).to(torch.uint8)
    high = _pack_fields((scale_codes >> 4).view(-1, 2, 4).transpose(1, 2), 2)
    low = _pack_fields((scale_codes & 15).view(-1, 4, 2).transpose(1, 2), 4)
    return torch.cat([_half_bytes(d), high, low, _pack_fields(codes.view(-1, 8, 2, 16), 4).flatten(1)], 1)
