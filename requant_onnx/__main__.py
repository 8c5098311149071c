"""python -m requant_onnx"""

import sys

from requant_onnx.cli.main import run

sys.exit(run())
