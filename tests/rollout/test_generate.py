"""Sampled text: the same in any batch and at any layout, as long as asked for, with log-probabilities of the whole model."""

import pytest
import torch
from ranks import run_ranks
from toys import GPT2_LIKE, LLAMA_LIKE, make_role

from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.models.layers.cache import KeyValueCache
from megatron_rlhf.rollout.collect import deal_by_length, sample_responses
from megatron_rlhf.rollout.generate import generate
from megatron_rlhf.rollout.sampling import row_keys

MODELS = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}
STOPS = (3, 40)
LENGTHS = [4, 11, 1, 7, 7, 2, 9, 11, 5]


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 67, (n,), generator=generator).tolist() for n in LENGTHS]


def keys():
    ids = torch.arange(len(LENGTHS))
    return row_keys(5, 0, ids, torch.zeros_like(ids))


def sampling(**settings):
    return SamplingConfig(**{"max_response_tokens": 20, "batch_size": 4, **settings})


def completions(model, parallel, config, stop_ids=STOPS):
    return generate(make_role(MODELS[model], parallel), prompts(), keys(), config, stop_ids)


def texts(done):
    return [(completion.tokens, completion.stopped) for completion in done]


def shared_work(model, parallel, config):
    """As in training: data-parallel ranks share the prompts."""
    role = make_role(MODELS[model], parallel)
    return sample_responses(role, prompts(), list(range(len(LENGTHS))), config, STOPS, (5, 0))


@pytest.fixture(scope="module")
def on_one_rank(world):
    return {name: completions(name, ParallelConfig(), sampling()) for name in MODELS}


def test_some_responses_stop_and_some_do_not(on_one_rank):
    """Otherwise the other tests would prove little."""
    for done in on_one_rank.values():
        assert 2 <= sum(c.stopped for c in done) <= len(LENGTHS) - 2
        assert len({len(c.tokens) for c in done}) > 3


def test_a_repetition_penalty_follows_its_sequence_from_slot_to_slot(world, on_one_rank):
    penalised = [
        texts(completions("gpt2", ParallelConfig(), sampling(repetition_penalty=1.4, batch_size=slots)))
        for slots in (1, 4, 9)
    ]
    assert penalised[0] == penalised[1] == penalised[2] != texts(on_one_rank["gpt2"])


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 9, 64])
def test_the_number_of_slots_changes_nothing(batch_size, static_shapes, on_one_rank):
    for name, expected in on_one_rank.items():
        config = sampling(batch_size=batch_size)
        done = generate(make_role(MODELS[name]), prompts(), keys(), config, STOPS, static_shapes=static_shapes)
        assert texts(done) == texts(expected)
        for ours, theirs in zip(done, expected, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-5)


def test_order_and_company_change_nothing(on_one_rank):
    role = make_role(GPT2_LIKE)
    order = [6, 2, 0]
    done = generate(role, [prompts()[i] for i in order], keys()[order], sampling(batch_size=2), STOPS)
    assert texts(done) == [texts(on_one_rank["gpt2"])[i] for i in order]


@pytest.mark.parametrize("stop_ids", [STOPS, ()])
def test_a_token_asks_the_device_once(world, monkeypatch, stop_ids):
    """On a GPU, every value that Python reads waits for all work queued before."""
    role, config, texts_before, row_keys_b = make_role(GPT2_LIKE), sampling(batch_size=16), prompts(), keys()
    asked = []

    def counted(name):
        method = getattr(torch.Tensor, name)
        return lambda self, *given, **named: asked.append(name) or method(self, *given, **named)

    for name in ("__bool__", "__int__", "__float__", "item", "tolist", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    generate(role, texts_before, row_keys_b, config, stop_ids)
    results = 4  # tokens, log-probabilities, lengths, whether stopped: when all is done
    assert len(asked) <= config.max_response_tokens + results, asked


LAYOUTS = {
    "tp2": (2, ParallelConfig(tensor=2)),
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "pp2": (2, ParallelConfig(pipeline=2)),
    "tp2_pp2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "pp4": (4, ParallelConfig(pipeline=4)),
    "dp2": (2, ParallelConfig()),
    "dp2_pp2": (4, ParallelConfig(pipeline=2)),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_text_at_every_layout_on_every_rank(layout, model, on_one_rank):
    ranks, parallel = LAYOUTS[layout]
    expected = on_one_rank[model]
    for done in run_ranks(ranks, shared_work, model, parallel, sampling()):
        assert texts(done) == texts(expected)
        for ours, theirs in zip(done, expected, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-5)


def test_more_ranks_than_prompts():
    for done in run_ranks(3, few_prompts):
        assert [len(c.tokens) for c in done] == [4, 4]


def few_prompts():
    return sample_responses(make_role(GPT2_LIKE), prompts()[:2], [0, 1], sampling(max_response_tokens=4), (), (5, 0))


@pytest.mark.parametrize("model", MODELS)
def test_sampled_logprobs_are_those_of_a_full_forward_pass(model, on_one_rank):
    role = make_role(MODELS[model])
    done = completions(model, ParallelConfig(), sampling(temperature=0.7, top_k=20))
    for prompt, completion in zip(prompts(), done, strict=True):
        text = torch.tensor([prompt + completion.tokens])
        recomputed = role.logprobs(text, 1, temperature=0.7)[0, len(prompt) - 1 :]
        # fp32, different kernels for one query and for many: measured 3e-6.
        assert completion.logprobs == pytest.approx(recomputed.tolist(), abs=2e-5)


@pytest.mark.parametrize("model", MODELS)
def test_greedy_text_is_the_argmax_of_a_full_forward_pass(model, world):
    role = make_role(MODELS[model])
    for prompt, completion in zip(
        prompts(), completions(model, ParallelConfig(), sampling(temperature=0)), strict=True
    ):
        text = torch.tensor([prompt + completion.tokens])
        with role.layout, role.evaluating():
            logits = role.modules[0](text, torch.arange(text.shape[1]).unsqueeze(0), None)
        assert completion.tokens == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()


def test_stop_tokens_end_a_response_and_are_kept(on_one_rank):
    for completion in on_one_rank["gpt2"]:
        assert not set(completion.tokens[:-1]) & set(STOPS)
        assert completion.stopped == (completion.tokens[-1] in STOPS)
        assert len(completion.tokens) == len(completion.logprobs)
        assert completion.stopped or len(completion.tokens) == 20


def test_maximum_length():
    done = completions("gpt2", ParallelConfig(), sampling(max_response_tokens=1))
    assert [len(c.tokens) for c in done] == [1] * len(LENGTHS)


def test_without_stop_tokens_every_response_has_the_maximum_length(world):
    done = completions("gpt2", ParallelConfig(), sampling(max_response_tokens=7), stop_ids=())
    assert [(len(c.tokens), c.stopped) for c in done] == [(7, False)] * len(LENGTHS)


@pytest.mark.parametrize("minimum", [2, 6, 20])
def test_minimum_length_and_the_logprobs_that_training_recomputes(minimum, world):
    """Half of the probability is on the stop tokens: log-probabilities that left it out would be off by 0.7."""
    role = make_role(GPT2_LIKE)
    every_second = tuple(range(0, 66, 2))
    done = generate(role, prompts(), keys(), sampling(min_response_tokens=minimum), every_second)
    assert all(len(c.tokens) >= minimum for c in done)
    assert any(len(c.tokens) == minimum and c.stopped for c in done) or minimum == 20
    for prompt, completion in zip(prompts(), done, strict=True):
        assert not set(completion.tokens[: minimum - 1]) & set(every_second)
        recomputed = role.logprobs(torch.tensor([prompt + completion.tokens]), 1)[0, len(prompt) - 1 :]
        assert completion.logprobs == pytest.approx(recomputed.tolist(), abs=2e-5)


def test_a_prompt_and_a_response_that_fill_the_context(world):
    long = [torch.randint(0, 67, (40,), generator=torch.Generator().manual_seed(2)).tolist()]
    for model in MODELS.values():
        (done,) = generate(make_role(model), long, keys()[:1], sampling(max_response_tokens=8), ())
        assert len(done.tokens) == 8


def test_one_prompt_twice_gives_two_samples_and_seeds_and_iterations_differ(world):
    role = make_role(GPT2_LIKE)

    def sample(ids, seed):
        return texts(sample_responses(role, [prompts()[0]] * 2, ids, sampling(), STOPS, seed))

    first, second = sample([0, 0], (5, 0))
    assert first != second
    assert sample([0, 1], (5, 0))[0] == first
    assert sample([0, 0], (5, 1))[0] != first
    assert sample([0, 0], (6, 0))[0] != first
    assert sample([0, 0], (5, 0)) == [first, second]


def test_a_prompt_that_is_sampled_several_times_is_read_once(monkeypatch, world):
    """Its samples are the same as when it is sampled alone."""
    role, read, repeated = make_role(LLAMA_LIKE), [], [prompts()[i] for i in (1, 0, 1, 1, 0, 1)]
    row = torch.arange(len(repeated))
    sample_keys = row_keys(5, 0, row, torch.zeros_like(row))
    alone = [generate(role, [p], sample_keys[i : i + 1], sampling(), STOPS)[0] for i, p in enumerate(repeated)]
    prefill = KeyValueCache.prefill
    monkeypatch.setattr(KeyValueCache, "prefill", lambda *a, **k: read.append(len(a[1])) or prefill(*a, **k))
    done = generate(role, repeated, sample_keys, sampling(batch_size=6), STOPS)
    assert texts(done) == texts(alone)
    assert len({tuple(c.tokens) for c in done}) == 6, "each sample has random numbers of its own"
    assert read == [2]


def test_prompts_are_dealt_by_length():
    assert deal_by_length([5, 1, 9, 7], 2) == [[2, 1], [3, 0]]
    assert deal_by_length([4, 4, 4], 2) == [[0], [1, 2]]
    assert deal_by_length([3], 3) == [[0], [], []]


def test_virtual_stages_are_refused():
    assert all("without virtual stages" in message for message in run_ranks(2, decode_with_virtual_stages))


def decode_with_virtual_stages():
    try:
        completions("gpt2", ParallelConfig(pipeline=2, virtual_stages=2), sampling())
    except AssertionError as error:
        return str(error)
    return "decoded"


def test_its_layout_hears_how_far_it_is(world):
    """In tokens that there may be; at the end all are done, however short the responses."""
    heard = []
    role = make_role(GPT2_LIKE)
    role.layout.watch = lambda done, total: heard.append((done, total))
    generate(role, prompts()[:3], keys()[:3], sampling(max_response_tokens=5, batch_size=2), ())
    assert heard[0] == (0, 15) and heard[-1] == (15, 15)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard) and len(heard) > 5
    heard.clear()
    role.logprobs(torch.zeros(6, 8, dtype=torch.long), 2)
    assert heard == [(0, 3), (1, 3), (2, 3)]
