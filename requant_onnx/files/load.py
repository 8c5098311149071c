"""Load a model from a path, a ModelProto, bytes or a file object, or raise ModelError with one sentence that gives the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import IO, TypeAlias

import onnx
from google.protobuf.message import DecodeError

from requant_onnx.errors import ModelError
from requant_onnx.files.external import check_tensors, check_texts, fetch, is_external, resolve, stored_bytes
from requant_onnx.files.walk import stored_tensors
from requant_onnx.files.wire import has_more_parts
from requant_onnx.text import first_line, is_unicode

Source: TypeAlias = "onnx.ModelProto | str | PathLike[str]"
ModelLike: TypeAlias = "Source | bytes | IO[bytes]"
MIN_OPSET = 7
MAX_OPSET = min(28, onnx.defs.onnx_opset_version())  # ONNX Runtime 1.32 has the operators of opset 28 and no newer one
MAX_BYTES = 2**31 - 1  # largest size of one protobuf message
MAX_PARTS = 1 << 20  # number of parts (see has_more_parts) of a model of 65,000 nodes
FETCHED_BYTES = 1 << 28  # external data up to this size are read with the model
LARGE_BYTES = MAX_BYTES - 2**26  # largest size of all initializers, which leaves 64 MB for the rest


def source_of(model: ModelLike) -> Source:
    """Turn a model into a source that can be read more than once: a path or a ModelProto is returned as it is, bytes are parsed.

    model: a path, a ModelProto, bytes, or a binary file object.
    Raises ModelError when the bytes cannot be read, are not an ONNX file or have too many parts, or the model is anything else.
    """
    if isinstance(model, onnx.ModelProto | str | PathLike):
        return model
    try:
        data: object = model.read() if hasattr(model, "read") else model
    except (OSError, ValueError) as error:  # a file that is closed, or not open for reading
        raise ModelError(f"the given file cannot be read ({first_line(error)}); open it in binary mode") from None
    data = bytes(data) if isinstance(data, bytearray | memoryview) else data
    if not isinstance(data, bytes):
        raise ModelError(f"a model must be a path, bytes, a ModelProto or a binary file object, not {type(model).__name__}")
    if has_more_parts(data, MAX_PARTS):
        raise _too_many_parts("the model")
    parsed = onnx.ModelProto()
    try:
        parsed.ParseFromString(data)
        return parsed
    except DecodeError:
        raise ModelError("the given bytes are not an ONNX file, or it is incomplete; export or download it again") from None


Runs: TypeAlias = "Callable[[Source], bool]"


def load_model(source: ModelLike) -> onnx.ModelProto:
    """Load a model as `load_checked`, and raise ModelError for every model that the onnx checker rejects."""
    return load_checked(source)[0]


def load_checked(source: ModelLike, runs: Runs | None = None) -> tuple[onnx.ModelProto, str]:
    """Load and check a model.  Returns it, for the caller to change, and the objection of the onnx checker, "" for none.

    source: as for `source_of`; a ModelProto is copied.
    runs: tells whether a runtime runs the source; such a model is loaded even if the checker rejects it (default: never).
    Initializers with more than FETCHED_BYTES of external data in total stay in their files; see `materialize`.
    Raises ModelError when it is missing, not ONNX, damaged, invalid, or of an opset outside MIN_OPSET .. MAX_OPSET.
    """
    source = source_of(source)
    if isinstance(source, onnx.ModelProto):
        name, model, path = "the model", onnx.ModelProto(), None
        model.CopyFrom(source)
    else:
        name, path = f"'{source}'", Path(source)
        model = _parse(path)
    check_texts(model, name)
    _check_head(model, name)
    check_tensors(model, name)
    outside = next((tensor for tensor in stored_tensors(model) if is_external(tensor)), None)
    if outside is not None and path is None:
        raise ModelError(
            f"the values of '{outside.name}' are in a file that cannot be found from {name} alone; give the path of the model"
        )
    stays = path is not None and resolve(model, path, name) > FETCHED_BYTES
    for tensor in stored_tensors(model, skip_main=stays):
        fetch(tensor)
    complaint = ""
    if not stays and not is_large(model):
        complaint = _complaint(model)
    elif path is not None and is_unicode(str(path)):  # a model that is too large is read by the checker, with its data files
        complaint = _complaint(str(path))
    if complaint and not (runs is not None and runs(source)):
        raise ModelError(f"{name} is not valid ONNX ({complaint}); export it again")
    return model, complaint


@dataclass(frozen=True)
class LoadedModel:
    """A model that has been read and checked.

    source: path or ModelProto that ONNX Runtime opens.  proto: its contents, which must not be changed.
    complaint: objection of the onnx checker, "" for none.
    """

    source: Source
    proto: onnx.ModelProto
    complaint: str = ""

    @classmethod
    def of(cls, model: ModelLike | LoadedModel, runs: Runs | None = None) -> LoadedModel:
        """Read and check a model; a LoadedModel is returned as it is.  runs: see `load_checked`.  Raises ModelError as it does."""
        if isinstance(model, LoadedModel):
            return model
        source = source_of(model)
        return cls(source, *load_checked(source, runs))

    @property
    def label(self) -> str:
        """The path, or "the model" if there is none."""
        return "the model" if isinstance(self.source, onnx.ModelProto) else str(self.source)

    @property
    def name(self) -> str:
        """The label for use in a sentence: a path is quoted."""
        return self.label if isinstance(self.source, onnx.ModelProto) else f"'{self.label}'"

    @property
    def bytes(self) -> int:
        """The size in bytes of the file with its external data, or of the serialized model."""
        return self.source.ByteSize() if isinstance(self.source, onnx.ModelProto) else file_bytes(Path(self.source))

    def copy(self) -> onnx.ModelProto:
        """A copy of the contents, which may be changed."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        return model


def materialize(model: onnx.ModelProto) -> onnx.ModelProto:
    """Read all external data into the model.  Changes and returns `model`.  Raises ModelError when a data file cannot be read."""
    for tensor in stored_tensors(model):
        fetch(tensor)
    return model


def whole(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all its values in memory: the given model, or a copy if it has external data.  Raises as `materialize`."""
    if not any(is_external(tensor) for tensor in stored_tensors(model)):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return materialize(copy)


def is_large(model: onnx.ModelProto) -> bool:
    """Whether the model may be too large for one protobuf message; such a model has no ByteSize and cannot be serialized."""
    return sum(stored_bytes(item) for item in model.graph.initializer) > LARGE_BYTES


def load_skeleton(path: str | PathLike[str]) -> onnx.ModelProto:
    """The model of a file without its external data, unchecked.  Raises ModelError when it is missing, damaged or not ONNX."""
    return _parse(Path(path))


USUAL = 320  # pixels per side where a model leaves it free
IMAGE_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.UINT8)


def noise_size(path: Path) -> tuple[int, int] | None:
    """The (height, width) in pixels of images for a model whose only input is (n, c, h, w) or (n, h, w, c) with 1 to 4 channels.

    A side that the model leaves free has USUAL pixels, which the usual strides of a network divide.  Returns None for any other
    model.  Raises ModelError as `load_skeleton`.
    """
    shapes = list(input_shapes(path).items())
    if len(shapes) != 1 or len(shapes[0][1]) != 4:
        return None
    (name, (_, *rest)) = shapes[0]
    kinds = [item.type.tensor_type.elem_type for item in load_skeleton(path).graph.input if item.name == name]
    first, last = rest[0] in range(1, 5), rest[2] in range(1, 5)
    if kinds[0] not in IMAGE_TYPES or not (first or last):
        return None
    height, width = rest[1:] if first else rest[:2]
    return height or USUAL, width or USUAL


def input_shapes(path: Path) -> dict[str, tuple[int | None, ...]]:
    """The shape of each required input, by name, with None for a free size.  Raises ModelError as `load_skeleton`."""
    graph = load_skeleton(path).graph
    stored = {item.name for item in graph.initializer}
    inputs = [item for item in graph.input if item.name not in stored]
    return {item.name: tuple(d.dim_value if d.dim_value > 0 else None for d in item.type.tensor_type.shape.dim) for item in inputs}


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operator set; 0 if the model imports none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def data_files(path: Path) -> list[Path]:
    """The paths of a model's external data files; none if the file is not a model."""
    try:
        stat = path.stat()
        return [path.parent / name for name in _locations(path, stat.st_mtime_ns, stat.st_size)]
    except (ModelError, OSError, ValueError):
        return []


@lru_cache(maxsize=8)
def _locations(path: Path, mtime_ns: int, size: int) -> tuple[str, ...]:  # noqa: ARG001  # a file that has changed is parsed again
    outside = {
        entry.value
        for tensor in stored_tensors(_parse(path))
        if is_external(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(outside))


def file_bytes(path: Path) -> int:
    """The size of a model file and its external data files, in bytes."""
    return path.stat().st_size + sum(file.stat().st_size for file in data_files(path))


def _parse(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise ModelError(f"'{path}' is a directory; give the .onnx file in it")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModelError(f"'{path}' is larger than 2 GB, more than one ONNX file can hold; give the exported .onnx file")
        if has_more_parts(path, MAX_PARTS):
            raise _too_many_parts(f"'{path}'")
        return onnx.load(path, format="protobuf", load_external_data=False)
    except ModelError:
        raise
    except FileNotFoundError:
        raise ModelError(f"'{path}' does not exist; give the path of an .onnx file") from None
    except OSError as error:
        raise ModelError(f"cannot read '{path}' ({error.strerror or error}); check the path and its permissions") from None
    except DecodeError:
        raise ModelError(f"'{path}' is not an ONNX file or is incomplete; export or download it again") from None
    except ValueError as error:  # a path with a null byte
        raise ModelError(f"'{path}' cannot be loaded ({first_line(error)}); check the path") from None


def _too_many_parts(name: str) -> ModelError:
    return ModelError(f"{name} has more than {MAX_PARTS:,} parts (nodes, attributes, names, ...), more than are supported")


def _check_head(model: onnx.ModelProto, name: str) -> None:
    if not (model.graph.node or model.graph.initializer or model.graph.output):
        raise ModelError(f"{name} contains no ONNX graph; give a file exported as .onnx")
    opset = opset_of(model)
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ModelError(
            f"{name} uses opset {opset}, but only opsets {MIN_OPSET} to {MAX_OPSET} are supported; export it with another opset"
        )


def _complaint(model: onnx.ModelProto | str) -> str:
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, DecodeError) as error:
        return first_line(error)
    return ""
