"""Everything that people own is found where it lies, and nothing that is broken, slow or circular stops the search."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import lowvram
from lowvram.library import scan as module
from lowvram.library.cache import Cache, load_cache, save_cache
from lowvram.library.places import Place, answering, given_places, usual_places, yaml_places
from lowvram.library.scan import Library, scan
from lowvram.quant.names import TEXT_GGUF
from lowvram.sampling.presets import model_preset

T2V = model_preset("wan2.2-t2v-a14b")
SMALL: Mapping[str, tuple[str, tuple[int, ...]]] = {"a.weight": ("F16", (4, 4))}


def found(library: Library) -> dict[str, tuple[str, str, str | None]]:
    return {Path(e.path).name: (e.kind, e.encoding, e.expert) for e in library.entries}


def test_a_comfy_wangp_and_hub_tree_is_found_whole(machine: Any) -> None:
    library = scan(usual_places({}, machine.home), Cache())
    i2v = "wan2.2_image2video_14B_{}_quanto_mbf16_int8.safetensors"
    lora = "wan2.2_t2v_lightx2v_4steps_lora_v1.1_{}_noise.safetensors"
    assert found(library) == {
        "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": ("dit", "fp8_scaled", "high"),
        "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": ("dit", "fp8_scaled", "low"),
        lora.format("high"): ("lora", "rank 64", "high"),
        lora.format("low"): ("lora", "rank 64", "low"),
        "wan_2.1_vae.safetensors": ("vae", "bf16", None),
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors": ("text", "fp8_scaled", None),
        i2v.format("high"): ("dit", "int8", "high"),
        i2v.format("low"): ("dit", "int8", "low"),
        "Wan2.1_VAE.pth": ("broken", "", None),
        "wan2.2_ti2v_5B_fp16.safetensors": ("dit", "fp16", None),
        "wan2.2_vae.safetensors": ("vae", "bf16", None),
    }
    assert library.others == 1 and library.unreadable == ()
    assert {e.place for e in library.entries} == {"ComfyUI", "WanGP", "Hugging Face cache"}
    by_name = {Path(e.path).name: e for e in library.entries}
    assert by_name["wan2.2_ti2v_5B_fp16.safetensors"].sha256.startswith("456f901338bd")
    assert by_name["wan2.2_ti2v_5B_fp16.safetensors"].models == ("wan2.2-ti2v-5b",)
    assert by_name[lora.format("high")].preset == "lightning-4"
    assert "wan2.2-t2v-a14b" in by_name[lora.format("low")].models
    assert by_name["umt5_xxl_fp8_e4m3fn_scaled.safetensors"].has_tokenizer


def test_renamed_files_are_known_by_what_they_hold_and_nested_ones_are_found(
    tmp_path: Path, files: Any, sparse: Callable[..., Path]
) -> None:
    folder = tmp_path / "a" / "b" / "c" / "d"
    sparse(folder / "my favourite.safetensors", files["bf16"](T2V.vae.shapes()))
    sparse(folder / "HighNoise" / "x.safetensors", files["fp8"](T2V.dit.shapes()))
    library = scan([Place(tmp_path, "here")], Cache())
    assert found(library) == {
        "my favourite.safetensors": ("vae", "bf16", None),
        "x.safetensors": ("dit", "fp8_scaled", "high"),
    }


def test_gguf_is_found_renamed_nested_and_by_yaml(
    tmp_path: Path, sparse_gguf: Callable[..., Path], files: Any, sparse: Callable[..., Path]
) -> None:
    """ComfyUI-GGUF's users: transformers on a shelf that only a yaml names, a text encoder of llama.cpp's names."""
    comfy, shelf = tmp_path / "ComfyUI", tmp_path / "disk" / "models"
    (comfy / "models").mkdir(parents=True)
    (comfy / "extra_model_paths.yaml").write_text(
        f"shelf:\n  base_path: {shelf}\n  unet_gguf: unet\n  unet: unet\n  clip: text\n  vae: vae\n"
    )
    text = {str(TEXT_GGUF.from_native(name)): shape for name, shape in T2V.text.shapes().items()}
    sparse_gguf(
        shelf / "unet" / "Wan" / "T2V" / "Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", T2V.dit.shapes(), "q4_k_m"
    )
    sparse_gguf(shelf / "unet" / "mine" / "LowNoise" / "renamed.gguf", T2V.dit.shapes(), "q4_k_m")
    sparse_gguf(shelf / "text" / "old" / "encoder.gguf", text, "q8_0", "t5encoder")
    sparse(shelf / "vae" / "v.safetensors", files["bf16"](T2V.vae.shapes()))
    library = scan(given_places([str(comfy)]), Cache())
    assert found(library) == {
        "Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf": ("dit", "q4_k", "high"),
        "renamed.gguf": ("dit", "q4_k", "low"),
        "encoder.gguf": ("text", "q8_0", None),
        "v.safetensors": ("vae", "bf16", None),
    }
    by_name = {Path(e.path).name: e for e in library.entries}
    assert by_name["renamed.gguf"].models == ("wan2.2-t2v-a14b", "wan2.1-t2v-14b")
    assert all(not entry.problem and entry.standard for entry in library.entries)


def test_a_published_hash_tells_the_expert_of_a_renamed_file(machine: Any, files: Any) -> None:
    machine.snapshot(
        "somebody/renamed",
        "a.safetensors",
        "e71b96d7c82e638694c5e7fb98fac4bfb0e4ddc5fbbb4b1df40da8f0f1278a97",
        files["fp8"](T2V.dit.shapes()),
    )
    library = scan([Place(machine.hub, "hub")], Cache())
    (entry,) = [e for e in library.entries if e.path.endswith("a.safetensors")]
    assert (entry.expert, entry.version) == ("low", "2.2")


def test_extra_model_paths_are_followed(tmp_path: Path, sparse: Callable[..., Path]) -> None:
    shelf = tmp_path / "shelf"
    for folder in ("unet", "more/unet", "vae", "upscale_models"):
        (shelf / folder).mkdir(parents=True)
    root = tmp_path / "ComfyUI"
    (root / "models").mkdir(parents=True)
    (root / "extra_model_paths.yaml").write_text(
        "mine:\n  base_path: ../shelf/\n  is_default: true\n  unet: |\n    unet\n    more\\unet\n  vae: vae\n"
        "  upscale_models: upscale_models\n  custom_nodes: nodes\nbroken: 7\n"
    )
    places = given_places([str(root)])
    assert [p.folder.resolve() for p in places] == [
        root.resolve(), *(shelf.resolve() / f for f in ("unet", "more/unet", "vae")),
    ]  # fmt: skip
    for text in ("a: [", "- 1", "a: &a\n  b: *a", "\x00", "a" * (2 << 20)):
        (root / "extra_model_paths.yaml").write_text(text)
        assert yaml_places(root / "extra_model_paths.yaml") == []


def test_the_places_of_every_program_on_linux_and_windows(tmp_path: Path) -> None:
    home = tmp_path / "me"
    wanted = [
        "ComfyUI/models/unet", "ComfyUI_windows_portable/ComfyUI/models/diffusion_models",
        "Documents/ComfyUI/models/text_encoders", "SwarmUI/Models/diffusion_models", "SwarmUI/Models/Lora",
        "SwarmUI/dlbackend/ComfyUI/models/vae", "StabilityMatrix/Data/Models/DiffusionModels",
        "StabilityMatrix/Data/Packages/Forge/models/clip_vision", "Wan2GP/ckpts", "Wan2GP/loras",
        "pinokio/api/wan.git/app/ckpts", ".cache/huggingface/hub", "elsewhere/ckpts",
        "ComfyUI/custom_nodes/comfyui-wanvideowrapper/configs/T5_tokenizer",
    ]  # fmt: skip
    drive = [tmp_path / "D" / "AI" / "ComfyUI" / "models" / "loras"]
    roaming = [tmp_path / "Roaming" / "StabilityMatrix" / "Models" / "VAE"]
    local = [
        tmp_path / "Local" / "Comfy-Desktop" / "ComfyUI-Installs" / "one" / "ComfyUI" / "models" / "clip"
    ]
    for folder in [
        *(home / name for name in wanted),
        *drive,
        *roaming,
        *local,
        home / "ComfyUI/models/upscale",
    ]:
        folder.mkdir(parents=True)
    (home / "Wan2GP" / "wgp_config.json").write_text(
        '{"checkpoints_paths": ["ckpts", ".", "../elsewhere/ckpts"]}'
    )
    environ = {"APPDATA": str(tmp_path / "Roaming"), "LOCALAPPDATA": str(tmp_path / "Local")}
    there = {p.folder.resolve() for p in usual_places(environ, home, [tmp_path / "D"])}
    assert there == {p.resolve() for p in [*(home / name for name in wanted), *drive, *roaming, *local]}
    hub = tmp_path / "hub"
    hub.mkdir()
    assert usual_places({"HF_HUB_CACHE": str(hub)}, home)[-1] == Place(hub, "Hugging Face cache")
    told = {"LOWVRAM_MODELS": os.pathsep.join([str(hub), str(home / "nowhere")])}
    assert usual_places(told, home) == [Place(hub, "LOWVRAM_MODELS")]


def test_a_comfyui_folder_brings_the_tokenizer_of_its_wan_nodes(tmp_path: Path) -> None:
    """Kijai's text encoders do not carry it: his nodes have it."""
    nodes = tmp_path / "custom_nodes"
    (nodes / "another" / "configs").mkdir(parents=True)
    tokenizer = nodes / "ComfyUI-WanVideoWrapper" / "configs" / "T5_tokenizer" / "spiece.model"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_bytes((Path(lowvram.__file__).parent / "assets/nano/spiece.model").read_bytes())
    library = scan(given_places([str(tmp_path)]), Cache())
    assert [(e.path, e.kind) for e in library.entries] == [(str(tokenizer), "tokenizer")]


def test_loops_of_links_and_folders_that_may_not_be_read_do_not_stop_it(
    tmp_path: Path, sparse: Callable[..., Path]
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.safetensors")
    sparse(tmp_path / "a" / "wan_vae.safetensors", SMALL)
    (tmp_path / "closed").mkdir()

    @contextmanager
    def scandir(folder: Path) -> Any:
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        with os.scandir(folder) as listing:
            yield listing

    library = scan([Place(tmp_path, "here")], Cache(), scandir=scandir)
    missed = {each.folder.name: each.why for each in library.unreadable}
    assert missed["closed"] == "Permission denied" and "gone.safetensors" in missed
    assert library.others == 2  # the small file, and the pipe that nobody opened


def test_a_place_that_does_not_answer_is_given_up_and_delays_nobody(
    tmp_path: Path, files: Any, sparse: Callable[..., Path]
) -> None:
    for name in ("share", "disk"):
        sparse(tmp_path / name / f"{name}.safetensors", files["bf16"](T2V.vae.shapes()))
    hung = threading.Event()

    @contextmanager
    def scandir(folder: Path) -> Any:
        if folder.name == "share":
            hung.wait(60)
        with os.scandir(folder) as listing:
            yield listing

    cache = Cache()
    library = scan([Place(tmp_path / n, n) for n in ("share", "disk")], cache, patience=1.5, scandir=scandir)
    hung.set()
    for thread in threading.enumerate():  # it answers after all, when the cache may be on its way to the disk
        if thread.name.startswith("scan"):
            thread.join(30)
    assert [Path(path).name for path in cache.records] == ["disk.safetensors"]
    assert [Path(e.path).name for e in library.entries] == ["disk.safetensors"]
    assert [(each.folder.name, each.why) for each in library.unreadable] == [
        ("share", "did not answer for 1.5 seconds: given up")
    ]


def test_headers_are_read_once_and_again_when_a_file_changes(
    tmp_path: Path, files: Any, sparse: Callable[..., Path]
) -> None:
    path = sparse(tmp_path / "m" / "vae.safetensors", files["bf16"](T2V.vae.shapes()))
    read: list[Path] = []
    cache, kept = Cache(), tmp_path / "models.json"
    first = scan([Place(tmp_path / "m", "here")], cache, read.append)
    assert read == [path]
    save_cache(kept, cache)
    cache = load_cache(kept)
    assert scan([Place(tmp_path / "m", "here")], cache, read.append) == first and read == [path]
    os.utime(path, ns=(1, 1))
    assert scan([Place(tmp_path / "m", "here")], cache, read.append) == first and read == [path, path]
    shutil.rmtree(tmp_path / "m")
    save_cache(kept, cache)
    assert load_cache(kept).records == {}
    for damaged in (b"", b"{", b'{"version": 3}', b"\xff"):
        kept.write_bytes(damaged)
        assert load_cache(kept) == Cache()


def test_shards_are_one_checkpoint(tmp_path: Path, files: Any, sparse: Callable[..., Path]) -> None:
    import json

    entries = list(files["bf16"](T2V.vae.shapes()).items())
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for folder, index in (("with", True), ("without", False)):
        for n, name in enumerate(names):
            sparse(tmp_path / folder / name, dict(entries[n::2]))
        if index:
            table = {tensor: names[n % 2] for n, (tensor, _) in enumerate(entries)}
            text = json.dumps({"metadata": {}, "weight_map": table})
            (tmp_path / folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    library = scan([Place(tmp_path, "here")], Cache())
    assert [(e.kind, e.tensors, Path(e.path).name) for e in library.entries] == [
        ("vae", 194, "diffusion_pytorch_model.safetensors.index.json"),
        ("vae", 194, "without"),
    ]


@pytest.mark.parametrize("argument", [["scan"], ["list"], ["scan", "--json"], ["list", "--json"]])
def test_the_command_lists_what_is_here(
    argument: list[str], machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lowvram.cli.main import _run

    monkeypatch.setenv(
        "LOWVRAM_MODELS", os.pathsep.join(map(str, (machine.comfy, machine.wangp, machine.hub)))
    )
    assert _run(["models", *argument], False, "--json" in argument) == 0
    said = capsys.readouterr()
    if argument[0] == "scan":
        assert said.out.count(".safetensors") >= 9 and "sd_xl" not in said.out
    else:
        assert "ready" in said.out


def test_the_time_to_load_the_parsers_is_no_silence_of_a_place(
    tmp_path: Path, files: Any, sparse: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def load() -> None:  # torch from a slow disk, for the first time
        nonlocal now
        now += 100.0

    monkeypatch.setattr(module, "load_parsers", load)
    sparse(tmp_path / "vae.safetensors", files["bf16"](T2V.vae.shapes()))
    library = scan([Place(tmp_path, "here")], Cache(), clock=lambda: now)
    assert len(library.entries) == 1 and library.unreadable == ()


def test_a_drive_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    """A network drive whose server is gone: every folder that is looked for on it would take half a minute."""
    gone = threading.Event()

    def is_dir(root: str) -> bool:
        return gone.wait() if root == "Z:" else os.path.isdir(root)

    def join(thread: threading.Thread, seconds: float) -> None:
        if not thread.name.endswith("Z:"):
            thread.join()

    try:
        assert answering(["Z:", str(tmp_path / "none"), str(tmp_path)], is_dir, join) == [tmp_path]
    finally:
        gone.set()
