"""ONNX Runtime sessions for any model, sessions with suitable options for a converted file, and optimized graphs."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnxruntime

from requant_onnx.choices import Form, Int8Levels
from requant_onnx.errors import ConfigError, LoadError, ModelError
from requant_onnx.files.load import LoadedModel, ModelLike, is_large, load_checked, load_skeleton, source_of, whole
from requant_onnx.graph.decode.forms import FORMS
from requant_onnx.graph.decode.replace import settings_of
from requant_onnx.numerics.arrays import GenericArray
from requant_onnx.runtime.cpu import adds_exactly
from requant_onnx.runtime.version import runtime_version
from requant_onnx.text import first_line, is_unicode

Session: TypeAlias = onnxruntime.InferenceSession
CUSTOM_OPS = "REQUANT_CUSTOM_OPS"  # environment variable, inherited by child processes: paths of libraries
PROVIDER = "REQUANT_PROVIDER"  # likewise: name of an execution provider
CPU = "CPUExecutionProvider"


def use_custom_ops(*libraries: str | os.PathLike[str]) -> None:
    """Register libraries of custom operators with every later session, in this process and its child processes.

    libraries: paths, as for onnxruntime.SessionOptions.register_custom_ops_library; they replace those of earlier calls.
    Raises ConfigError if one cannot be loaded.  https://onnxruntime.ai/docs/reference/operators/add-custom-op.html
    """
    for library in libraries:
        _register(onnxruntime.SessionOptions(), library)
    os.environ[CUSTOM_OPS] = os.pathsep.join(os.path.abspath(library) for library in libraries)


def use_provider(name: str | None) -> None:
    """Run models on an execution provider of the installed ONNX Runtime from now on, in this process and its child processes.

    Calibration, self-checks and validation run on it; operators that it lacks run on the CPU.  Constants of a model are always
    computed on the CPU, and `explain` always describes the CPU.  Results differ by the rounding of the provider.

    name: name of the provider in upper or lower case, with or without "ExecutionProvider", for example "cuda"; None: the CPU.
    Raises ConfigError if ONNX Runtime has no such provider.  https://onnxruntime.ai/docs/execution-providers/
    """
    os.environ[PROVIDER] = CPU if name is None else _provider(name)


def provider_in_use() -> str:
    """The full name of the current execution provider."""
    return os.environ.get(PROVIDER, CPU)


def fingerprint() -> str:
    """Text that identifies what runs models: the version of ONNX Runtime, the provider, and the custom operator libraries."""
    digests = (hashlib.sha256(Path(library).read_bytes()).hexdigest() for library in _libraries())
    return " ".join([runtime_version(), provider_in_use(), *digests])


def _libraries() -> list[str]:
    return [path for path in os.environ.get(CUSTOM_OPS, "").split(os.pathsep) if path]


def _provider(name: str) -> str:
    short: dict[str, str] = {full.removesuffix("ExecutionProvider").lower(): full for full in onnxruntime.get_available_providers()}
    wanted = name.lower().removesuffix("executionprovider")
    if wanted not in short:
        raise ConfigError(
            f"ONNX Runtime {onnxruntime.__version__} has no execution provider '{name}'; it has {', '.join(sorted(short))}; "
            "install the ONNX Runtime package for it, for example onnxruntime-gpu"
        )
    return short[wanted]


def _register(options: onnxruntime.SessionOptions, library: str | os.PathLike[str]) -> None:
    try:
        options.register_custom_ops_library(os.fspath(library))
    except Exception as error:  # onnxruntime raises many types of its own
        text = f"ONNX Runtime cannot load '{library}' as a library of custom operators ({first_line(error)}); check the path"
        raise ConfigError(text) from None


def quiet_options() -> onnxruntime.SessionOptions:
    """Default options with the custom operator libraries, but without warnings: those of the optimizer do not help users."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for library in _libraries():
        _register(options, library)
    return options


def optimized_graph(model: onnx.ModelProto | str | os.PathLike[str], name: str, folder: Path) -> tuple[str, onnx.ModelProto]:
    """The version of ONNX Runtime, and the model optimized with default options.  folder: directory for a temporary file.

    Raises ModelError when the model does not load.
    """
    options = quiet_options()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    start_session(serialized(model, name), name, options)
    return onnxruntime.__version__, onnx.load(folder / "optimized.onnx", load_external_data=False)


PRECISION = "session.x64quantprecision"


def load_session(model: ModelLike, options: onnxruntime.SessionOptions | None = None) -> onnxruntime.InferenceSession:
    """Open an InferenceSession with the options that suit the form of a converted model, on the current provider (default: CPU).

    qdq files decode at load (`session.disable_quant_qdq`), for float speed.  int8 files with levels up to 127 do not saturate on
    CPUs without VNNI (`session.x64quantprecision`).  Any other file gets default options.
    model: path, ModelProto, bytes or binary file object.  options: session options to start from.
    Raises ModelError if the model does not load.
    """
    options = options or quiet_options()
    source = source_of(model)
    settings = settings_of(source if isinstance(source, onnx.ModelProto) else load_skeleton(source)) or {}
    form = next((form for form in Form if form.value == settings.get("form")), None)
    for entry in () if form is None else FORMS[form].session_options:
        options.add_session_config_entry(*entry)
    name = "the model" if isinstance(source, onnx.ModelProto) else f"'{source}'"
    full = form is not None and FORMS[form].on_integers and settings.get("int8_levels") == Int8Levels.FULL.value
    if full and not adds_exactly():
        options.add_session_config_entry(PRECISION, "1")
        with contextlib.suppress(LoadError):  # ONNX Runtime 1.32 fails when a second node reads the same weight
            return start_session(serialized(source, name), name, options, provider_in_use())
        options.add_session_config_entry(PRECISION, "0")
    return start_session(serialized(source, name), name, options, provider_in_use())


def open_session(model: onnx.ModelProto, name: str) -> onnxruntime.InferenceSession:
    """A session with default options on the current provider.  Raises ModelError when the model does not load."""
    return start_session(serialized(model, name), name, quiet_options(), provider_in_use())


def open_cpu_session(model: onnx.ModelProto, name: str) -> onnxruntime.InferenceSession:
    """A session with default options on the CPU, for constants.  Raises ModelError when the model does not load."""
    return start_session(serialized(model, name), name, quiet_options())


def run_session(
    session: onnxruntime.InferenceSession, name: str, outputs: list[str] | None, feed: Mapping[str, GenericArray]
) -> list[Any]:
    """The named outputs (None: all).  Raises ModelError when the model does not accept the feed."""
    try:
        return list(session.run(outputs, dict(feed)))
    except Exception as error:  # onnxruntime raises many types of its own
        sizes = ", ".join("x".join(map(str, getattr(values, "shape", "?"))) for values in feed.values())  # sequences have none
        raise ModelError(f"{name} fails in ONNX Runtime on inputs with shapes {sizes} ({first_line(error)})") from None


def start_session(
    source: bytes | str, name: str, options: onnxruntime.SessionOptions, provider: str = CPU
) -> onnxruntime.InferenceSession:
    """Start a session.  source: a serialized model, or the path of a file.

    Raises LoadError if the model does not load, ConfigError if the provider does not start.
    """
    try:
        session = onnxruntime.InferenceSession(source, options, providers=list(dict.fromkeys((provider, CPU))))
    except Exception as error:  # onnxruntime raises many types of its own
        raise LoadError(f"{name} does not load in ONNX Runtime {onnxruntime.__version__} ({first_line(error)})") from None
    if provider not in session.get_providers():
        raise ConfigError(f"{provider} does not start on this machine; install its libraries, or use another --provider")
    return session


def serialized(model: onnx.ModelProto | str | os.PathLike[str], name: str) -> bytes | str:
    """The `source` of `start_session`.  Raises ModelError for a ModelProto above 2 GB.

    ONNX Runtime opens only paths that are Unicode text, so a file with another path is read here, with its external data.
    """
    if not isinstance(model, onnx.ModelProto):
        if is_unicode(str(model)):
            return str(model)
        model = whole(load_checked(model, lambda _: True)[0])
    if is_large(model):
        raise ModelError(f"{name} is larger than 2 GB, more than ONNX Runtime can load from memory; save it and give its path")
    data: bytes = model.SerializeToString()
    return data


def load_runnable(model: ModelLike | LoadedModel) -> LoadedModel:
    """Read and check a model; one that ONNX Runtime loads is valid even if onnx's checker rejects it.

    Raises ModelError if it is damaged, or if both reject it.
    """
    return LoadedModel.of(model, runs)


def runs(source: onnx.ModelProto | str | os.PathLike[str]) -> bool:
    """Whether ONNX Runtime loads a model.  source: the model, or the path of a file."""
    try:
        start_session(serialized(source, "the model"), "the model", quiet_options())
    except ModelError:
        return False
    return True
