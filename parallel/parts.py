"""Tensors in a checkpoint's files: parts of whole tensors, each with its region in the header of its file.

Any process can read any part of any tensor, whatever layout of processes wrote it. Files are mapped into memory,
so that only what is used of them is read.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parallel.regions import Region, covers
from relora.errors import ConfigError


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are missing, short or changed."""


def write_parts(path: Path, parts: Mapping[str, tuple[Region, Tensor]]) -> None:
    """Write one file of parts by the names of their tensors."""
    regions = {name: region.to_json() for name, (region, _) in parts.items()}
    tensors: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, (_, part) in parts.items():
        tensor = part.detach().cpu().contiguous()
        # safetensors refuses memory that has two names, such as a counter that parameters share.
        tensors[name] = tensor.clone() if tensor.data_ptr() in written else tensor
        written.add(tensor.data_ptr())
    save_file(tensors, path, metadata={"format": "pt", "regions": json.dumps(regions)})


class _Part(NamedTuple):
    region: Region
    file: Any


class StoredParts:
    """The tensors whose parts lie in some files of a folder."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        """Read the headers.

        Raises: DamagedCheckpoint when a file is missing or unreadable.
        """
        self._folder = folder
        self._parts: dict[str, list[_Part]] = defaultdict(list)
        for path in (folder / name for name in files):
            try:
                file: Any = safe_open(path, framework="pt")
                regions = json.loads(file.metadata()["regions"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
                raise DamagedCheckpoint(f"{path}: it is missing or unreadable") from error
            for name, values in regions.items():
                self._parts[name].append(_Part(Region.from_json(values), file))

    @property
    def names(self) -> list[str]:
        """All tensors, in alphabetical order."""
        return sorted(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor."""
        return self._of(name)[0].region.shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor's elements."""
        return self._read(name, self._of(name)[0]).dtype

    def whole(self, name: str) -> Tensor:
        """A tensor put together from its parts.

        Raises: DamagedCheckpoint when they are not all there.
        """
        parts = self._of(name)
        if not covers([part.region for part in parts]):
            raise self._incomplete(name)
        cuts = {part.region.cut_only for part in parts}
        entire = Region(parts[0].region.shape)
        if entire in cuts:
            return self._range(name, entire)
        whole = torch.empty(entire.shape, dtype=self.dtype(name))
        for cut in sorted(cuts, key=Region.to_json):
            cut.put(whole, self._range(name, cut))
        return whole

    def part(self, name: str, region: Region) -> Tensor:
        """What a region holds of a tensor; no more than that is read where the files have the same cut or none.

        Shapes: as `Region.take`.

        Raises: DamagedCheckpoint when it is not all there.
        """
        if region.cut_only in {part.region.cut_only for part in self._of(name)}:
            return self._range(name, region)
        return region.take(self.whole(name))

    def _of(self, name: str) -> list[_Part]:
        if name not in self._parts:
            raise ConfigError(f"{self._folder} holds no {name}: it is of another model, or of another phase of a run")
        return self._parts[name]

    def _incomplete(self, name: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"{self._folder}: its files hold only some parts of {name}")

    def _range(self, name: str, region: Region) -> Tensor:
        """A region from parts that were cut in the same way, each of which holds some range of that cut."""
        parts = [part for part in self._of(name) if part.region.cut_only == region.cut_only]
        pieces: list[Tensor] = []
        reached, stop = region.start, region.start + region.numel
        for part in sorted(parts, key=lambda part: part.region.start):
            begin, end = part.region.start, min(part.region.start + part.region.numel, stop)
            if begin <= reached < end:
                pieces.append(self._read(name, part).reshape(-1)[reached - begin : end - begin])
                reached = end
        if reached < stop:
            raise self._incomplete(name)
        if not pieces:
            pieces.append(self._read(name, parts[0]).reshape(-1)[:0])
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return flat if region.is_flat else flat.view(region.cut_shape)

    def _read(self, name: str, part: _Part) -> Tensor:
        tensor: Tensor = part.file.get_tensor(name)
        return tensor
