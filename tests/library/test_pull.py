"""Fetching, against a server on this machine that speaks the Hub's protocol: resumed, checked, never more than needed."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from lowvram.cli.main import _run
from lowvram.discovery import is_embedded
from lowvram.errors import FileError, StorageError, UsageError
from lowvram.library.downloads import Download, downloads
from lowvram.library.pull import Hub, Wanted, ask, check_space, fetch
from lowvram.offload.faults import FaultPlan, Faults
from lowvram.sampling.presets import load_models, model_preset

pytest.importorskip("huggingface_hub")

COMMIT = "c" * 40
FILE = Download("vae", "owner/repo", "folder/model.safetensors")
DATA = bytes(range(256)) * 4096


@dataclass
class Server:
    """What the Hub holds, and what was asked of it."""

    endpoint: str
    files: dict[str, bytes]
    etag: str | None = None
    """Given out instead of the true hash."""
    cut_after: int | None = None
    """Bytes after which the next download breaks off, once."""
    asked: list[tuple[str, str, str]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server("", {f"/{FILE.repository}/resolve/main/{FILE.name}": DATA})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def head(self) -> bytes | None:
            path = self.path.replace(COMMIT, "main")
            state.asked.append((self.command, path, self.headers.get("Range", "")))
            data = state.files.get(path)
            if data is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{state.etag or hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Accept-Ranges", "bytes")
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            return data[start:]

        def do_HEAD(self) -> None:
            self.head()

        def do_GET(self) -> None:
            data = self.head()
            if data is None:
                return
            cut, state.cut_after = state.cut_after, None
            self.wfile.write(data[:cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    state.endpoint = f"http://127.0.0.1:{httpd.server_address[1]}"
    yield state
    httpd.shutdown()
    httpd.server_close()


def nothing(download: Download, done: int, size: int) -> None:
    pass


def fetched(server: Server) -> list[str]:
    return [span for verb, _, span in server.asked if verb == "GET"]


def test_a_file_arrives_whole_and_the_second_time_nothing_is_fetched(server: Server, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub", server.endpoint)
    (wanted,) = ask(hub, [FILE])
    assert wanted == Wanted(FILE, len(DATA), False)
    seen: list[int] = []
    path = fetch(hub, wanted, lambda download, done, size: seen.append(done))
    assert path.read_bytes() == DATA and seen[-1] == len(DATA)
    assert path.resolve().name == hashlib.sha256(DATA).hexdigest()
    assert len(fetched(server)) == 1
    (again,) = ask(hub, [FILE])
    assert again.is_here and fetch(hub, again, nothing) == path and len(fetched(server)) == 1


def test_a_broken_connection_is_taken_up_where_it_broke(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 65_536)
    hub = Hub(tmp_path / "hub", server.endpoint)
    server.cut_after = 300_000
    path = fetch(hub, ask(hub, [FILE])[0], nothing)
    assert path.read_bytes() == DATA
    first, second = fetched(server)
    assert first == "" and second.startswith("bytes=") and 0 < int(second[6:].split("-")[0]) <= 300_000


def test_a_file_with_a_wrong_hash_is_removed(server: Server, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub", server.endpoint)
    server.etag = "a" * 64
    with pytest.raises(FileError, match="not the published file: sha256") as caught:
        fetch(hub, ask(hub, [FILE])[0], nothing)
    assert "a" * 64 in caught.value.expected
    assert not [p for p in (tmp_path / "hub").rglob("*") if p.is_file() and p.stat().st_size > 100_000]
    server.etag = None
    assert fetch(hub, ask(hub, [FILE])[0], nothing).read_bytes() == DATA


def test_a_disk_without_room_is_told_before_anything_is_fetched(server: Server, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub", server.endpoint)
    wanted = ask(hub, [FILE])
    with pytest.raises(StorageError, match="to fetch") as caught:
        check_space(hub, wanted, free=lambda path: 10**6)
    assert "HF_HUB_CACHE" in caught.value.advice and fetched(server) == []
    check_space(hub, wanted, free=lambda path: 10**12)


def test_a_disk_that_fills_up_keeps_what_has_arrived(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 65_536)
    hub = Hub(tmp_path / "hub", server.endpoint)
    (wanted,) = ask(hub, [FILE])
    with pytest.raises(StorageError, match="the disk is full"):
        fetch(hub, wanted, nothing, Faults(FaultPlan("write", 5)))
    assert fetch(hub, wanted, nothing).read_bytes() == DATA


def test_what_the_hub_does_not_have_and_a_hub_that_is_not_there(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # it waits half a minute between its attempts
    hub = Hub(tmp_path / "hub", server.endpoint)
    with pytest.raises(FileError, match="no such file"):
        ask(hub, [Download("vae", "owner/repo", "gone.safetensors")])
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(
        StorageError, match=r"the download failed \(.*Errno"
    ):  # what the system says, not the Hub's advice
        ask(Hub(tmp_path / "hub", f"http://127.0.0.1:{port}"), [FILE])


def test_only_the_files_of_the_chosen_encoding_are_asked_for() -> None:
    names = [d.name for d in downloads("wan2.2-t2v-a14b", ("high", "low", "vae"), "q4_k_m")]
    assert [Path(n).name for n in names] == [
        "Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf",
        "Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf",
        "wan_2.1_vae.safetensors",
    ]
    with pytest.raises(UsageError, match="fp7"):
        downloads("wan2.2-t2v-a14b", ("high",), "fp7")
    for model, spec in load_models().items():
        if not is_embedded(model):
            parts = (*spec.expert_names(), "vae", "text", *(("clip",) if spec.clip else ()))
            assert [d.part for d in downloads(model, parts)] == list(parts)


def test_the_command_fetches_what_is_missing_and_only_that(
    server: Server,
    machine: Any,
    files: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (machine.comfy / "vae" / "wan_2.1_vae.safetensors").unlink()
    monkeypatch.setenv("LOWVRAM_MODELS", os.pathsep.join(map(str, (machine.comfy, machine.hub))))
    monkeypatch.setenv("HF_HUB_CACHE", str(machine.hub))
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    name = "/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files/vae/wan_2.1_vae.safetensors"
    server.files[name] = DATA
    assert _run(["models", "pull", "wan2.2-t2v-a14b", "--json"], False, True) == 0
    assert {path for _, path, _ in server.asked} == {name}
    assert '"part":"vae"' in capsys.readouterr().out


def test_a_text_encoder_without_tokenizer_is_not_fetched_once_more(
    server: Server, machine: Any, files: Any, sparse: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = machine.comfy / "text_encoders" / "umt5_xxl_fp8_e4m3fn_scaled.safetensors"
    carried.unlink()
    sparse(
        carried.with_name("umt5-xxl-enc-bf16.safetensors"),
        files["bf16"](model_preset("wan2.2-t2v-a14b").text.shapes()),
    )
    monkeypatch.setenv("LOWVRAM_MODELS", str(machine.comfy))
    monkeypatch.setenv("HF_HUB_CACHE", str(machine.hub))
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    name = "/google/umt5-xxl/resolve/main/spiece.model"
    server.files[name] = DATA
    assert _run(["models", "pull", "wan2.2-t2v-a14b", "-q"], False, False) == 0
    assert {path for _, path, _ in server.asked} == {name}


def test_nothing_but_pull_opens_a_socket(
    machine: Any,
    files: Any,
    sparse: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LOWVRAM_MODELS", os.pathsep.join(map(str, (machine.comfy, machine.hub))))
    monkeypatch.chdir(tmp_path)

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    calls: Mapping[str, Callable[..., None]] = {
        "socket": refused,
        "create_connection": refused,
        "getaddrinfo": refused,
    }
    for attribute, call in calls.items():
        monkeypatch.setattr(socket, attribute, call)
    vae = str(sparse(tmp_path / "my vae.safetensors", files["bf16"](model_preset("nano").vae.shapes())))
    for arguments in (
        ["models", "scan"],
        ["models", "list"],
        ["models", "verify", vae],
        ["inspect", vae],
        ["plan", "--model", "wan2.2-t2v-a14b", "--size", "832x480", "--weights", "fp8"],
        ["demo", "-o", "demo.mp4"],
    ):
        assert _run(arguments, True, False) == 0, arguments
    capsys.readouterr()
    assert _run(["models", "pull", "wan2.2-i2v-a14b"], False, False) != 0
