"""Where lowvram keeps what is its own: in folders of the user, or where two variables say."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """For what may be lost at any time, at the price of doing it again: LOWVRAM_CACHE, or the user's cache folder."""
    told = os.environ.get("LOWVRAM_CACHE")
    return Path(told or platformdirs.user_cache_dir("lowvram", appauthor=False))


def jobs_folder() -> Path:
    """For the states of jobs: LOWVRAM_STATE, or a folder in the user's state folder."""
    told = os.environ.get("LOWVRAM_STATE")
    return Path(told) if told else Path(platformdirs.user_state_dir("lowvram", appauthor=False)) / "jobs"
