"""python -m requant_onnx"""

import sys

from requant_onnx.cli.main import main

sys.exit(main())
