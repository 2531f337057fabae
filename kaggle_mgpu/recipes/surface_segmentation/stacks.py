"""Read volumes from TIFF stacks of 8-bit or 16-bit grey pages, and write 8-bit LZW pages, through pillow.

(tifffile would need imagecodecs for LZW.) The recipe works in voxels; a voxel spacing in the file is ignored.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaggle_mgpu.checkpoints import atomically

Array = NDArray[Any]
IGNORED = 2
"""The value of voxels without annotation in labels."""
SUFFIXES = (".tif", ".tiff")
DTYPES = {"L": np.uint8, "I;16": np.uint16, "I;16L": np.uint16, "I;16B": np.uint16}
"""The dtype for each of pillow's modes: 8-bit grey, and 16-bit grey in either byte order."""


def read_stack(path: str, start: int = 0, stop: int | None = None) -> Array:
    """Return pages start ... stop - 1 of a TIFF stack, uint8 or uint16 (pages, height, width); decode only these.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a readable stack of grey pages of one size and bit depth; the message names the path.
    """
    with _opened(path) as stack:
        stop = stack.n_frames if stop is None else stop
        out = np.empty((stop - start, stack.height, stack.width), DTYPES[stack.mode])
        mode = stack.mode
        for i in range(start, stop):
            stack.seek(i)
            _check_page(stack, path, i, (out.shape[2], out.shape[1]), mode)
            out[i - start] = np.asarray(stack)
        return out


def shape_of(path: str) -> tuple[int, int, int]:
    """Return (pages, height, width) of a TIFF stack, from its page headers; raises as `read_stack` does."""
    with _opened(path) as stack:
        return stack.n_frames, stack.height, stack.width


def bytes_of(path: str) -> int:
    """Return the bytes of a whole decoded TIFF stack, from its page headers; raises as `read_stack` does."""
    with _opened(path) as stack:
        return int(stack.n_frames * stack.height * stack.width * np.dtype(DTYPES[stack.mode]).itemsize)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    from PIL import Image

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with Image.open(path, formats=["TIFF"]) as stack:
                _check_page(stack, path, 0, stack.size, "L" if stack.mode not in DTYPES else stack.mode)
                yield stack
        # pillow only warns about a truncated file, and reads the remaining pages
        for warning in said:
            if "PIL" in Path(warning.filename).parts:
                raise OSError(str(warning.message))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, EOFError, KeyError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable TIFF stack: {error}. Copy the file again.") from None


def _check_page(page: Any, path: str, number: int, size: tuple[int, int], mode: str) -> None:
    if page.mode != mode or page.size != size:
        depth = "8-bit or 16-bit" if number == 0 else f"{8 * np.dtype(DTYPES[mode]).itemsize}-bit"
        raise ValueError(
            f"{path}: page {number}: expected {depth} grey of {size[0]} x {size[1]}, got mode {page.mode!r} of "
            f"{page.size[0]} x {page.size[1]}"
        )


def write_stack(path: Path, volume: NDArray[np.uint8]) -> None:
    """Write a volume (pages, height, width) as a TIFF stack of LZW pages, atomically."""
    from PIL import Image

    pages = [Image.fromarray(page) for page in volume]
    # w+b: pillow also reads the file, to append pages
    with atomically(path) as temporary, temporary.open("w+b") as file:
        pages[0].save(file, format="TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw")
