"""Models in the protobuf wire format, written without a second copy of their values.

https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from requant_onnx.files.external import chunks_of, is_external, stored_bytes

Buffer: TypeAlias = "mmap.mmap | bytes"
SMALL_BYTES = 1 << 22  # a file up to this size takes at most 0.4 GB when it is parsed, whatever its parts
FIXED = {1: 8, 5: 4}  # wire type -> bytes of a value


def pieces_of(model: onnx.ModelProto) -> Iterator[bytes]:
    """The serialized model in pieces, including external data of its initializers.  Raises ModelError as `chunks_of`."""
    rest, graph = onnx.ModelProto(), onnx.GraphProto()
    copy_fields(model, rest, but="graph")
    copy_fields(model.graph, graph, but="initializer")
    heads = []
    for tensor in model.graph.initializer:
        head = onnx.TensorProto()
        copy_fields(tensor, head, but="raw_data")
        size = stored_bytes(tensor)
        if is_external(tensor):
            head.ClearField("data_location")
            del head.external_data[:]
        encoded = head.SerializeToString(deterministic=True)
        encoded += _tag(tensor, "raw_data", size) if size or tensor.HasField("raw_data") else b""
        heads.append((_tag(graph, "initializer", len(encoded) + size) + encoded, size))
    nodes = graph.SerializeToString(deterministic=True)
    yield rest.SerializeToString(deterministic=True)
    yield _tag(model, "graph", len(nodes) + sum(len(head) + size for head, size in heads))
    yield nodes
    for tensor, (encoded, _) in zip(model.graph.initializer, heads, strict=True):
        yield encoded
        yield from chunks_of(tensor)


def copy_fields(source: Any, target: Any, but: str) -> None:
    """Copy all fields of a message except one."""
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if isinstance(value, (str, bytes, int, float)):
            setattr(target, field.name, value)
        elif hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        else:
            getattr(target, field.name).CopyFrom(value)


def has_more_parts(source: Path | bytes, limit: int) -> bool:
    """Whether a serialized model has more than `limit` messages, strings and other values, counted without creating them.

    A file of tiny parts takes a hundred times its size in memory when it is parsed.  Returns False for up to SMALL_BYTES, and
    counts data that are not protobuf up to the first error.
    """
    if (len(source) if isinstance(source, bytes) else source.stat().st_size) <= SMALL_BYTES:
        return False
    if isinstance(source, bytes):
        return _exceeds(source, limit)
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _exceeds(data, limit)


def _exceeds(data: Buffer, limit: int) -> bool:
    try:
        return any(count > limit for count, _ in enumerate(_parts(data), 1))
    except IndexError:
        return False


def _parts(data: Buffer) -> Iterator[None]:
    waiting = [(0, len(data), onnx.ModelProto.DESCRIPTOR)]
    while waiting:
        at, end, message = waiting.pop()
        fields = message.fields_by_number
        while at < end:
            key, at = _varint(data, at)
            kind = key & 7
            yield
            if kind == 2:
                size, at = _varint(data, at)
                field = fields.get(key >> 3)
                if field is not None and field.message_type is not None and size:
                    waiting.append((at, at + size, field.message_type))
                at += size
            elif kind == 0:
                _, at = _varint(data, at)
            else:
                at += FIXED.get(kind, end)


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    """Read a varint: (value, index after it).  Raises IndexError where there is none."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise IndexError(at)


def _tag(message: Any, field: str, length: int) -> bytes:
    """The bytes before a length-delimited field: field number with wire type 2, and length, as varints."""
    coded = b""
    for rest in [message.DESCRIPTOR.fields_by_name[field].number << 3 | 2, length]:
        sevens = [rest >> k & 127 for k in range(0, max(rest.bit_length(), 1), 7)]
        coded += bytes([*(seven | 128 for seven in sevens[:-1]), sevens[-1]])
    return coded
