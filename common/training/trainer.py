"""The Trainer of transformers: it saves only the trained parameters, and scores generated answers."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs, gather_object, release_memory
from accelerate.utils.fsdp_utils import save_fsdp_optimizer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput

from common.errors import SaveError, disk_problem, note
from common.memory.fit import Forecast, what_would_fit
from common.methods import Method
from common.training.saves import Saves, checkpoint_folders, write_results
from common.training.steps import FiniteLoss, Seen, may_halve, parts_of, room_for, size_of


class Clock:
    """The seconds of a training without its evaluations and sample answers."""

    def __init__(self) -> None:
        self.began, self.paused = time.monotonic(), 0.0
        self.stands_since: float | None = None

    def seconds(self) -> float:
        now = time.monotonic() if self.stands_since is None else self.stands_since
        return now - self.began - self.paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        if self.stands_since is not None:  # a pause within a pause
            yield
            return
        self.stands_since = time.monotonic()
        try:
            yield
        finally:
            self.paused += time.monotonic() - self.stands_since
            self.stands_since = None


class Abandoned(Exception):
    """An evaluation that ends early, because the training must."""


class FinetuneTrainer(Trainer):
    """The Trainer with a method; ``score_answers`` generates answers to the validation set and returns their scores.

    The private methods are those of transformers 5.23, which has no public place for them.
    """

    optimizer: torch.optim.Optimizer | None
    score_answers: Callable[[], dict[str, float]] | None = None
    saves: Saves  # of a training
    resumed_from: Path | None = None  # the checkpoint
    order: Sampler | None = None  # of the training rows; None: that of the Trainer
    data_collator: Callable[..., dict[str, Any]]
    collate: Callable[..., dict[str, Any]] | None = None  # for training rows; None: as for others
    forecast: Forecast | None = None
    size = "the first rows"  # of the last batch
    parts = 1  # in which the rows of a batch go through, since memory ran out
    new_tokens = 0  # that this process has trained on since the last log
    logged_at = 0.0  # seconds on the clock
    evaluated: tuple[int, dict[str, float]] = (-1, {})  # step and metrics of the last evaluation

    def __init__(self, method: Method, **kwargs):
        self.method, self.finite_loss = method, FiniteLoss(self.last_checkpoint)
        self.batches: list[dict[str, Any]] = []  # of this step of the optimizer
        self.clock = Clock()
        super().__init__(callbacks=[self.finite_loss], **kwargs)
        self.args.logging_nan_inf_filter = False  # it would replace what FiniteLoss looks for

    def create_accelerator_and_postprocess(self) -> None:
        """For loss scaling alone fp16 comes without autocast."""
        super().create_accelerator_and_postprocess()
        if self.args.loss_scaling:
            self.accelerator.autocast_handler = AutocastKwargs(enabled=False)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        if self.optimizer is None:  # there is one, if the file of DeepSpeed names an optimizer
            self.optimizer = self.method.optimizer(self.model, self.args)
        return super().create_optimizer(*args, **kwargs)

    @property
    def predicted_memory(self) -> int:
        """Bytes."""
        return self.forecast.plan.total if self.forecast else 0

    def last_checkpoint(self) -> Path | None:
        """The newest one, when it is whole."""
        self.saves.wait()
        return next(reversed(checkpoint_folders(Path(self.args.output_dir))), None)

    def advice(self) -> str:
        """What would fit, as the plan says, where memory ran out."""
        return what_would_fit(self.forecast, self.args, self.model.training)

    def train(self, *args, **kwargs):
        """Raises OutOfMemory, also where the optimizer finds no room."""
        self.clock = Clock()
        with room_for(lambda: self.size, self.advice):
            return super().train(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Does one batch. Where memory runs out in a batch that was chosen here, it halves the rows that go through.

        Then it does all batches of this step of the optimizer again, because a part of their gradients is lost.
        """
        self.batches.append(inputs)
        self.size = size_of(inputs)
        todo, loss = [inputs], None
        while loss is None:
            halves = may_halve(self.args) and self.parts < len(inputs["input_ids"])
            with room_for(lambda: self.size, self.advice, goes_on=halves):
                loss = [self.do_parts(model, each, num_items_in_batch) for each in todo][-1]
            if loss is None:  # outside, where the error is gone that held the tensors of the failed pass
                self.parts, todo = 2 * self.parts, self.batches
                note(f"note: memory ran out at {self.size}: rows go through in {self.parts} parts from here on")
                model.zero_grad()
                release_memory()
        if self.accelerator.sync_gradients:
            self.batches = []
        self.finite_loss.seen.append(Seen(self.state.global_step, loss, inputs["origins"]))
        return loss

    def do_parts(self, model, inputs, num_items_in_batch) -> Tensor:
        """The loss of a batch, whose labels share ``num_items_in_batch``: the sum over its parts."""
        if self.parts == 1:
            return super().training_step(model, inputs, num_items_in_batch)
        loss = torch.zeros((), device=self.args.device)
        for part in parts_of(inputs, self.parts):
            loss += super().training_step(model, part, num_items_in_batch)
        return loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        with room_for(lambda: size_of(inputs), self.advice):
            return super().prediction_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        return super().compute_loss(model, inputs | self.args.engine.loss_flags, *args, **kwargs)

    def _track_num_input_tokens(self, inputs) -> None:
        """Counts without a look at the batch, for which a GPU would have to wait in every step."""
        self.new_tokens += inputs["tokens"]

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds up the tokens of all processes before it logs; evaluations don't count for the speed."""
        counted = self.new_tokens
        if self.args.world_size > 1:
            counted = int(self.accelerator.gather(torch.tensor(counted, device=self.args.device)).sum())
        self.state.num_input_tokens_seen += counted
        self.new_tokens = 0
        if "loss" in logs:
            seconds = self.clock.seconds()
            logs["tokens_per_second"] = counted / max(seconds - self.logged_at, 1e-6)
            self.logged_at = seconds
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Leaves the random numbers as they were, so that evaluations change nothing of a training."""
        devices = [] if self.args.device.type == "cpu" else [self.args.device]
        with self.clock.pause(), torch.random.fork_rng(devices), suppress(Abandoned):
            metrics = super().evaluate(*args, **kwargs)
            self.evaluated = self.state.global_step, metrics
            return metrics
        return {}

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.score_answers is not None and metric_key_prefix != "probe":
            output.metrics.update(
                {f"{metric_key_prefix}_{name}": value for name, value in self.score_answers().items()}
            )
        return output

    def get_train_dataloader(self) -> DataLoader:
        """Of rows that are trained; only these are packed."""
        collate, self.data_collator = self.data_collator, self.collate or self.data_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        return self.order or super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset) -> Sampler:
        """The order of the file; the Trainer would group these rows too, and so change their loss."""
        return SequentialSampler(eval_dataset)

    def save_model(self, *args, **kwargs) -> None:
        """Saves the trained parameters; under ZeRO 1 and 2 the Trainer would copy all weights in each process."""
        if self.args.should_save or self.args.engine.name != "DeepSpeed" or self.args.engine.sharded:
            super().save_model(*args, **kwargs)

    def _save_checkpoint(self, model, trial=None) -> None:
        """Writes a checkpoint, which is sealed while the training goes on. One that does not fit is named.

        The Trainer would write it under its own name at once, and remove others by the times of their folders.
        """
        step, best, saves = self.state.global_step, self.state.best_global_step, self.saves
        self.store_flos()
        former = self.state.best_model_checkpoint
        if best == step or best and (saves.folder / f"checkpoint-{best}").is_dir():
            self.state.best_model_checkpoint = str(saves.folder / f"checkpoint-{best}")
        problem = self.first_problem(saves.begin() if self.args.should_save else "")
        if not problem:
            problem = self.first_problem(self.write_checkpoint(saves.partial))
        if problem:
            self.state.best_model_checkpoint = former
        if problem and self.args.should_save:
            saves.give_up(step, problem)
        elif self.args.should_save:
            saves.finish(step, best)

    def first_problem(self, problem: str) -> str:
        """The problem of the first process that has one, on all processes; it waits for all."""
        return next(filter(None, gather_object([problem])), "")

    def write_checkpoint(self, folder: Path) -> str:
        """Writes the trained parameters and all states. Returns why the disk refused, or "".

        Raises SaveError under engines whose processes wait for each other while they save.
        """
        try:
            self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
            if self.args.should_save:
                for each in filter(lambda each: isinstance(each, ExportableState), self.callback_handler.callbacks):
                    self.state.stateful_callbacks[type(each).__name__] = each.state()
                self.state.stateful_callbacks[type(self.control).__name__] = self.control.state()
                self.state.save_to_json(str(folder / "trainer_state.json"))
        except Exception as error:
            problem = disk_problem(error)
            if problem is None:
                raise
            if self.args.engine.name != "DDP":
                raise SaveError(f"a checkpoint could not be written to {folder.parent}: {problem}.") from error
            return problem
        return ""

    def save_result(self, metrics: dict[str, float]) -> None:
        """Puts the trained parameters into the output folder, with ``metrics``. Raises SaveError."""
        step, best = self.state.global_step, self.state.best_global_step
        with self.saves.result(step, best) if self.args.should_save else nullcontext(self.saves.partial) as folder:
            self.save_model(str(folder), _internal_call=True)
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
                write_results(folder, "train", metrics)
        if self.args.push_to_hub:
            self.push_to_hub()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes them; private, because save_model gathers weights and pushes to the hub around it.

        ``state_dict``: the gathered weights under ZeRO and FSDP2, in the process that saves.
        """
        if not self.args.should_save:  # the Trainer calls this in every process
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.method.save(self.accelerator.unwrap_model(self.model), folder, state_dict)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP2 the Trainer would save the weights a second time, frozen ones included."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        for module in self.model.modules():  # after an evaluation some weights are still whole
            if isinstance(module, FSDPModule):
                module.reshard()
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_scaler(self, checkpoint: str | None) -> None:
        """A device that computes in bfloat16 has no scaler, and can continue what one with float16 began."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    def load_trained(self, folder: Path) -> None:
        """Reads the trained parameters of a checkpoint into the model."""
        self.method.restore(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Does nothing: the weights are read before the training starts; here FSDP2 has already sharded the model."""

    def _load_best_model(self) -> None:
        """The Trainer would look for names that not every method writes, and where the folder lay before a move."""
        self.saves.wait()
        best = self.saves.folder / f"checkpoint-{self.state.best_global_step}"
        if not best.is_dir() and self.resumed_from:  # it lies where the training began
            best = self.resumed_from.with_name(best.name)
        self.state.best_model_checkpoint = str(best)
        if self.is_deepspeed_enabled:  # it reads its own shards
            super()._load_best_model()
        else:
            self.load_trained(best)
