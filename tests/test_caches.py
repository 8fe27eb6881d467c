"""Prepared rows that are damaged are made again, with one line; where they can't be written nothing is left behind."""

import errno
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_data import ROWS, adgen, prepare, write_lines

from common.errors import SaveError
from common.manifest import damage
from common.training.evaluation import write_rows as write_answers


def flip(file: Path) -> None:
    """Changes one bit in the middle."""
    found = bytearray(file.read_bytes())
    found[len(found) // 2] ^= 1
    file.write_bytes(found)


def flip_in_silence(file: Path) -> None:
    """Changes one bit, and neither size nor time."""
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def make_folder(file: Path) -> None:
    file.unlink()
    (file / "other").mkdir(parents=True)


def rewrite(text: str) -> Callable[[Path], None]:
    return lambda file: None if file.write_text(text) else None


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "flipped in silence": flip_in_silence,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "deleted": os.unlink,
    "a folder": make_folder,
    "broken JSON": rewrite('{"files": {'),
    "no object": rewrite("[1]"),
    "without keys": rewrite('{"files": {}}'),
    "other types": rewrite('{"files": {"rows.arrow": 7}}'),
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["rows.arrow", "questions.arrow", "summary.json", "manifest.json"])
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_rows_are_tokenized_again(how, name, cache, tmp_path, demo_tokenizer, capsys):
    file = write_lines(tmp_path / "rows.json", ROWS)

    def rows() -> tuple[bool, list, list]:
        found = prepare(adgen(), file, demo_tokenizer, "validation")
        return found.cached, found.rows.to_list(), found.questions.to_list()

    _, *expected = rows()
    assert rows() == (True, *expected)
    (folder,) = (cache / "datasets").iterdir()
    DAMAGES[how](folder / name)
    assert rows() == (False, *expected)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and re.match(rf"note: {folder}: {name} .*: the rows are tokenized again", lines[0]), lines
    assert rows() == (True, *expected)
    assert not damage(folder)


def test_a_file_in_place_of_the_folder_is_replaced(cache, tmp_path, demo_tokenizer):
    file = write_lines(tmp_path / "rows.json", ROWS)
    prepare(adgen(), file, demo_tokenizer)
    (folder,) = (cache / "datasets").iterdir()
    shutil.rmtree(folder)
    folder.write_text("")
    assert not prepare(adgen(), file, demo_tokenizer).cached


def test_no_file_is_read_again_that_is_as_it_was(cache, tmp_path, demo_tokenizer, monkeypatch):
    file = write_lines(tmp_path / "rows.json", ROWS)
    prepare(adgen(), file, demo_tokenizer)
    prepare(adgen(), file, demo_tokenizer)
    monkeypatch.setattr("common.data.sealed.damage", lambda *args: pytest.fail("it was read"))
    assert prepare(adgen(), file, demo_tokenizer).cached
    for record in (cache / "checked").iterdir():
        flip(record)
    monkeypatch.undo()
    monkeypatch.setenv("CHATGLM_CACHE", str(cache))
    assert prepare(adgen(), file, demo_tokenizer).cached


@contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the kernel refuses the next one, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_full_disk_leaves_nothing_of_prepared_rows(cache, tmp_path, demo_tokenizer):
    small, large = write_lines(tmp_path / "small.json", ROWS), write_lines(tmp_path / "large.json", ROWS * 300)
    prepare(adgen(), small, demo_tokenizer)
    before = names(cache / "datasets")
    with pytest.raises(SaveError, match=rf"{cache}/datasets/\w+ could not be written \(File too large\): make room"):
        with full_disk(30_000):
            prepare(adgen(), large, demo_tokenizer)
    assert names(cache / "datasets") == before
    assert prepare(adgen(), small, demo_tokenizer).cached
    assert len(prepare(adgen(), large, demo_tokenizer).rows) == 900


def test_a_full_disk_leaves_the_answers_of_before(tmp_path):
    file = tmp_path / "generated_predictions.txt"
    write_answers(file, [{"labels": "", "predict": "白色"}])
    with pytest.raises(SaveError, match="generated_predictions.partial could not be written"), full_disk(1000):
        write_answers(file, [{"labels": "", "predict": "白色"}] * 1000)
    assert file.read_text() == '{"labels": "", "predict": "白色"}\n'
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_other_words_for_a_full_disk(code, cache, tmp_path, demo_tokenizer, monkeypatch):
    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("common.data.dataset.seal", fail)
    with pytest.raises(SaveError, match=re.escape(os.strerror(code))):
        prepare(adgen(), write_lines(tmp_path / "rows.json", ROWS), demo_tokenizer)
    assert not names(cache / "datasets")
