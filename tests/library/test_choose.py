"""A name is enough: the right files are taken for a stated reason, and where two sets fit the person is asked."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowvram.cli.main import _run
from lowvram.discovery import find, is_here, look
from lowvram.errors import FileError, UsageError
from lowvram.library.choose import choose, choose_loras
from lowvram.library.naming import expert_of
from lowvram.library.parts import typed
from lowvram.quant.names import CLIP
from lowvram.sampling.presets import model_preset, preset_of_file

T2V = model_preset("wan2.2-t2v-a14b")


@pytest.fixture
def owned(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(
        "LOWVRAM_MODELS", os.pathsep.join(map(str, (machine.comfy, machine.wangp, machine.hub)))
    )
    return machine


def test_a_name_finds_all_parts_and_says_why(owned: Any) -> None:
    found = find("wan2.2-t2v-a14b")
    assert {part: Path(path).name for part, path in found.paths.items()} == {
        "high": "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
        "low": "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors",
        "vae": "wan_2.1_vae.safetensors",
        "text": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    }
    assert found.reasons["high"] == "high-noise by its name, fp8_scaled, LOWVRAM_MODELS"
    assert found.reasons["vae"] == "the only one that fits, bf16, LOWVRAM_MODELS"
    found = find("wan2.2-i2v-a14b")
    assert Path(found.paths["low"]).name == "wan2.2_image2video_14B_low_quanto_mbf16_int8.safetensors"
    assert Path(find("wan2.2-ti2v-5b").paths["vae"]).name == "wan2.2_vae.safetensors"


def test_several_sets_are_asked_about_with_what_to_type(
    owned: Any, files: Any, sparse: Callable[..., Path]
) -> None:
    for expert in ("High", "Low"):
        sparse(
            owned.comfy / "unet" / f"Wan2.2-T2V-A14B-{expert}Noise-bf16.safetensors",
            files["bf16"](T2V.dit.shapes()),
        )
    with pytest.raises(UsageError) as caught:
        find("wan2.2-t2v-a14b")
    text = str(caught.value)
    assert "2 sets of transformers fit wan2.2-t2v-a14b" in text and text.count("\n") == 2
    assert "--weights" in text and "--high" in text and "HighNoise-bf16" in text
    taken = find("wan2.2-t2v-a14b", weights="bf16")
    assert Path(taken.paths["low"]).name == "Wan2.2-T2V-A14B-LowNoise-bf16.safetensors"
    assert Path(find("wan2.2-t2v-a14b", weights="fp8").paths["low"]).name.endswith("fp8_scaled.safetensors")


def test_copies_of_a_file_are_no_question(owned: Any, files: Any, sparse: Callable[..., Path]) -> None:
    for expert in ("high", "low"):
        name = f"wan2.2_t2v_{expert}_noise_14B_fp8_scaled.safetensors"
        sparse(owned.wangp / "ckpts" / name, files["fp8"](T2V.dit.shapes()))
    assert "ComfyUI" in find("wan2.2-t2v-a14b").paths["high"]


def test_experts_without_a_mark_are_never_guessed(
    tmp_path: Path, files: Any, sparse: Callable[..., Path]
) -> None:
    for name in ("one", "two"):
        sparse(tmp_path / f"wan2.2 {name}.safetensors", files["fp8"](T2V.dit.shapes()))
    with pytest.raises(UsageError, match="no name says which is for high noise"):
        find("wan2.2-t2v-a14b", models_dirs=[str(tmp_path)])


def test_swapped_and_doubled_experts_are_refused(owned: Any, files: Any, sparse: Callable[..., Path]) -> None:
    high, low = (find("wan2.2-t2v-a14b").paths[part] for part in ("high", "low"))
    with pytest.raises(UsageError, match="the low-noise expert"):
        find("wan2.2-t2v-a14b", {"high": low, "low": high})
    assert find("wan2.2-t2v-a14b", {"high": low, "low": high}, force=True).paths["high"] == low
    copy = Path(low).with_name("copy of high.safetensors")
    os.link(high, copy)
    small = {"w": ("F16", (512, 512))}
    one = sparse(copy.parent / "one_high.safetensors", small)
    one.write_bytes(bytes(range(256)) * 2048)
    two = copy.parent / "two_low.safetensors"
    two.write_bytes(one.read_bytes())
    with pytest.raises(UsageError, match="both experts hold the same numbers"):
        find("wan2.2-t2v-a14b", {"high": str(one), "low": str(two), "vae": str(one), "text": str(one)})


def test_experts_in_shards_have_the_same_index_and_are_no_copies(
    owned: Any, files: Any, sparse: Callable[..., Path]
) -> None:
    shapes = list(T2V.dit.shapes().items())
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    parts = [dict(shapes[:600]), dict(shapes[600:])]
    index = {"weight_map": {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}}
    indices = {}
    for part in ("high", "low"):
        folder = owned.home / "Wan2.2-T2V-A14B" / f"{part}_noise_model"
        for shard, held in zip(shards, parts, strict=True):
            sparse(folder / shard, files["bf16"](held))
        indices[part] = folder / "diffusion_pytorch_model.safetensors.index.json"
        indices[part].write_text(json.dumps(index))
    found = find("wan2.2-t2v-a14b", {part: str(path) for part, path in indices.items()})
    assert found.paths["high"] == str(indices["high"])


def test_a_lacking_part_is_named_and_so_is_what_was_found_of_it(owned: Any) -> None:
    (owned.comfy / "vae" / "wan_2.1_vae.safetensors").unlink()
    with pytest.raises(FileError) as caught:
        find("wan2.2-t2v-a14b")
    assert (
        "no VAE that can be used: not a file of tensors" in caught.value.found
        and caught.value.where.endswith("Wan2.1_VAE.pth")
    )
    (owned.wangp / "ckpts" / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(FileError, match="no VAE was found") as caught:
        find("wan2.2-t2v-a14b")
    assert "models pull wan2.2-t2v-a14b" in caught.value.advice and "--vae FILE" in caught.value.advice


def test_transformers_that_are_not_plain_are_named_and_taken_only_when_asked_for(
    tmp_path: Path, owned: Any, files: Any, sparse: Callable[..., Path]
) -> None:
    spec = model_preset("wan2.1-t2v-14b")
    mine = [str(tmp_path / "mine")]
    made = sparse(
        tmp_path / "mine" / "wan2.1_t2v_14b_lightx2v_4step.safetensors", files["fp8"](spec.dit.shapes())
    )
    with pytest.raises(FileError, match=r"only one made for --preset lightx2v-2.1-4") as caught:
        find("wan2.1-t2v-14b", models_dirs=mine)
    assert caught.value.where == str(made) and caught.value.advice == "give --preset lightx2v-2.1-4"
    assert find("wan2.1-t2v-14b", models_dirs=mine, preset="lightx2v-2.1-4").paths["single"] == str(made)
    made.rename(made.with_name("SkyReels_14B.safetensors"))
    with pytest.raises(FileError, match="skyreels"):
        find("wan2.1-t2v-14b", models_dirs=mine)


def test_a_folder_of_loose_comfy_files_is_a_model(owned: Any) -> None:
    found = find(str(owned.comfy))
    assert Path(found.paths["high"]).name == "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
    assert Path(found.paths["vae"]).name == "wan_2.1_vae.safetensors"
    assert {"high", "low", "vae", "text"} == found.paths.keys()


def test_a_folder_of_several_models_asks_which(owned: Any, files: Any, sparse: Callable[..., Path]) -> None:
    spec = model_preset("wan2.1-t2v-1.3b")
    sparse(owned.comfy / "unet" / "wan2.1_t2v_1.3B_fp16.safetensors", files["fp16"](spec.dit.shapes()))
    with pytest.raises(UsageError, match="2 models lie here") as caught:
        find(str(owned.comfy))
    assert "--models-dir" in caught.value.advice


def test_a_preset_brings_the_loras_that_are_here(owned: Any, files: Any, sparse: Callable[..., Path]) -> None:
    entries = look().entries
    names = {"wan2.2-t2v-a14b"}
    chosen = choose_loras(entries, names, T2V, "lightning-4")
    assert {expert: Path(path).name for expert, path in chosen.items()} == {
        expert: f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{expert}_noise.safetensors"
        for expert in ("high", "low")
    }
    assert choose_loras(entries, names, T2V, "lightning-8") == chosen
    assert choose_loras(entries, names, T2V, "lightx2v-2.2-4") == {}
    assert choose_loras(entries, {"wan2.2-i2v-a14b"}, model_preset("wan2.2-i2v-a14b"), "lightning-4") == {}
    sparse(
        owned.comfy / "loras" / "Wan22_A14B_T2V_HIGH_Lightning_4steps.safetensors", files["lora"](T2V.dit, 32)
    )
    with pytest.raises(UsageError, match="2 LoRAs fit --preset lightning-4"):
        choose_loras(look().entries, names, T2V, "lightning-4")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("diffusion_models", "wan2.2_animate_14B_bf16.safetensors"),
        ("diffusion_models", "wan2.2_animate_14B_int8_convrot.safetensors"),
        ("Wan22Animate", "Wan2_2-Animate-14B_fp8_e4m3fn_scaled_KJ.safetensors"),
    ],
)
def test_animate_is_found_under_the_names_it_is_published_by(
    folder: str, name: str, owned: Any, files: Any, sparse: Callable[..., Path]
) -> None:
    animate = model_preset("wan2.2-animate-14b")
    path = sparse(owned.comfy / folder / name, files["bf16"](animate.dit.shapes()))
    entries = look().entries
    assert [e.derived for e in entries if e.path == str(path)] == [""]
    taken = choose(entries, "wan2.2-animate-14b")
    assert taken.parts["single"].path == str(path) and taken.missing == ("clip",)
    sparse(owned.comfy / folder / "wan_animate_aio.safetensors", files["bf16"](animate.dit.shapes()))
    assert choose(look().entries, "wan2.2-animate-14b").parts["single"].path == str(path)


def test_a_model_that_is_here_distilled_only_is_ready_with_its_preset(
    owned: Any, files: Any, sparse: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, preset = "wan2.1-i2v-14b", "lightx2v-2.1-4"
    spec = model_preset(name)
    assert spec.clip is not None
    clip = {f"vision_model.{CLIP.from_native(key)}": shape for key, shape in spec.clip.shapes().items()}
    sparse(owned.comfy / "clip_vision" / "clip_vision_h.safetensors", files["fp16"](clip))
    sparse(
        owned.comfy / "unet" / "wan2.1_i2v_720p_scaled_fp8_e4m3_lightx2v_4step.safetensors",
        files["bf16"](spec.dit.shapes()),
    )
    assert is_here(name, preset=preset) and not is_here(name)
    assert _run(["models", "list"], False, False) == 0
    assert f"{name}      ready with --preset {preset}" in capsys.readouterr().out


def test_a_broken_file_is_told_of_where_it_may_be_the_one_that_is_missing(
    owned: Any, files: Any, sparse: Callable[..., Path]
) -> None:
    animate = model_preset("wan2.2-animate-14b")
    path = sparse(
        owned.comfy / "unet" / "wan2.2_animate_14B_bf16.safetensors", files["bf16"](animate.dit.shapes())
    )
    os.truncate(path, 12_345_678_901)
    with pytest.raises(FileError, match="the download is not complete"):
        find("wan2.2-animate-14b")
    with pytest.raises(FileError, match=r"lowvram models pull wan2\.1-flf2v-14b"):
        find("wan2.1-flf2v-14b")


def test_paths_in_an_advice_can_be_typed() -> None:
    assert typed("/m/wan2.2_vae.safetensors") == "/m/wan2.2_vae.safetensors"
    assert typed(r"C:\ComfyUI\vae.safetensors:high") == r"C:\ComfyUI\vae.safetensors:high"
    for path in ("/home/Jürgen's files/a b.safetensors", "/m/$HOME/`x`.safetensors", '/m/a "b".safetensors'):
        if sys.platform != "win32":
            assert shlex.split(typed(path)) == [path]
    assert typed("/a b/c.safetensors") == '"/a b/c.safetensors"'


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "high"),
        ("Wan2.2-I2V-A14B-LowNoise-Q4_K_M.gguf", "low"),
        ("Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors", "high"),
        ("smoothMixWan22GGUF_highQ6K.gguf", "high"),
        ("LowNoise/model.gguf", "low"),
        ("transformer_2/diffusion_pytorch_model.safetensors", "low"),
        ("Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16.safetensors", "high"),
        ("wan2.1_t2v_14B_high_quality.safetensors", None),
        ("wan_flow_lowvram.safetensors", None),
        ("wan_high_and_low.safetensors", None),
        ("wan22_HN_style.safetensors", "high"),
        ("highway_at_night.safetensors", None),
        ("slow_motion.safetensors", None),
        ("model.safetensors", None),
    ],
)
def test_names_tell_the_expert_or_nothing(name: str, expert: str | None) -> None:
    assert expert_of(Path("/models") / name) == expert


@pytest.mark.parametrize(
    ("name", "kind", "preset"),
    [
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors", "lora", "lightning-4"),
        ("Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16.safetensors", "lora", "lightning-4"),
        ("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/high_noise_model.safetensors", "lora", "lightning-4"),
        (
            "Wan_2_2_I2V_A14B_HIGH_lightx2v_4step_lora_260412_rank_64_fp16.safetensors",
            "lora",
            "lightx2v-2.2-4",
        ),
        ("wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217.safetensors", "lora", "lightx2v-2.2-4"),
        ("lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors", "lora", "lightx2v-2.1-4"),
        ("wan2.1_i2v_720p_scaled_fp8_e4m3_lightx2v_4step.safetensors", "dit", "lightx2v-2.1-4"),
        ("Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors", "lora", "fastwan-5b-3"),
        ("Wan21_CausVid_14B_T2V_lora_rank32_v2.safetensors", "lora", "causvid-9"),
        ("Wan21_AccVid_T2V_14B_lora_rank32_fp16.safetensors", "lora", "accvid-10"),
        ("TurboWan2.2-I2V-A14B-high-720P.safetensors", "dit", "rcm-i2v-4"),
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "dit", None),
        ("my style.safetensors", "lora", None),
    ],
)
def test_published_names_tell_the_preset(name: str, kind: str, preset: str | None) -> None:
    assert preset_of_file(Path("/models") / name, kind) == preset
