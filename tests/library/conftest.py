"""A machine full of other programs' model files: real names, real keys and shapes, sparse data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from lowvram.quant.encodings.registry import planned_encoding
from lowvram.quant.files.writing import Entry, gguf_head
from lowvram.quant.refs import Shape, stored_bytes
from lowvram.quant.spec import DitSpec
from lowvram.sampling.presets import model_preset

Entries = Mapping[str, tuple[str, Shape]]


def header_bytes(entries: Entries, mark: str) -> tuple[bytes, int]:
    """A safetensors header written independently of the product, and the size of the whole file."""
    table: dict[str, object] = {"__metadata__": {"mark": mark}}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + stored_bytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def write_sparse(path: Path, entries: Entries) -> Path:
    """The file at its real size, its data a hole with a few bytes in the middle that no other file has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head, size = header_bytes(entries, "")
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)
        file.seek(len(head) + (size - len(head)) // 2)
        file.write(path.name.encode()[: size - file.tell()])
    return path


def bf16(shapes: Mapping[str, Shape]) -> Entries:
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def fp16(shapes: Mapping[str, Shape]) -> Entries:
    return {name: ("F16", shape) for name, shape in shapes.items()}


def fp8_scaled(shapes: Mapping[str, Shape]) -> Entries:
    """As ComfyUI stores it: matrices in fp8 with one scale each."""
    entries: dict[str, tuple[str, Shape]] = {"scaled_fp8": ("F8_E4M3", (0,))}
    for name, shape in shapes.items():
        if len(shape) == 2 and name.endswith(".weight"):
            entries[name] = ("F8_E4M3", shape)
            entries[name.removesuffix("weight") + "scale_weight"] = ("F32", ())
        else:
            entries[name] = ("F16", shape)
    return entries


def quanto_int8(shapes: Mapping[str, Shape]) -> Entries:
    """As WanGP stores it: the matrices of the blocks in int8."""
    entries: dict[str, tuple[str, Shape]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name.startswith("blocks."):
            entries[f"{name}._data"] = ("I8", shape)
            entries[f"{name}._scale"] = ("BF16", (shape[0], 1))
        else:
            entries[name] = ("BF16", shape)
    return entries


def write_gguf(path: Path, shapes: Mapping[str, Shape], mix: str, architecture: str = "wan") -> Path:
    """A GGUF at its real size, its data a hole: matrices as the mix `mix` stores them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = []
    for name, shape in shapes.items():
        encoding = planned_encoding(name, shape, mix)
        kind = {"fp32": "F32", "bf16": "BF16"}.get(encoding.name, encoding.name.upper())
        entries.append(Entry(name, kind, shape))
    head = gguf_head(entries, {"general.architecture": architecture})
    with open(path, "wb") as file:
        file.write(head.data)
        file.truncate(head.nbytes)
    return path


def lora(dit: DitSpec, rank: int = 64) -> Entries:
    """lora_down, lora_up and alpha for every matrix of the blocks."""
    entries: dict[str, tuple[str, Shape]] = {}
    for name, shape in dit.shapes().items():
        if len(shape) == 2 and name.startswith("blocks."):
            module = f"diffusion_model.{name.removesuffix('.weight')}"
            entries[f"{module}.lora_down.weight"] = ("BF16", (rank, shape[1]))
            entries[f"{module}.lora_up.weight"] = ("BF16", (shape[0], rank))
            entries[f"{module}.alpha"] = ("F32", ())
    return entries


@dataclass(frozen=True)
class Machine:
    """A home folder with programs in it."""

    home: Path

    @property
    def comfy(self) -> Path:
        return self.home / "ComfyUI" / "models"

    @property
    def wangp(self) -> Path:
        return self.home / "Wan2GP"

    @property
    def hub(self) -> Path:
        return self.home / ".cache" / "huggingface" / "hub"

    def snapshot(self, repo: str, name: str, sha256: str, entries: Entries) -> Path:
        """A file of the Hub cache: a blob called by its hash, and a link to it."""
        folder = self.hub / f"models--{repo.replace('/', '--')}"
        blob = write_sparse(folder / "blobs" / sha256, entries)
        link = folder / "snapshots" / ("a" * 40) / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
        return link


T2V = model_preset("wan2.2-t2v-a14b")
I2V = model_preset("wan2.2-i2v-a14b")
TI2V = model_preset("wan2.2-ti2v-5b")


@pytest.fixture
def files() -> Mapping[str, Callable[..., Entries]]:
    """Writers of the encodings by name."""
    return {"bf16": bf16, "fp16": fp16, "fp8": fp8_scaled, "int8": quanto_int8, "lora": lora}


@pytest.fixture
def sparse() -> Callable[[Path, Entries], Path]:
    return write_sparse


@pytest.fixture
def sparse_gguf() -> Callable[..., Path]:
    """(path, shapes, mix, architecture): see `write_gguf`."""
    return write_gguf


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """ComfyUI with a T2V pair and its LoRAs, WanGP with an I2V pair, the Hub cache with TI2V-5B."""
    it = Machine(tmp_path / "home")
    t2v, text = fp8_scaled(T2V.dit.shapes()), T2V.text.shapes()
    for expert in ("high", "low"):
        write_sparse(
            it.comfy / "diffusion_models" / "Wan" / f"wan2.2_t2v_{expert}_noise_14B_fp8_scaled.safetensors",
            t2v,
        )
        write_sparse(
            it.comfy / "loras" / f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{expert}_noise.safetensors",
            lora(T2V.dit),
        )
        write_sparse(
            it.wangp / "ckpts" / f"wan2.2_image2video_14B_{expert}_quanto_mbf16_int8.safetensors",
            quanto_int8(I2V.dit.shapes()),
        )
    write_sparse(it.comfy / "vae" / "wan_2.1_vae.safetensors", bf16(T2V.vae.shapes()))
    write_sparse(
        it.comfy / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        {**fp8_scaled(text), "spiece_model": ("U8", (4_548_313,))},
    )
    write_sparse(it.comfy / "checkpoints" / "sd_xl_base_1.0.safetensors", {"model.x.weight": ("F16", (8, 8))})
    (it.wangp / "ckpts" / "Wan2.1_VAE.pth").write_bytes(b"PK\x03\x04" + bytes(64))
    it.snapshot(
        "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
        "split_files/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors",
        "456f901338bd9eadbded3828b819109a9b68e8a525ca5cf8d0049a69fcfeca1e",
        fp16(TI2V.dit.shapes()),
    )
    it.snapshot(
        "Comfy-Org/Wan_2.2_ComfyUI_Repackaged",
        "split_files/vae/wan2.2_vae.safetensors",
        "e40321bd36b9709991dae2530eb4ac303dd168276980d3e9bc4b6e2b75fed156",
        bf16(TI2V.vae.shapes()),
    )
    return it
