"""The Trainer of transformers, told to save only what was trained and to score generated answers."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from common.methods import Method


class FinetuneTrainer(Trainer):
    """``score_answers`` generates answers to the validation set and returns their metrics."""

    def __init__(
        self, method: Method, score_answers: Callable[[PreTrainedModel], dict[str, float]] | None = None, **kwargs
    ):
        self.method = method
        self.score_answers = score_answers
        super().__init__(**kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "loss_only": True, "use_cache": False}, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.score_answers is not None:
            scores = {f"{metric_key_prefix}_{name}": value for name, value in self.score_answers(self.model).items()}
            self.log(scores)
            metrics |= scores
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:  # the Trainer calls this in every process
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.method.save(self.accelerator.unwrap_model(self.model), folder)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def load_trained(self, folder: Path) -> None:
        """Reads what was trained from a checkpoint into the model."""
        self.method.restore(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.load_trained(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.load_trained(Path(self.state.best_model_checkpoint))
