"""Packed rows: the losses and gradients of rows that stand alone, in every architecture and method."""

from functools import partial

import pytest
import torch
from engine_runs import train_here
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Glm4Config, GlmConfig, PreTrainedModel

from common import finetune
from common.data.collator import packed_batch, share, train_batch
from common.methods.prefix import attach_prefix
from common.models import glm4

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "pad_token_id": 3}
LENGTHS = (9, 21, 6, 7, 13)
GLMS = {"glm": (glm4.GlmForCausalLM, GlmConfig), "glm4": (glm4.Glm4ForCausalLM, Glm4Config)}


def model_of(kind: str, request) -> PreTrainedModel:
    if kind not in GLMS:
        return request.getfixturevalue(kind)
    torch.manual_seed(0)
    architecture, config = GLMS[kind]
    return architecture(config(**SIZES))


def rows_of(model: PreTrainedModel) -> list[dict]:
    """Rows whose last three tokens have labels; the second is plain text, with labels from its first token on."""
    torch.manual_seed(1)
    rows = [torch.randint(5, 50, (length,)).tolist() for length in LENGTHS]
    if model.config.bos_token_id == 62:  # the ChatGLM-6B of conftest.py: [gMASK] <sop> before the answer
        rows = [[*row[:-3], 61, 62, *row[-3:]] for row in rows]
        rows[2][0] = 62  # a user may type it
    labels = [[-100] * (len(row) - 3) + row[-3:] for row in rows]
    labels[1] = rows[1]
    return [
        {"input_ids": ids, "labels": wanted, "file": 0, "line": line}
        for line, (ids, wanted) in enumerate(zip(rows, labels, strict=True))
    ]


def with_method(model: PreTrainedModel, method: str) -> PreTrainedModel:
    if method == "prefix":
        attach_prefix(model, 5)
        model.base_model.prefix_encoder.dropout.p = 0
    if method == "lora":
        layers = ["query_key_value"] if model.config.model_type == "chatglm" else ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=layers, init_lora_weights=False))
    return model.train()


def tensors(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)} | {"use_cache": False}


def loss_and_gradients(model, batches: list[dict], labels: int) -> tuple[Tensor, list[Tensor]]:
    """Of the mean over the labels of all batches."""
    model.zero_grad()
    loss = sum(model(**tensors(batch), num_items_in_batch=labels, loss_only=True).loss for batch in batches)
    loss.backward()
    return loss.detach(), [x.grad.clone() for x in model.parameters() if x.requires_grad]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["prefix", "lora", "full"])
@pytest.mark.parametrize("kind", ["small_model", "small2_model", "glm", "glm4"])
def test_packed_rows_train_as_alone(kind, method, attention, request):
    if kind in GLMS and method == "prefix":
        return  # P-Tuning v2 is for our own models
    model = with_method(model_of(kind, request), method)
    model.config._attn_implementation = attention
    rows = rows_of(model)
    packed = packed_batch(rows, partial(model.positions, config=model.config), room=36, pad_token_id=3)
    alone = [train_batch([row], pad_token_id=3) for row in rows]
    labels = len(packed["label_positions"])
    assert labels == sum(len(each["label_positions"]) for each in alone)
    assert len(packed["input_ids"]) < len(rows)
    assert packed["tokens"] == sum(each["tokens"] for each in alone)
    assert packed["origins"] == [(0, line) for line in range(len(rows))]
    expected, gradients = loss_and_gradients(model, alone, labels)
    found, ours = loss_and_gradients(model, [packed], labels)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(ours, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "room", "packed"),
    [
        ([9, 5, 4, 3], 12, [[0, 3], [1, 2]]),
        ([5], 12, [[0]]),
        ([7, 7, 7], 12, [[0], [1], [2]]),
        ([20, 3, 3], 12, [[0], [1], [2]]),  # a row that is longer than the room stands alone
        ([10, 10], 5, [[0], [1]]),
        ([3, 3, 3, 3], 12, [[0, 1, 2, 3]]),
    ],
)
def test_rows_share_as_few_packed_rows_as_hold_them(lengths, room, packed):
    assert share(lengths, room) == packed


def test_a_whole_training_packs_and_keeps_its_losses(tmp_path, monkeypatch):
    flags = ("--max_target_length", "128", "--max_train_samples", "8", "--max_steps", "2", "--learning_rate", "1e-3")
    expected = train_here("full", tmp_path / "alone", *flags)
    shapes = []

    def spied(*args, **kwargs):
        batch = packed_batch(*args, **kwargs)
        shapes.append(tuple(batch["input_ids"].shape))
        return batch

    monkeypatch.setattr(finetune, "packed_batch", spied)
    assert train_here("full", tmp_path / "packed", *flags, "--packing") == pytest.approx(expected, rel=1e-5)
    assert [rows for rows, _ in shapes] == [2, 2]  # of 4
