"""The data of a pickle, without running it.

torch.save stores a state dict as a pickle, a program for a small stack machine that may call any function there is. Here
its instructions are read one by one and *nothing is ever called*: containers become plain ones, a tensor becomes a
description of where its numbers lie, and a pickle that names anything else is refused. Memory and time are bounded by
the length of the text: no instruction makes more than its own bytes do.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from lowvram.quant.files.header import shown
from lowvram.quant.files.strict_json import Malformed
from lowvram.quant.refs import DTYPE_BITS, Shape

MAX_INSTRUCTIONS = 200_000
"""A tensor takes about forty: three times what any Wan file has, and a tenth of a second at most."""
MAX_PICKLE_BYTES = 8 << 20
MAX_DIMS = 8

_STORAGES: Mapping[str, str] = MappingProxyType(
    {"FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64", "LongStorage": "I64",
     "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
     "UntypedStorage": "U8"}
)  # fmt: skip
_DTYPES: Mapping[str, str] = MappingProxyType(
    {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
     "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
)  # fmt: skip
_INERT = frozenset(
    {
        "torch.Size", "collections.defaultdict", "builtins.set", "__builtin__.set", "builtins.dict", "__builtin__.dict",
        "argparse.Namespace", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
        "_codecs.encode", "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    }
)  # fmt: skip
"""What training programs leave beside the weights: passed over like everything that is no tensor."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of numbers in a file of its own inside the archive."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """A tensor as the pickle describes it: nothing of it is checked against the archive yet."""

    storage: Storage
    offset: int
    """Elements from the start of the storage."""
    shape: Shape
    strides: Shape
    dtype: str


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes of a file that lie together."""

    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file of torch.save holds."""

    made: object
    """As `read_pickle` gives it."""
    runs: Mapping[str, Run]
    """Where the numbers of each storage lie, by its key."""


class _Name(NamedTuple):
    """Something that a pickle asks for by name."""

    full: str


class _Other:
    """A value that is of no interest."""


_OTHER = _Other()
_MARK = object()


def read_pickle(text: bytes) -> object:
    """What the pickle `text` makes: dicts, lists, tuples, numbers, texts and PickledTensors. Malformed for anything that
    is no pickle, asks for what tensors do not need, or is too long."""
    return Pickles(text).read()


class Pickles:
    """Pickles that follow each other in `text`, from byte `at` on. `storages`: those that were asked for, by their keys."""

    def __init__(self, text: bytes, at: int = 0) -> None:
        self.text, self.at = text, at
        self.storages: dict[str, Storage] = {}
        self._left = MAX_INSTRUCTIONS
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def read(self) -> object:
        """What the next of them makes; see `read_pickle`."""
        self.stack, self.memo = [], {}
        for left in range(self._left, 0, -1):
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                self._left = left - 1
                return self.pop()
            work = _WORK.get(code)
            if work is None:
                raise Malformed(
                    f"the instruction {code:#04x} at byte {self.at - 1:,}", "what torch.save writes"
                )
            work(self)
        raise Malformed(f"more than {MAX_INSTRUCTIONS:,} instructions")

    def take(self, count: int) -> bytes:
        data = self.text[self.at : self.at + count]
        if len(data) != count:
            raise Malformed("a text that ends too early")
        self.at += count
        return data

    def number(self, form: str) -> int:
        value = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        assert isinstance(value, int)
        return value

    def line(self) -> str:
        end = self.text.find(b"\n", self.at, self.at + 256)
        if end < 0:
            raise Malformed(f"a name at byte {self.at:,} that does not end")
        return self.word(self.take(end + 1 - self.at)[:-1])

    def word(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise Malformed(f"a text before byte {self.at:,} that is not UTF-8") from None

    def pop(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            raise Malformed(f"nothing to take at byte {self.at:,}")
        return self.stack.pop()

    def top(self) -> object:
        if not self.stack:
            raise Malformed(f"nothing to add to at byte {self.at:,}")
        return self.stack[-1]

    def marked(self) -> list[object]:
        """The values since the last mark."""
        for n in range(len(self.stack) - 1, -1, -1):
            if self.stack[n] is _MARK:
                values = self.stack[n + 1 :]
                del self.stack[n:]
                return values
        raise Malformed(f"no mark before byte {self.at:,}")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Malformed(f"a reference to nothing at byte {self.at:,}")
        self.push(self.memo[index])

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Malformed(f"a name at byte {self.at:,} that is no text")
        full = f"{module}.{name}"
        if full not in _KNOWN and full not in _INERT:
            raise Malformed(f"it asks for {shown(full)}, a program and no data", "tensors only")
        self.push(_Name(full))

    def call(self) -> None:
        arguments, what = self.pop(), self.pop()
        if not isinstance(what, _Name) or not isinstance(arguments, tuple):
            raise Malformed(f"a call of something without a name at byte {self.at:,}")
        maker = _MAKERS.get(what.full)
        self.push(maker(arguments) if maker is not None else _OTHER)

    def storage(self) -> None:
        match self.pop():
            # Torch before 1.6 says None too: it is no view of another storage.
            case ("storage", _Name(full), str(key), str(), int(count), *view) if count >= 0 and view in (
                [],
                [None],
            ):
                dtype = _STORAGES.get(full.rpartition(".")[2])
                if dtype is not None:
                    storage = self.storages[key] = Storage(key, dtype, count)
                    self.push(storage)
                    return
        raise Malformed(f"a reference at byte {self.at:,} that is no storage")

    def add_items(self, values: list[object]) -> None:
        target = self.top()
        if len(values) % 2:
            raise Malformed(f"a key without a value at byte {self.at:,}")
        if isinstance(target, dict):
            for key, value in zip(values[::2], values[1::2], strict=True):
                if isinstance(key, str):
                    if key in target:
                        raise Malformed(f"two members are called {shown(key)}")
                    target[key] = value
        elif target is not _OTHER:
            raise Malformed(f"members for something that has none at byte {self.at:,}")

    def add_values(self, values: list[object]) -> None:
        target = self.top()
        if isinstance(target, list):
            target += values
        elif target is not _OTHER:
            raise Malformed(f"values for something that is no list at byte {self.at:,}")

    def build(self) -> None:
        """The state of an object: of no interest, whatever it is."""
        self.pop()
        self.top()

    def new_object(self) -> None:
        self.pop()
        self.pop()
        self.push(_OTHER)

    def long(self) -> None:
        self.push(int.from_bytes(self.take(self.number("<B")), "little", signed=True))


def _ordered(arguments: tuple[object, ...]) -> object:
    return {} if not arguments else _OTHER


def _tensor_2(arguments: tuple[object, ...]) -> object:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            return _tensor(storage, offset, shape, strides, storage.dtype)
    raise Malformed("a tensor that is described in an unknown way")


def _tensor_3(arguments: tuple[object, ...]) -> object:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), _, _, _Name(full), *_):
            dtype = _DTYPES.get(full.rpartition(".")[2])
            if dtype is not None and storage.dtype == "U8":
                count = storage.count * 8 // DTYPE_BITS[dtype]
                return _tensor(Storage(storage.key, dtype, count), offset, shape, strides, dtype)
    raise Malformed("a tensor that is described in an unknown way")


def _tensor(
    storage: Storage, offset: int, shape: tuple[object, ...], strides: tuple[object, ...], dtype: str
) -> PickledTensor:
    sizes, steps = (tuple(n for n in v if type(n) is int and 0 <= n < 1 << 62) for v in (shape, strides))
    whole = len(sizes) == len(shape) == len(steps) == len(strides) <= MAX_DIMS
    if not whole or not 0 <= offset < 1 << 62:
        raise Malformed("a tensor of an impossible shape")
    return PickledTensor(storage, offset, sizes, steps, dtype)


def _parameter(arguments: tuple[object, ...]) -> object:
    match arguments:
        case (PickledTensor() as tensor, *_):
            return tensor
    raise Malformed("a parameter that is no tensor")


_MAKERS: Mapping[str, Callable[[tuple[object, ...]], object]] = MappingProxyType(
    {
        "collections.OrderedDict": _ordered,
        "torch._utils._rebuild_tensor_v2": _tensor_2,
        "torch._utils._rebuild_tensor_v3": _tensor_3,
        "torch._utils._rebuild_parameter": _parameter,
    }
)
_KNOWN = frozenset(
    {*_MAKERS, *(f"torch.{n}" for n in (*_STORAGES, *_DTYPES)), *(f"torch.storage.{n}" for n in _STORAGES)}
)

_WORK: Mapping[int, Callable[[Pickles], None]] = MappingProxyType(
    {
        0x80: lambda m: _skip(m, 1),  # PROTO
        0x95: lambda m: _skip(m, 8),  # FRAME
        ord("}"): lambda m: m.push({}),
        ord("]"): lambda m: m.push([]),
        ord(")"): lambda m: m.push(()),
        0x8F: lambda m: m.push(_OTHER),  # EMPTY_SET
        ord("("): lambda m: m.push(_MARK),
        ord("t"): lambda m: m.push(tuple(m.marked())),
        0x85: lambda m: m.tuple_of(1),
        0x86: lambda m: m.tuple_of(2),
        0x87: lambda m: m.tuple_of(3),
        ord("N"): lambda m: m.push(None),
        0x88: lambda m: m.push(True),
        0x89: lambda m: m.push(False),
        ord("K"): lambda m: m.push(m.number("<B")),
        ord("M"): lambda m: m.push(m.number("<H")),
        ord("J"): lambda m: m.push(m.number("<i")),
        0x8A: Pickles.long,
        ord("G"): lambda m: _inert(m, 8),  # BINFLOAT
        ord("X"): lambda m: m.push(m.word(m.take(m.number("<I")))),
        0x8C: lambda m: m.push(m.word(m.take(m.number("<B")))),
        ord("U"): lambda m: _inert(m, m.number("<B")),  # SHORT_BINSTRING
        ord("C"): lambda m: _inert(m, m.number("<B")),  # SHORT_BINBYTES
        ord("B"): lambda m: _inert(m, m.number("<I")),  # BINBYTES
        ord("c"): lambda m: m.name(m.line(), m.line()),
        0x93: lambda m: _stack_name(m),
        ord("q"): lambda m: m.put(m.number("<B")),
        ord("r"): lambda m: m.put(m.number("<I")),
        0x94: lambda m: m.put(len(m.memo)),
        ord("h"): lambda m: m.get(m.number("<B")),
        ord("j"): lambda m: m.get(m.number("<I")),
        ord("Q"): Pickles.storage,
        ord("R"): Pickles.call,
        0x81: Pickles.new_object,
        ord("b"): Pickles.build,
        ord("s"): lambda m: _set_item(m),
        ord("u"): lambda m: m.add_items(m.marked()),
        ord("a"): lambda m: m.add_values([m.pop()]),
        ord("e"): lambda m: m.add_values(m.marked()),
        0x90: lambda m: m.add_values(m.marked()),  # ADDITEMS
    }
)
"""By instruction code (CPython `Lib/pickle.py`): those that torch.save uses in protocols 2 to 5."""


def _skip(machine: Pickles, count: int) -> None:
    machine.take(count)


def _inert(machine: Pickles, count: int) -> None:
    machine.take(count)
    machine.push(_OTHER)


def _stack_name(machine: Pickles) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _set_item(machine: Pickles) -> None:
    value, key = machine.pop(), machine.pop()
    machine.add_items([key, value])
