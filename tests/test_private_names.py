"""The one list of private and undocumented names of libraries that the product touches: an upgrade shows here first.

A name is private if a part of it begins with one underscore, undocumented if its module has no page in the library's
documentation. The list must name exactly what the code touches, and every name must still exist.
"""

import ast
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [*ROOT.glob("common/**/*.py"), *ROOT.glob("*/main.py")]
LIBRARIES = {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "datasets", "huggingface_hub"}
PYTHON = {"_replace", "_asdict", "_fields", "_exit"}  # documented by Python: NamedTuple, os._exit
UNDOCUMENTED = (
    *("accelerate.utils.fsdp_utils", "bitsandbytes.autograd", "bitsandbytes.functional", "deepspeed.ops"),
    *(
        "deepspeed.runtime",
        "huggingface_hub.utils",
        "transformers.integrations.deepspeed",
        "transformers.integrations.integration_utils",
        "transformers.modeling_layers",
    ),
    *("transformers.modeling_utils", "transformers.utils.generic", "transformers.utils.output_capturing"),
    *("transformers.cache_utils", "transformers.initialization"),
)
MODEL = "transformers.PreTrainedModel"
GENERATION = "transformers.GenerationMixin"
TRAINER = "transformers.Trainer"
TOKENIZER = "transformers.PreTrainedTokenizer"
PRIVATE = {  # name -> what breaks without it, or if its meaning changes
    # the engines
    "transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig": "contradictions of a DeepSpeed file are not found",
    "deepspeed.runtime.config.DeepSpeedConfig": "mistakes in a DeepSpeed file show after the model is loaded",
    "deepspeed.runtime.zero.config.DeepSpeedZeroConfig": "other names of its settings are not known",
    "deepspeed.ops.__compatible_ops__": "DeepSpeed compiles for a minute on CPUs",
    "deepspeed.ops.op_builder.builder.OpBuilder": "several jobs compile one extension at once",
    "deepspeed.ops.op_builder.builder.MissingCUDAException": "without nvcc a traceback is shown",
    "deepspeed.ops.op_builder.cpu.ShareMemCommBuilder": "DeepSpeed compiles for a minute on CPUs",
    "transformers.initialization.no_init_weights": "every process under FSDP2 takes memory for the whole model",
    "accelerate.utils.fsdp_utils.save_fsdp_optimizer": "checkpoints of FSDP2 hold frozen weights twice",
    "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model": "DDP unshares weights",
    # the Trainer
    "transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK": "trackers of --report_to are not known",
    f"{TRAINER}._save": "checkpoints hold the whole model",
    f"{TRAINER}._save_checkpoint": "a kill leaves parts of checkpoints, and a wrong clock removes the newest",
    f"{TRAINER}._save_scaler": "a training in float16 does not continue as it would have gone on",
    f"{TRAINER}._save_rng_state": "a continued training draws other random numbers",
    f"{TRAINER}._track_num_input_tokens": "a GPU waits in every step while tokens are counted",
    f"{TRAINER}._save_optimizer_and_scheduler": "checkpoints of FSDP2 hold frozen weights twice",
    f"{TRAINER}._load_scaler": "what a device with float16 began, one with bfloat16 can't continue",
    f"{TRAINER}._load_from_checkpoint": "a training under FSDP2 can't be continued",
    f"{TRAINER}._get_train_sampler": "--mix draws no rows, and rows of like length do not meet",
    f"{TRAINER}._get_eval_sampler": "the loss of the validation data depends on the order of the training rows",
    f"{TRAINER}._load_best_model": "--load_best_model_at_end finds no prefix",
    "_hf_peft_config_loaded": "of a model: P-Tuning v2 in 4 bit is refused by the Trainer, which reads this field",
    "transformers.AutoModelForCausalLM._model_mapping": "under ZeRO-3 no GLM-4 of transformers is planned for",
    # the memory planner
    "bitsandbytes.autograd._functions.MatMul8bitFp": "8 bit on a CPU is predicted wrong",
    "bitsandbytes.functional.QuantState": "4 bit is predicted wrong",
    "torch.utils._python_dispatch.TorchDispatchMode": "nothing is predicted",
    "torch.utils._pytree.tree_leaves": "nothing is predicted",
    "torch.UntypedStorage._cdata": "nothing is predicted",
    "torch._C._current_graph_task_id": "autocast is predicted wrong",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "attention on a CPU is predicted wrong",
    "torch.ops.aten._scaled_dot_product_flash_attention": "attention on a GPU is predicted wrong",
    "torch.ops.aten._scaled_dot_product_efficient_attention": "attention on a GPU is predicted wrong",
    "torch.ops.aten._local_scalar_dense": "meta tensors are asked for their values",
    "transformers.cache_utils.DynamicCache": "the models keep no cache",
    "transformers.cache_utils.DynamicLayer": "answers copy all keys and values for each token, or do not fit",
    "torch.ops.mkldnn._linear_pointwise": "products in float32 take twice as long on CPUs that are not Intel's",
    "torch.ops.mkldnn._reorder_linear_weight": "answers on CPUs that are not Intel's take half as long again",
    # data and downloads
    "_indices": "of a Dataset: the data report of a million rows takes 2 GB",
    "_fingerprint": "of a Dataset: the cache of --dataset_name does not notice other rows",
    "huggingface_hub.utils.hf_raise_for_status": "gated and missing models are told apart no longer",
    "transformers.utils.chat_template_utils._compile_jinja_template": "chat templates lack tojson, raise_exception, …",
    "huggingface_hub.utils._http.default_client_factory": "offline mode and request ids are lost in a client of ours",
    "huggingface_hub.utils.validate_repo_id": "a name that no hub can have is looked up there",
    "huggingface_hub.utils.build_hf_headers": "private models are asked for without a token",
    "huggingface_hub.utils.tqdm": "HF_HUB_DISABLE_PROGRESS_BARS is not obeyed",
    # the models, as transformers writes its own
    "transformers.cache_utils.Cache": "the models keep no cache",
    "transformers.modeling_layers.GradientCheckpointingLayer": "activations are not checkpointed",
    "transformers.modeling_utils.slice_logits_to_keep": "generation computes all logits",
    "transformers.utils.generic.merge_with_config_defaults": "the config's defaults do not reach forward()",
    "transformers.utils.output_capturing.capture_outputs": "output_hidden_states is ignored",
    "transformers.PreTrainedConfig._attn_implementation": "attn_implementation is ignored",
    f"{MODEL}._input_embed_layer": "the input embedding is not found, or not replaced",
    f"{MODEL}._no_split_modules": "FSDP2 and device maps split layers",
    f"{MODEL}._skip_keys_device_placement": "the cache is moved between devices",
    f"{MODEL}._supports_sdpa": "attention falls back to eager",
    f"{MODEL}._can_record_outputs": "output_hidden_states is ignored",
    f"{MODEL}._keys_to_ignore_on_load_unexpected": "buffers of old checkpoints are reported as unexpected",
    f"{MODEL}._tied_weights_keys": "the output layer of ChatGLM-6B is not tied",
    f"{GENERATION}._prepare_position_ids_for_generation": "ChatGLM-6B answers from wrong positions",
    f"{GENERATION}._update_model_kwargs_for_generation": "ChatGLM-6B answers from wrong positions",
    f"{GENERATION}._expand_inputs_for_generation": "beams of ChatGLM-6B mix their positions",
    # the tokenizers
    f"{TOKENIZER}._tokenize": "texts can't be encoded",
    f"{TOKENIZER}._convert_token_to_id": "texts can't be encoded",
    f"{TOKENIZER}._convert_id_to_token": "answers can't be decoded",
    f"{TOKENIZER}._decode": "answers differ from the original's",
    f"{TOKENIZER}._pad": "batches of a tokenizer lack attention_mask or position_ids",
}


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def own_names(tree: ast.Module) -> set[str]:
    """Private names that the file itself gives to its attributes and variables, not those of a library's class."""
    targets = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in targets if ast.unparse(node.value) == "self"}


def touched(file: Path) -> set[str]:
    """The last parts of the private and undocumented names of libraries in a file."""
    tree = ast.parse(file.read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            undocumented = private(node.module) or node.module.startswith(UNDOCUMENTED)
            names |= {alias.name for alias in node.names if undocumented or private(alias.name)}
        elif isinstance(node, ast.Attribute) and private(node.attr):
            names.add(node.attr)
        elif isinstance(node, ast.ClassDef) and node.bases:
            functions = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            fields = [ast.unparse(item.targets[0]) for item in node.body if isinstance(item, ast.Assign)]
            names |= {name for name in functions + fields if private(name)}
    return names - own_names(tree) - PYTHON - {"_C"}


def test_every_private_name_that_is_touched_stands_in_the_list():
    found = set().union(*(touched(file) for file in FILES))
    listed = {name.rpartition(".")[2] for name in PRIVATE}
    assert found - listed == set()
    assert listed - found - {"__compatible_ops__", "_hf_peft_config_loaded"} == set()


@pytest.mark.parametrize("name", [name for name in PRIVATE if "." in name])
def test_the_library_still_has_it(name):
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            module = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        reduce(getattr, parts[count:], module)
        return
    pytest.fail(f"no module of {name}")
