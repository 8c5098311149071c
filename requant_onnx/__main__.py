"""python -m requant_onnx"""

import sys

from requant_onnx.cli.start import run

sys.exit(run())
