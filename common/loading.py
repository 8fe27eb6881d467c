"""Loads a tokenizer or a model, tuned or not, by a name or a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.arguments import LoraArguments, PrefixArguments
from common.errors import UserError
from common.methods import Method
from common.methods.lora import Lora
from common.methods.prefix import PTuning, holds_prefix, holds_prefix_only
from common.models.registry import ModelFolder, fetch_weights, open_model
from common.models.weights import load_base
from common.tokenizers.glm4 import check_expressions
from common.trained import base_of


def tokenizer_of(folder: ModelFolder, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or the one of ``name``. Raises UserError if that one belongs to another model."""
    own = load_tokenizer(folder)
    if not name:
        return own
    given = load_tokenizer(name)
    vocabulary, rows = given.get_vocab(), folder.config.vocab_size
    differing = next((token for token, number in own.get_vocab().items() if vocabulary.get(token) != number), None)
    problem = f"has another number for {differing!r}" if differing else ""
    if type(given) is not type(own):
        problem = f"is a {type(given).__name__}, not a {type(own).__name__}"
    elif len(vocabulary) > rows:
        problem = f"has {len(vocabulary):,} tokens, and the model {rows:,}"
    if problem:
        raise UserError(f"--tokenizer_name {name}: it {problem}, so it belongs to another model: leave it out.")
    return given


def load_tokenizer(model: str | Path | ModelFolder) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises UserError if vocabulary and model do not belong together."""
    folder = open_model(model)
    spec = folder.spec
    if spec.key == "glm":
        check_expressions(folder.path / spec.vocabulary)
        with no_vocabulary(f"{folder.path / spec.vocabulary} can't be read"):
            tokenizer = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False, padding_side="left")
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            tokenizer("a")  # fails if its parts are of wrong kinds
        return tokenizer
    with no_vocabulary(f"{folder.path / spec.vocabulary} is no vocabulary of {spec.name}"):
        tokenizer = spec.tokenizer.from_pretrained(folder.path)
        tokenizer("a")
    rows = folder.config.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{folder.path} mixes files of different models: {spec.vocabulary} has {tokenizer.vocab_size:,} tokens "
            f"and the model {rows:,}."
        )
    ends = folder.config.eos_token_id
    if spec.key == "chatglm4" and ends and tokenizer.eos_token_id not in (ends if isinstance(ends, list) else [ends]):
        raise UserError(
            f"{folder.path / spec.vocabulary} has {tokenizer.pieces.get_piece_size():,} tokens, and eos_token_id in "
            "config.json counts on another number: copy or download it again."
        )
    return tokenizer


@contextmanager
def no_vocabulary(problem: str) -> Iterator[None]:
    """Turns any error of a tokenizer's library into a UserError: some are of Rust, and no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{problem}: copy or download it again.") from error


def load_model(
    model: str | Path | ModelFolder,
    dtype: torch.dtype = torch.float32,
    quantization_bit: int | None = None,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
    ptuning_checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """A model in evaluation mode, with a prefix or a LoRA adapter if one is asked for.

    ``ptuning_checkpoint`` and ``adapter`` are trained folders; ``pre_seq_len`` alone makes a new, trainable prefix.
    ``device``: see ``load_base``. Raises UserError for an unusable folder, and for parts that do not fit.
    """
    folder = open_model(model)
    if adapter and (ptuning_checkpoint or pre_seq_len):
        raise UserError("a model takes a LoRA adapter or a prefix, not both.")
    if not (adapter or ptuning_checkpoint or pre_seq_len or holds_prefix(folder)):
        return load_base(fetch_weights(folder), dtype, quantization_bit, device)
    method = method_of(adapter, ptuning_checkpoint, pre_seq_len, prefix_projection)
    method.check(folder, do_train=bool(pre_seq_len))
    base = load_base(fetch_weights(folder), dtype, quantization_bit, device, trained=bool(pre_seq_len))
    return method.attach(base)


def method_of(
    adapter: str | Path | None = None,
    ptuning_checkpoint: str | Path | None = None,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
) -> Method:
    """LoRA for an adapter, else P-Tuning v2; the parameters are those of ``load_model``."""
    if adapter:
        return Lora(LoraArguments(lora_checkpoint=str(adapter)))
    checkpoint = str(ptuning_checkpoint) if ptuning_checkpoint else None
    return PTuning(PrefixArguments(checkpoint, pre_seq_len, prefix_projection))


def find_trained(path: str, base: str | None = None) -> tuple[str, dict[str, Any]]:
    """(name of the base model, flag of ``load_model``) of a trained folder; (``path``, {}) of a whole model.

    ``base``: the base model, if it has moved. Raises UserError if there is none.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return base_of(folder, base), {"adapter": path}
    if holds_prefix_only(folder):
        return base_of(folder, base), {"ptuning_checkpoint": path}
    return path, {}
