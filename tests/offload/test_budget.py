from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.errors import InternalError, OutOfMemoryError, UsageError
from lowvram.offload.budget import (
    Budget,
    Ledger,
    allocated_size,
    format_bytes,
    parse_bytes,
    segment_size,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("16GB", 16_000_000_000),
        ("16gb", 16_000_000_000),
        ("16 GB", 16_000_000_000),
        (" 16Gb ", 16_000_000_000),
        ("16GiB", 17_179_869_184),
        ("16gib", 17_179_869_184),
        ("0.5GB", 500_000_000),
        (".5GB", 500_000_000),
        ("5.GB", 5_000_000_000),
        ("1.1GB", 1_100_000_000),
        ("64MB", 64_000_000),
        ("64MiB", 67_108_864),
        ("3KB", 3_000),
        ("3KiB", 3_072),
        ("2TB", 2_000_000_000_000),
        ("512B", 512),
        ("1.0000001KB", 1_000),
    ],
)
def test_sizes_with_a_unit_are_exact(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        ("16", "16GB", "16GiB"),
        ("16G", "16GB", "16GiB"),
        ("800m", "800MB", "800MiB"),
        ("7.5", "7.5GB", "7.5GiB"),
        ("16000000000", "16000000000B", "16.0GB"),
        ("16GGB", "16GB", "16GiB"),
        ("-16GB", "16GB", "16GiB"),
        ("0GB", "16GB", "16GiB"),
        ("0.4B", "16GB", "16GiB"),
        ("nan", "16GB", "16GiB"),
        ("infGB", "16GB", "16GiB"),
        ("1e9B", "16GB", "16GiB"),
        ("١٦GB", "16GB", "16GiB"),
        ("", "16GB", "16GiB"),
        ("GB", "16GB", "16GiB"),
        ("9999999999TB", "16GB", "16GiB"),
        ("9" * 5000, "16GB", "16GiB"),
    ],
)
def test_anything_else_is_refused_with_two_sizes_that_parse(text: str, first: str, second: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text, flag="--ram")
    assert caught.value.where == "--ram"
    assert caught.value.advice == f"write --ram {first} or --ram {second}"
    assert parse_bytes(first) > 0
    assert parse_bytes(second) > 0
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (1_140_000_000, "1.14 GB"),
        (16_000_000_000, "16.0 GB"),
        (64_000_000, "64.0 MB"),
        (350_000_000, "350 MB"),
        (9_994, "9.99 KB"),
        (9_996, "10.0 KB"),
        (99_960, "100 KB"),
        (999_400_000, "999 MB"),
        (999_600_000, "1.00 GB"),
        (5_000_000_000_000_000, "5000 TB"),
        (-2_000, "-2.00 KB"),
    ],
)
def test_sizes_are_shown_with_three_digits(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@given(st.integers(1, 10**15))
def test_a_shown_size_reads_back_within_half_a_percent(nbytes: int) -> None:
    assert abs(parse_bytes(format_bytes(nbytes)) - nbytes) <= 0.005 * nbytes


def test_a_budget_without_memory_is_refused() -> None:
    assert Budget(vram=1, ram=1).ram == 1
    with pytest.raises(UsageError):
        Budget(vram=0, ram=1)


def test_claims_count_up_to_the_cap_and_no_further() -> None:
    ledger = Ledger(100, "VRAM")
    first = ledger.claim("weights", 60)
    with ledger.claim("scratch", 40):
        assert (ledger.used, ledger.room) == (100, 0)
        with pytest.raises(OutOfMemoryError) as caught:
            ledger.claim("one more", 1)
    assert ledger.used == 60
    text = str(caught.value)
    assert "one more needs 1 B, 1 B too much" in text
    assert "weights 60 B, scratch 40 B" in text
    assert caught.value.exit_code == 5
    first.release()
    first.release()
    assert (ledger.used, ledger.peak, ledger.claims) == (0, 100, {})
    assert ledger.peak_claims == {"weights": 60, "scratch": 40}


def test_only_the_largest_claims_are_named() -> None:
    ledger = Ledger(1000, "RAM")
    for n in range(1, 10):
        ledger.claim(f"c{n}", n)
    with pytest.raises(OutOfMemoryError, match="beside c9 9 B, c8 8 B, c7 7 B\n"):
        ledger.claim("big", 1000)


def test_without_a_cap_everything_is_counted_and_nothing_refused() -> None:
    ledger = Ledger(None, "RAM")
    ledger.claim("all of it", 10**18)
    assert (ledger.used, ledger.room) == (10**18, None)


def test_a_name_can_be_claimed_again_only_after_its_release() -> None:
    ledger = Ledger(None, "RAM")
    claim = ledger.claim("x", 1)
    with pytest.raises(InternalError):
        ledger.claim("x", 1)
    claim.release()
    ledger.claim("x", 2)
    assert ledger.used == 2
    with pytest.raises(InternalError):
        ledger.claim("y", -1)


def test_threads_never_pass_the_cap_together() -> None:
    ledger = Ledger(10, "RAM")
    refused = []

    def work(name: str) -> None:
        for _ in range(200):
            try:
                with ledger.claim(name, 4):
                    assert ledger.used <= 10
            except OutOfMemoryError:
                refused.append(name)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.used == 0
    assert ledger.peak <= 8


def test_rounding_follows_the_rules_of_the_allocator() -> None:
    assert [allocated_size(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert segment_size(5 * 2**20 + 1) == 5 * 2**20 + 512
    assert segment_size(10 * 2**20) == 10 * 2**20
    assert segment_size(10 * 2**20 + 1) == 12 * 2**20
