"""The exceptions that requant_onnx raises on purpose.

RequantError (exit code 2 on the command line)
├── ConfigError   an option value that makes no sense
├── ModelError    the model file: missing, not ONNX, invalid, unsupported
│   ├── LoadError     ONNX Runtime does not load the model
│   └── ConvertedError    the model was converted already (exit code 3)
├── DataError     the images: missing, wrong shape, empty
└── OutputError   the output path: same as the input, exists, not writable

Each message is one sentence that says what is wrong, where, and what to do instead.
"""

INTERRUPTED, INTERRUPTED_MESSAGE = 130, "interrupted; no file was left half-written"  # exit code, as of a shell, after Ctrl-C


class RequantError(Exception):
    """Base class: catch this to catch every error requant_onnx raises on purpose."""


class ConfigError(RequantError, ValueError):
    """An option has a value outside its domain."""


class ModelError(RequantError, ValueError):
    """The model cannot be read, or holds something that cannot be converted."""


class LoadError(ModelError):
    """ONNX Runtime does not load the model."""


class ConvertedError(ModelError):
    """The model was converted already; a second conversion would add a second error."""


class DataError(RequantError, ValueError):
    """The images cannot be read, or do not fit the model."""


class OutputError(RequantError, OSError):
    """The output cannot or must not be written."""
