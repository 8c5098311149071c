"""Ranges of 8-bit activations, chosen by their effect on the outputs of a model.

Outliers that matter little are clipped, and channels of small values that matter keep their levels; the squared error of the
activation itself reveals neither.  A range is alpha times that of all observed values.  Tensors are rounded in graph order, each
after those before it, because what one clips, another clips again after the next sum.  The mean error of each channel does not
count, because the biases of later layers compensate for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import onnx

from requant_onnx.graph.selections import with_outputs
from requant_onnx.numerics.activation import ActivationGrid
from requant_onnx.numerics.arrays import Float32Array
from requant_onnx.runtime.sensitivity import Outputs, names_to_compare, numbers_in, relative_error
from requant_onnx.runtime.stream import Chunk, Stream, constants_to_initializers

STEP = 0.85  # from one alpha to the next
PRODUCTS = {"MatMul", "Gemm"}  # their inputs have channels in the last dimension


def alphas_by_output(
    model: onnx.ModelProto,
    starts: Mapping[str, float],
    grid_at: Callable[[str, float], ActivationGrid],
    chunks: Sequence[Chunk],
    *,
    corrected: bool,
    goes_on: Callable[[int, int], bool] = lambda _done, _total: True,
) -> dict[str, float]:
    """The alpha of least output error for each tensor, searched in steps of STEP from its start.

    starts: tensor -> initial alpha, 0 < alpha <= 1.  grid_at: (tensor, alpha) -> grid.  chunks: chunks of inputs.  corrected:
    whether biases will compensate for the mean error of each channel.  goes_on: called before each tensor with the numbers of
    finished and of all tensors; once it returns False, the remaining tensors keep their start.
    """
    work = with_outputs(model, names_to_compare(model, chunks))
    constants_to_initializers(work)
    stream = Stream(work, chunks)
    exact = [numbers_in(outputs) for outputs in map(stream.rest(), stream.values)]
    last = {name for node in work.graph.node if node.op_type in PRODUCTS for name in node.input}
    alphas = dict(starts)
    found = ((position, name) for position, name in _tensors(work) if name in starts)
    for done, (position, name) in enumerate(found):
        if not goes_on(done, len(starts)):
            break
        stream.advance(position, {})
        if not all(name in chunk for chunk in stream.values):
            continue
        axis = None if not corrected else -1 if name in last else 1
        trial = _Trial(stream, name, exact, partial(grid_at, name), axis)
        alphas[name] = _descend(trial.error, starts[name])
        for chunk, rounded in zip(stream.values, trial.rounded(alphas[name]), strict=True):
            chunk[name] = rounded.astype(chunk[name].dtype)
    return alphas


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[int, str]]:
    """Inputs and results of nodes in order, each with the number of nodes that must run before it exists."""
    yield from ((0, item.name) for item in model.graph.input)
    yield from ((k, name) for k, node in enumerate(model.graph.node, 1) for name in node.output)


class _Trial:
    """A tensor of a stream, rounded on one grid after another.  axis: channel axis, None to count mean errors too."""

    def __init__(
        self, stream: Stream, name: str, exact: Outputs, grid_at: Callable[[float], ActivationGrid], axis: int | None
    ) -> None:
        self._name, self._exact, self._grid_at = name, exact, grid_at
        self._chunks, self._rest = stream.values, stream.rest()
        self._values = [np.asarray(chunk[name], np.float32) for chunk in stream.values]
        self._axis = axis if self._values[0].ndim > 1 else None

    def error(self, alpha: float) -> float:
        """The error of the outputs."""
        pairs = zip(self._chunks, self.rounded(alpha), strict=True)
        changed = ({**chunk, self._name: x.astype(chunk[self._name].dtype)} for chunk, x in pairs)
        return relative_error(self._exact, [numbers_in(self._rest(chunk)) for chunk in changed])

    def rounded(self, alpha: float) -> list[Float32Array]:
        """The values of each chunk, without the mean error of each channel."""
        grid = self._grid_at(alpha)
        rounded = [grid.rounded(x) for x in self._values]
        if self._axis is None:
            return rounded
        count = self._values[0].ndim
        others = tuple(k for k in range(count) if k != self._axis % count)
        sums = sum((made - x).sum(others, np.float64, keepdims=True) for x, made in zip(self._values, rounded, strict=True))
        places = sum(x.size // x.shape[self._axis] for x in self._values)
        mean = (np.asarray(sums) / max(1, places)).astype(np.float32)
        return [made - mean for made in rounded]


def _descend(error: Callable[[float], float], start: float) -> float:
    """The alpha at the local minimum of the error nearest to the start."""
    best, least = start, error(start)
    for factor in (STEP, 1 / STEP):
        while (alpha := min(1.0, best * factor)) != best and (found := error(alpha)) < least:
            best, least = alpha, found
        if best != start:
            break
    return best
