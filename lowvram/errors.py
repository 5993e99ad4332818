"""Every error a user can meet. Imports nothing, so every room may raise these.

Each error is four facts and an exit code; its text is made from the facts:

    LowvramError
    ├── UsageError         2  a flag, a value or a combination that cannot be meant
    ├── FileError          3  a model, LoRA or media file that is not what it should be
    ├── BudgetError        4  the job does not fit the budget
    ├── OutOfMemoryError   5  memory ran out in spite of the plan
    ├── StorageError       6  a disk is full, gone, or a file changed while we read it
    ├── DeviceLostError    7  the device stopped answering
    ├── NonFiniteError     8  NaN or infinity appeared
    ├── BusyError          9  another process holds what this job needs
    └── InternalError     70  a bug of ours
"""

from __future__ import annotations


class LowvramError(Exception):
    """Base of all errors meant for people.

    Fields are short sentences without a final full stop:
    found     what was met
    where     the file, flag, stage or block it was met in ("" if it has no place)
    expected  what would have been right ("" if that is plain from `found`)
    advice    what to do now
    """

    exit_code = 70

    def __init__(self, found: str, *, where: str = "", expected: str = "", advice: str) -> None:
        self.found, self.where, self.expected, self.advice = found, where, expected, advice
        super().__init__(str(self))

    def __str__(self) -> str:
        first = f"{self.where}: {self.found}" if self.where else self.found
        lines = [first]
        if self.expected:
            lines.append(f"expected {self.expected}")
        lines.append(self.advice)
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        """For pickle, so that another process can raise it: `__init__` takes facts, not the text."""
        return _made_again, (type(self), str(self), dict(self.__dict__))


def _made_again(kind: type[LowvramError], text: str, facts: dict[str, object]) -> LowvramError:
    error = kind.__new__(kind, text)
    error.__dict__.update(facts)
    return error


class UsageError(LowvramError):
    """A flag, a value or a combination that cannot be meant."""

    exit_code = 2


class FileError(LowvramError):
    """A model, LoRA or media file that is not what it should be."""

    exit_code = 3


class BudgetError(LowvramError):
    """The job does not fit the budget.

    minimum_vram, minimum_ram    the least that would do (bytes), None for what is not the limit
    nearest                      settings that fit the budget, by flag without its dashes; each fits by itself
    """

    exit_code = 4

    def __init__(
        self,
        found: str,
        *,
        where: str = "",
        expected: str = "",
        advice: str,
        minimum_vram: int | None = None,
        minimum_ram: int | None = None,
        nearest: dict[str, str] | None = None,
    ) -> None:
        self.minimum_vram, self.minimum_ram = minimum_vram, minimum_ram
        self.nearest = dict(nearest or {})
        super().__init__(found, where=where, expected=expected, advice=advice)


class OutOfMemoryError(LowvramError):
    """Memory ran out in spite of the plan; the text names the claim that was wrong."""

    exit_code = 5


class StorageError(LowvramError):
    """A disk is full, gone or read-only, or a file changed while it was being read."""

    exit_code = 6


class DeviceLostError(LowvramError):
    """The device stopped answering."""

    exit_code = 7


class NonFiniteError(LowvramError):
    """NaN or infinity appeared in the state."""

    exit_code = 8


class BusyError(LowvramError):
    """Another process holds what this job needs."""

    exit_code = 9


class InternalError(LowvramError):
    """A bug of lowvram itself: please report it."""

    exit_code = 70
