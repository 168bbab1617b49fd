"""The tensors of a checkpoint, one at a time, so that a model larger than the memory can be read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gemma_tune.errors import UserError
from gemma_tune.plan.facts import read_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Weights(Protocol):
    """Named tensors of a model. Names are those of the checkpoint (`export.names.core_name` makes them comparable)."""

    def names(self) -> Sequence[str]:
        """All names, in the order of the files."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype:
        """As it is stored; what was changed may come out of `read` in fp32."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. The caller may keep it, but must not write into it."""


class CheckpointFiles:
    """The safetensors files of a model folder.

    Nothing is read but the headers; `read` maps one tensor, and its file stays open until the next `read` wants
    another, so that no more than one file's pages count as ours.

    Args:
        folder: of a complete model.

    Raises:
        UserError: a file is damaged, cut or missing, the index names a tensor that is not there, or the weights are
            quantised already.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place: dict[str, str] = {}
        self._facts: dict[str, tuple[tuple[int, ...], str]] = {}
        self._open: tuple[str, Any] | None = None
        if read_json(folder / "config.json").get("quantization_config"):
            raise UserError(
                "the weights of this model are quantised already",
                where=str(folder),
                fix="use the original 16-bit model",
            )
        for shard in self.shards():
            self._look_into(shard)
        self._check_index()

    def shards(self) -> list[str]:
        """Names of the weight files, in order."""
        return sorted(set(self._index().values())) or [SINGLE]

    def names(self) -> list[str]:
        return list(self._place)

    def names_in(self, shard: str) -> list[str]:
        """The tensors of one file, in its order."""
        return [name for name, place in self._place.items() if place == shard]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._facts[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return dtype_of(self._facts[name][1], str(self.folder / self._place[name]))

    def read(self, name: str) -> torch.Tensor:
        shard = self._place[name]
        if self._open is None or self._open[0] != shard:
            from safetensors import safe_open

            self._open = None
            with refusing_damage(self.folder / shard):
                self._open = (shard, safe_open(str(self.folder / shard), "pt"))
        with refusing_damage(self.folder / shard):
            return self._open[1].get_tensor(name)

    def _index(self) -> dict[str, str]:
        file = self.folder / INDEX
        if not file.is_file():
            return {}
        index = dict(read_json(file).get("weight_map", {}))
        if odd := next((name for name in index.values() if Path(name).name != name or name in ("", "..")), None):
            raise UserError(
                f"it names the file {odd!r}, which lies elsewhere", where=str(file), fix="download it again"
            )
        if (self.folder / SINGLE).is_file() and SINGLE not in index.values():
            raise UserError(
                f"there are {SINGLE} and {INDEX}: transformers reads the first, others the second",
                where=str(self.folder),
                fix="remove the one that does not belong there",
            )
        return index

    def _look_into(self, shard: str) -> None:
        file = self.folder / shard
        if not file.is_file():
            raise UserError(f"{shard} is missing", where=str(self.folder), fix="fetch the complete model")
        for name, (shape, dtype) in header_of(file).items():
            self._place[name] = shard
            self._facts[name] = (shape, dtype)

    def _check_index(self) -> None:
        for name, shard in self._index().items():
            if self._place.get(name) != shard:
                raise UserError(
                    f"{INDEX} says that {name} is in {shard}, which does not hold it",
                    where=str(self.folder),
                    fix="download the files of the model again, all of one revision",
                )


def header_of(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype as safetensors writes it, e.g. BF16) of a file, in the order of its data.

    Raises:
        UserError: it is no safetensors file, or it is cut.
    """
    from safetensors import safe_open

    with refusing_damage(file), safe_open(str(file), "pt"):  # compares the sizes in the header with the file's
        pass
    with file.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    header.pop("__metadata__", None)
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
    return {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in ordered}


@contextmanager
def refusing_damage(file: Path) -> Iterator[None]:
    """What safetensors raises about a damaged file, with its place and what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as exc:
        raise UserError(f"it is damaged: {exc}", where=str(file), fix="copy or download the file again") from exc


def dtype_of(name: str, where: str = "") -> torch.dtype:
    """The torch type of a type's name in a safetensors header.

    Raises:
        UserError: it is no type of plain weights.
    """
    import torch

    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    known |= {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}
    if name not in known:
        raise UserError(f"it holds tensors of type {name}", where=where, fix="use the original 16-bit model")
    return known[name]
