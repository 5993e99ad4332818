"""What a refused file is told."""

from __future__ import annotations

import pytest

from lowvram.errors import FileError
from lowvram.quant.identify import identify


@pytest.fixture
def refusal(header_of):
    def read(entries, want=None, **more) -> str:
        with pytest.raises(FileError) as caught:
            identify([header_of(entries, **more)], want)
        assert caught.value.where and caught.value.advice
        assert str(caught.value).count("\n") <= 2 and len(str(caught.value)) < 1200
        return str(caught.value)

    return read
