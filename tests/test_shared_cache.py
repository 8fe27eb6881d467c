"""The cache where several users meet: in one folder for all, in another user's, or where there is none."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from shell import ROOT

NOBODY = 65534
# Holds a lock of the cache and prints the cache's folder. With arguments it opens a file of that name instead.
USE = """
import sys
from common.errors import exit_on_user_error
from common.locking import cache_folder, guard
with exit_on_user_error():
    if sys.argv[1:]:
        open(sys.argv[1], "w")
    with guard("data set", "/some/folder"):
        print(cache_folder())
"""


def use(cache: Path | None, *arguments: object, user: int = NOBODY, **variables: str) -> subprocess.CompletedProcess:
    """Runs the program above as another user; only root can do that."""
    environ = {"PATH": os.environ["PATH"], **({"CHATGLM_CACHE": str(cache)} if cache else {}), **variables}
    return subprocess.run(
        [sys.executable, "-B", "-c", USE, *map(str, arguments)],
        cwd=ROOT, env=environ, user=user, group=user, extra_groups=[], capture_output=True, text=True,
    )  # fmt: skip


def folder_of(done: subprocess.CompletedProcess) -> Path:
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def error_of(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "saved before" not in done.stderr, done.stderr
    return done.stderr.strip()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that other users can reach, other than pytest's."""
    if os.geteuid():
        pytest.skip("only root can start a program as another user")
    if not os.stat(ROOT).st_mode & stat.S_IXOTH:
        pytest.skip(f"other users can't read {ROOT}")
    folder = Path(tempfile.mkdtemp(prefix="shared-cache-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def shared(place) -> Path:
    (place / "cache").mkdir()
    (place / "cache").chmod(0o1777)
    return place / "cache"


@pytest.mark.parametrize("locks", ["native", "soft"])
@pytest.mark.parametrize("order", [(0, NOBODY, 1234), (NOBODY, 0, 1234)])
def test_users_share_a_folder(shared, order, locks):
    """The first one takes it, the others get folders inside; so it stays."""
    expected = [shared, *(shared / f"user-{user}" for user in order[1:])]
    for _ in range(2):
        assert [folder_of(use(shared, user=user, CHATGLM_LOCKS=locks)) for user in order] == expected


def test_a_cache_of_an_earlier_version_is_shared_too(shared):
    for name in ("locks", "datasets"):
        (shared / name).mkdir()
    assert folder_of(use(shared)) == shared / f"user-{NOBODY}"
    assert folder_of(use(shared, user=0)) == shared


def test_a_cache_that_is_open_to_both_is_used_by_both(shared):
    assert folder_of(use(shared, user=0)) == shared
    (shared / "locks").chmod(0o777)
    (lock,) = (shared / "locks").glob("*.lock")
    sentence = f"{lock}: Permission denied; it belongs to user root. Set CHATGLM_CACHE to a folder of your own."
    assert error_of(use(shared)) == f"error: {sentence}"
    lock.unlink()  # it was made before the folder was open
    assert folder_of(use(shared, user=0)) == folder_of(use(shared)) == shared
    assert stat.S_IMODE(lock.stat().st_mode) == 0o666
    (shared / "datasets").mkdir(mode=0o755)  # root's alone
    assert folder_of(use(shared)) == shared / f"user-{NOBODY}"


def test_the_cache_of_another_user_names_its_owner_and_the_variable(place):
    cache = place / "cache"
    assert folder_of(use(cache, user=0)) == cache
    reason = "Permission denied; it belongs to user root"
    expected = f"error: can't write to the cache {cache} ({reason}): set CHATGLM_CACHE to a folder of your own."
    assert error_of(use(cache)) == expected
    assert f"; {place} belongs to user root)" in error_of(use(place / "not" / "there"))


def test_a_home_that_can_not_be_written_names_the_variable(place):
    sentence = error_of(use(None, HOME=str(place)))
    assert f"cache {place}/.cache/chatglm-tuning (Permission denied; {place} belongs to user root)" in sentence
    assert sentence.endswith("set CHATGLM_CACHE to a folder of your own.")
    assert error_of(use(None, user=12345)).endswith("has no home folder: set CHATGLM_CACHE to a folder of your own.")
    (place / "cache").mkdir()
    os.chown(place / "cache", 12345, 12345)
    assert folder_of(use(place / "cache", user=12345)) == place / "cache"  # with the variable it needs none


def test_a_cache_that_can_not_be_written_is_refused(place):
    (place / "file").touch()
    for user in (0, NOBODY):
        assert "file (Not a directory" in error_of(use(place / "file", user=user))
    cache = place / "cache"
    (cache / "locks").mkdir(parents=True)
    for folder in (cache, cache / "locks"):
        os.chown(folder, NOBODY, NOBODY)
    cache.chmod(0o555)
    assert f"cache {cache} (Permission denied): set CHATGLM_CACHE" in error_of(use(cache))


def test_a_file_of_another_user_names_its_owner(shared, place):
    file = place / "file"
    file.touch()
    assert error_of(use(shared, file)) == f"error: {file}: Permission denied; it belongs to user root."
