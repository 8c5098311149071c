"""The command `python -m requant_onnx`, which is the same as `requant`."""

import sys

from requant_onnx.cli.start import run

sys.exit(run())
