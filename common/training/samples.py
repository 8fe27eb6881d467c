"""The answers to a few fixed rows while a model is trained: before the first step, and at evaluations and saves."""

import time
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from common.encoding import stop_ids
from common.errors import OutOfMemory, note
from common.terminal import show
from common.training.evaluation import generate_answers
from common.training.first_row import visible
from common.training.trainer import FinetuneTrainer

ROWS = 3
LONGEST = 64  # tokens of an answer
SHOWN = 40  # characters of an answer in the terminal


class Samples(TrainerCallback):
    """Answers greedily, so that no random number is drawn. Every process takes part.

    ``record`` gets {"step", "answers", "seconds"}.
    """

    def __init__(self, trainer: FinetuneTrainer, questions: Dataset, longest: int, record: Callable[[dict], None]):
        self.trainer, self.record = trainer, record
        self.prompts = list(questions[:ROWS]["prompt_ids"])
        self.longest = min(LONGEST, longest)
        self.step, self.off = -1, False

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if not state.global_step:
            self.answer(args, state)

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self.answer(args, state)

    on_save = on_evaluate

    def answer(self, args, state) -> None:
        """Answers once a step. Where memory runs out, a training in one process goes on without answers."""
        if self.off or self.step == state.global_step:
            return
        self.step, began, trainer = state.global_step, time.monotonic(), self.trainer
        generation: dict[str, Any] = {"do_sample": False, "max_new_tokens": self.longest, "shown": False}
        generation |= {"eos_token_id": stop_ids(trainer.processing_class), "in_step": args.engine.sharded}
        try:
            with trainer.clock.pause():
                answers = generate_answers(trainer.model, trainer.processing_class, self.prompts, ROWS, **generation)
        except OutOfMemory:
            if args.world_size > 1:
                raise
            self.off = True
            note("note: memory ran out in the sample answers: the training goes on without them (SHOW_ANSWERS=0)")
            return
        seconds = time.monotonic() - began
        if state.is_world_process_zero:
            texts = (f"{number}. {visible(text)[:SHOWN]}" for number, text in enumerate(answers, 1))
            show(f"answers at step {self.step:,} ({seconds:.1f} s): {'  '.join(texts)}")
            self.record({"step": self.step, "answers": answers, "seconds": seconds})
