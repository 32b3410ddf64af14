"""Every architecture in every precision: scored, sampled, trained, resumed, exported.

fp16 is refused for whole runs on a CPU, where its kernels are slow; its arithmetic is the same there.
"""

import hf_models
import pytest
import torch
from conversions import CHECK, tensors
from ranks import run_ranks
from toys import make_role, weight_blocks

from megatron_rlhf.checkpoint import sharded
from megatron_rlhf.checkpoint.sharded import SavedRole
from megatron_rlhf.config.model import ParallelConfig, Precision
from megatron_rlhf.config.training import OptimizerConfig, SamplingConfig
from megatron_rlhf.conversion import convert
from megatron_rlhf.conversion.hf import load as hf_load
from megatron_rlhf.conversion.hf.extra_files import ExtraFiles
from megatron_rlhf.models.microbatches import TokenBatch, language_model_microbatches
from megatron_rlhf.parallel.pipeline import Microbatch
from megatron_rlhf.rollout.generate import generate
from megatron_rlhf.trainers.step import TrainedRole

# Of different lengths: padded on the left.
PROMPTS = [[5, 9, 40, 7, 7, 81], [3], [12, 60, 2, 33, 8, 1, 19, 4, 77], [50, 51]]
# bf16 has 8 bits of mantissa, fp16 11: their rounding errors, over a few layers, for logits of about 6.
ROUNDING = {Precision.fp32: 1e-4, Precision.fp16: 0.1, Precision.bf16: 0.5}
CASES = [*hf_models.ARCHITECTURES, "llama_linear_rope", "gpt_neox_serial"]
SMALL = 1e-3  # a loss times this does not overflow at fp16's initial loss scale
DTYPES = {Precision.fp32: torch.float32, Precision.fp16: torch.float16, Precision.bf16: torch.bfloat16}


def role_of(folder, precision, parallel=None, scalar=False):
    """A role with the folder's weights; a scalar head is the same in every precision."""
    role = make_role(hf_load.read_model_config(folder)[0], parallel, precision=precision, scalar=scalar)
    hf_load.load_into(role, folder)
    return role


def sampled_and_scored(folder, precision, parallel=None, offload=False):
    """Sampled texts with their log-probabilities, and the scores of these texts by the same role, by rows."""
    role = role_of(folder, precision, parallel)
    config = SamplingConfig(max_response_tokens=24, batch_size=4)
    completions = generate(role, PROMPTS, torch.arange(len(PROMPTS)), config, stop_ids=())
    if offload:
        role.frozen().offload()
    texts = [prompt + completion.tokens for prompt, completion in zip(PROMPTS, completions, strict=True)]
    sampled = torch.cat([torch.tensor(completion.logprobs) for completion in completions])
    return texts, sampled, logprobs_of(role, texts)


def logprobs_of(role, texts):
    rows = [role.logprobs(torch.tensor([text]), 1)[0] for text in texts]
    return torch.cat([row[len(prompt) - 1 :] for row, prompt in zip(rows, PROMPTS, strict=True)])


def assert_differ_by_rounding(folder, precision, texts, sampled, scored):
    """Rounding is measured, not guessed: how much the scores of these same texts differ from those in fp32."""
    rounding = (scored - logprobs_of(role_of(folder, Precision.fp32), texts)).abs().max()
    assert rounding < ROUNDING[precision]
    assert (sampled - scored).abs().max() <= max(2 * rounding, ROUNDING[Precision.fp32])
    assert precision is Precision.fp32 or rounding > 1e-4, "it is computed in this precision"


def trained(role, precision, ema_decay=0.0):
    return TrainedRole.create(role, OptimizerConfig(lr=1e-3, clip_norm=1.0), precision, ema_decay=ema_decay)


def update_policy(policy):
    batch = TokenBatch.pack([[*prompt, 11, 12, 13] for prompt in PROMPTS], [1] * len(PROMPTS))
    return policy.update(language_model_microbatches(batch, policy.role, 2, "loss", weight=SMALL), 1e-3)


def update_value(value):
    def loss_of(values_bs1):
        loss = SMALL * (values_bs1.squeeze(-1) - 1).square().mean()
        return loss, {"loss": loss.detach()}

    return value.update([Microbatch(torch.tensor([PROMPTS[0]]), loss_of)], 1e-3)


def save(folder, policy, value):
    with sharded.writing(folder) as aside:
        sharded.save_role(aside, SavedRole(policy.role, policy.optimizer))
        sharded.save_role(aside, SavedRole(value.role, value.optimizer))
        sharded.save_role(aside, policy.average.saved())
        roles = {"policy": policy.role, "value": value.role, "policy_ema": policy.role}
        sharded.write_meta(aside, roles, {})


def resumed(folder, source, precision):
    policy = trained(role_of(source, precision), precision, 0.9)
    value = trained(role_of(source, precision, scalar=True), precision)
    value.role.name = "value"
    sharded.load_role(folder, SavedRole(policy.role, policy.optimizer))
    sharded.load_role(folder, SavedRole(value.role, value.optimizer))
    sharded.load_role(folder, policy.average.saved())
    return policy, value


def state_of(policy, value):
    with policy.average.as_weights() as averaged:
        average = weight_blocks(averaged)
    return {
        f"{name} {block.name} {block.place}": torch.from_numpy(block.values)
        for name, blocks in (
            ("policy", weight_blocks(policy.role)),
            ("value", weight_blocks(value.role)),
            ("ema", average),
        )
        for block in blocks
    }


@pytest.mark.parametrize("precision", DTYPES, ids=lambda p: p.value)
@pytest.mark.parametrize("case", CASES)
def test_score_sample_train_resume_export(world, tmp_path, case, precision):
    source = hf_models.save(tmp_path / "source", case)
    assert_differ_by_rounding(source, precision, *sampled_and_scored(source, precision))
    policy = trained(role_of(source, precision), precision, 0.9)
    value = trained(role_of(source, precision, scalar=True), precision)
    value.role.name = "value"
    exact = update_policy(trained(role_of(source, Precision.fp32), Precision.fp32))
    exact_value = update_value(trained(role_of(source, Precision.fp32, scalar=True), Precision.fp32))
    for ours, theirs in ((update_policy(policy), exact), (update_value(value), exact_value)):
        assert not ours.skipped
        assert ours.statistics["loss"] == pytest.approx(theirs.statistics["loss"], rel=ROUNDING[precision] / 10)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=max(ROUNDING[precision] / 5, 1e-4))
    save(tmp_path / "step_1", policy, value)
    again = resumed(tmp_path / "step_1", source, precision)
    for roles in ((policy, value), again):
        update_policy(roles[0])
        update_value(roles[1])
    went_on, expected = state_of(*again), state_of(policy, value)
    assert went_on.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, went_on[name])] == []
    extra = ExtraFiles(source, None)
    for role, dtype in (("policy", None), ("policy_ema", torch.bfloat16)):
        # Its own check runs transformers on the same tokens.
        convert.export_huggingface(tmp_path / "step_1", tmp_path / role, role, None, dtype, extra, CHECK)
        assert {tensor.dtype for tensor in tensors(tmp_path / role).values()} == {dtype or DTYPES[precision]}


@pytest.mark.parametrize(
    ("case", "parallel", "offload"),
    [
        ("pythia", ParallelConfig(tensor=2, sequence=True), False),
        ("qwen3", ParallelConfig(pipeline=2), True),
        ("llama_3.1", ParallelConfig(tensor=2), True),
    ],
)
def test_bf16_at_a_layout(world, tmp_path, case, parallel, offload):
    """Partial rotation, norms of queries and keys, scaled positions; weights offloaded to host memory."""
    folder = hf_models.save(tmp_path, case)
    for result in run_ranks(2, sampled_and_scored, folder, Precision.bf16, parallel, offload):
        assert_differ_by_rounding(folder, Precision.bf16, *result)


def test_bf16_in_parts_of_a_context(world, tmp_path):
    folder = hf_models.save(tmp_path, "mistral")
    texts = [[*prompt, *range(20, 34)] for prompt in PROMPTS]
    exact = logprobs_of(role_of(folder, Precision.fp32), texts)
    for parts in run_ranks(2, scored, folder, texts):
        assert (parts - exact).abs().max() < ROUNDING[Precision.bf16]


def scored(folder, texts):
    return logprobs_of(role_of(folder, Precision.bf16, ParallelConfig(context=2)), texts)
