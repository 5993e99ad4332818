from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from io import FileIO
from pathlib import Path

import pytest

from lowvram.errors import FileError, StorageError
from lowvram.offload.faults import FaultPlan, Faults
from lowvram.offload.io import FileReader, free_bytes, read_small_text, seek_and_read, write_atomic
from lowvram.offload.locks import try_lock
from lowvram.quant.refs import Reader

DATA = bytes(range(256)) * 40

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.bin"
    file.write_bytes(DATA)
    return file


def test_reads_give_the_bytes_of_the_file(path: Path) -> None:
    with FileReader(path) as reader:
        as_protocol: Reader = reader
        assert as_protocol.path == path
        assert as_protocol.size == len(DATA)
        assert reader.read_at(300, 1000) == DATA[300:1300]
        target = bytearray(50)
        reader.read_into(10, memoryview(target)[5:45])
        assert target == bytes(5) + DATA[10:50] + bytes(5)
        assert reader.bytes_read == 1040


def test_read_at_gives_less_only_at_the_end(path: Path) -> None:
    with FileReader(path) as reader:
        assert reader.read_at(len(DATA) - 3, 100) == DATA[-3:]
        assert reader.read_at(len(DATA), 1) == b""
        assert reader.read_at(2**70, 2**70) == b""
        assert reader.read_at(0, 0) == b""


def test_read_into_past_the_end_is_an_error(path: Path) -> None:
    with FileReader(path) as reader, pytest.raises(StorageError, match="ends before byte 10,241"):
        reader.read_into(len(DATA) - 1, memoryview(bytearray(2)))


def test_short_reads_are_continued(path: Path) -> None:
    with FileReader(path, faults=Faults(FaultPlan("short_read", 1, persistent=True))) as reader:
        assert reader.read_at(0, len(DATA)) == DATA
        assert reader.bytes_read == len(DATA)


def test_a_failing_read_is_a_storage_error_that_names_the_file(path: Path) -> None:
    with FileReader(path, faults=Faults(FaultPlan("read", 2))) as reader:
        reader.read_at(0, 1)
        with pytest.raises(StorageError) as caught:
            reader.read_at(0, 1)
        assert caught.value.where == str(path)
        assert reader.read_at(0, 1) == DATA[:1]


def test_the_path_in_an_error_is_the_one_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with pytest.raises(FileError) as caught:
        FileReader(Path("absent.bin"))
    assert caught.value.where == "absent.bin"
    assert "No such file" in caught.value.found


@posix
def test_a_truncated_file_is_noticed(path: Path) -> None:
    with FileReader(path) as reader:
        os.truncate(path, 100)
        with pytest.raises(StorageError, match="changed"):
            reader.read_into(50, memoryview(bytearray(100)))
        with pytest.raises(StorageError, match="changed"):
            reader.read_into(0, memoryview(bytearray(10)))


@posix
def test_a_rewritten_file_is_noticed(path: Path) -> None:
    with FileReader(path) as reader:
        path.write_bytes(DATA)
        os.utime(path, ns=(1, 1))
        with pytest.raises(StorageError, match="written to"):
            reader.read_at(0, 10)


@posix
def test_a_replaced_file_is_noticed(path: Path) -> None:
    with FileReader(path) as reader:
        write_atomic(path, DATA)
        with pytest.raises(StorageError, match="took its place"):
            reader.read_at(0, 10)


@posix
def test_a_moved_file_can_still_be_read(path: Path) -> None:
    with FileReader(path) as reader:
        path.rename(path.with_name("elsewhere.bin"))
        assert reader.read_at(0, 10) == DATA[:10]


@posix
def test_a_file_other_than_the_expected_one_is_refused(path: Path) -> None:
    with FileReader(path) as reader:
        identity = reader.identity
    with FileReader(path, expected=identity) as reader:
        assert reader.read_at(0, 1) == DATA[:1]
    write_atomic(path, DATA)
    with pytest.raises(StorageError, match="not the file whose header"):
        FileReader(path, expected=identity)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="folder"):
        FileReader(tmp_path)


@posix
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="named pipe"):
        FileReader(tmp_path / "pipe")


@posix
def test_a_device_is_refused() -> None:
    with pytest.raises(FileError, match="device"):
        FileReader(Path("/dev/zero"))


@posix
def test_a_loop_of_links_is_refused_and_a_link_followed(path: Path) -> None:
    loop = path.parent / "loop"
    loop.symlink_to(loop)
    with pytest.raises(FileError):
        FileReader(loop)
    link = path.parent / "link"
    link.symlink_to(path)
    with FileReader(link) as reader:
        assert reader.read_at(0, 3) == DATA[:3]


def test_a_path_with_a_null_byte_is_refused() -> None:
    with pytest.raises(FileError):
        FileReader(Path("a\0b"))


def test_several_threads_read_at_their_own_places(path: Path) -> None:
    wrong: list[int] = []
    lock = threading.Lock()
    with FileReader(path) as reader, FileIO(path) as file:

        def work(start: int) -> None:
            for offset in range(start, len(DATA) - 64, 97):
                target = bytearray(64)
                assert seek_and_read(file, lock, offset, memoryview(target)) == 64
                if target != DATA[offset : offset + 64] or reader.read_at(offset, 64) != target:
                    wrong.append(offset)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_small_texts_are_read_and_large_or_binary_ones_refused(tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    file.write_bytes("höher".encode())
    assert read_small_text(file, 6) == "höher"
    with pytest.raises(FileError, match="6 bytes long"):
        read_small_text(file, 5)
    file.write_bytes(b"ab\xff")
    with pytest.raises(FileError, match="byte 2 is not UTF-8"):
        read_small_text(file, 5)


@pytest.mark.parametrize("data", [DATA, memoryview(DATA), [DATA[:100], bytearray(DATA[100:])], []])
def test_write_atomic_writes_everything_and_leaves_nothing_else(tmp_path: Path, data: object) -> None:
    file = tmp_path / "state"
    file.write_bytes(b"old")
    write_atomic(file, data)  # type: ignore[arg-type]
    assert file.read_bytes() == (DATA if data else b"")
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, nth: int) -> None:
    file = tmp_path / "state"
    file.write_bytes(b"old")
    with pytest.raises(StorageError, match="disk is full"):
        write_atomic(file, [b"new", b"er", b"!"], faults=Faults(FaultPlan("write", nth)))
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_writer_that_fails_halfway_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_bytes(b"old")

    def pieces() -> object:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(file, pieces())  # type: ignore[arg-type]
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        write_atomic(tmp_path / "no" / "state", b"x")
    assert caught.value.where == str(tmp_path / "no" / "state")


def test_a_file_held_open_by_a_scanner_is_replaced_when_it_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, refusals = os.replace, [PermissionError(errno.EACCES, "held open")] * 2

    def held(src: Path, dst: Path) -> None:
        if refusals:
            raise refusals.pop()
        replace(src, dst)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    write_atomic(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"


@posix
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_file_system_that_syncs_no_folders_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real = getattr(os, call)

    def unless_folder(what: Path | int, *more: int) -> object:
        if stat.S_ISDIR(os.stat(what).st_mode):
            raise OSError(errno.EINVAL, "not for folders")
        return real(what, *more)

    monkeypatch.setattr(os, call, unless_folder)
    write_atomic(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"


@posix
@pytest.mark.parametrize(("answer", "locked"), [(errno.EWOULDBLOCK, False), (errno.ENOSYS, True)])
def test_only_a_lock_that_another_holds_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, answer: int, locked: bool
) -> None:
    """Some network file systems have no locks: there nobody can hold one."""

    def flock(file: object, how: int) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr("fcntl.flock", flock)
    with path.open("rb") as file:
        assert try_lock(file) is locked


@posix
def test_writing_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_drive_that_is_not_there_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Path, "exists", lambda path: False
    )  # as for Z: on Windows, whose root is its own parent
    with pytest.raises(StorageError, match="no such drive"):
        free_bytes(Path("/a/b"))
