"""Text from a model: an official checkpoint folder, or a workdir of train.py.

    python -m dsv3_jax.generate --weights runs/tiny --prompt "The list of"
    python -m dsv3_jax.generate --weights ~/DeepSeek-V3 --mesh=ep8 --dtype=bfloat16 --chat \\
        --prompt "What is a mixture of experts?" --temperature 0.6 --top-p 0.95

Text streams as it comes. Several prompts run as one batch and are printed one after the other.
"""

import argparse

from dsv3_jax.cli import add_model_options
from dsv3_jax.data.chat import Prompts, StreamingDecoder, load_prompts
from dsv3_jax.errors import errors_as_messages


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--prompt", action="append", required=True, help="text to continue; may be repeated")
    add("--chat", action="store_true", help="put each prompt in the folder's chat template")
    add("--max-new", type=int, default=256, help="most new tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest (default)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest that reach this together")
    add("--seed", type=int, default=0, help="of the draws")
    add("--fp8-cache", action="store_true", help="remember tokens in FP8: 57 %% of the memory")
    add("--ignore-eos", action="store_true", help="go on after the end of the text")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    from dsv3_jax.serving.generator import (  # after --help, which needs none
        Generator,
        check_request,
    )
    from dsv3_jax.serving.model_view import ModelView
    from dsv3_jax.serving.sampling import Sampling
    from dsv3_jax.weights.pretrained import load_model, start_mesh
    from dsv3_jax.weights.sources import open_weights

    with errors_as_messages():
        sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p)
        mesh = start_mesh(arguments.mesh)
        source = open_weights(arguments.weights)
        prompts = load_prompts(source.directory)
        ids = [_ids(prompts, text, arguments.chat) for text in arguments.prompt]
        check_request(ids, arguments.max_new, source.config.vocab_size)
        view = ModelView.take(load_model(source, arguments.dtype, mesh), mesh)
        generator = Generator(view, fp8_cache=arguments.fp8_cache)
        stop_ids = () if arguments.ignore_eos else prompts.stop_ids
        steps = generator(ids, arguments.max_new, sampling, stop_ids, arguments.seed)
        texts = [text + "\n" * arguments.chat for text in arguments.prompt]
        show(texts, steps, prompts, stop_ids)


def _ids(prompts: Prompts, text: str, chat: bool) -> list[int]:
    return (
        prompts.encode_chat([{"role": "user", "content": text}]) if chat else prompts.encode(text)
    )


def show(texts: list[str], steps, prompts: Prompts, stop_ids: tuple[int, ...]):
    """Print each text and its continuation; the first unfinished one grows as tokens come."""
    streams = [StreamingDecoder(prompts.tokenizer) for _ in texts]
    waiting, ended = list(texts), [False] * len(texts)
    shown = 0  # texts before this one are complete
    for step in steps:
        for row, token in enumerate(step.tokens.tolist()):
            if ended[row]:
                continue
            if token not in stop_ids:
                waiting[row] += streams[row].push(token)
            if step.done[row]:
                waiting[row] += streams[row].flush()
                ended[row] = True
        shown = _print(waiting, ended, shown)
    for row in range(shown, len(texts)):
        if not ended[row]:
            waiting[row] += streams[row].flush()
    _print(waiting, [True] * len(texts), shown)


def _print(waiting: list[str], ended: list[bool], shown: int) -> int:
    while shown < len(waiting):
        print(waiting[shown], end="", flush=True)
        waiting[shown] = ""
        if not ended[shown]:
            break
        print("\n" if shown + 1 < len(waiting) else "", flush=True)
        shown += 1
    return shown


if __name__ == "__main__":
    main()
