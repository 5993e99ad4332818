"""Headers of .pth, .pt, .ckpt and .bin files: what torch.save writes, read where it lies and never run.

Such a file is a pickle that describes the tensors (`lowvram.quant.files.pickled`), and plain numbers for each storage: in
a zip archive (`torch_zip`), or one after another as torch before 1.6 wrote it (`torch_legacy`). So a contiguous tensor is
a run of bytes of the file, like one of a safetensors file, and nothing has to be converted or loaded to be read.
"""

from __future__ import annotations

from typing import NoReturn

from lowvram.errors import FileError
from lowvram.quant.files.header import Header, StoredTensor, shown
from lowvram.quant.files.pickled import PickledTensor, Saved
from lowvram.quant.files.safetensors import MAX_NAME_CHARACTERS, MAX_TENSORS
from lowvram.quant.files.sniff import HEAD_BYTES, recognise_content
from lowvram.quant.files.strict_json import Malformed
from lowvram.quant.files.torch_legacy import MAGIC, read_legacy
from lowvram.quant.files.torch_zip import read_archive
from lowvram.quant.refs import DTYPE_BITS, Reader, Shape, stored_bytes
from lowvram.quant.spec import numel

SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
_WRAPPERS = ("state_dict", "module", "model_state")
"""Members that hold the tensors where other things lie beside them (checkpoint-formats 0.1)."""
_AGAIN = "download the file again, or use the .safetensors version of the same model"


def read_torch_header(reader: Reader) -> Header:
    """The tensors of a file of torch.save; FileError if it is anything else, not whole, or holds more than data.

    Reads the directory of the archive and the pickle, not one number. Every tensor of the result lies inside the file.
    """
    head = reader.read_at(0, min(HEAD_BYTES, reader.size))
    try:
        if head.startswith(b"PK\x03\x04"):
            saved = read_archive(reader)
        elif head.startswith(MAGIC):
            saved = read_legacy(reader)
        else:
            _refuse_other(reader, head)
        tensors = tuple(_stored(name, t, saved) for name, t in _named(saved.made).items())
    except Malformed as error:
        _refuse(reader, f"not a file of tensors: {error.found}", error.expected, _AGAIN)
    return Header(reader.path, reader.size, tuple(sorted(tensors, key=lambda t: (t.offset, t.name))), {})


def _named(made: object) -> dict[str, PickledTensor]:
    """The tensors of a state dict by name, whatever it is wrapped in."""
    for _ in range(3):
        if not isinstance(made, dict):
            break
        if any(isinstance(value, PickledTensor) for value in made.values()):
            found = {name: value for name, value in made.items() if isinstance(value, PickledTensor)}
            if len(found) > MAX_TENSORS:
                raise Malformed(f"{len(found):,} tensors", f"at most {MAX_TENSORS:,}")
            return found
        inner = [made[name] for name in _WRAPPERS if isinstance(made.get(name), dict)]
        dicts = inner or [value for value in made.values() if isinstance(value, dict)]
        if not inner and len(dicts) != 1:
            break
        made = dicts[0]
    raise Malformed("no dict of tensors in it", "a state dict")


def _stored(name: str, tensor: PickledTensor, saved: Saved) -> StoredTensor:
    if len(name) > MAX_NAME_CHARACTERS:
        raise Malformed(f"a tensor name of {len(name):,} characters", f"at most {MAX_NAME_CHARACTERS}")
    run = saved.runs.get(tensor.storage.key)
    size = DTYPE_BITS[tensor.dtype] // 8
    count = numel(tensor.shape)
    if run is None or run.nbytes != tensor.storage.count * size:
        raise Malformed(f"the numbers of tensor {shown(name)} are not there")
    if tensor.offset + count > tensor.storage.count:
        raise Malformed(f"tensor {shown(name)} reaches beyond its numbers")
    if count and not _is_contiguous(tensor.shape, tensor.strides):
        found = (
            f"tensor {shown(name)} of {list(tensor.shape)} is stored with the strides {list(tensor.strides)}"
        )
        raise Malformed(found, "contiguous tensors")
    nbytes = stored_bytes(tensor.dtype, tensor.shape)
    return StoredTensor(name, tensor.dtype, tensor.shape, run.offset + tensor.offset * size, nbytes)


def _is_contiguous(shape: Shape, strides: Shape) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _refuse_other(reader: Reader, head: bytes) -> NoReturn:
    content = recognise_content(head)
    found = content.found if content is not None else f"something that starts with {ascii(head[:4])[1:]}"
    advice = content.advice if content is not None else _AGAIN
    _refuse(
        reader,
        f"not a file of torch.save but {found}",
        "a zip archive, or what torch before 1.6 wrote",
        advice,
    )


def _refuse(reader: Reader, found: str, expected: str, advice: str) -> NoReturn:
    raise FileError(found, where=str(reader.path), expected=expected, advice=advice)
