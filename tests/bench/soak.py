"""Trainings on machines that fail: does the same command, given again, always end with the right result?

    bash tests/bench/soak.sh 10                        10 minutes of everything
    ONLY=kills KILLS=200 bash tests/bench/soak.sh      so many kills, however long it takes
    ONLY="damages disks" bash tests/bench/soak.sh      60 damaged checkpoints and 20 full disks

A trial disturbs one training of the demo, then gives its command again until it ends with 0. The weights must equal,
bit for bit, those of the same training that nobody disturbed, and the folder must hold the same files. Words of ONLY:

    kills     SIGKILL or SIGTERM at a random moment, of bash, of the launcher or of a process of the training
    damages   of the newest checkpoint one file is changed by a bit, cut, emptied or deleted; the next start must say so
    disks     the disk is full from a random moment on
    clocks    a kill, then every file of the checkpoints gets a random time between 1980 and 2100
    users     two users train at once with one cache, and one of them is killed
    time      the share of time that is not lost with a kill every 10 save intervals

"launch" is the script as a user types it; "fork" starts the program in a process that has imported the libraries
already, which saves seconds. SEED decides what is tried, but the machine decides what happens in that moment.
"""

import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import psutil
from rich.console import Console
from rich.table import Table
from soak_training import (
    ENDED_WITHIN,
    LONGEST,
    ROOT,
    SAVE,
    WORK,
    Trial,
    as_user,
    check_log,
    checkpoints,
    end_family,
    family,
    finish,
    forks,
    hashes,
    kill,
    names,
    once,
    reference,
    start,
    steps,
    wait,
    wait_for_a_moment,
)

METHODS = ("ptuning", "lora", "full")
WORDS = {"kills": 5, "damages": 3, "disks": 2, "clocks": 1, "users": 1, "time": 0}  # shares of a soak by minutes
COUNTS = {"kills": 200, "damages": 60, "disks": 20, "clocks": 6, "users": 2, "time": 0}
PROBLEMS = ("unequal", "incomplete", "leftovers", "orphans", "stuck", "unnoticed", "lost too much", "errors")
INTERVAL, KILL_EVERY, INTERVALS = 20.0, 10, 12  # for the effective time: seconds between saves; in intervals
USERS = (65533, 65534)
DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "a bit changed": lambda old, rng: flip(old, rng),
    "cut": lambda old, rng: old[: len(old) // 2],
    "emptied": lambda old, rng: b"",
    "deleted": lambda old, rng: None,
}
console = Console(width=160, highlight=False)


def kills(trial: Trial) -> None:
    log = trial.folder / "log"
    job = start(trial, log)
    kill(trial, job, log)
    finish(trial, log)


def clocks(trial: Trial) -> None:
    log = trial.folder / "log"
    kill(trial, start(trial, log), log)
    for file in trial.output.rglob("*"):
        moment = trial.rng.uniform(315532800, 4102444800)
        os.utime(file, (moment, moment))
    trial.done += "random file times; "
    finish(trial, log)


def flip(old: bytes, rng: random.Random) -> bytes:
    """The bytes with one other bit."""
    changed = bytearray(old or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@cache
def half_done(method: str) -> Path:
    """The output folder of a training that was killed after its third checkpoint."""
    for attempt in itertools.count():
        trial = Trial("damages", method, "fork", 1, random.Random(attempt), WORK / f"half-{method}-{attempt}")
        trial.folder.mkdir()
        log = trial.folder / "log"
        log.touch()
        job = start(trial, log)
        while wait(job, 0.005) is None and steps(log) <= 3 * SAVE:
            pass
        job.kill()
        wait(job, ENDED_WITHIN)
        if checkpoints(trial.output)[-1:] == [3 * SAVE] or attempt == 20:
            return trial.output
    raise AssertionError


def damages(trial: Trial) -> None:
    with once:
        template = half_done(trial.method)
    shutil.copytree(template, trial.output)
    newest = trial.output / f"checkpoint-{checkpoints(trial.output)[-1]}"
    pairs = list(itertools.product(sorted(filter(Path.is_file, newest.rglob("*"))), DAMAGES))
    random.Random(os.environ["SEED"]).shuffle(pairs)
    file, kind = pairs[int(trial.folder.name.rpartition("-")[2]) // len(METHODS) % len(pairs)]
    trial.done = f"{newest.name}/{file.name} {kind}"
    damaged = DAMAGES[kind](file.read_bytes(), trial.rng)
    file.unlink()
    if damaged is not None:
        file.write_bytes(damaged)
    finish(trial)
    said = (trial.folder / "again-0").read_text(errors="replace")
    if not (trial.output / f"{newest.name}.damaged").exists() and f"{newest.name}.damaged" not in said:
        trial.problem("unnoticed", trial.done)


def disks(trial: Trial) -> None:
    log, limit, expected = trial.folder / "log", 0, reference(trial)
    disk = trial.output.parent
    disk.mkdir()
    if small_disk():
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "soak", disk], check=True)
    else:
        limit = trial.rng.randrange(1000, 400_000)
    try:
        job = start(trial, log, limit)
        if limit:
            trial.done = f"no file above {limit:,} bytes"
        else:
            moment = wait_for_a_moment(trial, job, log, first=1)
            filler, rest = disk / "filler", trial.rng.randrange(200_000)
            fill(filler, rest)
            trial.done = f"{rest:,} bytes left {moment}"
        code, whole = wait(job, LONGEST), checkpoints(trial.output)
        check_log(trial, log)
        if code not in (0, 2, 3):
            trial.problem("errors", f"ended with {code}, not with 3: {log.read_text(errors='replace').strip()[-200:]}")
        end_family(trial, job)
        if not limit:
            filler.unlink()
        left = {re.sub("checkpoint-[0-9]+(?=/)", "checkpoint-N", name) for name in names(trial.output)}
        usual = {re.sub("checkpoint-[0-9]+(?=/)", "checkpoint-N", name) for name in expected.names}
        if extra := left - usual:
            trial.problem("leftovers", ", ".join(sorted(extra)))
        trial.done += f", ended with {code}, checkpoints {whole}"
        finish(trial, log)
    finally:
        if not limit:
            subprocess.run(["umount", "-l", disk], check=True)


def fill(filler: Path, rest: int) -> None:
    """Takes all of a disk but ``rest`` bytes."""
    with open(filler, "wb", buffering=0) as out, suppress(OSError):
        while True:
            out.write(bytes(2**16))
    with suppress(OSError):
        os.truncate(filler, max(0, filler.stat().st_size - rest))


@cache
def small_disk() -> bool:
    """Whether this user may mount a disk in memory."""
    with tempfile.TemporaryDirectory(dir=WORK) as place:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "soak", place]
        made = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        return made and subprocess.run(["umount", place], check=False).returncode == 0


def users(trial: Trial) -> None:
    shared = trial.folder / "cache"
    shared.mkdir()
    shared.chmod(0o1777)
    pair = []
    for user in USERS:
        own = Trial("users", trial.method, "launch", 1, trial.rng, trial.folder / str(user), user=user)
        own.settings = {"CHATGLM_CACHE": str(shared), "HOME": str(own.folder)}
        own.folder.mkdir()
        os.chown(own.folder, user, user)
        pair.append(own)
    reference(pair[0])
    jobs = [start(own, own.folder / "log") for own in pair]
    kill(pair[0], jobs[0], pair[0].folder / "log")
    wait(jobs[1], LONGEST)
    for own, job in zip(pair, jobs, strict=True):
        end_family(own, job)
        check_log(own, own.folder / "log")
        finish(own)
        trial.done += f"user {own.user}: {own.done or 'not disturbed'}; "
        trial.problems += own.problems
        trial.notes += own.notes


def effective_time(seed: str) -> bool:
    """Trains without and with kills, side by side, and prints the share of time that is not lost. Are both equal?"""
    calm, killed, short = (
        Trial("time", "ptuning", "launch", 1, random.Random(seed), WORK / f"time-{name}")
        for name in ("calm", "killed", "short")
    )
    for trial in (calm, killed, short):
        trial.folder.mkdir()
    wait(start(short, short.folder / "log", MAX_STEPS="40", SAVE_STEPS="40", BATCH_SIZE="16"), LONGEST)
    step = json.loads((short.output / "train_results.json").read_text())["train_runtime"] / 40
    every = max(1, round(INTERVAL / step))
    settings = {"MAX_STEPS": str(every * INTERVALS), "SAVE_STEPS": str(every), "BATCH_SIZE": "16"}
    begin, kills, seconds = time.monotonic(), 0, dict[str, float]()
    next_kill = KILL_EVERY * every + killed.rng.randrange(every)  # a step within a save interval
    jobs = {trial.folder.name: start(trial, trial.folder / "log", **settings) for trial in (calm, killed)}
    while len(seconds) < 2:
        for name, job in jobs.items():
            if name not in seconds and (code := wait(job, 0.1)) is not None:
                seconds[name] = time.monotonic() - begin if code == 0 else math.nan
        if "time-killed" not in seconds and steps(killed.folder / "log", every * INTERVALS) >= next_kill:
            end_training(killed, jobs["time-killed"])
            jobs["time-killed"] = start(killed, killed.folder / "log", **settings)
            kills, next_kill = kills + 1, next_kill + KILL_EVERY * every
    equal = hashes(calm.output) == hashes(killed.output) != {}
    interval = json.loads((calm.output / "train_results.json").read_text())["train_runtime"] / INTERVALS
    without, with_kills = seconds["time-calm"], seconds["time-killed"]
    lost = (with_kills - without) / max(1, kills)
    share = 1 - lost / (KILL_EVERY * interval + lost)
    console.print(
        f"effective training time: {100 * share:.0f}% with a kill every {KILL_EVERY} save intervals of {every} steps, "
        f"{interval:.0f} s: {without:.0f} s without kills, {with_kills:.0f} s with {kills}; {lost:.0f} s a kill, for a "
        f"start and the steps since the last save. Side by side (ptuning, launch), results "
        f"{'equal' if equal else 'UNEQUAL'}"
    )
    return equal


def end_training(trial: Trial, job) -> None:
    for process in family(trial, job):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    wait(job, ENDED_WITHIN)


# All of them


def plan(seed: str, words: list[str], minutes: float) -> Iterator[Trial]:
    """The trials: as many of each word as the environment says, or for so many minutes one after the other."""
    counts = {word: int(os.environ.get(word.upper(), COUNTS[word])) for word in words}
    if minutes:
        shares = [word for word in words for _ in range(WORDS[word])]
        order: Iterator[str] = itertools.cycle(shares[::3] + shares[1::3] + shares[2::3])
    else:
        order = itertools.chain.from_iterable([word] * counts[word] for word in words)
    numbers: Counter[str] = Counter()
    for word in order:
        number = numbers[word]
        numbers[word] += 1
        rng = random.Random(f"{seed}-{word}-{number}")
        launched = word == "users" or word in ("kills", "disks") and number % 10 == 9
        processes = 2 if launched and word == "kills" and number % 20 == 19 else 1
        method = METHODS[(number + number // 30) % 3]
        folder = WORK / f"{word}-{number}"
        yield Trial(word, method, "launch" if launched else "fork", processes, rng, folder)


def attempt(trial: Trial) -> Trial:
    trial.folder.mkdir()
    begin = time.monotonic()
    try:
        reference(trial)
        begin = time.monotonic()
        {"kills": kills, "damages": damages, "disks": disks, "clocks": clocks, "users": users}[trial.word](trial)
    except Exception as error:  # a trial that can't be made is no success
        trial.problem("errors", f"the trial itself failed: {error!r:.300}")
    verdict = "; ".join(trial.notes) or "right"
    where = f"{trial.method}, {trial.how}, {trial.processes} process{'es' if trial.processes > 1 else ''}"
    console.print(
        f"{trial.folder.name} ({where}; {trial.done}) {time.monotonic() - begin:.0f} s: {verdict}", markup=False
    )
    if not trial.problems:
        shutil.rmtree(trial.folder, ignore_errors=True)
    return trial


def print_table(trials: list[Trial]) -> None:
    table = Table(title="what was tried, and what was wrong", title_justify="left")
    columns = ("tried", "method", "start", "trials", "right", "lost steps", "most", *PROBLEMS)
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:3] else "right")

    def row(trial: Trial) -> tuple[int, str, str]:
        start = trial.how + (f" x {trial.processes}" if trial.processes > 1 else "")
        return list(WORDS).index(trial.word), trial.method, start

    for key, group in itertools.groupby(sorted(trials, key=row), key=row):
        found = list(group)
        lost = [steps for trial in found for steps in trial.lost]
        total = sum((trial.problems for trial in found), Counter())
        right = sum(not trial.problems for trial in found)
        mean = f"{sum(lost) / len(lost):.1f}" if lost else ""
        cells = [list(WORDS)[key[0]], *key[1:], str(len(found)), str(right), mean, str(max(lost, default=""))]
        table.add_row(*cells, *(str(total[problem] or "") for problem in PROBLEMS))
    console.print(table)
    console.print(f"{sum(not trial.problems for trial in trials)} of {len(trials)} trials ended with the right result.")


def main() -> int:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    words, seed = os.environ.get("ONLY", " ".join(WORDS)).split(), os.environ.get("SEED") or str(time.time_ns() % 10**6)
    if unknown := set(words) - WORDS.keys():
        sys.exit(f"error: ONLY={' '.join(unknown)}: the words are {' '.join(WORDS)}.")
    cores = int(os.environ.get("CORES") or len(os.sched_getaffinity(0)))
    disk = "tmpfs" if small_disk() else "RLIMIT_FSIZE, because this user may mount no tmpfs"
    console.print(f"SEED={seed}, in {WORK}, {cores} at once, full disks by {disk}", markup=False)
    if "users" in words and not as_user(USERS[0]):
        console.print("users: left out, because only root can start programs of other users, and they must read Python")
        words.remove("users")
    os.environ |= {"SEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    forks.set_forkserver_preload(
        [
            "__main__",
            "common.finetune",
            "common.flags",
            *(f"common.methods.{name}" for name in ("prefix", "lora", "full")),
        ]
    )
    warm = forks.Process(target=time.sleep, args=(0,))
    warm.start()
    warm.join()
    until = time.monotonic() + 60 * minutes
    good = "time" not in words or effective_time(seed)
    until = max(until, time.monotonic() + 20 * minutes)  # a third of them, where the machine is busy with other things
    trials, queue, turn = [], plan(seed, words, minutes), threading.Lock()

    def work() -> None:
        while not minutes or time.monotonic() < until:
            with turn:
                trial = next(queue, None)
            if trial is None:
                return
            trials.append(attempt(trial))

    with ThreadPoolExecutor(cores) as pool:
        for worker in [pool.submit(work) for _ in range(cores)]:
            worker.result()
    if trials:
        print_table(trials)
    good = good and not any(trial.problems for trial in trials)
    if good:
        shutil.rmtree(WORK, ignore_errors=True)
    else:
        console.print(f"the folders and logs of what went wrong are in {WORK}", markup=False)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
