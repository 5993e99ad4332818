"""The parsers under atheris (libFuzzer): mutants that are kept because they reach code that none reached before.

    python bench/fuzz_guided.py FORMAT CORPUS [-- -max_total_time=3600]

FORMAT is one of `bench/fuzz.py`, CORPUS a folder that keeps what was found from one night to the next; it begins with
the whole file of that format. A parse that is neither done nor refused, or that takes longer than `fuzz.SLOW`, ends the
run with the input in a file (`crash-*`). atheris (`pip install atheris`, CPython 3.11 on Linux) is needed for this
alone. A night of all formats:

    for format in safetensors gguf vocabulary index lora pickle archive stream; do
        python bench/fuzz_guided.py $format ~/corpus/$format -- -max_total_time=3600 -rss_limit_mb=4096
    done
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lowvram"]):
    import fuzz

from lowvram.errors import FileError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("format", choices=fuzz.TARGETS)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("libfuzzer", nargs="*", help="options of libFuzzer, behind --")
    args = parser.parse_args()
    make, parse = fuzz.TARGETS[args.format]
    args.corpus.mkdir(parents=True, exist_ok=True)
    (args.corpus / "whole").write_bytes(make())

    def one(data: bytes) -> None:
        def refused_or_read() -> None:
            try:
                parse(data)
            except FileError:
                return

        took = fuzz.seconds(refused_or_read)
        if took > fuzz.SLOW:
            raise RuntimeError(f"{took:.2f} s")

    options = ["-max_len=65536", f"-dict={_words(args.corpus)}", *args.libfuzzer]
    atheris.Setup([sys.argv[0], *options, str(args.corpus)], one)
    atheris.Fuzz()


def _words(corpus: Path) -> Path:
    """The extremes of `fuzz.py` as a dictionary, beside the corpus."""
    path = corpus.with_name(f"{corpus.name}.dict")
    words = ("".join(f"\\x{byte:02x}" for byte in word) for word in fuzz.EXTREMES)
    path.write_text("".join(f'"{word}"\n' for word in words))
    return path


if __name__ == "__main__":
    main()
