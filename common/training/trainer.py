"""The Trainer of transformers, told to save only what was trained and to score generated answers."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils.fsdp_utils import save_fsdp_optimizer
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer

from common.errors import UserError
from common.methods import Method
from common.training.checkpoints import complete_checkpoints


class FinetuneTrainer(Trainer):
    """``score_answers`` generates answers to the validation set and returns their metrics."""

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self, method: Method, score_answers: Callable[[PreTrainedModel], dict[str, float]] | None = None, **kwargs
    ):
        self.method = method
        self.score_answers = score_answers
        super().__init__(**kwargs)
        self.finite = torch.ones((), dtype=torch.bool, device=self.args.device)

    def create_optimizer(self, *args, **kwargs) -> torch.optim.Optimizer:
        self.optimizer = self.method.optimizer(self.model, self.args)
        return super().create_optimizer(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        flags = {"loss_only": True, "loss_in_parts": not self.args.sharded, "use_cache": False}
        return super().compute_loss(model, {**inputs, **flags}, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.score_answers is not None:
            scores = {f"{metric_key_prefix}_{name}": value for name, value in self.score_answers(self.model).items()}
            self.log(scores)
            metrics |= scores
        return metrics

    def training_step(self, *args, **kwargs) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.finite = self.finite & torch.isfinite(loss.detach())  # looked at now and then: each look waits for the GPU
        return loss

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs) -> None:
        if self.control.should_log or self.control.should_save:
            self.check_finite(grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def check_finite(self, grad_norm: Tensor | float | None) -> None:
        """Raises UserError in all processes where loss or gradients of one are not finite, before that is saved.

        Steps with gradients that overflow are part of training in fp16: they are left out, and the scale is lowered.
        """
        if grad_norm is not None and not self.args.fp16:
            self.finite = self.finite & math.isfinite(float(grad_norm))
        if bool(self.accelerator.gather(self.finite.reshape(1)).all()):
            return
        whole = complete_checkpoints(Path(self.args.output_dir))
        cause = "--fp16 overflows: use --bf16, or " if self.args.fp16 else ""
        raise UserError(
            f"the loss is no longer finite (nan or inf) at step {self.state.global_step}: {cause}lower --learning_rate "
            f"(now {self.args.learning_rate:g}). Last good checkpoint: {whole[-1] if whole else 'none was saved yet'}."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """``state_dict``: the gathered weights under ZeRO and FSDP, in the process that saves."""
        if not self.args.should_save:  # the Trainer calls this in every process
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.method.save(self.accelerator.unwrap_model(self.model), folder, state_dict)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        for module in self.model.modules():  # after an evaluation some weights are still whole
            if isinstance(module, FSDPModule):
                module.reshard()
        # The Trainer would save the weights a second time, frozen ones included.
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def load_trained(self, folder: Path) -> None:
        """Reads what was trained from a checkpoint into the model."""
        self.method.restore(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Done before the training starts: here FSDP has already sharded the model."""

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:  # it reads its own shards
            super()._load_best_model()
        else:
            self.load_trained(Path(self.state.best_model_checkpoint))
