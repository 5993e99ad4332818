"""Fetching published files into the Hugging Face cache: resumed, checked against size and hash. The only code that opens
a socket."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lowvram.errors import FileError, LowvramError, StorageError, UsageError
from lowvram.library.downloads import Download
from lowvram.library.hashing import file_sha256
from lowvram.library.known import published_as, stored_hash
from lowvram.offload.budget import format_bytes
from lowvram.offload.faults import Faults
from lowvram.offload.io import free_bytes

RESERVE = 1 << 30
"""Bytes that a download leaves free on the disk."""
TIMEOUT = 30.0
"""Seconds to wait for the answer of the Hub."""

Progress = Callable[[Download, int, int], None]
"""Called with a file, its bytes that are here and its size."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file as the Hub describes it."""

    download: Download
    nbytes: int
    is_here: bool


@dataclass(frozen=True, slots=True)
class Hub:
    """Where files come from and where they go."""

    cache: Path
    endpoint: str | None = None
    """None for the one of huggingface_hub itself."""
    token: str | None = None


def hub_from(environ: Mapping[str, str], cache: Path) -> Hub:
    """The Hub that HF_ENDPOINT and HF_TOKEN name."""
    if environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UsageError("HF_HUB_OFFLINE is set", expected="a connection", advice="unset it to fetch files")
    return Hub(cache, environ.get("HF_ENDPOINT") or None, environ.get("HF_TOKEN") or None)


def ask(hub: Hub, files: Sequence[Download]) -> list[Wanted]:
    """What the Hub says of these files. FileError for one that it does not have, StorageError if it does not answer."""
    wanted = []
    for each in files:
        with _told(each, hub):
            said = _download(hub, each, dry_run=True)
        wanted.append(Wanted(each, int(said.file_size), bool(said.is_cached)))
    return wanted


def check_space(
    hub: Hub,
    wanted: Sequence[Wanted],
    free: Callable[[Path], int] = free_bytes,
) -> None:
    """StorageError if the disk cannot hold what is not here yet."""
    needed = sum(each.nbytes for each in wanted if not each.is_here)
    left = free(hub.cache)
    if needed and needed + RESERVE > left:
        raise StorageError(
            f"{format_bytes(needed)} to fetch, {format_bytes(left)} free",
            where=str(hub.cache),
            expected=f"{format_bytes(needed + RESERVE)}, of which {format_bytes(RESERVE)} stay free",
            advice="free space there, or name another disk with HF_HUB_CACHE",
        )


def fetch(hub: Hub, wanted: Wanted, progress: Progress, faults: Faults | None = None) -> Path:
    """The file on this disk, whole and checked: fetched, or what is left of it, or nothing where it is here.

    StorageError if the connection or the disk fails: what has arrived is kept, and the next call goes on there.
    FileError if what arrived is not what was published: it is removed.
    """
    with _told(wanted.download, hub):
        path = Path(_download(hub, wanted.download, progress=progress, nbytes=wanted.nbytes, faults=faults))
    if not wanted.is_here:
        _check(path, wanted)
    return path


def _check(path: Path, wanted: Wanted) -> None:
    size = path.stat().st_size
    known = published_as(Path(wanted.download.name).name)
    expected = stored_hash(path) or (known.sha256 if known else "")
    found = "" if size != wanted.nbytes or not expected else file_sha256(path)
    if size == wanted.nbytes and found == expected:
        return
    real = path.resolve()
    path.unlink(missing_ok=True)
    real.unlink(missing_ok=True)
    what = f"{size:,} bytes" if size != wanted.nbytes else f"sha256 {found}"
    right = f"{wanted.nbytes:,} bytes" if size != wanted.nbytes else f"sha256 {expected}"
    raise FileError(
        f"what arrived is not the published file: {what}",
        where=f"{wanted.download.repository}/{wanted.download.name}",
        expected=right,
        advice="it was removed; run the command again",
    )


def _download(
    hub: Hub,
    each: Download,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
    nbytes: int = 0,
    faults: Faults | None = None,
) -> Any:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise UsageError(
            "huggingface_hub is not installed",
            expected="it, to fetch files: everything else works without",
            advice="pip install 'lowvram[hub]'",
        ) from None
    settings: dict[str, Any] = (
        {} if progress is None else {"tqdm_class": _bar(each, nbytes, progress, faults)}
    )
    return hf_hub_download(
        each.repository,
        each.name,
        cache_dir=hub.cache,
        endpoint=hub.endpoint,
        token=hub.token,
        etag_timeout=TIMEOUT,
        dry_run=dry_run,
        **settings,
    )


def _bar(each: Download, nbytes: int, progress: Progress, faults: Faults | None) -> type:
    """A progress bar of the kind huggingface_hub wants, which draws nothing and tells `progress`. It is called for
    every piece before that is written, which makes it the fault point of the disk."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        def __init__(self, *args: Any, **settings: Any) -> None:
            settings["disable"] = True
            self._here = int(settings.get("initial") or 0)
            super().__init__(*args, **settings)  # type: ignore[no-untyped-call, unused-ignore]

        def update(self, n: float | None = 1) -> None:
            if faults is not None and faults.strikes("write"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._here += int(n or 0)
            progress(each, self._here, nbytes)

    return Bar


@contextmanager
def _told(each: Download, hub: Hub) -> Iterator[None]:
    """What huggingface_hub raises inside the block, as errors for people."""
    where = f"{each.repository}/{each.name}"
    try:
        yield
    except LowvramError:
        raise
    except Exception as error:
        if not type(error).__module__.startswith(
            ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
        ):
            if isinstance(error, OSError) and error.errno in (
                errno.ENOSPC,
                getattr(errno, "EDQUOT", errno.ENOSPC),
            ):
                raise StorageError(
                    "the disk is full",
                    where=str(hub.cache),
                    advice="free space there and run the command again: it goes on where it stopped",
                ) from error
            if not isinstance(error, OSError):
                raise
        raise _network_error(error, where) from error


def _network_error(error: Exception, where: str) -> LowvramError:
    kind = type(error).__name__
    if kind in (
        "RepositoryNotFoundError",
        "EntryNotFoundError",
        "RemoteEntryNotFoundError",
        "RevisionNotFoundError",
    ):
        return FileError(
            "the Hub has no such file",
            where=where,
            advice="fetch another --weights, or report that it was moved",
        )
    if kind == "GatedRepoError":
        return FileError(
            "the Hub asks for an account here", where=where, advice="accept the terms there and set HF_TOKEN"
        )
    # The Hub says "please check your connection" of every failure: what the system said is further down.
    while error.__cause__ is not None:
        error = cast(Exception, error.__cause__)
    first = (str(error).splitlines() or [""])[0]
    return StorageError(
        f"the download failed ({type(error).__name__}: {first[:160]})",
        where=where,
        advice="check the connection (or HF_ENDPOINT) and run the command again: it goes on where it stopped",
    )
