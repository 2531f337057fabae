"""Write tensors and text atomically, flushed to disk, with checksums.

    replace_tensors(path, model.state_dict())    # writes a .safetensors file; read_tensors(path) returns the tensors
    pieces = Buffer().hold({"model": layout})    # copies the bytes of such a file now; a thread writes the copy later

All writing goes through `write`, in large pieces, so that other threads run meanwhile, and with a checksum.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DiskFullError

# Names of types in .safetensors files (https://huggingface.co/docs/safetensors), which are little-endian like the CPU
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip
_PIECE = 1 << 23


@dataclass(frozen=True)
class Layout:
    """The header of a .safetensors file, and each tensor's place in the file."""

    header: bytes
    tensors: list[Tensor]
    offsets: list[int]
    """Where each tensor's bytes begin, counted from the file's first byte."""
    nbytes: int
    """The whole file's length."""

    @classmethod
    def of(cls, named: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Layout:
        """Return the layout of a file with these tensors and metadata; tied weights (same memory) are written once.

        The metadata lists the other names of tied weights, and `read_tensors` returns a tensor for every name.

        Raises:
            TypeError: a tensor has a type that the format does not support.
        """
        first: dict[tuple[Any, ...], str] = {}
        aliases: dict[str, str] = {}
        unique: dict[str, Tensor] = {}
        for name, tensor in named.items():
            key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if tensor.numel() and key in first:
                aliases[name] = first[key]
                continue
            if tensor.dtype not in _DTYPES:
                raise TypeError(f"{name} is of type {tensor.dtype}, which a .safetensors file cannot hold")
            first[key] = name
            unique[name] = tensor.detach()
        # Wide types come first, so that each tensor lies at a multiple of its own width.
        order = sorted(unique, key=lambda name: -unique[name].itemsize)
        entries: dict[str, Any] = {}
        notes = {**(metadata or {}), **({"aliases": json.dumps(aliases)} if aliases else {})}
        if notes:
            entries["__metadata__"] = notes
        position = 0
        offsets = []
        for name in order:
            tensor = unique[name]
            size = tensor.numel() * tensor.itemsize
            entries[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, position + size],
            }
            offsets.append(position)
            position += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        return cls(header, [unique[name] for name in order], [len(header) + o for o in offsets], len(header) + position)

    def pieces(self) -> Iterable[Any]:
        """Yield the file's content: the header, then the bytes of one tensor at a time."""
        yield self.header
        for tensor in self.tensors:
            yield _bytes_of(tensor.cpu().contiguous())


class Buffer:
    """Reuse host memory for every save, since allocating memory takes longer than the copy itself.

    Memory for a GPU's tensors is page-locked, so that copies have the bus's full speed. torch rounds each page-locked
    piece up to a power of two (CachingHostAllocator): 9 GB in one piece would take 16 of Kaggle's 31 GB. A
    page-locked buffer therefore consists of pieces whose lengths are powers of two.
    """

    SMALLEST = 1 << 20
    """Bytes of the smallest page-locked piece; the size of a page-locked buffer is rounded up to a multiple of this."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []

    def hold(self, layouts: Mapping[str, Layout]) -> dict[str, list[memoryview]]:
        """Copy the files' content into the buffer; the returned views of each file are valid until the next call."""
        starts: dict[str, int] = {}
        size = 0
        for name, layout in layouts.items():
            # padding before the header, so that the tensors after the header begin at a multiple of 64 bytes
            starts[name] = size + -(size + len(layout.header)) % 64
            size = starts[name] + layout.nbytes
        tensors = [tensor for layout in layouts.values() for tensor in layout.tensors]
        self._reserve(size, any(tensor.device.type == "cuda" for tensor in tensors))
        copies: list[tuple[Tensor, Tensor]] = []
        for name, layout in layouts.items():
            header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
            parts = [(header, 0), *zip(layout.tensors, layout.offsets, strict=True)]
            for tensor, offset in parts:
                places = self._between(starts[name] + offset, tensor.numel() * tensor.itemsize)
                if len(places) == 1:
                    copies.append((places[0].view(tensor.dtype).view(tensor.shape), tensor))
                elif places:  # the tensor spans several pieces
                    sizes = [len(place) for place in places]
                    rows = tensor.contiguous().view(-1).view(torch.uint8).split(sizes)
                    copies += zip(places, rows, strict=True)
        _copy(copies)
        for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
            torch.cuda.synchronize(device)
        return {
            name: [place.numpy().data for place in self._between(starts[name], layout.nbytes)]
            for name, layout in layouts.items()
        }

    def _between(self, start: int, length: int) -> list[Tensor]:
        """Return the parts of the pieces that hold `length` bytes from `start` on."""
        found = []
        for piece in self._pieces:
            if length > 0 and start < len(piece):
                found.append(piece[start : start + length])
                length -= len(found[-1])
            start = max(start - len(piece), 0)
        return found

    def _reserve(self, size: int, pinned: bool) -> None:
        if sum(map(len, self._pieces)) >= size and all(piece.is_pinned() == pinned for piece in self._pieces):
            return
        self._pieces.clear()  # frees the old memory before the new is allocated
        if pinned:
            rounded = -(-size // self.SMALLEST) * self.SMALLEST
            lengths = [1 << bit for bit in reversed(range(rounded.bit_length())) if rounded >> bit & 1]
            try:
                self._pieces += [torch.empty(length, dtype=torch.uint8, pin_memory=True) for length in lengths]
                return
            except RuntimeError:  # the limit of page-locked memory is reached: use ordinary memory, which is slower
                pass
        self._pieces = [torch.empty(size, dtype=torch.uint8)]


def _copy(copies: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second tensor of each pair into the first; several threads copy large CPU tensors (1.2 x as fast)."""
    pieces: list[tuple[Tensor, Tensor]] = []
    for target, source in copies:
        if source.device.type == "cpu" and source.is_contiguous():
            step = _PIECE // source.itemsize
            pieces += zip(target.reshape(-1).split(step), source.reshape(-1).split(step), strict=True)
        else:
            target.copy_(source, non_blocking=True)
    if sum(target.nbytes for target, _ in pieces) < 4 * _PIECE:
        for target, source in pieces:
            target.copy_(source)
        return
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda piece: piece[0].copy_(piece[1]), pieces):
            pass


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def write(path: Path, pieces: Iterable[Any]) -> dict[str, int]:
    """Write bytes-like pieces to a file and flush to disk; return {"bytes": length, "crc32": checksum}.

    Raises:
        DiskFullError: there is no room.
        OSError: writing failed for another reason.
    """
    size = crc = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                part = rest[:_PIECE]
                written = os.write(descriptor, part)
                crc = zlib.crc32(part[:written], crc)
                size += written
                rest = rest[written:]
        os.fsync(descriptor)
    except OSError as error:
        raise no_room(path, error) or error from None
    finally:
        os.close(descriptor)
    return {"bytes": size, "crc32": crc}


def no_room(path: Path, error: OSError, needed: int | None = None) -> DiskFullError | None:
    """Return a DiskFullError with the free and `needed` bytes if `error` means a full disk or quota; else None."""
    if isinstance(error, DiskFullError):
        return error
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    wanted = "" if needed is None else f"{needed:,} bytes needed, "
    return DiskFullError(error.errno, f"the disk is full: {wanted}{free_bytes(path.parent):,} free", str(path))


def free_bytes(folder: Path) -> int:
    """Return the bytes free for this user on the folder's disk."""
    return shutil.disk_usage(folder).free


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file as memory maps; tied weights appear under each of their names.

    Raises:
        safetensors.SafetensorError: the file is damaged or has another format.
    """
    return read_with_metadata(path)[0]


def read_with_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a .safetensors file as `read_tensors` does, and the metadata in its header."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = file.metadata() or {}
    aliases = json.loads(metadata.get("aliases", "{}"))
    return {**tensors, **{name: tensors[first] for name, first in aliases.items()}}, metadata


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor of a .safetensors file, from its header alone.

    Raises:
        ValueError: the file is not a .safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path.name} is not a safetensors file: its header would be {length} bytes long")
        entries = json.loads(file.read(length))
    notes = entries.pop("__metadata__", {})
    aliases = json.loads(notes.get("aliases", "{}"))
    found = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    # If the rows of a tensor are in several files, "shards" has the shape of the full tensor.
    found |= {name: tuple(shape) for name, (shape, _) in json.loads(notes.get("shards", "{}")).items()}
    return {**found, **{name: found[first] for name, first in aliases.items()}}


def replace_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    """Write tensors as a .safetensors file atomically: the old file stays until the new file is complete."""
    layout = Layout.of(named)
    replace(path, layout.pieces(), layout.nbytes)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, flushed to disk."""
    content = text.encode()
    replace(path, [content], len(content))


_LEFT_BEHIND = 3600.0
"""Age in seconds from which a temporary file counts as left by a killed process and is removed."""


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; when the `with` block succeeds, flush the file and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name has the process id, so that two processes can write the same file at the same time.
    temporary = path.with_name(f".writing-{os.getpid()}-{path.name}")
    for left in path.parent.glob(f".writing-*-{glob.escape(path.name)}"):  # left by a killed process
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - _LEFT_BEHIND:
                left.unlink()
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def replace(path: Path, pieces: Iterable[Any], needed: int) -> dict[str, int]:
    """Write a file atomically: the old file stays until the new file is complete; return the same as `write`.

    Raises:
        DiskFullError: there is no room for the `needed` bytes.
        OSError: writing failed for another reason.
    """
    try:
        with atomically(path) as temporary:
            return write(temporary, pieces)
    except OSError as error:
        if full := no_room(path, error):
            full.strerror = f"the disk is full: {needed:,} bytes needed, {free_bytes(path.parent):,} free"
            raise full from None
        raise


def flush(path: Path) -> None:
    """Flush a file or a folder to disk (fsync); a crash can leave an unflushed file without its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    """Return the checksum of a file's content."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_PIECE):
            value = zlib.crc32(chunk, value)
    return value


# pack and unpack store nested state without pickle: the tensors of a .safetensors file, and JSON in its metadata
def pack(tree: Any) -> tuple[dict[str, Tensor], str]:
    """Return the tensors in a tree by their paths ("optimizer/state/weight/exp_avg"), and the rest of the tree as JSON.

    Raises:
        TypeError: the tree holds something other than tensors, plain values, lists, tuples and dictionaries, or a
            dictionary has a key that is neither text nor a whole number.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return {"tensor": path}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, dict):
            return {"dict": [[key_of(k, path), plain(v, f"{path}/{k}" if path else str(k))] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [plain(item, f"{path}/{i}" if path else str(i)) for i, item in enumerate(value)]}
        raise TypeError(
            f"{path} is a {type(value).__name__}: a checkpoint holds only tensors, numbers, text, lists and "
            f"dictionaries"
        )

    def key_of(key: Any, path: str) -> Any:
        if isinstance(key, str | int) and not isinstance(key, bool):
            return key
        raise TypeError(f"{path} has the key {key!r}: expected text or a whole number")

    return tensors, json.dumps(plain(tree, ""))


def unpack(tensors: Mapping[str, Tensor], text: str) -> Any:
    """Return the tree for which `pack` returned `tensors` and `text`."""

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            ((kind, content),) = value.items()
            if kind == "tensor":
                return tensors[content]
            if kind == "dict":
                return {key: restored(item) for key, item in content}
            return (list if kind == "list" else tuple)(restored(item) for item in content)
        return value

    return restored(json.loads(text))
