"""Old ``.bin`` weights, converted once to safetensors, which every process of a machine maps instead of reading.

Mapped weights lie in the page cache, once for all ranks. So do those of a zip-format .bin; of a plain pickle, the
oldest kind, each rank would hold a copy of its own.
"""

import os
import shutil
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from common.errors import UserError, say
from common.files import gb, indexed_files, short_hash, write_json
from common.locking import cache_folder, guard

CONVERT_FROM = 64 * 2**20  # bytes; a smaller checkpoint costs nobody anything as it is


def weights_folder(folder: Path) -> Path:
    """Where the weights of a model folder are read from: the folder itself, or the safetensors made of its .bin files.

    One job converts, the others wait for it. Where that can't be done, the folder itself is read.
    Raises UserError for a .bin file that can't be read.
    """
    files = bin_files(folder)
    size = sum(file.stat().st_size for file in files)
    if not files or size < CONVERT_FROM or os.environ.get("CONVERT_WEIGHTS", "").lower() == "false":
        return folder
    target, others = conversion_of(files)
    if target.is_dir():
        return target
    with guard("converted weights", files[0].resolve().parent):
        if target.is_dir():  # made by whom we waited for
            return target
        for other in others:
            shutil.rmtree(other)
        return convert(folder, files, size, target)


def bin_files(folder: Path) -> list[Path]:
    """The .bin files that transformers would read: it prefers safetensors, and one file to several."""
    if any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return []
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    return indexed_files(folder / WEIGHTS_INDEX_NAME) or []


def conversion_of(files: list[Path]) -> tuple[Path, list[Path]]:
    """The folder of their conversion, and what else lies there of these files: of older content, or never finished."""
    stats = [file.stat() for file in files]
    place = short_hash(str([str(file.resolve()) for file in files]).encode())
    content = short_hash(str([(stat.st_size, stat.st_mtime_ns) for stat in stats]).encode())
    cache = cache_folder() / "weights"
    target = cache / f"{place}-{content}"
    return target, [found for found in cache.glob(f"{place}-*") if found != target]


def convert(folder: Path, files: list[Path], size: int, target: Path) -> Path:
    """Makes ``target``, whole or not at all, and returns it; or the folder itself, where the disk does not allow it."""
    target.parent.mkdir(exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < size:
        say(f"{folder} is read as it is: as safetensors it takes {gb(size)}, and {target.parent} has {gb(free)} left.")
        return folder
    say(f"converting {folder} to safetensors, once: {gb(size)} in {target} (CONVERT_WEIGHTS=false to do without)")
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir()
    weight_map: dict[str, str] = {}
    try:
        for file in files:
            shard = partial / f"{file.stem}.safetensors"
            tensors = storable(read_bin(file))
            save_file(tensors, shard, metadata={"format": "pt"})
            flush(shard)
            weight_map |= dict.fromkeys(tensors, shard.name)
        write_json(partial / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        say(f"{folder} is read as it is: it can't be converted ({error}).")
        return folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what a failure leaves
    return target


def read_bin(file: Path) -> dict[str, Tensor]:
    """Its tensors, mapped and not read; only plain pickles, the oldest kind, can't be mapped."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # what is no pickle fails in any way
        raise UserError(f"{file} can't be read ({type(error).__name__}): copy or download it again.") from error
    return {name: tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}


def storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: contiguous, and no two in one storage, as tied weights are."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        shared = storage in seen
        seen.add(storage)
        result[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return result


def flush(file: Path) -> None:
    """To the disk: else the folder's name could outlive a power cut that its content does not."""
    with open(file, "rb") as content:
        os.fsync(content.fileno())
