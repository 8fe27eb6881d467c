"""Write a tuned model so that other programs run it.

python common/export/export.py --checkpoint FOLDER [--format glm|gguf|original]

glm: a folder that transformers and vLLM load without our code. gguf: one file for llama.cpp and Ollama. original: for
the code of the official repository. A LoRA adapter is merged into its base first.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from common.encoding import encode_chat, stop_ids
from common.errors import UserError, exit_on_user_error
from common.export import glm, original
from common.export.compare import compare_answers, compare_prompts, load_glm
from common.export.vocabulary import save_vocabulary
from common.export.weights import stored_weights, write_shards
from common.files import clear, read_json, write_json
from common.loading import find_trained, load_model, load_tokenizer
from common.merge import DTYPES, SAMPLE, merge, new_folder
from common.methods.lora import adapter_config
from common.models.registry import ModelFolder, empty_model, fetch_weights, open_model
from common.trained import find_training

HERE = "serve it from here (serve.sh)"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a training, a merged model, or a folder of trainings: the newest one")
    parser.add_argument("--model_name_or_path", help="the base of an adapter that has moved; alone: this model")
    parser.add_argument("--format", choices=WRITERS, default="glm")
    parser.add_argument("--output_dir", type=Path, help="a new folder; default: FORMAT, inside the training's folder")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="precision of the weights")
    parser.add_argument("--max_shard_size", default="2GB", help="size of the weight files of glm and original")
    args = parser.parse_args()
    limit, dtype = bytes_of(args.max_shard_size), DTYPES[args.dtype]
    if not args.checkpoint and not args.model_name_or_path:
        raise UserError("CHECKPOINT (--checkpoint) and MODEL (--model_name_or_path) are empty: which model leaves?")
    checkpoint = find_training(args.checkpoint) if args.checkpoint else Path(args.model_name_or_path)
    base, trained = find_trained(str(checkpoint), args.model_name_or_path)
    if "ptuning_checkpoint" in trained:
        raise UserError(f"{checkpoint} holds a prefix, which no other program puts before a text: {HERE}.")
    if trained:
        adapter_config(checkpoint)
    folder = fetch_weights(open_model(base))
    check_leaves(folder, args.format)
    output_dir = args.output_dir or (checkpoint if args.checkpoint else Path()) / args.format
    size = sum(file.stat().st_size for file in folder.weights) * (2 if dtype == torch.float32 else 1)
    with new_folder(output_dir, size * (2 if trained else 1)) as new:
        if trained:
            merge(folder, trained, dtype, args.max_shard_size, new / "merged")
        WRITERS[args.format](open_model(new / "merged") if trained else folder, new, dtype, limit)
        clear(new / "merged")
    print(f"exported {checkpoint}: {output_dir}")


def check_leaves(folder: ModelFolder, form: str) -> None:
    """Raises UserError for a model that no program runs in this form."""
    if folder.bits:
        raise UserError(f"{folder.path} holds quantized weights: export the 16-bit model.")
    if folder.spec.key == "glm":
        merged = "merge an adapter by lora/merge.sh, and they load the result"
        raise UserError(f"{folder.path} is in the format of transformers: other programs load it as it is; {merged}.")
    if folder.spec.key == "chatglm4" and form == "gguf":
        raise UserError("of a GLM-4 no GGUF file is written here: take FORMAT=glm and llama.cpp's own converter.")
    if folder.spec.key == "chatglm" and form != "original":
        raise UserError(
            "ChatGLM-6B reads a question in both directions, which no other program computes: "
            f"{HERE}, or take FORMAT=original (--format original)."
        )


def write_glm(folder: ModelFolder, output_dir: Path, dtype: torch.dtype, limit: int) -> None:
    """A folder that transformers and vLLM load. Raises UserError if it does not compute the same."""
    tokenizer = load_tokenizer(folder)
    stops = stop_ids(tokenizer)
    config = glm.glm_config(folder.config, dtype, stops)
    config.save_pretrained(output_dir)
    fields = (read_json(output_dir / "config.json") or {}) | glm.older_fields(folder.config, dtype)
    write_json(output_dir / "config.json", fields)
    GenerationConfig(eos_token_id=stops, pad_token_id=config.pad_token_id).save_pretrained(output_dir)
    save_vocabulary(tokenizer, output_dir, folder.config.seq_length)
    weights = glm.glm_weights(stored_weights(folder), folder.config, dtype)
    write_shards(weights, output_dir, "model.safetensors", limit, partial(save_file, metadata={"format": "pt"}))
    compare_prompts(tokenizer, folder.spec.key, output_dir)
    prompt = encode_chat(tokenizer, SAMPLE)
    difference = compare_answers(load_model(folder, dtype), load_glm(output_dir, dtype), prompt)
    print(f"tokens of conversations and a greedy answer are the same, logits within {difference:.1g}")


def write_gguf(folder: ModelFolder, output_dir: Path, dtype: torch.dtype, limit: int) -> None:
    """One file for llama.cpp."""
    from common.export import gguf_file  # its library comes with requirements-export.txt

    tokenizer = load_tokenizer(folder)
    file, weights = output_dir / "model.gguf", partial(stored_weights, folder)
    gguf_file.write_gguf(file, folder.spec.name, weights, tokenizer, folder.config, dtype, stop_ids(tokenizer))


def write_original(folder: ModelFolder, output_dir: Path, dtype: torch.dtype, limit: int) -> None:
    """A folder for the official code. Raises UserError if the weights are no longer the same."""
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(output_dir)
    original.write_settings(folder, output_dir)
    weights = empty_model(folder.spec, folder.config).original_state_dict(dtype, dict(stored_weights(folder)))
    write_shards(weights.items(), output_dir, "pytorch_model.bin", limit, torch.save)
    compare_answers(load_model(folder, dtype), load_model(output_dir, dtype), encode_chat(tokenizer, SAMPLE))
    code = ", ".join(original.MODEL_CODE)
    print(f"copy {code} beside it from the base model, as far as it has them: this folder holds no code")


WRITERS = {"glm": write_glm, "gguf": write_gguf, "original": write_original}


def bytes_of(size: str) -> int:
    """The number of bytes in a text like 2GB. Raises UserError for others."""
    number, unit = size[:-2], size[-2:].upper()
    if unit not in UNITS or not number.isdecimal() or int(number) == 0:
        raise UserError(f"--max_shard_size {size}: write it like 500MB or 2GB.")
    return int(number) * UNITS[unit]


if __name__ == "__main__":
    with exit_on_user_error():
        main()
