"""A training that is told to end saves a checkpoint first: at SIGTERM, SIGUSR1, SIGHUP, and at SIGINT (Ctrl-C).

SLURM, Kubernetes and spot machines send SIGTERM, and SLURM's --signal=USR1@120 sends SIGUSR1 two minutes ahead. All
processes of a training end at the same step, although each hears of the signal at another moment, or not at all.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed import TCPStore
from transformers import TrainerCallback

from common.command import this_command
from common.errors import SaveError, note
from common.launch.environment import die_with
from common.launch.machines import ENDINGS
from common.training.trainer import Abandoned, FinetuneTrainer

ONE_KEYPRESS = 1.0  # seconds in which the same Ctrl-C may come twice, from the terminal and from the launcher
LOOK_EVERY = 1.0  # seconds between two looks at whether another process was told to end


class Preemption(TrainerCallback):
    """Saves and ends at the first step boundary after a signal to any process of the training.

    A process must not wait for the others at the end of a step: they may be in the next one, and wait for it there. So
    it writes into a store that it was told, and goes on. When all have written, the first that sees it, at the end of
    step n, names n + 1 as the last step, which nobody can have finished without it.
    """

    def __init__(self, trainer: FinetuneTrainer):
        self.trainer = trainer
        self.store: TCPStore | None = None
        self.told = 0  # the number of the signal
        self.interrupted = self.looked = 0.0  # when the first Ctrl-C came, when the store was asked
        self.leaving = False
        self.handlers: dict[int, Any] = {}  # of before the training

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # as nohup sets it
        self.handlers = {number: signal.signal(number, self.hear) for number in ENDINGS - ignored}
        if args.dataloader_num_workers:
            os.register_at_fork(after_in_child=outlive_signals)
        if args.world_size > 1:
            address, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=args.ddp_timeout)
            self.store = TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
        due = args.eval_strategy == "steps" and state.global_step and state.global_step % state.eval_steps == 0
        if due and not any("eval_loss" in log and log["step"] == state.global_step for log in state.log_history):
            self.trainer.evaluate()  # which was left out before

    def hear(self, number: int, _) -> None:
        """The handler. It may run in the middle of a print, so it writes without Python's buffers."""
        now = time.monotonic()
        if number == signal.SIGINT and self.interrupted and now - self.interrupted > ONE_KEYPRESS:
            os._exit(128 + number)
        if number == signal.SIGINT and not self.interrupted:
            self.interrupted = now
        if not self.told and os.environ.get("RANK", "0") == "0":
            again = "; a second Ctrl-C ends it at once" if number == signal.SIGINT else ""
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: a checkpoint is saved after this step, then the training ends{again}\n".encode())
        self.told = self.told or number

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.ends_here(state.global_step):
            control.should_save = control.should_log = self.leaving = True
            if args.metric_for_best_model is None:  # it may take minutes: the next run makes up for it
                control.should_evaluate = False
            elif args.eval_strategy == "epoch" and float(state.epoch).is_integer():
                control.should_evaluate = True  # which the Trainer would do only after it has left here

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        """Raises Abandoned in an evaluation that no other process takes part in, and no choice depends on."""
        if self.told and self.store is None and args.metric_for_best_model is None:
            control.should_save = self.leaving = True
            raise Abandoned

    def ends_here(self, step: int) -> bool:
        if self.store is None:
            return bool(self.told)
        if not self.told and time.monotonic() - self.looked > LOOK_EVERY:
            self.looked = time.monotonic()
            self.told = int(self.store.get("told")) if self.store.check(["told"]) else 0
        if not self.told:
            return False
        if self.trainer.args.device.type != "cpu":
            torch.accelerator.synchronize()  # or this process may run steps ahead of its device, and of the others
        self.store.set("told", str(self.told))
        self.store.set(f"told {self.trainer.args.process_index}", "")
        if not self.store.check([f"told {rank}" for rank in range(self.trainer.args.world_size)]):
            return False
        return step >= int(self.store.compare_set("last step", "", str(step + 1)))

    def on_save(self, args, state, control, **kwargs) -> None:
        if self.leaving:
            self.trainer.saves.wait()
            self.trainer.callback_handler.on_train_end(args, state, control)  # logs are written, the bar makes way
            self.leave()

    def leave(self) -> None:
        """Ends this process, with the exit code that the launcher asks for, if one is there.

        Raises SaveError if the checkpoint found no room.
        """
        state, folder = self.trainer.state, self.trainer.saves.folder
        there = (folder / f"checkpoint-{state.global_step}").is_dir()
        if self.leaving and self.trainer.args.should_save and not there:
            raise SaveError(f"{signal.Signals(self.told).name}: step {state.global_step} is not saved; see above.")
        note(
            f"{signal.Signals(self.told).name}: step {state.global_step} of {state.max_steps} is saved in "
            f"{folder}. This command continues:\n{this_command()}"
        )
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()
        sys.exit(int(os.environ.get("EXIT_WHEN_PREEMPTED", 130 if self.told == signal.SIGINT else 0)))


@contextmanager
def saved_at_signals(trainer: FinetuneTrainer) -> Iterator[None]:
    """Lets a training hear of signals. Raises SystemExit after one, when its checkpoint or its result is saved."""
    callback = Preemption(trainer)
    trainer.add_callback(callback)
    try:
        yield
        told = trainer.accelerator.gather(torch.tensor([callback.told], device=trainer.args.device))
        callback.told = int(told.max())
        if callback.told:  # too late for a checkpoint: the result is saved
            callback.leave()
    finally:
        for number, handler in callback.handlers.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # nothing is left to save
        trainer.remove_callback(callback)


def outlive_signals() -> None:
    """Lets a data worker ignore the signals that go to all processes. It ends with its parent, or when that asks."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
    die_with(os.getppid())

    def end_at_request() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=end_at_request, daemon=True).start()
