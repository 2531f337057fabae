"""Read and write volumes as TIFF stacks of 8-bit LZW pages through pillow; tifffile would need imagecodecs for LZW."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kaggle_mgpu.checkpoints import whole

SUFFIXES = (".tif", ".tiff")


def read_stack(path: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
    """Pages start ... stop - 1 of a TIFF stack, uint8 (pages, height, width). Only these are decoded.

    Raises:
        ValueError: not a readable stack of 8-bit pages of one size; the message names the path.
    """
    with _opened(path) as stack:
        stop = stack.n_frames if stop is None else stop
        out = np.empty((stop - start, stack.height, stack.width), np.uint8)
        for i in range(start, stop):
            stack.seek(i)
            _check_page(stack, path, i, (out.shape[2], out.shape[1]))
            out[i - start] = np.asarray(stack)
        return out


def shape_of(path: str) -> tuple[int, int, int]:
    """(pages, height, width) of a TIFF stack, from its page headers; raises as `read_stack` does."""
    with _opened(path) as stack:
        return stack.n_frames, stack.height, stack.width


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    from PIL import Image

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with Image.open(path, formats=["TIFF"]) as stack:
                _check_page(stack, path, 0, stack.size)
                yield stack
        # of a file that is cut off pillow only warns, and reads the pages there are
        for warning in said:
            if "PIL" in Path(warning.filename).parts:
                raise OSError(str(warning.message))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, EOFError, KeyError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable TIFF stack: {error}. Copy the file again.") from None


def _check_page(page: Any, path: str, number: int, size: tuple[int, int]) -> None:
    if page.mode != "L" or page.size != size:
        raise ValueError(
            f"{path}: page {number}: expected 8-bit grey of {size[0]} x {size[1]}, got mode {page.mode!r} of "
            f"{page.size[0]} x {page.size[1]}"
        )


def write_stack(path: Path, volume: NDArray[np.uint8]) -> None:
    """Write a volume (pages, height, width) as a TIFF stack of LZW pages: whole or not at all."""
    from PIL import Image

    pages = [Image.fromarray(page) for page in volume]
    # pillow reads back what it has written, to append
    with whole(path) as temporary, temporary.open("w+b") as file:
        pages[0].save(file, format="TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw")
