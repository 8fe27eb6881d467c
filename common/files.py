"""Weight files and JSON files, which a killed process may have left incomplete."""

import hashlib
import io
import json
import os
import pickletools
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, TextIO

from safetensors import SafetensorError, safe_open

from common.errors import SaveError, UserError, disk_problem

TEXTS = ("a Git LFS pointer", "an HTML page", "text")  # kinds of text that are saved under the name of another file
PASSING = (".lock", "*.lock", "*.soft", "*.holder", "*.partial")  # written in an output folder by every program
WRITTEN = (  # by a training
    *("*.json", "*.jsonl", "*.txt", "*.md", "*.html", "*.csv", "*.log", "*.model", "*.jinja", "*.arrow"),
    *("*.bin", "*.safetensors", "*.pt", "*.pth"),
    *(*PASSING, "*.damaged", "runs", "held_out", "checkpoint-*", "merged"),
)
LARGEST_TABLE = 2**22  # bytes of the pickle that describes the tensors of a file: one of 6 billion weights has 2**16
OLD_PICKLES = 5  # in a file of torch before 1.6, before the bytes of its tensors
# The instructions that torch.save writes; none of them takes more memory than its own length.
INSTRUCTIONS = frozenset(
    "APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE BUILD EMPTY_DICT EMPTY_LIST "
    "EMPTY_SET EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK NEWFALSE NEWOBJ NEWTRUE NONE PROTO REDUCE SETITEM "
    "SETITEMS SHORT_BINSTRING STOP TUPLE TUPLE1 TUPLE2 TUPLE3".split()
)
# What a pickle may name: parts of tensors, states of random numbers, and what DeepSpeed stores in its checkpoints.
KNOWN_TYPES = re.compile(
    r"collections (OrderedDict|defaultdict)|torch (\w+Storage|Size|device|Tensor|u?int\d+|b?float\d+\w*|bool)"
    r"|torch\._utils _rebuild_(tensor(_v2)?|parameter|from_type_v2)|torch\._tensor _rebuild_from_type_v2"
    r"|torch\.storage UntypedStorage|torch\.nn\.parameter Parameter|_codecs encode"
    r"|numpy(\._?core\.multiarray)? (_reconstruct|scalar|ndarray|dtype)|numpy\.dtypes \w+DType"
    r"|torch_npu\.utils\.storage _rebuild_npu_tensor|torch_npu\.npu\._format Format"
    r"|deepspeed\.runtime\.zero\.config ZeroStageEnum|deepspeed\.utils\.tensor_fragment fragment_address"
    r"|deepspeed\.runtime\.fp16\.loss_scaler (LossScaler|DynamicLossScaler)"
)
BINARY = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")  # bytes that no text holds
LARGEST_TEXT = 2**26  # bytes of a JSON file, a vocabulary or a listing: three times the largest that is known
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them


def text_kind(file: Path) -> str:
    """The kind of text in a file, as in "a Git LFS pointer"; "" for binary content, and for an empty file."""
    with open(file, "rb") as content:
        beginning = content.read(512)
    if BINARY.search(beginning) or not beginning:
        return ""
    if beginning.startswith(b"version https://git-lfs"):
        return TEXTS[0]
    return TEXTS[1] if beginning.lstrip(b"\xef\xbb\xbf\r\n\t ").startswith(b"<") else TEXTS[2]


def is_complete(file: Path) -> bool:
    """Whether a weight file (.bin, .pt, .safetensors) has the length that its table of contents gives."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "np"):  # reads the table alone
                return True
        except SafetensorError:
            return False
    # torch writes zip files, whose table is at the end. Before version 1.6 it wrote pickles, which have no table.
    with open(file, "rb") as content:
        beginning = content.read(2)
    return zipfile.is_zipfile(file) if beginning == b"PK" else bool(beginning) and not text_kind(file)


def pickle_problem(file: Path) -> str:
    """What keeps a file of torch.save from being read, as in "holds code (posix.system)"; "" for tensors and settings.

    It looks at the instructions and follows none. torch checks code too, but not how much memory they take, and
    DeepSpeed follows all of them.
    """
    if file.suffix == ".safetensors":
        return ""
    size = file.stat().st_size
    try:
        if not zipfile.is_zipfile(file):
            with open(file, "rb") as content:
                return pickles_problem(io.BytesIO(content.read(LARGEST_TABLE)), OLD_PICKLES)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size for entry in entries):
                return "is compressed, or promises more than it holds"
            tables = [entry for entry in entries if entry.filename.endswith(".pkl")]
            if not tables or any(entry.file_size > LARGEST_TABLE for entry in tables):
                return "holds no table of weights, or one that is too large"
            problems = [pickles_problem(io.BytesIO(archive.read(entry)), 1) for entry in tables]
            return next(filter(None, problems), "")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError, IndexError):
        return "has a broken table of contents"


def pickles_problem(pickles: io.BytesIO, count: int) -> str:
    """``pickle_problem`` of ``count`` pickles, one after the other."""
    for _ in range(count):
        value: Any
        for instruction, value, _ in pickletools.genops(pickles):
            if instruction.name not in INSTRUCTIONS or "LONG_BIN" in instruction.name and value > LARGEST_TABLE:
                return f"holds the instruction {instruction.name}, which no weights need"
            if instruction.name == "GLOBAL" and not KNOWN_TYPES.fullmatch(value):
                return f"holds code or objects ({value.replace(' ', '.', 1):.80}) instead of weights alone"
    return ""


def check_no_text(file: Path, content: str = "weights", kinds: tuple[str, ...] = TEXTS) -> None:
    """Raises UserError for a file of a model that holds text of one of ``kinds`` instead of its ``content``."""
    if (kind := text_kind(file)) not in kinds:
        return
    name = file.parent.name if "glm" in file.parent.name.lower() else "NAME"
    again = "copy it again" if file.name.startswith("adapter_") else f"bash common/download.sh {name}"
    remedy = f"run git lfs pull, or {again}" if kind == TEXTS[0] else f"download it again, or {again}"
    raise UserError(f"{file} is {kind}, not the {content}: {remedy}.")


def check_complete(file: Path) -> None:
    """Raises UserError for a weight file that is missing, truncated or no weight file at all."""
    if not file.is_file():
        link = f"; the link leads to {os.readlink(file)}" if file.is_symlink() else ""
        raise UserError(f"{file} is missing{link}: copy or download it again.")
    check_no_text(file)
    if not is_complete(file):
        raise UserError(f"{file} is truncated ({file.stat().st_size:,} bytes): copy or download it again.")
    check_pickle(file)


def check_pickle(file: Path) -> None:
    """Raises UserError for a file of torch.save that can't be read without danger."""
    if problem := pickle_problem(file):
        raise UserError(f"{file} {problem}. Nothing of it was run: take .safetensors files, or download it again.")


def check_states(checkpoint: Path) -> None:
    """``check_pickle`` of all that a training reads from its checkpoint."""
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix in (".bin", ".pt", ".pth") and file.name != "training_args.bin" and file.is_file():
            check_pickle(file)


def short_hash(content: bytes) -> str:
    """A name for a cached folder: the first 24 hex digits of the SHA-256 of ``content``."""
    return hashlib.sha256(content).hexdigest()[:24]


def indexed_files(index: Path) -> list[Path] | None:
    """The weight files that an index names; None if it is missing or broken, or names files outside of its folder."""
    weight_map = (read_json(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(is_inside, weight_map.values())):
        return None
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, which may be missing. Raises UserError for a broken index.

    If a folder has both formats, the safetensors files count, because transformers reads those. Numbered shards count
    without their index too.
    """
    for index in sorted(folder.glob("*.index.json"))[:1]:  # model.safetensors… comes before pytorch_model.bin…
        if (named := indexed_files(index)) is None:
            check_no_text(index, "index of the weights", TEXTS[:2])
            raise UserError(f"{index} is broken: copy or download it again.")
        return named
    names = {file.name for file in folder.glob("*")}
    for whole in WHOLE_FILES:
        stem, suffix = os.path.splitext(whole)
        shards = [re.fullmatch(rf"{stem}-\d+-of-(\d+){suffix}", name) for name in names]
        count = max((int(shard[1]) for shard in shards if shard), default=0)
        if whole in names:
            return [folder / whole]
        if count:
            return [folder / f"{stem}-{number:05d}-of-{count:05d}{suffix}" for number in range(1, count + 1)]
    return []


def is_inside(name: object) -> bool:
    """Whether a name is that of a file in a folder or in the folders below it."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts


def read_json(file: Path) -> dict | None:
    """The object in a JSON file; None if the file is missing, broken, too large or holds another value."""
    try:
        if not file.is_file() or file.stat().st_size > LARGEST_TEXT:
            return None
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # Notepad writes the byte order mark
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def replaced(file: Path, encoding: str = "utf-8", newline: str | None = None) -> Iterator[TextIO]:
    """Text to write, which takes the place of the file in one step: a reader finds the old content or the new.

    Follows no link.
    """
    partial = file.with_suffix(f".{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "x", encoding=encoding, newline=newline) as text:
            yield text
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(file: Path, content: dict) -> None:
    """Replaces the file in one step."""
    with replaced(file) as text:
        text.write(json.dumps(content, ensure_ascii=False, indent=2))


def check_no_links(folder: Path, kinds: tuple[str, ...] = WRITTEN) -> None:
    """Raises UserError for a link under a name that a program writes in an output folder: it would write elsewhere.

    The folder itself may be a link, and so may a name that no program of ours writes.
    """
    written = [path for kind in kinds for path in folder.glob(kind)]
    below = [path for path in written if path.is_dir() and not path.is_symlink() for path in path.rglob("*")]
    if link := next((path for path in [*written, *below] if path.is_symlink()), None):
        raise UserError(f"{link} is a link to {os.readlink(link)}, which would be overwritten: remove the link.")


def gb(size: float) -> str:
    """A number of bytes as text for people, in GB."""
    return f"{size / 1e9:,.1f} GB"


def lack_of_room(folder: Path, needed: int) -> str:
    """Why ``needed`` bytes of weights have no room in a folder; "" if they have."""
    free = shutil.disk_usage(folder).free
    return f"{free / 1e6:,.1f} MB are free and {needed / 1e6:,.1f} MB are needed" if free < needed else ""


def clear(path: Path) -> None:
    """Deletes a file, or a folder with all that is in it; does nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def written(path: Path, remedy: str) -> Iterator[None]:
    """Where ``path`` can't be written whole it is deleted. Raises SaveError if the disk is full, read-only or fails."""
    try:
        yield
    except BaseException as error:
        clear(path)
        if isinstance(error, Exception) and (problem := disk_problem(error)):
            raise SaveError(f"{path} could not be written ({problem}): {remedy}.") from error
        raise
