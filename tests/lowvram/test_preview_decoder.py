"""Previews by a small decoder: the numbers of its network as published, latent by latent, inside the plan."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_peaks import Peaks, check
from PIL import Image, ImageSequence
from safetensors.torch import save_file
from strict_device import StrictRuntime, metered
from torch import Tensor, nn

from lowvram import Runtime, footprint
from lowvram.cli.preview import preview_path
from lowvram.errors import FileError
from lowvram.models import dit, tae
from lowvram.models.tae import TaeSpec
from lowvram.offload.budget import allocated_size
from lowvram.offload.estimate import track
from lowvram.offload.io import FileReader
from lowvram.preview import MOST_SIDE, Decoder, Preview, decoded, open_decoder
from lowvram.quant.encodings.base import TORCH_DTYPES
from lowvram.quant.linear import Params
from lowvram.quant.spec import LATENT_MEAN_22, LATENT_STD_22, VaeSpec
from lowvram.stages.weights import Dense

PROMPT = "a green circle moves right on a navy background"
VAES = {
    "taew2_1": VaeSpec("2.1"),
    "taew2_2": VaeSpec("2.2", 160, 256, 48, 2, LATENT_MEAN_22, LATENT_STD_22),
}
SPECS = {name: TaeSpec(vae.z, vae.patch) for name, vae in VAES.items()}


# ---- the network as published: every layer on all frames of a clip


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(n, width, 3, padding=1) for n in (2 * width, width, width)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x: Tensor) -> Tensor:
        past = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        return (self.conv(torch.cat([x, past], 1)) + x).relu()


class Grow(nn.Module):
    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, frames * width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


class Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * (x / 3).tanh()


class Published(nn.Module):
    def __init__(self, spec: TaeSpec) -> None:
        super().__init__()
        layers: list[nn.Module] = [Squash(), nn.Conv2d(spec.z, 256, 3, padding=1), nn.ReLU()]
        for width, after, frames in ((256, 128, 1), (128, 64, 2), (64, 64, 2)):
            layers += [Block(width), Block(width), Block(width), nn.Upsample(scale_factor=2)]
            layers += [Grow(width, frames), nn.Conv2d(width, after, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(64, 3 * spec.patch**2, 3, padding=1))
        self.patch = spec.patch

    def forward(self, x: Tensor) -> Tensor:
        """[F, z, h, w] -> [1 + 4 * (F - 1), 3, 8ph, 8pw]"""
        return nn.functional.pixel_shuffle(self.decoder(x), self.patch).clamp(0, 1)[3:]


def published(spec: TaeSpec) -> Published:
    """With random weights that keep a signal's size."""
    torch.manual_seed(3)
    network = Published(spec)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.normal_(0.3 if name == "decoder.22.bias" else 0, 0.1 if p.ndim == 1 else p[0].numel() ** -0.5)
    return network


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both decoders in fp16, taew2_1 with an encoder's tensor and with the rows that nobody uses."""
    folder, found = tmp_path_factory.mktemp("vae_approx"), {}
    for name, spec in SPECS.items():
        tensors = {n: t.half() for n, t in published(spec).state_dict().items()}
        assert {n: tuple(t.shape) for n, t in tensors.items()} == spec.shapes()
        if name == "taew2_1":
            grow = tensors["decoder.7.conv.weight"]
            tensors["decoder.7.conv.weight"] = torch.cat([torch.ones_like(grow), grow])
            tensors["encoder.0.bias"] = torch.zeros(64).half()
        found[name] = folder / f"{name}.safetensors"
        save_file(tensors, found[name])
    return found


def weights(decoder: Decoder, dtype: torch.dtype = torch.float32) -> Dense:
    """Those in the file."""
    tensors = {}
    for ref in decoder.weights.refs:
        (part,) = ref.parts
        with FileReader(part.file) as reader:
            data = bytearray(reader.read_at(part.offset, part.nbytes))
        tensors[ref.name] = torch.frombuffer(data, dtype=TORCH_DTYPES[part.dtype]).view(ref.shape)
    return Dense(Params(tensors), dtype)


@pytest.mark.parametrize("name", SPECS)
@torch.no_grad()
def test_the_numbers_are_those_of_the_network_as_published(name: str, files: dict[str, Path]) -> None:
    """Frame by frame and band by band here, all at once there: a clip, its beginning, and no latent before its turn."""
    assert tae.BAND < 20 * 4
    spec, decoder = SPECS[name], open_decoder(files[name], VAES[name])
    network = published(spec).half().double()
    latents = torch.randn(3, spec.z, 20, 3, generator=torch.Generator().manual_seed(4)).double() * 2
    taken = 0

    def one_by_one() -> Iterator[Tensor]:
        nonlocal taken
        for latent in latents:
            taken += 1
            yield latent[None]

    found = []
    for n, frame in enumerate(tae.decode(spec, weights(decoder, torch.float64), one_by_one())):
        assert taken == 1 + (n + 3) // 4
        found.append(frame)
    expected = network(latents)
    assert torch.cat(found).shape == expected.shape == (9, 3, 160 * spec.patch, 24 * spec.patch)
    assert (torch.cat(found) - expected).abs().max() < 1e-10
    assert (torch.cat(found)[:5] - network(latents[:2])).abs().max() < 1e-10
    assert ((expected > 0) & (expected < 1)).double().mean() > 0.2


@torch.inference_mode()
def test_pictures_are_of_the_guess_and_no_larger_than_a_preview(files: dict[str, Path]) -> None:
    decoder = open_decoder(files["taew2_1"], VAES["taew2_1"])
    latent, noise = torch.randn(2, 16, 2, 4, 66, generator=torch.Generator().manual_seed(5))
    found = list(decoded(0.7 * noise + 0.3 * latent, noise - latent, 0.7, decoder, weights(decoder)))
    frames = published(decoder.spec).half().float()(latent.transpose(0, 1))
    expected = 255 * frames.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5)).permute(0, 2, 3, 1)
    assert len(found) == 5 and found[0].shape == (16, 264, 3) and max(found[0].shape) <= MOST_SIDE
    assert (torch.stack(found).float() - expected).abs().max() <= 0.6
    assert decoder.pictures_bytes(2, (4, 66)) == 5 * 16 * 264 * 7


@torch.inference_mode()
def test_the_planned_scratch_is_what_is_measured(files: dict[str, Path]) -> None:
    decoder = open_decoder(files["taew2_1"], VAES["taew2_1"])
    latent, w = torch.randn(16, 3, 12, 10), weights(decoder)
    planned = footprint.preview_scratch(decoder, (16, 3, 12, 10), torch.float32)
    with track(rounding=allocated_size) as tracker:
        for _ in decoded(latent, latent, 0.5, decoder, w):
            pass
    measured = tracker.peak().peak_bytes
    assert measured <= planned <= 1.03 * measured
    assert planned == footprint.preview_scratch(decoder, (16, 30, 12, 10), torch.float32)


def test_a_job_stays_inside_its_plan_and_keeps_its_bits(tiny_model: Path, files: dict[str, Path]) -> None:
    """On a device where nothing of the host is counted, and where a tensor in the wrong place is an error."""
    pipe = StrictRuntime("1GB", "2GB", "cpu", cache=False).load(str(tiny_model))
    job = pipe.job("a red circle", width=64, height=64, frames=9, steps=2, shift=3.0)
    decoder = open_decoder(files["taew2_1"], pipe.model.spec.vae)
    seen: list[tuple[int, int]] = []
    preview = Preview(decoder, 1, lambda done, frames: seen.append((done, len(frames))))
    plan, plain = pipe.plan_job(job, decoder), pipe.plan_job(job)
    now, was = plan.stage("denoise"), plain.stage("denoise")
    assert now.claims["preview weights"] > 9e6 * 2 and now.claims["scratch"] > was.claims["scratch"]
    assert now.ram_claims["preview pictures"] == 9 * 64 * 64 * 7
    with metered() as tracker:
        stages = Peaks(tracker)
        video = pipe.run(job, plan=plan, listener=stages, preview=preview)
        list(video.frames())
    assert seen == [(1, 9), (2, 9)] and not video.notes
    check(plan, stages)
    assert torch.equal(video.latent, pipe.run(job).latent)


def test_the_command_shows_every_frame(
    cli: Callable[..., Any], files: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "out.mp4"
    flags = "--preset", "lightning-4", "--preview", 4, "--preview-decoder", files["taew2_1"], "-o", target
    said = cli("generate", PROMPT, *flags)
    assert said.code == 0 and "after step 4 of 4" in said.err and "no more previews" not in said.err
    with Image.open(preview_path(target)) as file:
        frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(file)]
    assert len(frames) == 9 and frames[0].shape == (256, 256, 3) and frames[0].std() > 1


def test_plan_counts_the_decoder_too(cli: Callable[..., Any], files: dict[str, Path]) -> None:
    asked = ("plan", "--model", "wan2.1-t2v-1.3b", "--machine", "rtx4090", "--json")
    file = "--preview-decoder", files["taew2_1"]
    plain, found = (json.loads(cli(*asked, *more).out)["stages"] for more in ((), file))
    weights = found[-2]["claims"]["preview weights"]
    assert found[-2]["name"] == "denoise" and "preview weights" not in plain[-2]["claims"]
    assert weights >= 2 * sum(math.prod(shape) for shape in SPECS["taew2_1"].shapes().values())
    wrong = cli(*asked, "--preview-decoder", files["taew2_2"])
    assert wrong.code == 3 and str(files["taew2_2"]) in wrong.err
    here = json.loads(cli("plan", PROMPT, "--json", *file).out)
    assert "preview weights" in here["stages"][-2]["claims"]


def test_another_file_is_refused(cli: Callable[..., Any], files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        FileError, match=r"decoder.1.weight is \[256, 48, 3, 3\], not \[256, 16, 3, 3\]"
    ) as no:
        open_decoder(files["taew2_2"], VAES["taew2_1"])
    assert "taew2_1.safetensors" in no.value.expected and str(files["taew2_2"]) == no.value.where
    other = tmp_path / "lighttaew2_1.safetensors"
    save_file({"decoder.1.weight": torch.zeros(2).half()}, other)
    with pytest.raises(FileError, match="another scale"):
        open_decoder(other, VAES["taew2_1"])
    other = other.rename(tmp_path / "taehv.safetensors")
    target = tmp_path / "out.mp4"
    for file in (other, tmp_path / "none.safetensors"):
        said = cli("generate", PROMPT, "--preview", 1, "--preview-decoder", file, "-o", target)
        assert said.code == 3 and "--preview-decoder" in said.err and str(file) in said.err
    said = cli("generate", PROMPT, "--preview-decoder", files["taew2_1"], "-o", target)
    assert said.code == 2 and "--preview N" in said.err and not target.exists()
    index = tmp_path / "taew2_1.safetensors.index.json"
    save_file({"a": torch.zeros(2).half()}, tmp_path / "second.safetensors")
    index.write_text(json.dumps({"weight_map": {"decoder.1.weight": other.name, "a": "second.safetensors"}}))
    with pytest.raises(FileError, match="in shards"):
        open_decoder(index, VAES["taew2_1"])
    bad = tmp_path / "taew2_1.safetensors"
    bad.write_bytes(b"{}")
    with pytest.raises(FileError, match="not a safetensors file"):
        open_decoder(bad, VAES["taew2_1"])


def test_a_step_that_is_planned_again_keeps_its_previews(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the second step; in the third, the preview itself finds none, and only that ends."""
    pipe = Runtime("1GB", "2GB", "cpu", cache=False).load("nano")
    job = pipe.job(PROMPT, steps=3, frames=5)
    plain, decoder = pipe.run(job).latent, open_decoder(files["taew2_1"], pipe.model.spec.vae)
    forward, calls, seen = dit.forward, 0, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("made to fail")
        return forward(*args, **kwargs)

    def show(done: int, frames: Any) -> None:
        if done == 3:
            raise torch.OutOfMemoryError("no room for pictures")
        seen.append((done, len(frames)))

    monkeypatch.setattr(dit, "forward", failing)
    video = pipe.run(job, preview=Preview(decoder, 1, show))
    assert torch.equal(video.latent, plain) and seen == [(1, 5), (2, 5)]
    again, last = video.notes
    assert "planned again" in again and last == "no more previews: no room for pictures"
