"""The parts of soak.py: one training that is disturbed, its start, its end, and what is right about its result."""

import multiprocessing
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
from xxhash import xxh3_128

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE = 12, 3
ENDED_WITHIN = 10.0  # seconds that the rest of a training has after a kill
LONGEST = 400.0  # seconds of one start, longer is stuck
FLAGS = ["--logging_steps", "1", "--save_total_limit", "2", "--max_train_samples", "64"]
forks = multiprocessing.get_context("forkserver")
if "SOAK_WORK" not in os.environ:  # a forked process imports this file again
    os.environ["SOAK_WORK"] = tempfile.mkdtemp(prefix="soak-")
    os.chmod(os.environ["SOAK_WORK"], 0o755)  # other users train in it too
WORK = Path(os.environ["SOAK_WORK"])


@dataclass
class Trial:
    """One training in its own folder, what was done to it, and what was found."""

    word: str
    method: str
    how: str  # launch or fork
    processes: int
    rng: random.Random
    folder: Path
    done: str = ""
    lost: list[int] = field(default_factory=list)  # steps that were trained again
    problems: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    user: int | None = None
    settings: dict[str, str] = field(default_factory=dict)  # variables of every start

    @property
    def output(self) -> Path:
        return self.folder / ("disk/output" if self.word == "disks" else "output")

    def problem(self, kind: str, text: str, count: int = 1) -> None:
        self.problems[kind] += count
        self.notes.append(f"{kind}: {text}")


# Starting a training


def variables(trial: Trial, settings: dict[str, str]) -> dict[str, str]:
    own = {"OUTPUT_DIR": trial.output, "CHATGLM_CACHE": WORK / "cache", "SOAK_RUN": trial.folder}
    own |= {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    own |= {"NUM_PROCESSES": trial.processes, "NUM_MACHINES": 1}
    own |= {"MODEL": "demo", "TRAIN_FILE": ROOT / "AdvertiseGen" / "train.json", "BATCH_SIZE": 2, "EVAL_STEPS": 0}
    own |= {"MAX_STEPS": STEPS, "SAVE_STEPS": SAVE, "PRE_SEQ_LEN": 8, "EVALUATE": "false", "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in (own | trial.settings | settings).items()}


def start(trial: Trial, log: Path, limit: int = 0, **settings: str):
    """Starts the training; returns its process. ``limit``: bytes that no file may exceed."""
    environ = variables(trial, settings)
    log.touch()
    if trial.how == "fork":
        flags = ["--do_train", "--model_name_or_path", "demo", "--train_file", environ["TRAIN_FILE"], *FLAGS]
        flags += ["--output_dir", environ["OUTPUT_DIR"], "--max_steps", str(STEPS), "--save_steps", str(SAVE)]
        flags += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-3"]
        flags += ["--gradient_accumulation_steps", "1", "--activation_checkpointing", "false", "--report_to", "none"]
        flags += ["--pre_seq_len", "8"] if trial.method == "ptuning" else []
        job = forks.Process(target=train, args=(trial.method, flags, log, environ, limit))
        job.start()
        return job
    prefix = as_user(trial.user) if trial.user else []
    script = ["bash", str(ROOT / trial.method / "train.sh"), "--do_predict", "false", *FLAGS]
    with open(log, "ab") as out:
        return subprocess.Popen(
            [*prefix, *script],
            env=os.environ | environ,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
        )


def train(method: str, flags: list[str], log: Path, environ: dict[str, str], limit: int) -> None:
    """In the forked process: the program of a method."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environ)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    program = str(ROOT / method / "main.py")
    sys.argv = [program, *flags]
    runpy.run_path(program, run_name="__main__")


@cache
def as_user(user: int) -> list[str]:
    """The command that starts another one as this user; it may read all, if the Python lies in root's home."""
    switch = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    for more in ([], ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]):
        works = [*switch, *more, sys.executable, "-c", "import torch"]
        if os.geteuid() == 0 and not subprocess.run(works, capture_output=True, check=False).returncode:
            return [*switch, *more]
    return []


def wait(job, seconds: float) -> int | None:
    """The exit code of a training; None if it has not ended in time."""
    if isinstance(job, subprocess.Popen):
        with suppress(subprocess.TimeoutExpired):
            return job.wait(seconds)
        return None
    job.join(seconds)
    return job.exitcode


def family(trial: Trial, job) -> list[psutil.Process]:
    """All living processes of a training: of its session, or with its folder in their environment or command."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            own = job.pid in (process.pid, os.getsid(process.pid))
            own = own or process.environ().get("SOAK_RUN") == str(trial.folder)
            own = own or f"{trial.folder}/" in " ".join(process.cmdline())
            if own and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]


def role(process: psutil.Process, job) -> str:
    with suppress(psutil.Error):
        command = " ".join(process.cmdline())
        if process.pid == job.pid:
            return "bash" if isinstance(job, subprocess.Popen) and "train.sh" in command else "training"
        return "launcher" if "launcher.py" in command else "training" if "main.py" in command else "helper"
    return "helper"


def wait_for_a_moment(trial: Trial, job, log: Path, first: int = 0) -> str:
    """Waits for a random moment: of the start, or within half a second after a random step, where saves are too."""
    step = trial.rng.randint(first, STEPS)
    if not step:
        moment = trial.rng.uniform(0, 0.7 * reference(trial).seconds)
        wait(job, moment)
        return f"{moment:.1f} s after the start"
    while wait(job, 0.01) is None and steps(log) < step:
        pass
    moment = trial.rng.uniform(0, 0.5)
    wait(job, moment)
    return f"{moment:.2f} s after step {step}"


def kill(trial: Trial, job, log: Path) -> None:
    """Kills one process of the training at a random moment. The others must end by themselves."""
    moment = wait_for_a_moment(trial, job, log)
    victims: dict[str, list[psutil.Process]] = {}
    for process in family(trial, job):
        victims.setdefault(role(process, job), []).append(process)
    code = trial.rng.choice((signal.SIGKILL, signal.SIGTERM))
    if victims:
        name = trial.rng.choice(sorted(victims))
        with suppress(psutil.NoSuchProcess):
            trial.rng.choice(victims[name]).send_signal(code)
        trial.done += f"{code.name} to {name} {moment}; "
    else:
        trial.done += f"ended before {moment}; "
    end_family(trial, job)


def end_family(trial: Trial, job) -> None:
    """Waits until no process of the training is left; those that stay are counted as orphans and killed."""
    until = time.monotonic() + ENDED_WITHIN
    while (left := family(trial, job)) and time.monotonic() < until:
        wait(job, 0.1)
    if left:
        trial.problem("orphans", ", ".join(f"{role(process, job)} {process.pid}" for process in left), len(left))
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait(job, ENDED_WITHIN)


# Judging it


def hashes(folder: Path) -> dict[str, str]:
    """{file: hash of its tensors, their names, types and shapes} of the result in an output folder."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for file in sorted([*folder.glob("*.bin"), *folder.glob("*.safetensors")]):
        if file.name != "training_args.bin":
            tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
            content = xxh3_128()
            for name, tensor in sorted(tensors.items()):
                content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                content.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            found[file.name] = content.hexdigest()
    return found


def names(folder: Path) -> set[str]:
    """The files of an output folder, but for logs, locks, and checkpoints that were set aside."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not re.match(r"runs/|\.(lock|holder)$|[^/]*\.damaged[^/]*/", name)}


def checkpoints(folder: Path) -> list[int]:
    """The steps of the checkpoints whose last file was written, oldest first."""
    found = [re.fullmatch(r"checkpoint-(\d+)", path.parent.name) for path in folder.glob("*/trainer_state.json")]
    return sorted(int(each[1]) for each in found if each)


@dataclass
class Reference:
    hashes: dict[str, str]
    names: set[str]
    seconds: float


_references: dict[tuple, Reference] = {}
_locks: dict[tuple, threading.Lock] = {}
once = threading.Lock()


def reference(trial: Trial) -> Reference:
    """The result of the same training without any disturbance, made once."""
    key = trial.how, trial.method, trial.processes
    with once:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if key not in _references:
            folder = WORK / "-".join(map(str, key))
            calm = Trial("reference", trial.method, trial.how, trial.processes, trial.rng, folder)
            calm.folder.mkdir()
            begin = time.monotonic()
            code = wait(start(calm, calm.folder / "log"), LONGEST)
            if code != 0:
                tail = (calm.folder / "log").read_text(errors="replace")[-2000:]
                sys.exit(f"error: a training that nobody disturbed ended with {code}: {key}\n{tail}")
            found = Reference(hashes(calm.output), names(calm.output), time.monotonic() - begin)
            shutil.rmtree(calm.output)
            _references[key] = found
    return _references[key]


def finish(trial: Trial, reached: Path | None = None) -> None:
    """Gives the same command again until it ends with 0, and compares. ``reached``: the log of the disturbed start."""
    expected = reference(trial)
    newest = checkpoints(trial.output)
    # A full disk costs checkpoints, which the training names.
    unsaved = set(re.findall(r"checkpoint-(\d+) is not saved", reached.read_text(errors="replace") if reached else ""))
    for attempt in range(3):
        log = trial.folder / f"again-{attempt}"
        job = start(trial, log)
        code = wait(job, LONGEST)
        text = log.read_text(errors="replace")
        if code is None:
            trial.problem("stuck", f"a start ran for more than {LONGEST:.0f} s")
            for process in family(trial, job):
                process.kill()
            wait(job, ENDED_WITHIN)
        if re.search("waiting for|is in use by", text):
            trial.problem("stuck", next(line for line in text.splitlines() if re.search("waiting for|is in use", line)))
        if code == 0:
            break
        lines = re.findall(r"^(?:error: |\w+Error).*", text, re.MULTILINE) or text.strip().splitlines() or [""]
        trial.problem("errors", f"start {attempt + 2} ended with {code}: {lines[-1][:200]}")
    else:
        return
    if reached:
        resumed = re.search(r"checkpoint-(\d+)", next(iter(re.findall("continuing from.*", text)), "checkpoint-0"))
        finished = "was finished before" in text
        lost = 0 if finished else max(0, steps(reached) - int(resumed[1]) if resumed else 0)
        trial.lost.append(lost)
        fell_back = newest and resumed and not finished and int(resumed[1]) < newest[-1] - SAVE
        if fell_back or lost > SAVE * (1 + len(unsaved)) + 1:
            place = resumed and resumed[1]
            trial.problem("lost too much", f"{lost} steps, checkpoints {newest}, continued from {place}")
    end_family(trial, job)
    if changed := {name for name, content in hashes(trial.output).items() if expected.hashes.get(name) != content}:
        trial.problem("unequal", ", ".join(sorted(changed)))
    # A training that SIGTERM ends saves one checkpoint more, which takes the place of an older one.
    others = re.compile(r"checkpoint-\d+/" if str(STEPS) in unsaved else rf"checkpoint-(?!{STEPS}/)\d+/")
    found, wanted = (
        {name for name in all_ if not others.match(name)} for all_ in (names(trial.output), expected.names)
    )
    if missing := wanted - found:
        trial.problem("incomplete", ", ".join(sorted(missing)))
    if extra := found - wanted:
        trial.problem("leftovers", ", ".join(sorted(extra)))


def steps(log: Path, total: int = STEPS) -> int:
    """The step that a training of ``total`` steps reached, by its progress bar."""
    return max((int(step) for step in re.findall(rf"\b(\d+)/{total} \[", log.read_text(errors="replace"))), default=0)


def check_log(trial: Trial, log: Path) -> None:
    if "Traceback (most" in (text := log.read_text(errors="replace")):
        trial.problem("errors", f"a traceback: {text.strip().splitlines()[-1][:200]}")
