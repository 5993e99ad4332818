"""BlockReader: blocks from their files into host memory, in pieces that several threads read at once.

One thread waits for a disk while another copies out of the system's cache, or both wait: a drive answers several
requests at once, and a core copies slower than a fast drive reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from lowvram.offload.direct import DirectFile
from lowvram.offload.io import FileReader
from lowvram.offload.kept import KeptBytes
from lowvram.offload.placement import PIECE_BYTES
from lowvram.offload.slab import BlockLayout, read_runs

_Piece = tuple[FileReader, int, memoryview]
"""What is read, from where, to where."""


class BlockReader:
    """Fills host buffers with blocks. Used by one thread; a context manager.

    open_reader  path -> FileReader; each file is opened once, on first use, and closed in the end
    threads      how many read at once
    pages        memory of PIECE_BYTES for each of them, if reads go past the system's cache; empty if they do not
    stopping     asked between pieces: whether nobody wants the bytes any more
    kept         what earlier jobs read, if it is kept
    """

    def __init__(
        self,
        open_reader: Callable[[Path], FileReader],
        threads: int,
        pages: Sequence[memoryview],
        stopping: Callable[[], bool],
        kept: KeptBytes | None = None,
    ) -> None:
        self._open_reader, self._stopping, self._kept = open_reader, stopping, kept
        self._readers: dict[Path, FileReader] = {}
        self._direct: dict[FileReader, DirectFile] = {}
        self._pages: SimpleQueue[memoryview] = SimpleQueue()
        for memory in pages:
            self._pages.put(memory)
        self._past_cache = bool(pages)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="block reader")
        self._failed = False

    def fill(self, layout: BlockLayout, memory: memoryview) -> int | None:
        """Read a block into `memory`: bytes that came from files; None if it was left undone because nobody wants it.

        Raises what opening and reading raise; no thread writes to `memory` any more then.
        """
        pieces = list(self._pieces(layout, memory))
        if len(pieces) == 1:
            return self._read(pieces[0])
        tasks = [self._threads.submit(self._read, piece) for piece in pieces]
        wait(tasks)
        # all of them: the one that failed tells why others were left undone
        done = [task.result() for task in tasks]
        return None if None in done else sum(nbytes for nbytes in done if nbytes is not None)

    def _pieces(self, layout: BlockLayout, memory: memoryview) -> Iterator[_Piece]:
        """Cut where a file's offset is a multiple of PIECE_BYTES, so that no page is read twice."""
        for run in read_runs(layout):
            if run.file not in self._readers:
                reader = self._readers[run.file] = self._open_reader(run.file)
                if self._past_cache:
                    self._direct[reader] = DirectFile(reader)
            begin, end = run.file_offset, run.file_offset + run.nbytes
            while begin < end:
                cut = min(end, (begin // PIECE_BYTES + 1) * PIECE_BYTES)
                at = run.slab_offset + begin - run.file_offset
                yield self._readers[run.file], begin, memory[at : at + cut - begin]
                begin = cut

    def _read(self, piece: _Piece) -> int | None:
        reader, offset, target = piece
        if self._failed or self._stopping():
            return None
        try:
            if self._kept is not None and self._kept.fetch(reader, offset, target):
                return 0
            self._read_file(reader, offset, target)
            if self._kept is not None:
                self._kept.keep(reader, offset, target)
        except BaseException:
            self._failed = True
            raise
        return target.nbytes

    def _read_file(self, reader: FileReader, offset: int, target: memoryview) -> None:
        if not self._past_cache:
            reader.read_into(offset, target)
            return
        pages = self._pages.get()
        try:
            self._direct[reader].read_into(offset, target, pages)
        finally:
            self._pages.put(pages)

    def close(self) -> None:
        self._threads.shutdown()
        for direct in self._direct.values():
            direct.close()
        for reader in self._readers.values():
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
