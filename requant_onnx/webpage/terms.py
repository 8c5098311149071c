"""The terms of a page, explained: on hover, and in a list at its end."""

from __future__ import annotations

TERMS = {
    "SQNR": "Signal-to-quantization-noise ratio in decibels: 10 log10 of the power of the float values over that of the error. "
    "20 dB is an error of 10 % of the values, 40 dB of 1 %.",
    "output SQNR": "The SQNR of what a layer, or the model, computes; above 20 dB answers rarely change.",
    "alone": "The output SQNR of the float model in which only this weight is quantized: what the weight costs by itself.",
    "agreement": "The share of inputs for which both models give the same answer. It needs no labels, and does not tell whether "
    "the answer is right.",
    "top-1 accuracy": "The share of images whose highest score is that of the right class.",
    "mAP": "Mean average precision of detections, over classes and over overlaps from 0.5 to 0.95, as COCO defines it.",
    "standard error": "How far a figure would scatter with other inputs of the same kind; a change within it is no change.",
    "latency": "Time of one run: lower quartiles over interleaved blocks of runs on the machine that made this page.",
    "coverage": "The share of the bytes of all float constants that was converted.",
    "alpha": "The range factor: the share of the full range of a channel that its levels span; what lies beyond is clipped.",
    "transform": "Levels are evenly spaced after this function of the weights: the square root puts more of them near zero.",
    "folded at load": "ONNX Runtime decodes the weight once, when it loads the model: runs are as fast as in float.",
    "decoded every run": "ONNX Runtime decodes the weight again at every run, which takes time.",
    "fused": "An integer kernel multiplies with the codes themselves.",
    "mean IoU": "Intersection over union of the pixels of each class in both answers, the mean over the classes.",
}
"""Term -> what it means, in sentences."""
