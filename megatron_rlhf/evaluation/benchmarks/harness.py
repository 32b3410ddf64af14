"""A model in its layout as lm-evaluation-harness sees one.

All ranks run the harness, with the same requests in the same order; inside a request's pass they work together, and all
get its result. So the harness sees a world of one rank, and scores are those of a single rank.
"""

import copy
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.lengths import check_sampling
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models.microbatches import TokenBatch
from megatron_rlhf.models.roles import Role
from megatron_rlhf.rollout.collect import sample_responses

MAX_RESPONSE_TOKENS = 256
"""Of tasks that state no limit; the harness's own default."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the limit in a task's generation settings, the first one first."""
REQUESTS = 1024
"""Requests that are padded into one tensor; their passes are smaller."""

Pair = tuple[tuple[str, str], list[int], list[int]]
"""Texts of a request, tokens of its context, and tokens whose log-likelihood is requested."""


class HarnessModel(TemplateLM):
    """Log-likelihoods, rolling log-likelihoods and generation of a language model."""

    def __init__(self, role: Role, tokenizer: Tokenizer, micro_batch_size: int, sampling: SamplingConfig, seed: int):
        """`sampling`: its number of slots is used; everything else is a task's own."""
        super().__init__()
        self.role = role
        self.tokens = tokenizer
        self.tokenizer: Any = tokenizer.hf
        self.max_length = role.model.max_sequence_length
        self.micro_batch_size = micro_batch_size
        self.sampling = sampling
        self.seed = seed

    @property
    def eot_token_id(self) -> int:
        """Ends a document."""
        return self.tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is read after."""
        return self.tokens.eos_id if self.tokens.bos_id is None else self.tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of the harness's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As the tokenizer itself begins a text, unless the text already begins so, or the caller says otherwise."""
        start = self.tokenizer.decode([self.prefix_token_id])
        begins = not string.startswith(start) if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(string, add_special_tokens=begins)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation in the tokenizer's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **_: Any) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        for start in range(0, len(requests), REQUESTS):
            results += self._loglikelihoods(requests[start : start + REQUESTS])
        return results

    def _loglikelihoods(self, requests: Sequence[Pair]) -> list[tuple[float, bool]]:
        texts, firsts = [], []
        for _, context, continuation in requests:
            # What does not fit is cut off at the front: the last token is only predicted, never read.
            text = (context + continuation)[-(self.max_length + 1) :]
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a task asks for the likelihood of a text of {len(continuation)} tokens, and the model's context has "
                    f"{self.max_length}: {self.tokens.decode(continuation[:16])!r}..."
                )
            texts.append(text)
            firsts.append(max(len(text) - len(continuation), 1))
        batch = TokenBatch.pack(texts, firsts)
        logprobs_bs, chosen_bs = self.role.logprobs_and_choices(batch.sequences, self.micro_batch_size)
        target_bs = batch.target_bs[:, 1:].to(logprobs_bs.device)
        sums_b = logprobs_bs.double().masked_fill(~target_bs, 0.0).sum(dim=1)
        greedy_b = (chosen_bs | ~target_bs).all(dim=1)
        return list(zip(sums_b.tolist(), greedy_b.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's context that do not overlap."""
        windows: list[Pair] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            parts = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, parts):
                windows.append(((text, ""), context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A text for each context, up to its first stop text or end token; requests with equal settings together."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        texts: dict[int, str] = {}
        for rows in groups.values():
            contexts = [requests[i].args[0] for i in rows]
            texts.update(zip(rows, self._generate(contexts, requests[rows[0]].args[1]), strict=True))
        return [texts[i] for i in range(len(requests))]

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        sampling, stops = generation_settings(settings, self.sampling)
        room = self.max_length - sampling.longest_response
        if room < 1:
            raise UserError(
                f"a task generates {sampling.longest_response} tokens, and the model's context has "
                f"{self.max_length}; lower max_gen_toks in the task's generation_kwargs"
            )
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        completions = sample_responses(
            self.role,
            prompts,
            range(len(prompts)),
            sampling,
            self.tokens.stop_ids,
            (self.seed, 0),
            lambda: self.tokens.watch_for(stops),
        )
        texts = [self.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
        return [_before_any(text, stops) for text in texts]


def generation_settings(task: dict[str, Any], base: SamplingConfig) -> tuple[SamplingConfig, list[str]]:
    """A task's generation settings: how responses are sampled, and the texts that end one.

    Raises:
        UserError: a setting that decoding here does not have.
    """
    remaining = copy.deepcopy(task)
    until = remaining.pop("until", None) or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    limits = [remaining.pop(name, None) for name in LIMITS]
    limit = next((value for value in limits if value is not None), MAX_RESPONSE_TOKENS)
    sampled = remaining.pop("do_sample", None)
    temperature = float(remaining.pop("temperature", 0.0 if not sampled else 1.0))
    sampling = SamplingConfig(
        temperature=temperature if sampled is not False else 0.0,
        top_k=int(remaining.pop("top_k", 0)),
        top_p=float(remaining.pop("top_p", 1.0)),
        repetition_penalty=float(remaining.pop("repetition_penalty", 1.0)),
        beams=int(remaining.pop("num_beams", 1)),
        max_response_tokens=int(limit),
        batch_size=base.batch_size,
        precision=base.precision,
    )
    if remaining:
        raise UserError(
            f"a task's generation_kwargs ask for {', '.join(sorted(remaining))}; known are until, do_sample, "
            "temperature, top_k, top_p, repetition_penalty, num_beams and max_gen_toks"
        )
    check_sampling(sampling, "a task's generation_kwargs")
    return sampling, stops


def _before_any(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
