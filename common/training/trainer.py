"""The Trainer of transformers: it saves only the trained parameters, and scores generated answers."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate.utils import AutocastKwargs, gather_object
from accelerate.utils.fsdp_utils import save_fsdp_optimizer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput

from common.errors import SaveError, UserError, disk_problem
from common.methods import Method
from common.training.saves import Saves, checkpoint_folders, write_results


class FiniteLoss(TrainerCallback):
    """Ends a training whose loss or gradients are no longer finite before that is saved or evaluated.

    It reads the logs, which the Trainer has gathered from all processes; a look at each step would wait for
    the GPU. A nan or inf of any step since the last log stays in the logged mean.
    """

    def __init__(self, trainer: "FinetuneTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_log |= control.should_save or control.should_evaluate or control.should_training_stop

    on_epoch_end = on_step_end  # the Trainer logs, then evaluates, then saves

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        """Raises UserError. In fp16, gradients that overflow are part of training: they are left out."""
        grad_norm = 0.0 if args.fp16 else logs.get("grad_norm", 0.0)
        if math.isfinite(logs.get("loss", 0.0)) and math.isfinite(grad_norm):
            return
        self.trainer.saves.wait()
        whole = checkpoint_folders(Path(args.output_dir))
        cause = "float16 overflows: use --precision bf16 or fp32, or " if args.fp16 else ""
        raise UserError(
            f"the loss is no longer finite (nan or inf) at step {state.global_step}: {cause}lower --learning_rate "
            f"(now {args.learning_rate:g}). Last good checkpoint: {whole[-1] if whole else 'none was saved yet'}."
        )


class FinetuneTrainer(Trainer):
    """The Trainer with a method; ``score_answers`` generates answers to the validation set and returns their scores.

    The private methods are those of transformers 5.23, which has no public place for them.
    """

    optimizer: torch.optim.Optimizer | None
    score_answers: Callable[[], dict[str, float]] | None = None
    saves: Saves  # of a training
    sampler: Sampler | None = None  # of the training rows; None: that of the Trainer
    predicted_memory = 0  # bytes
    new_tokens = 0  # that this process has trained on since the last log

    def __init__(self, method: Method, **kwargs):
        self.method = method
        super().__init__(callbacks=[FiniteLoss(self)], **kwargs)
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

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs = {name: value for name, value in inputs.items() if name != "tokens"}
        return super().compute_loss(model, inputs | self.args.engine.loss_flags, *args, **kwargs)

    def _track_num_input_tokens(self, inputs) -> None:
        """Counts without a look at the batch, for which a GPU would have to wait in every step."""
        self.new_tokens += inputs["tokens"]

    def log(self, *args, **kwargs) -> None:
        """Adds up the tokens of all processes before it logs."""
        counted = self.new_tokens
        if self.args.world_size > 1:
            counted = int(self.accelerator.gather(torch.tensor(counted, device=self.args.device)).sum())
        self.state.num_input_tokens_seen += counted
        self.new_tokens = 0
        super().log(*args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Leaves the random numbers as they were, so that evaluations change nothing of a training."""
        devices = [] if self.args.device.type == "cpu" else [self.args.device]
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.score_answers is not None and metric_key_prefix != "probe":
            output.metrics.update(
                {f"{metric_key_prefix}_{name}": value for name, value in self.score_answers().items()}
            )
        return output

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        return self.sampler or super()._get_train_sampler(train_dataset)

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
        if best.is_dir():  # else it lies where the training began
            self.state.best_model_checkpoint = str(best)
        if self.is_deepspeed_enabled:  # it reads its own shards
            super()._load_best_model()
        else:
            self.load_trained(Path(self.state.best_model_checkpoint))
