"""The weights of a model folder, one after the other, and the shards that they are written to."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from common.manifest import flush
from common.models.registry import ModelFolder
from common.models.tensors import read_weights

Weights = Iterable[tuple[str, Tensor]]
"""(name, weight), one after the other: of no more than one file is anything in memory."""


def stored_weights(folder: ModelFolder) -> Iterator[tuple[str, Tensor]]:
    """The weights under their original names, mapped; without the frequencies that every program computes."""
    for file in folder.weights:
        yield from ((name, weight) for name, weight in read_weights(file).items() if "inv_freq" not in name)


def write_shards(
    weights: Weights, folder: Path, whole: str, limit: int, save: Callable[[dict[str, Tensor], Path], None]
) -> None:
    """Writes weights to files of at most ``limit`` bytes, or one weight, and their index.

    ``whole``: the name of the file if one is enough, as transformers looks for it: model.safetensors.
    """
    stem, dot, suffix = whole.rpartition(".")
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def write() -> None:
        file = folder / f"{stem}-{len(shards)}{dot}{suffix}"
        save(shard, file)
        flush(file)
        shards.append(list(shard))
        shard.clear()

    for name, weight in weights:
        if shard and sum(each.nbytes for each in shard.values()) + weight.nbytes > limit:
            write()
        shard[name] = weight
        total += weight.nbytes
    write()
    names = [f"{stem}-{number:05d}-of-{len(shards):05d}{dot}{suffix}" for number in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [whole]
    for number, name in enumerate(names):
        (folder / f"{stem}-{number}{dot}{suffix}").rename(folder / name)
    if len(shards) > 1:
        weight_map = {weight: name for name, shard in zip(names, shards, strict=True) for weight in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{whole}.index.json").write_text(json.dumps(index, indent=2))


def converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that shares no memory with another weight."""
    return weight.to(dtype, copy=True).contiguous()
