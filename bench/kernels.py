"""What the kernels are, without a GPU: how they build, how exact their arithmetic is; with one, which tiles are fastest.

    python bench/kernels.py aot [--json] [--quick]    every configuration built for every architecture
        [--changed]                                   only what is not in kernels-aot.jsonl as it is now, and then put there
    python bench/kernels.py accuracy [--json]         error of 8-bit attention and multiplication on synthetic data
    python bench/kernels.py peak [--json]             peak memory of a 14B forward at 720p in each mode, meta tensors
    python bench/kernels.py nano [--json]             each mode of both end to end on the embedded model: PSNR and score
    python bench/kernels.py sparse [--json]           what the order of tokens is worth to attention to some tiles of keys
    python bench/kernels.py tune [--json]             on a card: time of every tile, of torch's and of others' kernels
        [--table [FILE]]                              and what was fastest into the table that dispatch reads
        [--rows FILE]                                 the same from what was printed with --json on a card before

Exits with 1 if a build spills, takes too much shared memory or lacks an instruction, or an error is out of bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

Row = dict[str, object]
BUILT = Path(__file__).parent / "kernels-aot.jsonl"
TABLE = Path(__file__).parents[1] / "triton_kernels" / "tuned.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
        "aot": aot,
        "accuracy": accuracy,
        "peak": peak,
        "nano": nano,
        "sparse": sparse,
        "tune": tune,
    }
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="only what the test suite looks at")
    parser.add_argument("--changed", action="store_true")
    parser.add_argument("--table", nargs="?", const=TABLE, type=Path, metavar="FILE")
    parser.add_argument("--rows", type=Path, metavar="FILE")
    args = parser.parse_args()
    right = True
    for row in verbs[args.verb](args):
        right &= bool(row["ok"])
        print(json.dumps(row) if args.json else "  ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    sys.exit(0 if right else 1)


def aot(args: argparse.Namespace) -> Iterator[Row]:
    from kernel_builds import builds, key, report

    if not args.changed:
        yield from (report(build) for build in builds() if build.quick or not args.quick)
        return
    from lowvram.offload.io import write_atomic

    known = {row["key"]: row for row in _printed(BUILT)} if BUILT.exists() else {}
    rows: list[Row] = []
    try:
        for build in builds():
            row = known.get(key(build))
            if row is None:
                yield (row := report(build))
            rows.append(row)
    finally:  # what was built before an interruption stays
        write_atomic(BUILT, "".join(json.dumps(row) + "\n" for row in rows).encode())


def accuracy(args: argparse.Namespace) -> Iterator[Row]:
    import kernel_accuracy
    import kernel_gemm_accuracy

    yield from kernel_accuracy.errors(args.quick)
    yield from kernel_gemm_accuracy.errors(args.quick)


def peak(args: argparse.Namespace) -> Iterator[Row]:
    from kernel_peak import peaks

    return peaks()


def nano(args: argparse.Namespace) -> Iterator[Row]:
    import kernel_nano

    yield from kernel_nano.scores()
    yield from kernel_nano.matmul_scores()


def sparse(args: argparse.Namespace) -> Iterator[Row]:
    import kernel_sparse

    return kernel_sparse.rows()


def tune(args: argparse.Namespace) -> Iterator[Row]:
    rows = []
    for row in _timed() if args.rows is None else _printed(args.rows):
        rows.append(row)
        yield row
    if args.table is not None:
        from kernel_tuning import tuned

        from lowvram.offload.io import write_atomic
        from lowvram.triton_kernels.tuned import read, written

        table = read(args.table.read_text(encoding="utf-8")) if args.table.exists() else {}
        write_atomic(args.table, written(table | tuned(rows)).encode())


def _printed(path: Path) -> Iterator[Row]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def _timed() -> Iterator[Row]:
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: tiles are timed on a card")
    import kernel_timing
    import triton

    from lowvram.bench import products
    from lowvram.triton_kernels.tiles import arch_of

    device = torch.device("cuda", 0)
    software = f"torch {torch.__version__}, triton {triton.__version__}"
    facts = {"card": torch.cuda.get_device_name(device), "arch": arch_of(device), "software": software}
    yield from (facts | row for row in products.timings("cuda"))
    yield from (facts | row for row in kernel_timing.timings())


if __name__ == "__main__":
    main()
