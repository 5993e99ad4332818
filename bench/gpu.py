"""The acceptance run on a GPU: one command, the most valuable part first.

    python -m lowvram.bench.gpu                          everything; bench/results/GPU-DATE.json grows while it runs
    python -m lowvram.bench.gpu --check                  what this machine lacks for it, and no more
    python -m lowvram.bench.gpu --quick                  the first parts, which need no checkpoint, in three minutes at most
    python -m lowvram.bench.gpu --minutes 9.5            what fits in a slot; the same command goes on later
    python -m lowvram.bench.gpu --only smoke --only vae  some parts, again if they are done already
    python -m lowvram.bench.gpu --dry                    all parts on a CPU, with the embedded model

Run it in the root of a clone. It needs Python 3.11 or newer, a torch with CUDA, and for kernels a C compiler and the headers
of that Python; nothing has to be installed if the packages of pyproject.toml are there. For a bare machine without a
network, collect them where there is one (63 MB; what is there already can be left out, and diffusers and sageattention, which
are only compared with, added):

    python bench/wheels.py wheels [--there numpy]... [--compared]

and there:

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 -m lowvram.bench.gpu --quick
    PYTHONPATH=site python3 -m lowvram.bench.gpu --folder /tmp --minutes 9.5      again and again, until all is done

Real sizes need about 36 GB of disk in --folder for random checkpoints, which are removed once every part is done.
Every part is a process of its own with a time limit of its own. What it found is written down as soon as it is done, and
what it had found before it hung or crashed too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from lowvram.bench.ready import lacks
from lowvram.errors import LowvramError

QUICK_MINUTES = 3.0


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 if no part failed, 1 if one did, 2 if nothing can run here."""
    options = _parser().parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    lacking = list(lacks(options.folder, dry=options.dry))
    for lack in lacking:
        print(lack, file=sys.stderr)
    if any(lack.fatal for lack in lacking):
        return 2
    if options.check:
        print("everything that is needed is here")
        return 0
    # Not before: it imports what has just been looked for.
    from lowvram.bench.acceptance import QUICK, accept

    minutes = min(options.minutes, QUICK_MINUTES) if options.quick else options.minutes
    only = options.only or (QUICK if options.quick else ())
    try:
        return accept(
            dry=options.dry, seconds=60 * minutes, only=only, output=options.output, folder=options.folder
        )
    except LowvramError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lowvram.bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dry", action="store_true", help="on a CPU, with the embedded model")
    parser.add_argument("--check", action="store_true", help="say what is missing here, and run nothing")
    parser.add_argument(
        "--quick", action="store_true", help="the parts that need no checkpoint, in 3 minutes"
    )
    parser.add_argument("--minutes", type=float, default=120, help="when to stop starting parts")
    parser.add_argument("--only", action="append", default=[], help="run these parts, even again")
    parser.add_argument(
        "--output", type=Path, default=Path("bench/results"), help="folder of the results file"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where random checkpoints are written",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
