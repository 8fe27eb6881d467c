"""P-Tuning v2: trainable keys and values in front of the text in every layer; the base model stays frozen.

P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks,
https://arxiv.org/abs/2110.07602

On disk a prefix has the format of the official code: ``pytorch_model.bin`` with ``transformer.prefix_encoder.*``, and
a ``config.json`` that names ``pre_seq_len`` and ``prefix_projection``, so that no flag has to repeat them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from common.arguments import PrefixArguments
from common.errors import UserError
from common.files import read_json, weight_files
from common.methods import Method, check_flags
from common.models.chatglm import ChatGLMConfig
from common.models.registry import ModelFolder, empty_model
from common.models.tensors import read_weights

KEY_PREFIX = "transformer.prefix_encoder."


class PTuning(Method):
    args: PrefixArguments
    name = "P-Tuning v2"
    trains_base = False
    files = ("pytorch_model.bin",)

    def check(self, folder: ModelFolder, do_train: bool) -> None:
        args = self.args
        if args.ptuning_checkpoint:
            check_prefix(args.ptuning_checkpoint, args)
            check_fits(folder, args.ptuning_checkpoint)
        elif do_train and not args.pre_seq_len:
            raise UserError(
                "--do_train needs --pre_seq_len, the number of virtual tokens to train (full/main.py trains weights)."
            )
        elif args.pre_seq_len and not do_train:
            raise UserError("--pre_seq_len makes an untrained prefix: give --ptuning_checkpoint to evaluate one.")

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Freezes the model and adds a trained or a new prefix. An old checkpoint may hold one beside the model."""
        args = self.args
        source = args.ptuning_checkpoint
        if source is None and vars(model.config).get("pre_seq_len") and read_prefix(model.name_or_path):
            source = model.name_or_path
        if source:
            load_prefix(model, source, args)
        elif args.pre_seq_len:
            attach_prefix(model, args.pre_seq_len, args.prefix_projection)
        return model

    def save(self, model: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes the prefix alone, in float32, and the config, in the format of the original code."""
        folder.mkdir(parents=True, exist_ok=True)
        own = f"{model.base_model_prefix}.prefix_encoder."
        tensors = {name: x for name, x in (weights or model.state_dict()).items() if name.startswith(own)}
        whole = {name.replace(own, KEY_PREFIX): x.float().cpu().contiguous() for name, x in tensors.items()}
        torch.save(whole, folder / "pytorch_model.bin")
        model.config.save_pretrained(folder)

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        model.base_model.prefix_encoder.load_state_dict(read_prefix(folder))

    def base(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        return with_prefix(model, None)

    def more(self, model: PreTrainedModel, folder: Path) -> Callable[[], AbstractContextManager[PreTrainedModel]]:
        with with_prefix(model, None):
            load_prefix(model, folder)
            return partial(with_prefix, model, model.base_model.prefix_encoder)


@contextmanager
def with_prefix(model: PreTrainedModel, encoder: nn.Module | None) -> Iterator[PreTrainedModel]:
    """A context in which the model has another prefix, or none."""
    own, model.base_model.prefix_encoder = model.base_model.prefix_encoder, encoder
    try:
        yield model
    finally:
        model.base_model.prefix_encoder = own


class PrefixEncoder(nn.Module):
    """Keys and values of ``pre_seq_len`` virtual tokens, in float32, drawn from N(0, 1) as nn.Embedding does.

    With ``projection`` a two-layer network makes them (embedding -> Linear -> Tanh -> Linear): it trains more stably
    and costs far more parameters.
    """

    def __init__(self, config: PreTrainedConfig, pre_seq_len: int, projection: bool = False, dropout: float = 0.1):
        super().__init__()
        self.pre_seq_len = pre_seq_len
        self.num_layers = config.num_hidden_layers
        self.kv_shape = (config.num_key_value_heads, config.head_dim)
        size = self.num_layers * 2 * config.num_key_value_heads * config.head_dim
        of_first = projection and isinstance(config, ChatGLMConfig)
        embedding_size = config.hidden_size if of_first else size
        self.embedding = nn.Embedding(pre_seq_len, embedding_size)
        self.trans: nn.Module = nn.Identity()
        if projection:
            self.trans = nn.Sequential(
                nn.Linear(embedding_size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, size)
            )
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Keys and values of all layers, [layers, 2, b, h, pre_seq_len, d]; dropout differs from row to row."""
        tokens = torch.arange(self.pre_seq_len, device=self.embedding.weight.device)
        keys_values = self.trans(self.embedding(tokens)).to(dtype)  # before expand() copies it for each row
        keys_values = keys_values.view(self.pre_seq_len, self.num_layers, 2, *self.kv_shape).permute(1, 2, 3, 0, 4)
        return self.dropout(keys_values.unsqueeze(2).expand(-1, -1, batch_size, -1, -1, -1))


def attach_prefix(model: PreTrainedModel, pre_seq_len: int, projection: bool = False) -> None:
    """Freezes the model and gives it a new, trainable prefix encoder."""
    model.requires_grad_(False)
    encoder = PrefixEncoder(model.config, pre_seq_len, projection).to(model.device)
    model.base_model.prefix_encoder = encoder.train(model.training)
    model.config.pre_seq_len = pre_seq_len
    model.config.prefix_projection = projection


def read_prefix(folder: str | Path) -> dict[str, Tensor]:
    """The prefix of a checkpoint: float32 tensors by their names in ``PrefixEncoder``; {} without a prefix.

    Reads our prefixes, those of the official script, and old full checkpoints that hold base and prefix.
    """
    folder = Path(folder)
    files = [file for file in (folder / "pytorch_model.bin", folder / "model.safetensors") if file.exists()]
    for index in sorted(folder.glob("*.index.json"))[:1]:  # it names the files exactly
        weight_files(folder)  # raises UserError for a broken index
        names = (read_json(index) or {}).get("weight_map", {})
        files = sorted({folder / file for name, file in names.items() if name.startswith(KEY_PREFIX)})
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= {name: tensor for name, tensor in read_weights(file).items() if name.startswith(KEY_PREFIX)}
    return {name.removeprefix(KEY_PREFIX): tensor.float() for name, tensor in tensors.items()}


def holds_prefix(folder: ModelFolder) -> bool:
    """Whether a model folder is an old checkpoint of base and prefix in one."""
    return folder.spec.key != "glm" and bool(folder.config.pre_seq_len and read_prefix(folder.path))


def holds_prefix_only(folder: str | Path) -> bool:
    """Whether a checkpoint is a prefix without its model."""
    file = Path(folder) / "pytorch_model.bin"
    names = read_weights(file) if file.is_file() else {}
    return bool(names) and all(name.startswith(KEY_PREFIX) for name in names)


def check_prefix(folder: str | Path, args: PrefixArguments) -> dict[str, Tensor]:
    """The tensors of a saved prefix. Raises UserError if the folder holds none, or if a given flag differs."""
    tensors = read_prefix(folder)
    if not tensors:
        raise UserError(f"{folder} holds no prefix: no tensor there is named {KEY_PREFIX}*.")
    if "embedding.weight" not in tensors or tensors["embedding.weight"].dim() != 2:
        raise UserError(f"{folder} holds no whole prefix: {KEY_PREFIX}embedding.weight is missing or no table.")
    stored = {"pre_seq_len": len(tensors["embedding.weight"]), "prefix_projection": "trans.0.weight" in tensors}
    check_flags(f"the prefix in {folder}", stored, args)
    return tensors


def check_fits(folder: ModelFolder, checkpoint: str | Path) -> None:
    """Raises UserError for the prefix of another model. Loads no model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights, which are lost on the meta device
        load_prefix(empty_model(folder.spec, folder.config), checkpoint)


def load_prefix(model: PreTrainedModel, folder: str | Path, args: PrefixArguments | None = None) -> None:
    """Attaches the prefix of a checkpoint. Raises UserError like ``check_prefix``, and if the shapes differ."""
    tensors = check_prefix(folder, args or PrefixArguments())
    length, projection = len(tensors["embedding.weight"]), "trans.0.weight" in tensors
    try:
        with torch.device("meta"):  # a wrong shape must not take memory
            PrefixEncoder(model.config, length, projection).load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise UserError(f"the prefix in {folder} does not belong to this model: {detail}") from error
    attach_prefix(model, length, projection)
    model.base_model.prefix_encoder.load_state_dict(tensors)
