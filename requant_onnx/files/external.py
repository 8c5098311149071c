"""The values of stored tensors: in the model itself, or in a data file next to it (external data).

References to data files are not trusted: a path may lead outside the model's directory, or an offset past the end of a file.
https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from requant_onnx.errors import ModelError
from requant_onnx.files.walk import stored_tensors
from requant_onnx.text import is_unicode

MAX_ELEMENTS = 1 << 40  # largest number of elements of a tensor
CHUNK = 1 << 24  # bytes read at a time
WIDTHS = {"4": ("UINT4", "INT4", "FLOAT4E2M1"), "2": ("UINT2", "INT2")}  # bits -> types narrower than a byte
TYPED = {
    "float_data": ("FLOAT", "COMPLEX64"),
    "double_data": ("DOUBLE", "COMPLEX128"),
    "int64_data": ("INT64",),
    "uint64_data": ("UINT32", "UINT64"),
    "string_data": ("STRING",),
}  # field -> types of its values; int32_data holds all other types


def is_external(tensor: TensorProto) -> bool:
    """Whether the values are in a data file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def stored_bytes(tensor: TensorProto) -> int:
    """The size of the raw values in bytes, wherever they are; 0 for values in typed fields."""
    return _length(tensor) if is_external(tensor) else len(tensor.raw_data)


def values_of(tensor: TensorProto) -> npt.NDArray[np.generic]:
    """The values of a tensor; external data are read from the resolved file.  Raises ModelError when it cannot be read."""
    if not is_external(tensor):
        return np.asarray(numpy_helper.to_array(tensor))
    here = TensorProto()
    here.CopyFrom(tensor)
    fetch(here)
    return np.asarray(numpy_helper.to_array(here))


def chunks_of(tensor: TensorProto) -> Iterator[bytes]:
    """The raw values, in pieces of at most CHUNK bytes if external.  Raises ModelError when the data file cannot be read."""
    if not is_external(tensor):
        yield tensor.raw_data
        return
    yield from _pieces(tensor.name, _location(tensor), _offset(tensor), _length(tensor))


def _pieces(name: str, location: str, offset: int, left: int) -> Iterator[bytes]:
    """The bytes of a data file from an offset, in pieces of at most CHUNK bytes.  name: tensor.  left: number of bytes."""
    try:
        with open(location, "rb") as file:
            file.seek(offset)
            while left:
                piece = file.read(min(CHUNK, left))
                if not piece:
                    raise ModelError(f"the data file '{location}' of '{name}' became shorter; keep it while it is read")
                left -= len(piece)
                yield piece
    except OSError as error:
        raise ModelError(f"cannot read the data file '{location}' of '{name}' ({error.strerror or error})") from None


def dense_values(sparse: onnx.SparseTensorProto) -> npt.NDArray[np.generic]:
    """The values of a sparse tensor as a dense array.  https://onnx.ai/onnx/repo-docs/IR.html, SparseTensorProto.

    Its indices are (values,) positions in the flattened tensor, or (values, rank) coordinates.
    """
    values, indices = values_of(sparse.values), values_of(sparse.indices).astype(np.int64)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return dense


def fetch(tensor: TensorProto) -> None:
    """Read external data into the tensor, which then refers to no file.  Raises ModelError as `chunks_of`."""
    if is_external(tensor):
        _keep(tensor, b"".join(chunks_of(tensor)))


def _keep(tensor: TensorProto, values: bytes) -> None:
    """Store values in a tensor, which then refers to no data file."""
    tensor.raw_data = values
    tensor.ClearField("data_location")
    del tensor.external_data[:]


def resolve(model: onnx.ModelProto, model_path: Path, name: str) -> int:
    """Check every reference to a data file, and make its path absolute.  Changes `model`.  Returns the bytes of external data.

    model_path: path of the model file.  name: the model in error messages.
    Raises ModelError if a path leads outside the trusted directories, a file is missing, or offset and length do not fit.
    """
    total = 0
    for tensor in stored_tensors(model):
        if is_external(tensor):
            total += _check_reference(tensor, model_path, name)
    return total


def _check_reference(tensor: TensorProto, model_path: Path, name: str) -> int:
    """Check one reference and make its path absolute; a path that a model cannot contain is read at once.  Returns the bytes."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location, label = entries.get("location", ""), f"the data of '{tensor.name}' in {name}"
    windows = PureWindowsPath(location)
    foreign = (os.name != "nt" and windows.drive) or windows.drive.startswith("\\\\")  # another system's drive, or a share
    if not location or "\0" in location or ".." in windows.parts or foreign:
        raise ModelError(f"{label} should be at '{location}', but only files in the directory of the model are read; move it there")
    path = model_path.parent / location  # an absolute location stays absolute
    try:
        inside = any(path.resolve().is_relative_to(folder) for folder in _trusted_folders(model_path))
        size = path.stat().st_size if inside and path.is_file() else -1
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{label} cannot be read ({getattr(error, 'strerror', None) or error}); check '{path}'") from None
    if not inside:
        raise ModelError(
            f"{label} should be at '{location}', which is or links to a place outside the directory of the model, and is not "
            "read; copy it into that directory"
        )
    if size < 0:
        raise ModelError(f"'{path}', which should hold {label}, does not exist or is not a file; put it next to the model")
    expected = raw_bytes(tensor)
    offset, length = (_number(entries.get(key, default), label) for key, default in (("offset", "0"), ("length", str(expected))))
    if expected is None or length != expected or offset + length > size:
        raise ModelError(
            f"{label} has {length} bytes at {offset} in a file of {size}, which do not fit its shape; export the model again"
        )
    location = os.path.abspath(path)
    if is_unicode(location):
        del tensor.external_data[:]
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
    else:
        _keep(tensor, b"".join(_pieces(tensor.name, location, offset, length)))
    return length


def _trusted_folders(model_path: Path) -> tuple[Path, ...]:
    """The directories that may hold data files: the directory of the given path, and that of the file to which it links.

    In a Hugging Face cache, snapshots are links into a directory of blobs.  ONNX Runtime 1.32 has the same rule.
    """
    return model_path.parent.resolve(), model_path.resolve().parent


def _number(text: str, label: str) -> int:
    """Parse an offset or a length in bytes.  Raises ModelError."""
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ModelError(f"{label} has the offset or length '{text[:40]}', which is not a number; export the model again")
    return int(text)


def raw_bytes(tensor: TensorProto) -> int | None:
    """The number of bytes of the values as raw data; None for strings and unknown types."""
    bits = _bits(tensor.data_type)
    return None if bits is None else -(-math.prod(tensor.dims) * bits // 8)


def check_tensors(model: onnx.ModelProto, name: str) -> None:
    """Raise ModelError if a shape is impossible, or does not match the number of values, except for external data (`resolve`)."""
    for tensor in stored_tensors(model):
        label, count = f"the tensor '{tensor.name}' in {name}", math.prod(tensor.dims)
        if min(tensor.dims, default=0) < 0 or count > MAX_ELEMENTS:
            shape = "x".join(map(str, tensor.dims))
            raise ModelError(f"{label} has the impossible shape {shape[:80]}; export the model again")
        if not is_external(tensor):
            _check_count(tensor, count, label)


def check_texts(message: Any, name: str) -> None:
    """Raise ModelError if a text in a protobuf message, or in a message nested in it, is not UTF-8."""
    for descriptor, value in message.ListFields():
        values = value if hasattr(value, "extend") else (value,)
        if descriptor.message_type is not None:
            for each in values:
                check_texts(each, name)
        # protobuf returns bytes for a text that is not UTF-8
        elif descriptor.type == descriptor.TYPE_STRING and not all(isinstance(text, str) for text in values):
            raise ModelError(f"{name} contains a name or text that is not UTF-8; export the model again")


def _check_count(tensor: TensorProto, count: int, label: str) -> None:
    kind = _kind(tensor.data_type)
    field = next((name for name, kinds in TYPED.items() if kind in kinds), "int32_data")
    if tensor.HasField("raw_data"):
        expected, actual, unit = raw_bytes(tensor), len(tensor.raw_data), "bytes"
    else:
        bits = _bits(tensor.data_type)
        expected, actual, unit = count * (2 if kind.startswith("COMPLEX") else 1), len(getattr(tensor, field)), "values"
        expected = -(-expected * bits // 8) if bits in (2, 4) else expected
    if expected != actual:
        raise ModelError(f"{label} has {actual} {unit}, but its shape and type {kind} need {expected}; export the model again")


def _kind(data_type: int) -> str:
    return str(TensorProto.DataType.Name(data_type)) if data_type in TensorProto.DataType.values() else f"number {data_type}"


def _bits(data_type: int) -> int | None:
    kind = _kind(data_type)
    narrow = next((int(bits) for bits, kinds in WIDTHS.items() if kind in kinds), None)
    if narrow is not None or kind in ("UNDEFINED", "STRING") or kind.startswith("number"):
        return narrow
    return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type)).itemsize) * 8


def _entry(tensor: TensorProto, key: str) -> str:
    return next((str(entry.value) for entry in tensor.external_data if entry.key == key), "")


def _location(tensor: TensorProto) -> str:
    return _entry(tensor, "location")


def _offset(tensor: TensorProto) -> int:
    return int(_entry(tensor, "offset") or 0)


def _length(tensor: TensorProto) -> int:
    return int(_entry(tensor, "length") or 0)
