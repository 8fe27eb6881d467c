"""P-Tuning v2: the numbers of the original code, what trains, what is saved, and what is refused."""

import json

import pytest
import torch
from conftest import GOLDENS
from safetensors.torch import save_file
from test_chatglm_model import LOGITS, PAD, RELATIVE, batch_of, check_logits, left_padded, relative_error, trajectory

from common.arguments import PrefixArguments
from common.errors import UserError
from common.methods.prefix import PTuning, attach_prefix, load_prefix, read_prefix
from common.models.chatglm import ChatGLMForConditionalGeneration

OFFICIAL = {kind: GOLDENS / f"prefix16-{kind}" for kind in ("plain", "proj")}
PLAIN_KEYS = ["transformer.prefix_encoder.embedding.weight"]
PROJECTION_KEYS = [
    *PLAIN_KEYS,
    "transformer.prefix_encoder.trans.0.bias",
    "transformer.prefix_encoder.trans.0.weight",
    "transformer.prefix_encoder.trans.2.bias",
    "transformer.prefix_encoder.trans.2.weight",
]


@pytest.fixture
def plain_model(fresh_tiny_model):
    """The tiny model with the golden prefix, in training mode but without dropout, as the goldens are."""
    load_prefix(fresh_tiny_model, OFFICIAL["plain"])
    fresh_tiny_model.train()
    fresh_tiny_model.transformer.prefix_encoder.dropout.p = 0.0
    return fresh_tiny_model


def training_batch(goldens: dict) -> dict:
    return batch_of(goldens, "train_64_64", "input_ids", "labels")


def trainable(model) -> list[str]:
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def random_prefix(model, pre_seq_len: int = 5, projection: bool = False) -> dict:
    """Attaches a prefix and returns its tensors by their names on disk."""
    attach_prefix(model, pre_seq_len, projection)
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "prefix_encoder" in name}


# Numbers


@torch.no_grad()
def test_logits_and_loss(plain_model, model_goldens):
    output = plain_model.eval()(**training_batch(model_goldens))
    check_logits(output.logits, model_goldens, "prefix16_plain")
    torch.testing.assert_close(output.loss, model_goldens["prefix16_plain/loss"], **RELATIVE)


@torch.no_grad()
def test_left_padded_logits(plain_model, model_goldens):
    logits = plain_model.eval()(**left_padded(model_goldens)).logits[:, -1, model_goldens["cols"]]
    torch.testing.assert_close(logits, model_goldens["prefix16_plain/leftpad_lg_cols_last"], **LOGITS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(plain_model, model_goldens, checkpointing):
    if checkpointing:
        plain_model.gradient_checkpointing_enable()
    loss = plain_model(**training_batch(model_goldens)).loss
    loss.backward()
    gradient = plain_model.transformer.prefix_encoder.embedding.weight.grad
    torch.testing.assert_close(loss.detach(), model_goldens["prefix16_plain/loss"], **RELATIVE)
    assert relative_error(gradient, model_goldens["prefix16_plain/grad/embedding.weight"]) < 1e-4
    assert gradient.norm().item() == pytest.approx(model_goldens["prefix16_plain/grad_norm"].item(), rel=1e-4)


def test_trajectory(plain_model, model_goldens):
    losses, norms = trajectory(plain_model, training_batch(model_goldens), 2e-2)
    assert losses == pytest.approx(model_goldens["prefix16_plain/traj_loss"].tolist(), rel=1e-4)
    assert norms == pytest.approx(model_goldens["prefix16_plain/traj_gnorm"].tolist(), rel=1e-3)


@pytest.mark.parametrize("kind", ["plain", "proj"])
def test_greedy(fresh_tiny_model, model_goldens, generation_goldens, kind):
    """Batched with and without cache, and row by row: always the ids of the original."""
    load_prefix(fresh_tiny_model, OFFICIAL[kind])
    golden = generation_goldens[f"prefix_{kind}"]
    batch = left_padded(model_goldens)
    length = batch["input_ids"].shape[1]
    settings = {"max_new_tokens": len(golden["batch_generated"][0]), "do_sample": False}
    for use_cache in (True, False):
        output = fresh_tiny_model.generate(**batch, **settings, use_cache=use_cache)
        assert output[:, length:].tolist() == golden["batch_generated"]
    for input_ids, expected in zip(batch["input_ids"], golden["single_generated"], strict=True):
        single = input_ids[input_ids != PAD][None]
        assert fresh_tiny_model.generate(single, **settings)[0, single.shape[1] :].tolist() == expected


@torch.no_grad()
def test_projection_is_a_computed_plain_prefix(fresh_tiny_model, model_goldens):
    """embedding -> Linear -> Tanh -> Linear, written out, gives the table of a plain prefix with equal logits."""
    load_prefix(fresh_tiny_model, OFFICIAL["proj"])
    input_ids = model_goldens["prompt_row0/input_ids"]
    projected = fresh_tiny_model(input_ids).logits
    stored = read_prefix(OFFICIAL["proj"])
    hidden = torch.tanh(stored["embedding.weight"] @ stored["trans.0.weight"].T + stored["trans.0.bias"])
    attach_prefix(fresh_tiny_model, 16)
    table = hidden @ stored["trans.2.weight"].T + stored["trans.2.bias"]
    fresh_tiny_model.transformer.prefix_encoder.embedding.weight.copy_(table)
    torch.testing.assert_close(fresh_tiny_model(input_ids).logits, projected, **LOGITS)


def test_projection_gradients_follow_the_loss(fresh_tiny_model, model_goldens):
    """A small step against the gradient changes the loss by what the gradient promises."""
    load_prefix(fresh_tiny_model, OFFICIAL["proj"])
    batch = batch_of(model_goldens, "train_single_nopad", "input_ids", "labels")
    loss = fresh_tiny_model(**batch, loss_only=True).loss
    loss.backward()
    parameters = list(fresh_tiny_model.transformer.prefix_encoder.parameters())
    assert len(parameters) == 5 and all(parameter.grad.abs().max() > 0 for parameter in parameters)
    for parameter in parameters:
        before, step = parameter.data.clone(), 0.02 / parameter.grad.norm()
        losses = []
        for sign in (1, -1):
            parameter.data = before + sign * step * parameter.grad
            with torch.no_grad():
                losses.append(fresh_tiny_model(**batch, loss_only=True).loss.double())
        parameter.data = before
        slope = ((losses[0] - losses[1]) / (2 * step)).item()
        assert slope == pytest.approx(parameter.grad.norm().item() ** 2, rel=0.02)


# What trains


@pytest.mark.parametrize("projection, keys", [(False, PLAIN_KEYS), (True, PROJECTION_KEYS)])
def test_only_the_prefix_trains(small_model, projection, keys):
    """Also with an optimizer that was given everything, and weight decay: the base stays bit for bit."""
    model = small_model.half()
    attach_prefix(model, 4, projection)
    model.train()
    assert trainable(model) == keys
    assert {parameter.dtype for parameter in model.transformer.prefix_encoder.parameters()} == {torch.float32}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.float()  # training itself in float32: half precision products are slow on CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    input_ids = torch.tensor([[5, 6, 7, 61, 62, 9, 10, 63]])
    for _ in range(3):
        model(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name].float()) != (name in keys), name


def test_half_precision_base_keeps_a_float32_prefix(small_model):
    """The base runs in bfloat16, the prefix and its gradient stay float32."""
    model = small_model.bfloat16()
    attach_prefix(model, 4)
    input_ids = torch.tensor([[5, 6, 7, 61, 62, 9, 10, 63]])
    model(input_ids, labels=input_ids).loss.backward()
    weight = model.transformer.prefix_encoder.embedding.weight
    assert weight.dtype == weight.grad.dtype == torch.float32 and weight.grad.abs().max() > 0
    assert model.transformer.word_embeddings.weight.dtype == torch.bfloat16


def test_dropout_differs_from_row_to_row(small_model):
    attach_prefix(small_model, 32)
    encoder = small_model.transformer.prefix_encoder
    torch.manual_seed(0)
    small_model.train()
    first, second = encoder(2).unbind(2)
    assert not torch.equal(first == 0, second == 0)
    assert 0.05 < (first == 0).float().mean() < 0.15
    small_model.eval()
    first, second = encoder(2).unbind(2)
    assert torch.equal(first, second) and not (first == 0).any()


def test_dropout_with_gradient_checkpointing(small_model):
    """The recomputed layers see the same dropped keys and values: equal gradients from equal seeds."""
    attach_prefix(small_model, 8)
    small_model.train()
    input_ids = torch.tensor([[5, 6, 7, 61, 62, 9, 10, 63]])
    weight = small_model.transformer.prefix_encoder.embedding.weight
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            small_model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        small_model(input_ids, labels=input_ids).loss.backward()
        found.append(weight.grad.clone())
        weight.grad = None
    torch.testing.assert_close(found[1], found[0])


@torch.no_grad()
def test_without_prefix_is_the_base_model(plain_model, model_goldens):
    plain_model.eval()
    input_ids = model_goldens["prompt_row0/input_ids"]
    tuned = plain_model(input_ids).logits
    with pytest.raises(KeyError), PTuning(PrefixArguments()).base(plain_model) as base:
        check_logits(base(input_ids).logits, model_goldens, "prompt_row0")
        raise KeyError  # the prefix also comes back after an error
    assert torch.equal(plain_model(input_ids).logits, tuned)
    assert (tuned[..., model_goldens["cols"]] - model_goldens["prompt_row0/lg_cols"]).abs().max() > 0.1


# Files


@pytest.mark.parametrize("projection, keys", [(False, PLAIN_KEYS), (True, PROJECTION_KEYS)])
def test_save_and_load(small_model, tmp_path, projection, keys):
    tensors = random_prefix(small_model, 5, projection)
    PTuning(PrefixArguments()).save(small_model, tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "pytorch_model.bin"]
    stored = torch.load(tmp_path / "saved" / "pytorch_model.bin", weights_only=True)
    assert sorted(stored) == keys and {tensor.dtype for tensor in stored.values()} == {torch.float32}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["pre_seq_len"], config["prefix_projection"]) == (5, projection)
    attach_prefix(small_model, 7)
    load_prefix(small_model, tmp_path / "saved")
    assert (small_model.config.pre_seq_len, small_model.config.prefix_projection) == (5, projection)
    for name, tensor in tensors.items():
        assert torch.equal(small_model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind, projection", [("plain", False), ("proj", True)])
def test_kind_of_the_official_folder_is_read_from_it(fresh_tiny_model, kind, projection):
    load_prefix(fresh_tiny_model, OFFICIAL[kind])
    assert fresh_tiny_model.config.pre_seq_len == 16
    assert fresh_tiny_model.config.prefix_projection is projection
    assert trainable(fresh_tiny_model) == (PROJECTION_KEYS if projection else PLAIN_KEYS)


def write_full_checkpoint(model, folder, form: str) -> dict:
    """Base and prefix together, as old versions of the official script saved them; returns the prefix tensors."""
    prefix = random_prefix(model, 5, projection=True)
    model.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save, stem, suffix = (
        (save_file, "model", "safetensors") if "safetensors" in form else (torch.save, "pytorch_model", "bin")
    )
    if "sharded" not in form:
        save(tensors, folder / f"{stem}.{suffix}")
        return prefix
    names = sorted(tensors, key=lambda name: (len(name), name))  # spreads the prefix over both shards
    index = {}
    for number in (1, 2):
        file = f"{stem}-{number:05}-of-00002.{suffix}"
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        index |= dict.fromkeys(part, file)
        save(part, folder / file)
    assert len({index[name] for name in prefix}) == 2
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))
    return prefix


@pytest.mark.parametrize("form", ["bin", "sharded bin", "safetensors", "sharded safetensors"])
@torch.no_grad()
def test_full_checkpoints_with_a_prefix(small_model, tmp_path, form):
    """The base loads from the same folder without it, and the prefix is read by load_prefix."""
    input_ids = torch.tensor([[5, 6, 7, 61, 62]])
    base_logits = small_model(input_ids).logits
    prefix = write_full_checkpoint(small_model, tmp_path, form)
    tuned_logits = small_model(input_ids).logits
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(loaded(input_ids).logits, base_logits)
    load_prefix(loaded, tmp_path)
    for name, tensor in prefix.items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    torch.testing.assert_close(loaded(input_ids).logits, tuned_logits)


# Refusals


def test_another_length_is_refused(fresh_tiny_model):
    with pytest.raises(UserError, match=r"pre_seq_len 16, not 128"):
        load_prefix(fresh_tiny_model, OFFICIAL["plain"], PrefixArguments(pre_seq_len=128))
    load_prefix(fresh_tiny_model, OFFICIAL["plain"], PrefixArguments(pre_seq_len=16))


def test_another_kind_is_refused(fresh_tiny_model):
    with pytest.raises(UserError, match="trained with --prefix_projection False, not True"):
        load_prefix(fresh_tiny_model, OFFICIAL["plain"], PrefixArguments(prefix_projection=True))
    load_prefix(fresh_tiny_model, OFFICIAL["proj"], PrefixArguments(prefix_projection=True))


@pytest.mark.parametrize("kind, found, needed", [("plain", "[16, 512]", "[16, 128]"), ("proj", "[16, 64]", "[16, 32]")])
def test_another_model_shape_is_refused(small_model, kind, found, needed):
    with pytest.raises(UserError) as error:
        load_prefix(small_model, OFFICIAL[kind])
    assert found in str(error.value) and needed in str(error.value)


def test_a_folder_without_prefix_is_refused(tiny_weights, fresh_tiny_model):
    with pytest.raises(UserError, match="holds no prefix"):
        load_prefix(fresh_tiny_model, tiny_weights)
