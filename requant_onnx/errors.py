"""The exceptions that requant_onnx raises on purpose.

RequantError (exit code 2 on the command line)
├── ConfigError   an option value that makes no sense
├── ModelError    the model file: missing, not ONNX, invalid, unsupported
│   ├── LoadError     ONNX Runtime does not load the model
│   └── ConvertedError    the model was converted already (exit code 3)
├── DataError     the images: missing, wrong shape, empty
├── QualityError  the result is there, and worse than asked for (exit code 3 after a conversion, 4 after a validation)
└── OutputError   the output path: same as the input, exists, not writable

Each message is one sentence that says what is wrong, where, and what to do instead.
"""

from __future__ import annotations

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


class QualityError(RequantError):
    """A result is worse than asked for.  code: exit code of the command line."""

    def __init__(self, message: str, code: int = 3) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[QualityError], tuple[str, int]]:
        """Pickled with its code, for other processes."""
        return type(self), (str(self), self.code)
