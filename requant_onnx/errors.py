"""The exceptions that requant_onnx raises on purpose.

RequantError (exit code 2 on the command line)
├── ConfigError   an option has an invalid value
├── ModelError    the model is missing, not ONNX, invalid or unsupported
│   ├── LoadError     ONNX Runtime does not load the model
│   └── ConvertedError    the model is already converted (exit code 3)
├── DataError     the inputs are missing, empty or of the wrong shape
├── QualityError  the result is below the required quality (exit code 3 after a conversion, 4 after a validation)
└── OutputError   the output path is the input, exists already or is not writable

Each message is one sentence that states what is wrong, where, and what to do.
"""

from __future__ import annotations

INTERRUPTED, INTERRUPTED_MESSAGE = 130, "interrupted; no file was left half-written"  # exit code after Ctrl-C, as in a shell


class RequantError(Exception):
    """Base class of all errors that requant_onnx raises on purpose."""


class ConfigError(RequantError, ValueError):
    """An option or argument has an invalid value."""


class ModelError(RequantError, ValueError):
    """The model cannot be read, or contains something that cannot be converted."""


class LoadError(ModelError):
    """ONNX Runtime does not load the model."""


class ConvertedError(ModelError):
    """The model is already converted; a second conversion would add a second error."""


class DataError(RequantError, ValueError):
    """The images or other inputs cannot be read, or do not fit the model."""


class OutputError(RequantError, OSError):
    """The output cannot or must not be written."""


class QualityError(RequantError):
    """A result is below the required quality.  code: exit code of the command line."""

    def __init__(self, message: str, code: int = 3) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type[QualityError], tuple[str, int]]:
        """Pickle the error with its code, for other processes."""
        return type(self), (str(self), self.code)
