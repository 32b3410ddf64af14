"""lm-evaluation-harness on our models against its own Hugging Face model: the same requests, the same results."""

import json
from pathlib import Path

import hf_models
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from ranks import run_ranks
from transformers import AutoTokenizer

from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.model import ParallelConfig, Precision
from megatron_rlhf.config.training import SamplingConfig
from megatron_rlhf.conversion.starting_point import POLICY, StartingPoint
from megatron_rlhf.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_rlhf.evaluation.benchmarks.harness import HarnessModel, generation_settings
from megatron_rlhf.models.roles import Role
from megatron_rlhf.parallel.layout import ParallelLayout

WORDS = "The cat sat on the mat. A dog ran far away and the cat saw it. "
CONTEXTS = ["The cat", "The cat sat ", "A dog ran far away", "", "The cat sat on the mat. " * 6]
CONTINUATIONS = [" sat on the mat.", "far away", " and the cat", "A dog", " saw it"]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request, tmp_path_factory) -> Path:
    """A Hugging Face folder with a context of 64 tokens, of which some requests have more."""
    path = tmp_path_factory.mktemp(request.param)
    train_tokenizer([WORDS], 290, path)
    size = len(AutoTokenizer.from_pretrained(path))
    hf_models.build(request.param, vocab_size=size).save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return path


def requests_of(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def likelihoods() -> list[Instance]:
    return requests_of("loglikelihood", list(zip(CONTEXTS, CONTINUATIONS, strict=True)))


def texts() -> list[Instance]:
    return requests_of("loglikelihood_rolling", [(WORDS,), (WORDS * 5,), ("cat",)])


def generations() -> list[Instance]:
    greedy = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    other = {"until": "a", "max_new_tokens": 20, "temperature": 0.0}
    return requests_of("generate_until", [(c, s) for s in (greedy, other) for c in CONTEXTS if c])


def model(folder: Path, parallel: ParallelConfig) -> HarnessModel:
    source = StartingPoint.find(str(folder), "policy.init_from", POLICY)
    layout = ParallelLayout.create(parallel)
    layout.seed(1)
    role = Role.build("policy", source.model, layout, Precision.fp32)
    source.load_into(role)
    tokenizer = load_tokenizer(folder)
    role.know_only(tokenizer.known_ids)
    return HarnessModel(role.frozen(), tokenizer, 2, SamplingConfig(batch_size=2), seed=1)


def answers(folder: Path, parallel: ParallelConfig):
    ours = model(folder, parallel)
    return (
        ours.loglikelihood(likelihoods(), disable_tqdm=True),
        ours.loglikelihood_rolling(texts()),
        ours.generate_until(generations()),
    )


@pytest.fixture(scope="module")
def theirs(folder):
    lm = HFLM(pretrained=hf_models.load(folder), tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1)
    return (
        lm.loglikelihood(likelihoods(), disable_tqdm=True),
        lm.loglikelihood_rolling(texts(), disable_tqdm=True),
        [lm.generate_until([request], disable_tqdm=True)[0] for request in generations()],
    )


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(), ParallelConfig(tensor=2, pipeline=2), ParallelConfig(tensor=2, sequence=True)],
    ids=["one", "tp2_pp2", "tp2_sp_dp2"],
)
def test_results_are_those_of_its_own_model(folder, theirs, parallel):
    ranks = 1 if parallel == ParallelConfig() else 4
    for likelihood, rolling, generated in run_ranks(ranks, answers, folder, parallel):
        for (ours, greedy), (expected, choice) in zip(likelihood, theirs[0], strict=True):
            assert ours == pytest.approx(expected, abs=1e-3)
            assert greedy == choice
        assert rolling == pytest.approx(theirs[1], abs=2e-2)
        assert generated == theirs[2]
    assert len(set(theirs[2])) > 3  # texts differ, so that one in the wrong place shows


def test_one_token_is_the_greedy_one(world, folder):
    ours = model(folder, ParallelConfig())
    context = ours.tok_encode("The cat")
    results = ours._loglikelihood_tokens([(("", ""), context, [token]) for token in range(ours.role.model.vocab_size)])
    assert [result for result in results if result[1]] == [max(results)]


def test_settings_of_a_task():
    sampling, stops = generation_settings(
        {"until": "\n", "max_gen_toks": 7, "max_new_tokens": 9, "do_sample": True, "temperature": 0.5, "top_k": 3},
        SamplingConfig(batch_size=5),
    )
    assert (sampling.max_response_tokens, sampling.temperature, sampling.top_k, sampling.batch_size) == (7, 0.5, 3, 5)
    assert stops == ["\n"]
    assert generation_settings({}, SamplingConfig())[0].temperature == 0
    assert generation_settings({"do_sample": False, "temperature": 1.0}, SamplingConfig())[0].temperature == 0
    assert generation_settings({"num_beams": 4}, SamplingConfig())[0].beams == 4
    with pytest.raises(UserError, match="ask for length_penalty; known are"):
        generation_settings({"length_penalty": 2.0}, SamplingConfig())


def test_what_does_not_fit_the_context_is_refused(world, folder):
    ours = model(folder, ParallelConfig())
    with pytest.raises(UserError, match=r"generates 64 tokens.*context has 64"):
        ours.generate_until(requests_of("generate_until", [("cat", {"max_gen_toks": 64})]))
    with pytest.raises(UserError, match=r"text of \d+ tokens.*context has 64"):
        ours.loglikelihood(requests_of("loglikelihood", [("cat", " far" * 80)]))
