"""Examples of each command, shown at the end of its --help."""

from __future__ import annotations

from requant_onnx.cli.goals import GOALS
from requant_onnx.numerics.heads import HEADS

EXAMPLES = {
    None: """examples:
  requant convert net.onnx net8.onnx
  requant validate net.onnx net8.onnx --data cifar10:DIR
  requant inspect net.onnx
  requant help forms""",
    "convert": """examples:
  requant convert net.onnx net8.onnx
  requant convert net.onnx small.onnx --for web
  requant convert repo/onnx/model.onnx repo --for transformers.js
  requant convert net.onnx net4.onnx --bits 4 --json report.json
  requant convert net.onnx small.onnx --bits 4 --form folded --calibrate images.npz
  requant convert net.onnx small.onnx --bits auto --size 180kB --form folded --calibrate noise
  requant convert net.onnx small.onnx --max-drop 0.5 --data images:val --fit --calibrate images:photos --form folded
  requant convert net.onnx page.onnx --progressive --runtime web --calibrate images.npz
  requant convert net.onnx paper.onnx --bits 4 --recipe paper
  requant convert net.onnx fast.onnx --bits 4 --form int8 --calibrate images.npz --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
  requant convert net.onnx small.onnx --bits 4 --calibrate images:photos --resize 256 --crop 224
  requant convert net.onnx small.onnx --config requant.toml
  requant convert net.onnx max.onnx --bits 6 --granularity per-tensor --transform none --range max
goals for --for, and the options that each sets:
"""
    + "\n".join(
        f"  {name:<16}{goal.title}\n                  {' '.join(f'--{option} {value}' for option, value in goal.options.items())}"
        for name, goal in GOALS.items()
    ),
    "convert-many": """examples:
  requant convert-many zoo small --bits 4 --form folded --calibrate noise
  requant convert-many 'zoo/*/fp32/*.onnx' small --bits 4 --jobs 4
  requant convert-many zoo small --bits 4 --dask tcp://scheduler:8786
OUT_DIR/requant.jsonl gets one line of JSON for each model; repeating an interrupted command continues it""",
    "validate": """examples:
  requant validate net.onnx net8.onnx --data cifar10:cifar-10-batches-bin
  requant validate net.onnx net8.onnx --data images.npz --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225
  requant validate net.onnx net8.onnx --data images:imagenet/val --resize 256 --crop 224
  requant validate net.onnx net8.onnx --data inputs.npz --fail-below agreement=99,sqnr=20,latency=1.1
  requant validate yolo.onnx yolo8.onnx --data images:val2017 --letterbox 640 --labels instances_val2017.json --mean 0 --std 1
  requant validate yolox.onnx yolox8.onnx --data images:val --letterbox 640 --task detect:yolox --mean 0 --std 0.00392156862745098
each pixel becomes (pixel / 255 - mean) / std; for a model that takes raw values of 0..255: --mean 0 --std 0.00392156862745098
heads of detectors for --task detect:HEAD (r: recognized automatically):
"""
    + "\n".join(f"  {name:<16}{'r ' if head.is_recognized else '  '}{head.what}" for name, head in HEADS.items()),
    "help": """examples:
  requant help
  requant help forms""",
    "restore": """example:
  requant restore net4.onnx float.onnx""",
    "inspect": """examples:
  requant inspect net.onnx --json net.json
  requant inspect net.onnx --sensitivity --data images:val --fit""",
    "report": """examples:
  requant report net.onnx net4.onnx net4.html
  requant report net.onnx net4.onnx net4.html --data cifar10:cifar-10-batches-bin
  requant report net.onnx by_another_tool.onnx page.html --data images:val --resize 256 --crop 224""",
    "compare": """examples:
  requant compare net.onnx --data cifar10:cifar-10-batches-bin
  requant compare net.onnx --bits 4,3 --recipes max,paper,best --data images:val --resize 256 --crop 224 --calibrate images:photos
  requant compare net.onnx --html net.html --csv net.csv --dask tcp://scheduler:8786
recipes: max (one scale per tensor, full range), range (searched range), transform (square root, full range), paper (REQuant: square
root and searched range), channel (one searched scale per channel), best (like channel, refined on calibration inputs)""",
    "explain": """example:
  requant explain net4.onnx
each weight is float (stored as float), folded at load (decoded once, float speed), decoded every run (slow), or fused (an
integer kernel reads its codes)""",
}
