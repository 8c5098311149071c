"""The terms of a page, which are explained on hover and in a list at its end."""

from __future__ import annotations

TERMS = {
    "SQNR": "Signal-to-quantization-noise ratio in decibels: 10 log10 of the power of the float values over that of the error. "
    "At 20 dB, the error is 10 % of the values; at 40 dB, 1 %.",
    "output SQNR": "The SQNR of the output of a layer or of the model. Above 20 dB, answers rarely change.",
    "alone": "The output SQNR of the float model in which only this weight is quantized: the cost of the weight by itself.",
    "agreement": "The share of inputs for which both models give the same answer. It needs no labels, and does not show whether "
    "the answer is right.",
    "top-1 accuracy": "The share of images whose highest score belongs to the right class.",
    "mAP": "Mean average precision of detections, over classes and overlaps from 0.5 to 0.95, as COCO defines it.",
    "standard error": "The spread of a figure over other inputs of the same kind. A change within it is not significant.",
    "latency": "The time of one run: the lower quartile over interleaved blocks of runs, on the machine that made this page.",
    "coverage": "The share of the bytes of all float constants that was converted.",
    "code": "The small integer that is stored for a weight. A weight of 4 bits has 16 different codes.",
    "level": "The value for which a code stands. Quantization replaces each weight by a level.",
    "scale": "The number by which codes are multiplied to give levels; one for each tensor, or one for each output channel.",
    "calibration": "Running the float model on inputs without labels, by which rounding, biases and ranges are then chosen.",
    "noise": "Synthetic images with the statistics of natural images, for calibration without data.",
    "bias correction": "A change of the biases of a layer by the mean error that rounded weights cause in its output.",
    "feedback": "Rounding weights one after another, where each makes up for the error of those before it (as in GPTQ).",
    "descent": "Changing single codes, and fitting the scales, as long as this reduces the error of the layer's output.",
    "refinement": "Bias correction, feedback and descent together.",
    "QDQ": "QuantizeLinear and DequantizeLinear, the standard operators for quantized values in ONNX.",
    "VNNI": "Instructions of x86 CPUs for sums of products of 8-bit integers. Without them, integer kernels saturate.",
    "alpha": "The range factor: the share of the full range of a channel that its levels span. Values beyond it are clipped.",
    "transform": "The function of the weights after which levels are evenly spaced. The square root puts more levels near zero.",
    "folded at load": "ONNX Runtime decodes the weight once, when it loads the model, so runs are as fast as in float.",
    "decoded every run": "ONNX Runtime decodes the weight again in every run, which takes time.",
    "fused": "An integer kernel multiplies the codes directly, without decoding.",
    "mean IoU": "The intersection over union of the pixels of each class in both answers, averaged over the classes.",
}
"""The explanations by term, in sentences."""
