"""Lets the 1st, 2nd, ... Nth change of the disk by a training fail, or kills it there, and gives the command again.

    python tests/sweep/sweep.py ptuning|lora|full [STRIDE] [FIRST]     each STRIDE-th change (1: all) from the FIRST on

After each case the same command must end with the result, the last checkpoint and the losses of an undisturbed
training, bit for bit, and leave no other file. Scenarios: one step from the beginning, saved; and a second step from
there, beside what a kill in its save has left. faults.c is compiled with cc.
"""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
COUNT, KILL, FAIL, FULL = range(4)
WAYS = {KILL: "killed", FAIL: "one failed", FULL: "disk full from there on"}
FLAGS = f"""--do_train --train_file {ROOT}/AdvertiseGen/train.json --model_name_or_path demo --use_cpu
--max_train_samples 8 --max_source_length 16 --max_target_length 16 --per_device_train_batch_size 2 --save_steps 1
--save_total_limit 1 --logging_steps 1 --learning_rate 1e-2 --report_to none --disable_tqdm true"""
METHODS = {
    "ptuning": ("common.methods.prefix", "PTuning", "PrefixArguments", "--pre_seq_len 4"),
    "lora": ("common.methods.lora", "Lora", "LoraArguments", "--lora_rank 2"),
    "full": ("common.methods.full", "Full", "FullArguments", ""),
}
RANDOM = {"training_args.bin"}  # names hold the time
TENSORS = {".bin", ".safetensors", ".pt", ".pth"}


def preload(folder: Path) -> None:
    """Compiles the library, and starts this program again with it."""
    library = folder / "faults.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, Path(__file__).with_name("faults.c"), "-ldl"], check=True
    )
    threads = {"OMP_NUM_THREADS": "1", "CHATGLM_CACHE": str(folder / "cache")}
    command = [sys.executable, __file__, *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=os.environ | threads | {"LD_PRELOAD": str(library)}).returncode)


class Sweep:
    def __init__(self, method: str, folder: Path):
        from importlib import import_module

        import common.arguments
        import common.finetune
        from common.errors import exit_on_user_error
        from common.finetune import run
        from common.flags import parse_arguments

        module, name, arguments, flags = METHODS[method]
        method_class = vars(import_module(module))[name]
        flag_class = vars(common.arguments)[arguments]
        self.folder, self.out, self.log = folder, folder / "out", folder / "log"
        self.faults = ctypes.CDLL(None)
        self.cases = self.failures = 0
        self.steps = 1
        # The plan of the memory touches no file, and takes half of a run.
        planned = common.finetune.forecast
        once = cache(lambda: planned(*self.planned))

        def forecast(*args):
            self.planned = args
            return once()

        common.finetune.forecast = forecast

        def train() -> None:
            model_args, method_args, *others = parse_arguments(
                flag_class,
                [*FLAGS.split(), *flags.split(), "--max_steps", str(self.steps), "--output_dir", str(self.out)],
            )
            with exit_on_user_error():
                run(method_class(method_args), model_args, *others)

        self.train = train

    def run(self, mode: int = COUNT, nth: int = 0) -> tuple[int, int]:
        """Trains in a child process. Returns its exit code, negative for a signal, and the number of changes."""
        receive, send = os.pipe()
        if (child := os.fork()) == 0:
            with open(self.log, "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            self.faults.fault_arm(str(self.out).encode(), mode, nth)
            code = 1
            try:
                self.train()
                code = 0
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os.write(send, str(self.faults.fault_count()).encode())
                os._exit(code)
        os.close(send)
        counted = os.read(receive, 99)
        os.close(receive)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(counted or nth)

    def files(self, folder: Path) -> dict[str, bytes]:
        """{relative path: its tensors, or nothing}."""
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.name[:5] != ".lock"}
        return {
            name: path.read_bytes() if path.suffix in TENSORS and path.name not in RANDOM else b""
            for name, path in paths.items()
        }

    def losses(self, folder: Path) -> list[float]:
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [entry["loss"] for entry in history if "loss" in entry]

    def differences(self, expected: Path, warned: bool) -> str:
        """What the output folder has else than the expected one; "" if nothing.

        ``warned``: a checkpoint was not saved, and a warning said so; then the one before it may be there still.
        """
        found, right = self.files(self.out), self.files(expected)
        if warned:
            found, right = (
                {name: data for name, data in each.items() if name[:5] != "check"} for each in (found, right)
            )
        if names := found.keys() ^ right.keys():
            return f"other files: {sorted(names)}"
        if names := {name for name in right if found[name] != right[name]}:
            return f"other content: {sorted(names)}"
        return "" if self.losses(self.out) == self.losses(expected) else "other losses"

    def check(self, scenario: str, mode: int, nth: int, code: int, expected: Path) -> None:
        """Gives the command again after a fault, and prints what is wrong then."""
        text = self.log.read_text()
        problem = ""
        if mode == KILL and code != -9 or mode != KILL and code not in (0, 3):
            problem = f"exit code {code}"
        elif "Traceback" in text:
            problem = "a traceback"
        elif again := self.run()[0]:
            problem, text = f"exit code {again} of the same command", self.log.read_text()
        else:
            problem = self.differences(expected, mode != KILL and "is not saved" in text)
        self.cases += 1
        if problem:
            self.failures += 1
            print(f"{scenario}, {WAYS[mode]} at change {nth}: {problem}\n{text[-3000:]}", flush=True)

    def reset(self, start: Path | None) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if start:
            shutil.copytree(start, self.out)
        else:
            self.out.mkdir()

    def sweep(self, scenario: str, start: Path | None, stride: int, first: int) -> None:
        """Sweeps through a training that begins with the files in ``start``."""
        expected = self.folder / f"expected {self.steps}"
        self.reset(start)
        self.train()
        shutil.copytree(self.out, expected)
        gc.collect()
        gc.freeze()  # or each child would collect, and so copy, all that was imported
        for mode in WAYS:
            stride *= 4 if mode == FULL else 1
            nth = 1 + (first - 1 + mode - 1) % stride
            while True:
                self.reset(start)
                code, counted = self.run(mode, nth)
                if counted < nth:
                    break  # the fault came too late
                self.check(scenario, mode, nth, code, expected)
                nth += stride
            print(f"{scenario}, {WAYS[mode]}: {counted} changes, {self.cases} cases, {self.failures} wrong", flush=True)


def main() -> int:
    method, stride, first = sys.argv[1], *(int(word) for word in (*sys.argv[2:], 1, 1)[:2])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "LD_PRELOAD" not in os.environ:
            preload(folder)
        sweep, begun = Sweep(method, folder), folder / "begun"
        sweep.sweep("from the beginning", None, stride, first)
        sweep.steps, nth = 2, 0  # of the first kill that leaves a part of the second checkpoint
        while not list(sweep.out.glob(".saving/*.pt")):
            nth += 1
            sweep.reset(folder / "expected 1")
            sweep.run(KILL, nth)
        shutil.copytree(sweep.out, begun)
        sweep.sweep("from a checkpoint", begun, stride, first)
        print(f"{method}: {sweep.cases} cases, {sweep.cases - sweep.failures} bit-equal, {sweep.failures} wrong")
    return int(sweep.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
