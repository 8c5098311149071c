"""python -m requant_onnx"""

import sys

from requant_onnx.cli import main

sys.exit(main())
