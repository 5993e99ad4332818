"""Models derived from Wan without tensors of their own: told by name, and never run as Wan."""

from __future__ import annotations

from pathlib import Path, PurePath

import pytest

from lowvram.errors import FileError
from lowvram.library.naming import derived_name, family_of
from lowvram.model_files import open_model

NAMED = {
    "/m/Phantom-Wan-14B_fp16.safetensors": "Phantom",
    "/m/ChronoEdit_14B_fp8.safetensors": "ChronoEdit",
    "/m/Wan21-WanMove_fp8_scaled_e4m3fn_KJ.safetensors": "Wan-Move",
    "/m/wan2_1_mocha_14B_preview_Q4_K_M.gguf": "MoCha",
    "/hub/models--x--ChronoEdit-14B-Diffusers/snapshots/1f/transformer/diffusion_pytorch_model.safetensors": "ChronoEdit",
    "/hub/Phantom-Wan-1.3B/diffusion_pytorch_model-00001-of-00006.safetensors": "Phantom",
    "/m/Phantom-Wan-14B/transformer": "Phantom",
}
WAN = (
    "/mocha/wan2.2_t2v_high_noise_14B_fp16.safetensors",
    "/m/wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors",
    "/m/Wan2.1-Fun-V1.1-14B-InP.safetensors",
    "/m/wan_moves_lora.safetensors",
    "/hub/models--Wan-AI--Wan2.2-T2V-A14B-Diffusers/snapshots/1f/transformer_2/diffusion_pytorch_model.safetensors",
)


def test_families_are_told_by_the_name_of_the_file_or_of_its_folder() -> None:
    assert {name: family_of(PurePath(name)) for name in NAMED} == NAMED
    assert [family_of(PurePath(name)) for name in WAN] == [""] * len(WAN)
    assert derived_name("ChronoEdit_14B_fp8.safetensors", "i2v-clip") == "chronoedit"


@pytest.mark.parametrize("name", ["Phantom-Wan-14B_fp16.safetensors", "ChronoEdit_14B_fp8.safetensors"])
def test_a_file_of_such_a_family_is_refused_whatever_it_holds(name: str, tmp_path: Path) -> None:
    parts = dict.fromkeys(("single", "vae", "text"), str(tmp_path / name))
    with pytest.raises(FileError, match="not supported yet") as refused:
        open_model("wan2.1-t2v-14b", parts)
    assert name.partition("-")[0].partition("_")[0] in refused.value.found
