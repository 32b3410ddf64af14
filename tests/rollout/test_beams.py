"""Beam search: by hand, and token for token as `transformers`' generate at several layouts."""

import dataclasses

import pytest
import torch
from ranks import run_ranks
from toys import GPT2_LIKE, LLAMA_LIKE, make_role
from transformers_twins import twin

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.rollout.beams import BeamSearch, Candidate
from megatron_rlhf.rollout.collect import sample_responses

MODELS = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}
LENGTHS = [4, 11, 1, 7, 7, 2]
LIMIT = 12


def by_hand(*steps, beams=2, limit=3, stop=9):
    search = BeamSearch(beams, limit, lambda tokens: tokens[-1] == stop)
    for step in steps:
        assert not search.is_over
        search.advance([Candidate(total, parent, token, -1.0) for total, parent, token in step])
    return search


def test_beams_that_end_leave_their_place_to_others():
    search = by_hand([(-1.0, 0, 9), (-1.5, 0, 4), (-2.0, 0, 5), (-9.0, 0, 6)])
    assert [(each.score, each.beam.tokens) for each in search.finished] == [(-1.0, [9])]
    assert [beam.tokens for beam in search.beams] == [[4], [5]]
    search.advance([Candidate(-1.8, 1, 9, -0.3), Candidate(-2.0, 1, 7, -0.5), Candidate(-2.5, 0, 9, -1.0)])
    assert [(each.score, each.beam.tokens) for each in search.finished] == [(-0.9, [5, 9]), (-1.0, [9])]
    assert search.beams[0].tokens == [5, 7] and search.parents[0] == 1
    # The best beam is worth -2 / 2 tokens now, which is no more than the worst of two finished ones.
    assert search.is_over


def test_what_ends_below_the_beams_does_not_count():
    search = by_hand([(-1.0, 0, 4), (-1.5, 0, 5), (-1.6, 0, 9), (-2.0, 0, 6)])
    assert search.finished == [] and [beam.tokens for beam in search.beams] == [[4], [5]]


def test_the_length_limit_ends_all():
    search = by_hand([(-1.0, 0, 4), (-1.5, 0, 5)], [(-4.0, 1, 6), (-5.0, 0, 9)], limit=2)
    assert search.is_over
    assert [(each.score, each.stopped) for each in search.finished] == [(-2.0, False), (-2.5, True)]


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 67, (n,), generator=generator).tolist() for n in LENGTHS]


CASES = {
    "two": ({"beams": 2}, (22, 65, 49)),
    "five": ({"beams": 5}, (13, 66, 19)),
    "one_stop": ({"beams": 3}, (46,)),
    "no_stop": ({"beams": 3}, ()),
    "penalty": ({"beams": 3, "repetition_penalty": 1.4}, (65, 22, 15)),
    "shortest": ({"beams": 4, "min_response_tokens": 6}, (46, 65, 49)),
}


def ours(model, parallel, settings, stops, slots=64):
    config = SamplingConfig(**{"max_response_tokens": LIMIT, "batch_size": slots, **settings})
    role = make_role(MODELS[model], parallel)
    done = sample_responses(role, prompts(), list(range(len(LENGTHS))), config, stops, (0, 0))
    return [(completion.tokens, completion.stopped) for completion in done]


@pytest.fixture(scope="module")
def theirs(world):
    """(model, case) -> tokens and whether they end by themselves, of each prompt alone."""
    found = {}
    for model in MODELS:
        hf = twin(make_role(MODELS[model]).modules[0].state_dict(), MODELS[model])
        for case, (settings, stops) in CASES.items():
            named = {"num_beams": settings["beams"], "repetition_penalty": settings.get("repetition_penalty", 1.0)}
            named["min_new_tokens"] = settings.get("min_response_tokens", 1) - 1
            answers = []
            for prompt in prompts():
                tokens = hf.generate(
                    torch.tensor([prompt]),
                    do_sample=False,
                    max_new_tokens=LIMIT,
                    eos_token_id=list(stops) or 66 + 10**6,
                    pad_token_id=0,
                    **named,
                )[0, len(prompt) :].tolist()
                answers.append((tokens, bool(stops) and tokens[-1] in stops))
            found[model, case] = answers
    return found


def test_the_cases_are_of_all_kinds(theirs):
    for model in MODELS:
        assert len({str(theirs[model, case]) for case in CASES}) == len(CASES)
        ends = [stopped for case in CASES for _, stopped in theirs[model, case]]
        assert 0.2 < sum(ends) / len(ends) < 0.8


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_as_generate(model, case, theirs):
    for slots in (64, 1, 7):
        assert ours(model, ParallelConfig(), *CASES[case], slots) == theirs[model, case], slots


LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "tp2_pp2": (4, {"tensor": 2, "pipeline": 2}),
}


def all_cases(parallel):
    return {(model, case): ours(model, ParallelConfig(**parallel), *CASES[case]) for model in MODELS for case in CASES}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_every_layout(layout, theirs):
    ranks, parallel = LAYOUTS[layout]
    for found in run_ranks(ranks, all_cases, parallel):
        assert found == theirs


def test_a_text_that_ends_a_response_ends_beams(world):
    """Two tokens as texts: as if they were stop tokens, though no more candidates are kept for them."""

    def watch():
        return lambda token: token in (22, 65)

    config = SamplingConfig(max_response_tokens=LIMIT, beams=1)
    role = make_role(GPT2_LIKE)
    for beams in (2, 5):
        chosen = dataclasses.replace(config, beams=beams)
        ids = list(range(len(LENGTHS)))
        texts = [c.tokens for c in sample_responses(role, prompts(), ids, chosen, (), (0, 0), watch)]
        tokens = [c.tokens for c in sample_responses(role, prompts(), ids, chosen, (22, 65), (0, 0))]
        assert sum(a == b for a, b in zip(texts, tokens, strict=True)) >= len(ids) - 1
        assert all(token not in (22, 65) for text in texts for token in text[:-1])
