"""ChatGLM-6B gives the numbers of the original code: logits, losses, gradients, generated ids, files."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import common.models.registry  # noqa: F401 - registers our classes with AutoModelForCausalLM
from common.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMModel

PAD = 3
PROMPTS = ["row0", "row1", "hello", "english", "history1"]
LOGITS = {"atol": 1e-4, "rtol": 0}
RELATIVE = {"atol": 0, "rtol": 1e-4}


def batch_of(goldens: dict, name: str, *keys: str) -> dict:
    return {key: goldens[f"{name}/{key}"] for key in keys}


def left_padded(goldens: dict) -> dict:
    """Four prompts of different lengths; the first positions are pads."""
    input_ids = goldens["left_pad_batch/input_ids"]
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long()}


def check_logits(logits, goldens: dict, name: str, positions=...) -> None:
    """Compares some columns, and the log-sum-exp over the whole vocabulary, at all positions or the selected ones."""
    logits = logits[positions]
    torch.testing.assert_close(logits[..., goldens["cols"]], goldens[f"{name}/lg_cols"][positions], **LOGITS)
    torch.testing.assert_close(logits.logsumexp(-1), goldens[f"{name}/lg_lse"][positions], **LOGITS)


def relative_error(found, expected) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def unpack_mask(packed, length: int):
    """The original's mask [b, 1, s, s], True = hidden, stored as bits."""
    bits = (packed[..., None].int() >> torch.arange(7, -1, -1)) & 1
    return bits.flatten(-2)[..., :length].bool()


# Forward


@pytest.mark.parametrize("name", ["train_64_64", "train_single_nopad"])
@torch.no_grad()
def test_training_rows(tiny_model, model_goldens, name):
    output = tiny_model(**batch_of(model_goldens, name, "input_ids", "labels"))
    check_logits(output.logits, model_goldens, name)
    torch.testing.assert_close(output.loss, model_goldens[f"{name}/loss"], **RELATIVE)


@pytest.mark.parametrize("name", [*(f"prompt_{name}" for name in PROMPTS), "mask_only"])
@torch.no_grad()
def test_single_prompts(tiny_model, model_goldens, name):
    input_ids = model_goldens[f"{name}/input_ids"]
    assert torch.equal(tiny_model.transformer.get_position_ids(input_ids), model_goldens[f"{name}/position_ids"])
    check_logits(tiny_model(input_ids).logits, model_goldens, name)


@torch.no_grad()
def test_mask_token_beside_gmask(tiny_model, model_goldens):
    """The original counts positions from [MASK]. We accept such positions, but our own count from [gMASK]."""
    batch = batch_of(model_goldens, "mask_both_tokpos", "input_ids", "position_ids")
    check_logits(tiny_model(**batch).logits, model_goldens, "mask_both_tokpos")
    ours = tiny_model.transformer.get_position_ids(batch["input_ids"])
    gmask_index = batch["input_ids"][0].tolist().index(130001)
    assert ours[0, 0, -1] == gmask_index != batch["position_ids"][0, 0, -1]


@torch.no_grad()
def test_left_padded_batch(tiny_model, model_goldens):
    batch = left_padded(model_goldens)
    positions = tiny_model.transformer.get_position_ids(**batch)
    assert torch.equal(positions, model_goldens["left_pad_batch/position_ids"])
    check_logits(tiny_model(**batch).logits, model_goldens, "left_pad_batch", batch["input_ids"] != PAD)


def test_training_positions(tiny_model, model_goldens):
    positions = tiny_model.transformer.get_position_ids(model_goldens["train_64_64/input_ids"])
    assert torch.equal(positions, model_goldens["train_64_64/position_ids"])


@pytest.mark.parametrize("name", ["train_64_64", "left_pad_batch"])
@torch.no_grad()
def test_original_mask_is_accepted(tiny_model, model_goldens, name):
    """In the left-padded batch only the mask marks the pads."""
    batch = batch_of(model_goldens, name, "input_ids", "position_ids")
    mask = unpack_mask(model_goldens[f"{name}/attention_mask"], batch["input_ids"].shape[1])
    real = batch["input_ids"] != PAD
    check_logits(tiny_model(**batch, attention_mask=mask).logits, model_goldens, name, real)


@torch.no_grad()
def test_eager_attention_equals_sdpa(fresh_tiny_model, model_goldens):
    fresh_tiny_model.set_attn_implementation("eager")
    batch = left_padded(model_goldens)
    output = fresh_tiny_model(**batch, output_attentions=True)
    check_logits(output.logits, model_goldens, "left_pad_batch", batch["input_ids"] != PAD)
    torch.testing.assert_close(output.attentions[-1].sum(-1), torch.ones(4, 4, 58))


@pytest.mark.parametrize("half", [0, 1])
def test_rotary_table(model_goldens, half):
    """The angles of the real model's head size, for the position (half 0) and the block position (half 1)."""
    position_ids = torch.zeros(1, 2, len(model_goldens["rotary_dim64/pos"]), dtype=torch.long)
    position_ids[0, half] = model_goldens["rotary_dim64/pos"]
    with torch.device("meta"):
        model = ChatGLMModel(ChatGLMConfig())
    cos, sin = model.rotary(position_ids)
    torch.testing.assert_close(cos[0, 0, :, half], model_goldens["rotary_dim64/cos_f32"], atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[0, 0, :, half], model_goldens["rotary_dim64/sin_f32"], atol=1e-5, rtol=0)
    assert torch.all(cos[0, 0, :, 1 - half] == 1) and torch.all(sin[0, 0, :, 1 - half] == 0)


# Training


@pytest.mark.parametrize("loss_only", [False, True])
def test_full_gradients(fresh_tiny_model, model_goldens, loss_only):
    model = fresh_tiny_model.train()
    loss = model(**batch_of(model_goldens, "train_64_64", "input_ids", "labels"), loss_only=loss_only).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), model_goldens["full_ft/loss"], **RELATIVE)
    parameters = dict(model.named_parameters())
    selected = [name for name in model_goldens if name.startswith("full_ft/grad/")]
    assert len(selected) == 6
    for name in selected:
        gradient = parameters[name.removeprefix("full_ft/grad/")].grad
        assert relative_error(gradient, model_goldens[name]) < 1e-4, name
    # The embedding has gradients as an embedding and, because it is tied, as the head.
    rows = parameters["transformer.word_embeddings.weight"].grad[model_goldens["grad_row_ids"]]
    assert relative_error(rows, model_goldens["full_ft/grad_rows/word_embeddings"]) < 1e-4
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters.values()])
    assert norm.item() == pytest.approx(model_goldens["full_ft/grad_total_norm"].item(), rel=1e-4)


def trajectory(model, batch: dict, learning_rate: float) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of five steps of the original script: linear decay to 0, gradients clipped to 1."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    group = optimizer.param_groups[0]
    losses, norms = [], []
    for step in range(5):
        group["lr"] = learning_rate * (1 - step / 5)
        # The old AdamW of transformers added eps before the bias correction; torch adds it after.
        group["eps"] = 1e-8 / (1 - 0.999 ** (step + 1)) ** 0.5
        loss = model(**batch, loss_only=True).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


def test_full_trajectory(fresh_tiny_model, model_goldens):
    batch = batch_of(model_goldens, "train_64_64", "input_ids", "labels")
    losses, norms = trajectory(fresh_tiny_model.train(), batch, 1e-3)
    assert losses == pytest.approx(model_goldens["full_ft/traj_loss"].tolist(), rel=1e-4)
    assert norms == pytest.approx(model_goldens["full_ft/traj_gnorm"].tolist(), rel=1e-3)


def gradients(model, batch, **kwargs) -> dict:
    model.zero_grad()
    model(**batch, **kwargs, loss_only=True).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_gives_equal_gradients(fresh_tiny_model, model_goldens):
    model = fresh_tiny_model.train()
    batch = batch_of(model_goldens, "train_single_nopad", "input_ids", "labels")
    plain = gradients(model, batch)
    forwards = []
    model.transformer.layers[2].mlp.register_forward_pre_hook(lambda *args: forwards.append(1))
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, batch)
    assert len(forwards) == 2  # the backward pass calls the layer again, so checkpointing is on
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_micro_batches_sum_to_the_whole_batch(fresh_tiny_model, model_goldens):
    """With num_items_in_batch a token has the same weight in every micro batch."""
    model = fresh_tiny_model.train()
    batch = batch_of(model_goldens, "train_64_64", "input_ids", "labels")
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    assert counts[0] != counts[1]
    whole = gradients(model, batch)
    summed = [gradients(model, part, num_items_in_batch=sum(counts)) for part in parts]
    for name, gradient in whole.items():
        assert relative_error(summed[0][name] + summed[1][name], gradient) < 1e-4, name


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_loss_alone(fresh_tiny_model, model_goldens, training):
    """The base model has no dropout, and the loss needs only the logits of labelled positions."""
    model = fresh_tiny_model.train(training)
    batch = batch_of(model_goldens, "train_64_64", "input_ids", "labels")
    output = model(**batch, loss_only=True)
    torch.testing.assert_close(output.loss, model_goldens["train_64_64/loss"], **RELATIVE)
    assert output.logits is None
    torch.testing.assert_close(model(**batch).loss, output.loss)


def test_left_padded_training_rows_have_finite_gradients(small_model):
    """A left pad attends to no key; its softmax must not be nan."""
    model = small_model.train()
    input_ids = torch.tensor([[PAD, PAD, PAD, 7, 61, 62, 9, 63], [5, 6, 7, 8, 61, 62, 9, 63]])
    labels = torch.where(torch.arange(8) >= 5, input_ids, -100)
    loss = model(input_ids, attention_mask=(input_ids != PAD).long(), labels=labels).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in model.parameters())


# Generation


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_single(tiny_model, generation_goldens, name):
    golden = generation_goldens["prompts"][name]
    input_ids = torch.tensor([golden["input_ids"]])
    output = tiny_model.generate(input_ids, max_new_tokens=len(golden["greedy"]), do_sample=False)
    assert output[0, input_ids.shape[1] :].tolist() == golden["greedy"]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_batched(tiny_model, model_goldens, use_cache):
    expected = model_goldens["left_pad_batch/generated"]
    batch = left_padded(model_goldens)
    steps = expected.shape[1] - batch["input_ids"].shape[1]
    output = tiny_model.generate(**batch, max_new_tokens=steps, do_sample=False, use_cache=use_cache)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("name, keys", [("mask_only", []), ("mask_both_tokpos", ["position_ids"])])
def test_greedy_with_mask_token(tiny_model, model_goldens, name, keys):
    expected = model_goldens[f"{name}/generated"]
    batch = batch_of(model_goldens, name, "input_ids", *keys)
    steps = expected.shape[1] - batch["input_ids"].shape[1]
    assert torch.equal(tiny_model.generate(**batch, max_new_tokens=steps, do_sample=False), expected)


def test_rows_end_at_eos_and_are_padded(tiny_model, model_goldens, generation_goldens):
    golden = generation_goldens["eos_override"]
    expected = torch.tensor(golden["generated"])
    batch = left_padded(model_goldens)
    steps = expected.shape[1] - batch["input_ids"].shape[1]
    output = tiny_model.generate(**batch, max_new_tokens=steps, do_sample=False, eos_token_id=golden["eos"])
    assert torch.equal(output, expected)


def test_beam_search_is_equal_batched_and_single(tiny_model, model_goldens):
    batch = left_padded(model_goldens)
    length = batch["input_ids"].shape[1]
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    batched = tiny_model.generate(**batch, **settings)[:, length:]
    greedy = tiny_model.generate(**batch, max_new_tokens=8, do_sample=False)[:, length:]
    assert not torch.equal(batched, greedy)  # otherwise the test would not test beams
    for row, input_ids in enumerate(batch["input_ids"]):
        single = input_ids[input_ids != PAD][None]
        assert torch.equal(tiny_model.generate(single, **settings)[0, single.shape[1] :], batched[row])


# Files


def test_nothing_of_the_checkpoint_folder_is_executed(tiny_weights):
    for loaded in (
        ChatGLMForConditionalGeneration.from_pretrained(tiny_weights),
        AutoModelForCausalLM.from_pretrained(tiny_weights),
    ):
        assert type(loaded) is ChatGLMForConditionalGeneration
        assert type(AutoConfig.from_pretrained(tiny_weights)) is type(loaded.config)
    assert not (tiny_weights / "executed").exists()


def test_the_poison_works(tiny_weights, tmp_path):
    """The control of the test above: a program that runs a file of the folder leaves the marker."""
    marker = tmp_path / "executed"
    code = (tiny_weights / "modeling_chatglm.py").read_text().replace(str(tiny_weights / "executed"), str(marker))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0
    assert marker.exists()


def test_dtype_of_the_checkpoint(tiny_weights):
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny_weights)
    assert model.dtype == torch.float16 and model.lm_head.weight is model.transformer.word_embeddings.weight


@torch.no_grad()
def test_embedding_wins_over_a_different_stored_head(tiny_weights, model_goldens, tmp_path):
    weights = torch.load(tiny_weights / "pytorch_model.bin")
    weights["lm_head.weight"] = torch.ones_like(weights["lm_head.weight"])
    torch.save(weights, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((tiny_weights / "config.json").read_text())
    model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    check_logits(model(model_goldens["prompt_hello/input_ids"]).logits, model_goldens, "prompt_hello")


@torch.no_grad()
def test_save_and_load(tiny_weights, tiny_model, model_goldens, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    original = torch.load(tiny_weights / "pytorch_model.bin").keys()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    assert saved == {name for name in original if "inv_freq" not in name and name != "lm_head.weight"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and "auto_map" not in config
    assert config["num_layers"] == 4 and config["inner_hidden_size"] == 256 and config["gmask_token_id"] == 130001
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    input_ids = model_goldens["prompt_row0/input_ids"]
    assert torch.equal(loaded(input_ids).logits, tiny_model(input_ids).logits)
