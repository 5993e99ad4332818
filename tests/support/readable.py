"""Every encoding that stored tensors are recognised as, with the usual sizes of blocks and groups."""

from __future__ import annotations

from typing import get_args

from lowvram.quant.encodings.base import Encoding
from lowvram.quant.encodings.fp8 import Fp8
from lowvram.quant.encodings.fp8 import Scaling as Fp8Scaling
from lowvram.quant.encodings.int4 import ConvrotInt4, QuantoInt4
from lowvram.quant.encodings.int8 import Int8
from lowvram.quant.encodings.kquants import BLOCK_SIZES, Blocks
from lowvram.quant.encodings.mxfp8 import Mxfp8
from lowvram.quant.encodings.nf4 import Bnb4
from lowvram.quant.encodings.nvfp4 import Nvfp4, Tensorwide
from lowvram.quant.encodings.plain import Plain
from lowvram.quant.encodings.registry import encoding_by_name, encoding_names


def readable() -> dict[str, Encoding]:
    """By name."""
    sizes = {"block": 128, "tile": 128}
    fp8 = [Fp8(c, s, sizes.get(s, 0)) for c in ("F8_E4M3", "F8_E5M2") for s in get_args(Fp8Scaling)]
    int8 = [Int8(scaling, group=group) for scaling in ("tensor", "row") for group in (0, 256)]
    int8 += [Int8("absmax"), Int8("row", zeros=True), Int8("tensor", zeros=True)]
    bnb4 = [Bnb4(kind, nested=nested) for kind in ("nf4", "fp4") for nested in (0, 256)]
    others = [QuantoInt4(), ConvrotInt4(), Mxfp8()]
    nvfp4 = [Nvfp4(how) for how in get_args(Tensorwide)]
    plain = [Plain(code) for code in ("BF16", "F16", "F32", "F64")]
    made = [*plain, *fp8, *int8, *bnb4, *others, *nvfp4, *map(Blocks, BLOCK_SIZES)]
    asked = [encoding_by_name(name) for name in encoding_names()]
    # A new family is listed here too.
    assert {type(encoding) for encoding in asked} == {type(encoding) for encoding in made}
    return {encoding.name: encoding for encoding in (*made, *asked)}
