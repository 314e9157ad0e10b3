"""Tensors of safetensors files, mapped into memory instead of read."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their names in the files. Tensors of other dtypes are copied at once."""

LENGTH_BYTES = 8
"""Size of the number before a file's header, which is the header's size."""


class MappedFiles:
    """The tensors of ``paths``. A page of a file takes memory from its first use on.

    These pages belong to the system's cache of files: workers of one machine share them.
    ``release`` takes them out of this process; a later use reads them again. Tensors that are not
    aligned to their dtype are copied at once. Raises what ``safe_open`` raises for a damaged file.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._maps: list[tuple[int, mmap.mmap]] = []  # each with the address of its first byte
        for path in paths:
            self._add(path)

    def _add(self, path: Path) -> None:
        # The library refuses a damaged header or length.
        with safe_open(path, framework="pt") as checked, path.open("rb") as file:
            # Private and writable, as torch wants it. Nothing writes: released pages are the
            # file's.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            begin = LENGTH_BYTES + int.from_bytes(mapped[:LENGTH_BYTES], "little")
            header = json.loads(mapped[LENGTH_BYTES:begin])
            for name in checked.keys():  # noqa: SIM118 - no mapping
                entry = header[name]
                dtype = DTYPES.get(entry["dtype"])
                size = entry["shape"]
                first, end = (begin + offset for offset in entry["data_offsets"])
                if dtype is None or 0 in size or first % dtype.itemsize:
                    self.tensors[name] = checked.get_tensor(name).clone()  # it maps the file, too
                    continue
                values = torch.frombuffer(
                    mapped, dtype=dtype, count=(end - first) // dtype.itemsize, offset=first
                )
                self.tensors[name] = values.reshape(size)
        address = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
        self._maps.append((address, mapped))

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of all floating-point tensors, if it is one of half precision."""
        dtypes = {t.dtype for t in self.tensors.values() if t.is_floating_point()}
        return next(iter(dtypes)) if dtypes in ({torch.float16}, {torch.bfloat16}) else None

    def release(self, tensors: Iterable[torch.Tensor]) -> None:
        """Release the pages of those ``tensors`` that are still in the files, and not copies."""
        for tensor in tensors:
            for address, mapped in self._maps:
                first = tensor.data_ptr() - address
                if 0 <= first < len(mapped):
                    end = first + tensor.nbytes
                    first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
                    length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
                    if length > 0:
                        mapped.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        """Forget the files. A file stays mapped until no tensor is in it any more."""
        self.tensors.clear()
        self._maps.clear()
