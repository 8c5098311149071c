"""The compressed size of a file with gzip, brotli and zstd, each at the highest level that all decoders support.

Brotli and zstd need an extra: pip install 'requant_onnx[download]'.
"""

from __future__ import annotations

import contextlib
import zlib

from requant_onnx.choices import OptimizeFor
from requant_onnx.errors import ConfigError

GZIP_LEVEL, GZIP_WINDOW = 9, 31  # wbits of zlib: the largest window, with a gzip header
BROTLI_QUALITY, BROTLI_WINDOW = 11, 24  # the largest window that browsers accept
ZSTD_LEVEL = 19  # the highest level whose window all decoders support
LARGEST_MEASURED = {OptimizeFor.GZIP: 1 << 28, OptimizeFor.BROTLI: 1 << 23, OptimizeFor.ZSTD: 1 << 25}  # bytes; each takes seconds
PACKERS = {"gz": "gzip", "br": "brotli", "zst": "zstd"}
EXTRA = "pip install 'requant_onnx[download]'"


def compress(data: bytes, aim: OptimizeFor) -> bytes:
    """The compressed data.  aim: any but OptimizeFor.FILE.  Raises ConfigError if the compressor is not installed."""
    if aim is OptimizeFor.GZIP:
        packer = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, GZIP_WINDOW)
        return packer.compress(data) + packer.flush()
    if aim is OptimizeFor.BROTLI:
        try:
            import brotli  # noqa: PLC0415
        except ImportError:
            raise _missing("brotli", aim) from None
        return bytes(brotli.compress(data, quality=BROTLI_QUALITY, lgwin=BROTLI_WINDOW))
    try:
        import zstandard  # noqa: PLC0415
    except ImportError:
        raise _missing("zstandard", aim) from None
    return bytes(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(data))


def download_sizes(data: bytes) -> dict[str, int]:
    """The compressed bytes of a file, by "gz", "br" and "zst", without compressors that are missing or would be too slow."""
    sizes = {}
    for aim, largest in LARGEST_MEASURED.items():
        if len(data) <= largest:
            with contextlib.suppress(ConfigError):
                sizes[aim.value.rpartition(":")[2]] = len(compress(data, aim))
    return sizes


def check_installed(aim: OptimizeFor) -> None:
    """Raise ConfigError if the compressor that `aim` needs is not installed."""
    if aim.compresses:
        compress(b"", aim)


def _missing(package: str, aim: OptimizeFor) -> ConfigError:
    return ConfigError(f"--optimize-for {aim} needs '{package}'; install it with: {EXTRA}, or choose download:gz")
