"""Prints the path of the Python that the scripts use; builds .venv on first use. Standard library only.

    python3 common/launch/environment.py requirements.txt [more requirements files]

If the user has an active environment, the scripts use it and never change it. Any number of jobs may call this at once:
one builds, the others wait. .venv keeps a copy of each requirements file that it holds, made when pip has ended, so
that a build that was killed is repeated. Where a short look finds .venv damaged, it is built again.

TORCH_INDEX takes another build of PyTorch than that of pip's own index: cpu, cu126, cu130, ... or the address of a
mirror that ends in such a word. All other packages come from where the user's pip takes them.
"""

import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
from functools import partial
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv"
RECORD = FOLDER / "torch_index"  # the address that its PyTorch came from; empty: that of pip's own index
CONTENTS = FOLDER / "contents"  # what ``packages`` found when pip had ended
LIBC = ctypes.CDLL(None)
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def die_with(parent: int) -> None:
    """Lets the system kill this process as soon as its parent is dead, whatever ended that."""
    LIBC.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os.kill(os.getpid(), signal.SIGKILL)


def missing_packages(files: list[Path]) -> list[str]:
    """The requirements that this Python lacks. If only the version differs, it prints a note."""
    missing = []
    for line in (line.split("#")[0].strip() for file in files for line in file.read_text().splitlines()):
        name, _, version = line.partition("==")
        try:
            found = metadata.version(name) if name else version
        except metadata.PackageNotFoundError:
            missing.append(line)
            continue
        if version and found.partition("+")[0] != version:
            note(f"note: {name} is {found}; we tested with {version}.")
    return missing


def is_installed(files: list[Path]) -> bool:
    copies = [FOLDER / file.name for file in files]
    same = (copy.is_file() and copy.read_bytes() == file.read_bytes() for copy, file in zip(copies, files, strict=True))
    return all(same) and CONTENTS.exists() and not damage()


def packages() -> set[str]:
    """Of each package in .venv its first module and its description, as in torch/__init__.py and torch/METADATA.

    Raises OSError or CalledProcessError if the Python of .venv does not start.
    """
    asked = [str(FOLDER / "bin" / "python"), "-I", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    folder = Path(subprocess.check_output(asked, text=True, stderr=subprocess.DEVNULL).rstrip())
    found = [*folder.glob("*/__init__.py"), *folder.glob("*.dist-info/METADATA")]
    return {f"{path.parent.name.partition('-')[0]}/{path.name}" for path in found}


def damage() -> str:
    """What a short look finds wrong with .venv, as in "torch/METADATA is missing"; "" if nothing is."""
    try:
        there = packages()
    except (OSError, subprocess.CalledProcessError):  # also after the system's Python was replaced
        return "its Python does not start"
    try:
        recorded = CONTENTS.read_text("ascii").splitlines() if CONTENTS.exists() else []
    except (OSError, ValueError):
        return f"{CONTENTS.name} can't be read"
    return next((f"{name} is missing" for name in recorded if name not in there), "")


def recorded_index() -> str:
    try:
        return RECORD.read_text("ascii")
    except (OSError, ValueError):  # there is none, or it is damaged
        return ""


def torch_index() -> str:
    """The address that TORCH_INDEX stands for, or, if it is not set, the one that .venv was built from.

    Raises ValueError if .venv holds another build: a job that runs may still import from it.
    """
    asked = os.environ.get("TORCH_INDEX", "").rstrip("/")
    recorded = recorded_index() if CONTENTS.exists() else ""  # an address that did not answer must not stay
    address = f"https://download.pytorch.org/whl/{asked}" if asked and "/" not in asked else asked
    if asked and CONTENTS.exists() and address != recorded:
        source = recorded or "pip's own index"
        raise ValueError(
            f"TORCH_INDEX={asked}, but the PyTorch of {FOLDER} came from {source}: when no job uses that folder, "
            "remove it and run the script again"
        )
    return address or recorded


def torch_build(files: list[Path], address: str) -> list[str]:
    """The arguments of pip that ask for the build of PyTorch at an address, in the version of the requirements."""
    lines = [line.strip() for file in files for line in file.read_text().splitlines()]
    exactly = [f"{line}+{address.rpartition('/')[2]}" for line in lines if line.startswith("torch==")]
    # A mirror is an index, as PyTorch's own, or one page of links.
    return ["--extra-index-url", address, "--find-links", address, *exactly] if address else []


def ensure(files: list[Path]) -> None:
    """Returns when .venv holds the requirements: creates it, unless a complete one exists, and installs them.

    Raises ValueError like ``torch_index``.
    """
    if is_installed(files):
        torch_index()
        return
    with open(ROOT / ".venv.lock", "a+") as holder:
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder.seek(0)
            note(f"waiting for the environment: process {holder.read().strip() or 'unknown'} builds it")
            fcntl.flock(holder, fcntl.LOCK_EX)
        holder.truncate(0)
        holder.write(f"{os.getpid()} since {time.strftime('%H:%M:%S')}")
        holder.flush()
        address = torch_index()
        if is_installed(files):
            return
        if FOLDER.exists() and (broken := damage()):
            note(f"{FOLDER} is damaged ({broken}): it is built again")
            shutil.rmtree(FOLDER)
        if not (FOLDER / files[0].name).exists():
            note(f"creating {FOLDER} (once; minutes and 2 GB of disk; with CUDA about 6 GB, and 2.7 GB to download)")
            FOLDER.mkdir(exist_ok=True)
            # What a killed build has started may still run its Python, which can be removed but not overwritten.
            shutil.rmtree(FOLDER / "bin", ignore_errors=True)
            venv.EnvBuilder(with_pip=True).create(FOLDER)
        RECORD.write_text(address)
        note(f"installing {', '.join(file.name for file in files)}")
        pip = [str(FOLDER / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        requirements = [*(f"--requirement={file}" for file in files), *torch_build(files, address)]
        # pip inherits the lock: if this process is killed, no other installs until pip has ended too.
        end = partial(die_with, os.getpid())
        subprocess.run([*pip, *requirements], check=True, stdout=sys.stderr, pass_fds=[holder.fileno()], preexec_fn=end)
        CONTENTS.write_text("\n".join(sorted(packages())))
        for file in files:
            shutil.copy(file, FOLDER)


def main() -> int:
    die_with(os.getppid())  # that of the shell
    if sys.version_info < (3, 10):
        note(f"error: Python 3.10 or newer is needed, python3 is {sys.version.split()[0]}.")
        return 2
    files = [ROOT / name for name in sys.argv[1:]]
    own = os.environ.get("VIRTUAL_ENV")
    if os.environ.get("CONDA_DEFAULT_ENV", "base") != "base":  # conda's base is not the user's own
        own = own or os.environ.get("CONDA_PREFIX")
    if own:
        if missing := missing_packages(files):
            note(f"error: the active environment {own} lacks {', '.join(missing)}: install that or deactivate it.")
            return 2
        if os.environ.get("TORCH_INDEX"):
            note(f"note: TORCH_INDEX is for {FOLDER}; the active environment {own} keeps its PyTorch.")
        print(sys.executable)
        return 0
    try:
        ensure(files)
    except ValueError as error:
        note(f"error: {error}.")
        return 2
    except (subprocess.CalledProcessError, OSError) as error:
        note(f"error: the environment could not be built ({error}); see above, and run the script again.")
        return 2
    print(FOLDER / "bin" / "python")
    return 0


if __name__ == "__main__":
    sys.exit(main())
