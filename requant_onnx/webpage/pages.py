"""Reports as web pages.  Needs the extra: pip install 'requant_onnx[report]'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from requant_onnx.convert.report import QuantReport
from requant_onnx.errors import ConfigError
from requant_onnx.evaluate.page_data import Asked, study
from requant_onnx.evaluate.recipes import Comparison
from requant_onnx.files.load import ModelLike, source_of
from requant_onnx.inputs.calibration import Calibration
from requant_onnx.inputs.images import ImageSet, Normalization
from requant_onnx.progress import Progress


def html_report(
    reference: ModelLike,
    candidate: ModelLike,
    images: ImageSet | None = None,
    normalization: Normalization | None = None,
    *,
    calibration: Calibration | None = None,
    data: str = "",
    used: bool = False,
    task: str | None = None,
    conversion: QuantReport | None = None,
    settings: Sequence[tuple[str, str]] = (),
    progress: Progress | None = None,
) -> str:
    """Make a self-contained web page that shows the error and the cost of each weight.  Returns the page as HTML.

    reference, candidate: path, ModelProto, bytes or binary file object; any tool may have made the candidate.
    images: images on which the models are compared, with labels for accuracy.  normalization: normalization of uint8 images.
    calibration: other inputs instead of images, such as inputs by name or noise of a given size.  Without both, noise is used if
    the model takes images of a known size.
    data: name of the inputs on the page.  used: whether the conversion also used them, which the page then states.
    task: detect:HEAD or values, as in `validate`.  conversion: report of the conversion, if there was one.
    settings: (title, text) pairs with the settings that made the file.  progress: callback for progress.
    Raises ModelError and DataError as `validate`; ConfigError if the extra `report` is not installed.
    """
    require()
    from requant_onnx.webpage.report_page import render  # noqa: PLC0415

    if images is not None:
        calibration = Calibration(images, normalization, len(images))
    studied = study(source_of(reference), source_of(candidate), Asked(calibration, data, used, task), progress)
    return render(replace(studied, conversion=conversion, settings=settings), progress)


def html_comparison(comparison: Comparison, name: str, settings: Sequence[tuple[str, str]] = ()) -> str:
    """Make a web page with the table and the charts of a comparison.  Raises ConfigError if the extra `report` is not installed."""
    require()
    from requant_onnx.webpage.recipes_page import render_comparison  # noqa: PLC0415

    return render_comparison(comparison, name, settings)


def require() -> None:
    """Raise ConfigError if the extra `report` is not installed."""
    try:
        import requant_onnx.webpage.report_page  # noqa: F401, PLC0415
    except ImportError as error:
        raise ConfigError(f"a web page needs '{error.name}'; install it with: pip install 'requant_onnx[report]'") from None
