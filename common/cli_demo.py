"""Chat in the terminal with a model and, if there is one, its trained prefix.

python common/cli_demo.py --model_name_or_path demo --ptuning_checkpoint FOLDER
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.chat import generation_settings, stream_chat
from common.engines import compute_dtype
from common.errors import exit_on_user_error
from common.loading import load_model, load_tokenizer

WELCOME = "输入内容即可对话，clear 清空对话历史，stop 终止程序 (clear: forget the conversation, stop: leave)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", default="demo", help="demo, demo3, a folder, or a hub id")
    parser.add_argument("--ptuning_checkpoint", help="folder of a trained prefix")
    parser.add_argument("--lora_checkpoint", help="folder of a trained adapter")
    parser.add_argument("--quantization_bit", type=int, help="4 or 8")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--top_p", type=float, default=0.7)
    parser.add_argument("--temperature", type=float, default=0.95, help="0 always takes the likeliest token")
    args = parser.parse_args()
    generation = generation_settings(args.max_new_tokens, args.temperature, args.top_p)

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer = load_tokenizer(args.model_name_or_path)
    model = load_model(
        args.model_name_or_path,
        compute_dtype(device),
        args.quantization_bit,
        ptuning_checkpoint=args.ptuning_checkpoint,
        adapter=args.lora_checkpoint,
        device=device,
    )
    chat(model, tokenizer, generation)


def chat(model, tokenizer, generation: dict) -> None:
    """Reads questions until stop or the end of input; Ctrl-C breaks off an answer."""
    print(WELCOME)
    history: list[list[str]] = []
    while True:
        try:
            query = input("\n用户：").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if query == "stop":
            return
        if query == "clear":
            history = []
            print("(cleared)")
        elif query:
            history.append([query, say_answer(model, tokenizer, query, history, generation)])


def say_answer(model, tokenizer, query: str, history: list[list[str]], generation: dict) -> str:
    """Prints the answer as it grows. Text that a later token changed is printed anew on the next line."""
    print("\nChatGLM：", end="", flush=True)
    shown = ""
    try:
        for answer in stream_chat(model, tokenizer, query, history, **generation):
            print(answer[len(shown) :] if answer.startswith(shown) else f"\n{answer}", end="", flush=True)
            shown = answer
    except KeyboardInterrupt:
        pass
    print()
    return shown


if __name__ == "__main__":
    with exit_on_user_error():
        main()
