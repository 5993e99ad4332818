"""nano's own LoRA pair on nano in every encoding that is read, and in files of every family that quantise writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from readable import readable
from safetensors.torch import load_file
from torch.nn import functional

from lowvram.conversion import plan_conversion, run_conversion
from lowvram.job import LoraChoice
from lowvram.model import Model, Transformer
from lowvram.model_files import with_loras
from lowvram.offload.io import FileReader
from lowvram.offload.slab import as_bytes, build_layout, carve, read_runs
from lowvram.quant.branches import Branch
from lowvram.quant.encodings.base import Encoding
from lowvram.quant.identify import identify_path
from lowvram.quant.linear import Encoded, Params
from lowvram.sampling.presets import model_preset
from lowvram.stages.weights import to_params

NANO = Path(__file__).parents[2] / "lowvram" / "assets" / "nano"
FORMATS = ["bf16", "fp8_row", "fp8_tile128", "mxfp8", "int8", "int8_convrot", "int4", "int4_convrot", "nf4", "nvfp4",
           "q8_0", "q4_k_m"]  # fmt: skip


@pytest.mark.parametrize("to", FORMATS)
def test_the_lora_of_nano_works_on_nano_in_every_format(to: str, tmp_path: Path) -> None:
    out = tmp_path / f"high.{'gguf' if to.startswith(('q', 'iq')) else 'safetensors'}"
    list(run_conversion(plan_conversion(NANO / "high_noise_model.safetensors", out, to)))
    found = identify_path(out, FileReader)
    spec = model_preset("nano")
    model = Model(
        "nano", spec, {"high": Transformer(found.refs), "low": Transformer(found.refs)}, {}, {}, None
    )
    lora = LoraChoice(path=str(NANO / "loras" / "lightning-4-high.safetensors"))
    transformers = with_loras(model, (lora,)).transformers
    assert not transformers["low"].loras
    (used,) = transformers["high"].loras
    assert used.matched.matched == used.matched.total == 60
    group = transformers["high"].groups()["blocks.3"]
    layout = build_layout(group.refs)
    slab = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for run in read_runs(layout):
        with FileReader(run.file) as reader:
            reader.read_into(run.file_offset, as_bytes(slab)[run.slab_offset : run.slab_offset + run.nbytes])
    block = to_params(group, carve(layout, slab))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    for name in ("self_attn.q", "ffn.0"):
        stored = block.tensors[f"{name}.weight"]
        weight = stored.decode(torch.float32) if isinstance(stored, Encoded) else stored.float()
        (branch,) = block.branches[name]
        plain = functional.linear(x, weight, block[f"{name}.bias"].float())
        change = branch.scale * (x @ branch.down.float().T) @ branch.up.float().T
        assert change.abs().max() > 1e-4
        assert torch.allclose(block.linear(name, x), plain + change, atol=1e-5)


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("encoding", readable().values(), ids=lambda encoding: encoding.name)
def test_the_pair_is_added_beside_a_weight_in_every_encoding(encoding: Encoding, expert: str) -> None:
    """Never merged: the weight that is multiplied is the stored one, to the bit, and the LoRA is what it adds."""
    name = "blocks.2.ffn.0"
    weight = load_file(NANO / f"{expert}_noise_model.safetensors")[f"{name}.weight"].float()
    lora = load_file(NANO / "loras" / f"lightning-4-{expert}.safetensors")
    down, up = (lora[f"{name}.lora_{half}.weight"] for half in ("down", "up"))
    stored = Encoded(encoding, tuple(weight.shape), encoding.encode(weight))
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    branches = {name: (Branch(down, up, 0.8),)}
    found = Params({f"{name}.weight": stored}, branches).linear(name, x)
    plain = Params({f"{name}.weight": stored}).linear(name, x)
    assert torch.equal(plain, functional.linear(x, stored.decode(torch.float32)))
    change = 0.8 * (x @ down.float().T) @ up.float().T
    assert change.abs().max() > 1e-3 and torch.allclose(found, plain + change, atol=1e-5)
