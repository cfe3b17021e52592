"""A model for lm-eval's tasks: `python -m dsv3_jax.evaluation --tasks` is its command line.

Source: the package lm-eval, `pip install dsv3_jax[eval]`, whose numbers for the same weights by
transformers are the goldens of tests/test_evaluation.py.
"""

import json

from dsv3_jax.data.chat import Prompts
from dsv3_jax.evaluation.completions import Completion, Ending, complete
from dsv3_jax.evaluation.perplexity import prefix_id, windows
from dsv3_jax.evaluation.scorer import Pair, Score, Scorer
from dsv3_jax.progress import Bar, no_bar
from dsv3_jax.serving.sampling import Sampling

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"tasks need the package lm-eval ({error}); pip install 'dsv3_jax[eval]'"
    ) from error

MAX_NEW = 256  # tokens, where a task does not say
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessModel(TemplateLM):
    """Answers lm-eval's three kinds of request.

    Args:
        prompts: tokenizer, chat template, and whether a plain prompt begins with bos.
        bar: shows how far the work is.
    """

    def __init__(self, scorer: Scorer, prompts: Prompts, bar: Bar = no_bar):
        super().__init__()
        self.scorer, self.prompts, self.bar = scorer, prompts, bar

    @property
    def eot_token_id(self) -> int:
        return self.prompts.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return prefix_id(self.prompts)

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's caches tell tokenizers apart by."""
        return self.prompts.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        plain = add_special_tokens is False
        return self.prompts.tokenizer.encode(string) if plain else self.prompts.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.prompts.template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.prompts.render(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of (context, continuation) each, split as lm-eval does."""
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of (texts, context, continuation) each."""
        pairs = [Pair(tuple(context), tuple(new)) for _, context, new in requests]
        return [tuple(score) for score in self._scored(pairs)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text.

        As lm-eval has it, the text stands after the prefix token and is encoded as a prompt: where
        prompts begin with bos, a second bos is scored.
        """
        pairs, ends = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            pairs += windows(ids, self.prefix_token_id, self.scorer.max_length)
            ends.append(len(pairs))
        scores = self._scored(pairs)
        parts = zip([0, *ends], ends, strict=False)
        return [sum(score.log_probability for score in scores[a:b]) for a, b in parts]

    def _scored(self, pairs: list[Pair]) -> list[Score]:
        with self.bar("log-probabilities", len(pairs)) as advance:
            return self.scorer(pairs, advance)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [completion.text for completion in self.completions([r.args for r in requests])]

    def completions(self, asked: list[tuple[str, dict]]) -> list[Completion]:
        """Continuations of (prompt, settings of a task's generation_kwargs) each."""
        kinds: dict[str, list[int]] = {}
        for place, (_, settings) in enumerate(asked):
            kinds.setdefault(json.dumps(settings, sort_keys=True), []).append(place)
        found: dict[int, Completion] = {}
        with self.bar("continuations", len(asked)) as advance:
            for settings, places in kinds.items():
                ending, sampling = request_of(json.loads(settings), self.prompts.stop_ids)
                room = self._room(ending.max_new)
                ids = [self.tok_encode(asked[place][0])[-room:] for place in places]
                how = (ending, self.scorer.batch, sampling, advance)
                new = complete(self.scorer.generator, self.prompts.tokenizer, ids, *how)
                found.update(zip(places, new, strict=True))
        return [found[place] for place in range(len(asked))]

    def _room(self, max_new: int) -> int:
        """Tokens of a prompt that leave room for the new ones."""
        room = self.scorer.max_length - max_new
        if room < 1:
            raise ValueError(
                f"a task asks for {max_new} new tokens, which leaves no room for a prompt in "
                f"max_length={self.scorer.max_length}; lower the task's max_gen_toks"
            )
        return room


def request_of(settings: dict, stop_ids: tuple[int, ...]) -> tuple[Ending, Sampling]:
    """What a task's generation_kwargs mean.

    Raises:
        ValueError: a setting that there is no way to follow.
    """
    settings = dict(settings)
    lengths = [settings.pop(name, None) for name in LENGTH_NAMES]
    until = settings.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    temperature = float(settings.pop("temperature", None) or 0.0)
    draws = settings.pop("do_sample", None)
    top_p = float(settings.pop("top_p", 1.0))
    if settings:
        raise ValueError(
            f"generation_kwargs {', '.join(settings)} cannot be followed; there are until, "
            "max_gen_toks, do_sample, temperature and top_p"
        )
    if draws and not temperature:
        raise ValueError("do_sample=true needs a temperature above 0 in generation_kwargs")
    ending = Ending(
        max_new=next((int(n) for n in lengths if n is not None), MAX_NEW),
        until=tuple(stop for stop in until if stop),
        stop_ids=stop_ids,
    )
    return ending, Sampling(temperature=0.0 if draws is False else temperature, top_p=top_p)
