"""Answer one question with what was trained: an adapter, a prefix, or a full checkpoint.

python common/inference_hf.py CHECKPOINT --prompt "你好"
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from common.chat.chat import generation_settings, stream_chat
from common.errors import UserError, exit_on_user_error
from common.loading import find_trained, load_model, load_tokenizer
from common.models.precision import compute_dtype, this_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder of what was trained, or any model")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--model_name_or_path", help="the base, where it is not the one that the checkpoint names")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--top_p", type=float, default=0.8)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token")
    args = parser.parse_args()
    generation = generation_settings(args.max_new_tokens, args.temperature, args.top_p)

    base, trained = find_trained(args.checkpoint, args.model_name_or_path)
    if args.model_name_or_path and not trained:
        raise UserError(f"{base} holds neither adapter nor prefix alone: leave --model_name_or_path out.")
    device = this_device()
    tokenizer = load_tokenizer(base)
    model = load_model(base, compute_dtype(device), device=device, **trained)
    *_, answer = "", *stream_chat(model, tokenizer, args.prompt, **generation)
    print(answer)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
