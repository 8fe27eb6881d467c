"""4 and 8 bit: what bitsandbytes makes of a model while it is loaded, and what was published packed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import ROOT
from safetensors.torch import save_file
from torch import Tensor, nn

from common.arguments import FullArguments, LoraArguments, PrefixArguments
from common.errors import UserError
from common.finetune import run
from common.flags import parse_arguments
from common.loading import load_model
from common.memory.quantized import quantized
from common.methods.full import Full
from common.methods.lora import Lora
from common.methods.prefix import PTuning
from common.models.quantization import OUTLIER_THRESHOLD, PackedWeight
from common.models.registry import DEMOS, open_model
from common.models.weights import packed_weights

IDS = torch.tensor([[5, 8, *range(40, 60)]])
PACKED_LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def pack(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(integers, scale of each row) as the original code stores them; in 4 bit the even column is the high half."""
    largest = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(-1) / largest).half()
    numbers = (weight / scale.float()[:, None]).round().clamp(-largest, largest).to(torch.int8)
    return (numbers if bits == 8 else numbers[:, ::2] << 4 | numbers[:, 1::2] & 15), scale


def packed_layers(weights: dict[str, Tensor]) -> list[str]:
    return [name for name in weights if name.endswith(tuple(f".{layer}.weight" for layer in PACKED_LAYERS))]


def write_packed(demo: str, bits: int, folder: Path, safetensors: bool = False, without: str = "") -> Path:
    """A demo as the original code would have saved it in ``bits``; ``without``: of a name to leave out."""
    shutil.copytree(DEMOS[demo], folder, ignore=shutil.ignore_patterns("*.bin"))
    weights = torch.load(DEMOS[demo] / "pytorch_model.bin", weights_only=True)
    for name in packed_layers(weights):
        weights[name], weights[f"{name}_scale"] = pack(weights[name].float(), bits)
    weights = {
        name: tensor.contiguous() for name, tensor in weights.items() if not (without and name.endswith(without))
    }
    if safetensors:
        weights.pop("lm_head.weight", None)  # the same tensor as the embedding
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_bit": bits}))
    return folder


# Packed checkpoints


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_round_trip_is_exact(bits):
    """Every integer that the format has, and every scale, come back: packed again it is the same."""
    largest = 2 ** (bits - 1) - 1
    numbers = torch.arange(-largest, largest + 1).repeat(2)[: 2 * largest].float()
    weight = torch.stack((numbers, numbers.flip(0), -numbers)) * torch.tensor([[1.0], [2**-7], [0.0123]]).half().float()
    packed, scale = pack(weight, bits)
    unpacked = PackedWeight(packed, scale, bits)[...]
    assert unpacked.dtype == torch.float32
    assert torch.equal(unpacked, weight)
    assert all(torch.equal(again, first) for again, first in zip(pack(unpacked, bits), (packed, scale), strict=True))


def test_the_even_column_is_the_high_half():
    packed = torch.tensor([[0x7F - 256 * 0, 0x12]], dtype=torch.uint8).view(torch.int8)
    unpacked = PackedWeight(packed, torch.ones(1).half(), 4)[...]
    assert unpacked.tolist() == [[7, -1, 1, 2]]


@pytest.mark.parametrize(
    ("demo", "bits", "safetensors"), [("demo", 4, False), ("demo", 8, True), ("demo3", 4, True), ("demo3", 8, False)]
)
def test_a_packed_checkpoint_is_the_model_that_was_packed(demo, bits, safetensors, tmp_path):
    """Unpacked it computes what plain weights of these values compute; loaded as it is, it is quantized again."""
    folder = write_packed(demo, bits, tmp_path / "chatglm3-6b", safetensors)
    plain = load_model(demo)
    for name in packed_layers(plain.state_dict()):
        plain.get_parameter(name).data = PackedWeight(*pack(plain.get_parameter(name).data, bits), bits)[...]
    unpacked = load_model(demo)
    weights = {name: weight[...] for name, weight in packed_weights(open_model(folder)).items()}
    unpacked.load_state_dict(weights, strict=False)
    quantized = load_model(folder)
    with torch.no_grad():
        expected, found, again = plain(IDS).logits, unpacked(IDS).logits, quantized(IDS).logits
    assert torch.equal(expected, found)
    assert (again - expected).abs().mean() < (0.4 if bits == 4 else 0.02) * expected.std()
    layers = [module for module in quantized.modules() if isinstance(module, Linear4bit if bits == 4 else Linear8bitLt)]
    assert len(layers) == 4 * plain.config.num_layers


def test_a_packed_checkpoint_trains_and_can_be_given_other_bits(tmp_path):
    folder = write_packed("demo", 4, tmp_path / "chatglm-6b-int4")
    losses = finetune("lora", f"--model_name_or_path {folder} --max_steps 3", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "run_settings.json").read_text())
    assert settings["quantization_bit"] == 4
    assert losses[-1] < losses[0]
    other = load_model(folder, quantization_bit=8)
    assert any(isinstance(module, Linear8bitLt) for module in other.modules())


@pytest.mark.parametrize(
    ("without", "config", "says"),
    [
        ("layers.3.mlp.dense_h_to_4h.weight_scale", {}, r"layers.3.mlp.dense_h_to_4h.weight_scale is missing"),
        ("", {"quantization_bit": 2}, "quantization_bit is 2; only 4 and 8 exist"),
        ("", {"quantization_bit": 8}, r"unpacks to \[576, 96\] with the 8 bit .* the model needs \[576, 192\]"),
    ],
)
def test_a_packed_checkpoint_that_does_not_fit_is_refused(without, config, says, tmp_path):
    folder = write_packed("demo", 4, tmp_path / "model", without=without)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    with pytest.raises(UserError, match=says):
        packed_weights(open_model(folder))


def test_all_weights_of_a_packed_checkpoint_are_not_trained(tmp_path):
    folder = write_packed("demo", 8, tmp_path / "chatglm-6b-int8")
    with pytest.raises(UserError, match="is packed in 8 bit: integers have no gradients to train"):
        finetune("full", f"--model_name_or_path {folder}", tmp_path / "out")


# Quantized while loading


@pytest.fixture(scope="module", params=["demo", "demo3"])
def in_4_bit(request):
    return load_model(request.param, quantization_bit=4)


def test_embedding_and_head_are_not_quantized(in_4_bit):
    linear = {type(module) for module in in_4_bit.transformer.modules() if isinstance(module, nn.Linear)}
    head = in_4_bit.get_output_embeddings()
    assert linear - {type(head)} == {Linear4bit}
    assert type(head) is nn.Linear
    assert in_4_bit.get_input_embeddings().weight.dtype == head.weight.dtype == torch.float32
    states = [module.weight.quant_state for module in in_4_bit.modules() if isinstance(module, Linear4bit)]
    assert all(state.quant_type == "nf4" and state.nested for state in states)


def test_nf4_computes_what_its_dequantized_weights_compute(in_4_bit):
    """In training exactly; in inference as near as bfloat16 does, in which bitsandbytes computes on some CPUs."""
    plain, half = load_model(in_4_bit.name_or_path), load_model(in_4_bit.name_or_path, torch.bfloat16)
    with torch.no_grad():
        before = plain(IDS).logits
        for name, module in in_4_bit.named_modules():
            if isinstance(module, Linear4bit):
                plain.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
        half.load_state_dict(plain.state_dict())
        expected, rounded = plain(IDS).logits, half(IDS).logits.float()
        assert torch.equal(in_4_bit.train()(IDS).logits, expected)
        assert (in_4_bit.eval()(IDS).logits - expected).abs().mean() <= (rounded - expected).abs().mean()
    assert not torch.equal(before, expected)


def test_columns_with_outliers_are_not_rounded_to_8_bit():
    """As the plan says, whose layers have the same threshold."""
    model = load_model("demo", quantization_bit=8)
    layers = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
    planned = quantized(nn.Linear(8, 8, device="meta"), 8, torch.float32)
    assert {layer.state.threshold for layer in [*layers, planned]} == {OUTLIER_THRESHOLD}
    layer, inputs = layers[0], torch.randn(4, layers[0].in_features, generator=torch.Generator().manual_seed(0))
    inputs[:, 7] *= 100
    layer(inputs)
    expected = inputs @ int8_vectorwise_dequant(layer.state.CB, layer.state.SCB).T + layer.bias
    kept = (layer(inputs) - expected).abs().mean()
    layer.state.threshold = 0.0
    assert kept < 0.1 * (layer(inputs) - expected).abs().mean()


# Training

METHODS = {"ptuning": (PTuning, PrefixArguments), "lora": (Lora, LoraArguments), "full": (Full, FullArguments)}
TRAINING = (
    f"--do_train --train_file {ROOT}/AdvertiseGen/train.json --prompt_column content --response_column summary "
    "--max_source_length 64 --max_target_length 64 --per_device_train_batch_size 8 --logging_steps 1 "
    "--save_strategy no --report_to none --disable_tqdm true --train_sampling_strategy random"
)
OWN_FLAGS = {"ptuning": "--pre_seq_len 32 --learning_rate 2e-2", "lora": "--learning_rate 5e-3", "full": ""}


def finetune(method: str, flags: str, folder: Path) -> list[float]:
    """Trains in this process. Returns the loss of every step."""
    make, arguments = METHODS[method]
    argv = f"{TRAINING} {OWN_FLAGS[method]} {flags} --output_dir {folder}".split()
    model_args, method_args, data_args, args = parse_arguments(arguments, argv)
    run(make(method_args), model_args, data_args, args)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("method", ["ptuning", "lora"])
def test_10_steps_in_4_bit_follow_those_in_32(method, tmp_path):
    """Each mean over five steps within 3%."""
    whole, quantized = (
        torch.tensor(finetune(method, f"--max_steps 10 {flags}", tmp_path / name)).view(2, 5).mean(1)
        for name, flags in (("whole", ""), ("quantized", "--quantization_bit 4"))
    )
    assert whole[-1] < 0.9 * whole[0]
    assert not torch.equal(whole, quantized)
    torch.testing.assert_close(quantized, whole, rtol=0.03, atol=0)


@pytest.mark.parametrize("method", ["ptuning", "lora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_bits_ask_for_checkpointed_activations_which_change_nothing(method, bits, tmp_path):
    flags = f"--quantization_bit {bits} --max_steps 2 --per_device_train_batch_size 2"
    losses = finetune(method, flags, tmp_path / "on")
    args = torch.load(tmp_path / "on" / "training_args.bin", weights_only=False)
    assert args.activation_checkpointing is True
    assert finetune(method, f"{flags} --activation_checkpointing false", tmp_path / "off") == losses
    assert len(set(losses)) == 2


def test_packed_weights_are_mapped_and_not_read(tmp_path):
    """A checkpoint is looked at before a start without any of its weights being unpacked."""
    weights = packed_weights(open_model(write_packed("demo", 4, tmp_path / "model")))
    packed = [weight for weight in weights.values() if isinstance(weight, PackedWeight)]
    assert len(packed) == 4 * 6
    assert all(weight.packed.dtype == torch.int8 and weight.scale.dtype == torch.float16 for weight in packed)
