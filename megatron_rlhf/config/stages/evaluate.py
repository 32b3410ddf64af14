"""What an evaluation measures."""

from dataclasses import dataclass, field

from megatron_rlhf.config.data import EvaluationDataConfig
from megatron_rlhf.config.model import ParallelConfig
from megatron_rlhf.config.rewards import NamedReward, RewardConfig, WeightedRewardConfig, named_rewards
from megatron_rlhf.config.stages.common import BaseConfig
from megatron_rlhf.config.training import RoleConfig, SamplingConfig


@dataclass(kw_only=True)
class EvaluateAlgorithmConfig:
    """What to measure."""

    samples: int = 128
    """Prompts to answer."""
    samples_per_prompt: int = 1
    """Sampled answers to each prompt."""
    greedy: bool = False
    """One more answer to each prompt: always the most likely token."""
    name: str | None = None
    """What the policy is called in the output; not given: the last folder of policy.init_from."""
    labels: str | None = None
    """A project of megatron-rlhf label to which the answers are added, for people to rank; made if it is not there."""
    comparisons: str | None = None
    """Comparisons, as data.comparisons of a reward model, to measure a reward model on: accuracy by K, and by the columns
    `team` (labelers of megatron-rlhf label) or `subset` (RewardBench)."""
    comparisons_format: str | None = None
    """Their shape, as data.format."""
    ema: bool = False
    """Use the moving average of the policy's weights."""
    few_shot: str | None = None
    """A text file put before every prompt (the paper's few-shot baseline)."""
    output: str = "evaluation.jsonl"
    """File in run.dir that gets one line per response; it replaces that of an earlier evaluation, and nothing else."""
    tasks: list[str] = field(default_factory=list)
    """Public benchmarks, tasks or tags of lm-evaluation-harness; instructgpt is all of the paper's. docs/benchmarks.md."""
    task_path: str | None = None
    """A folder with more task files, one's own."""
    task_data: str | None = None
    """The folder with the benchmarks' files, as they are published, that the instructgpt tasks read."""
    task_limit: int | None = None
    """Only the first rows of each task, to try it."""
    task_shots: int | None = None
    """Solved examples in front of each row; not given: as the task says."""
    task_chat: bool = False
    """Put prompts in the tokenizer's chat template."""
    scorer: str | None = None
    """PATH/TO/FILE.py:NAME or MODULE:NAME: judges the answers to tasks that ask for it (toxicity); takes prompts, responses
    and rows as a reward function does, and returns a number for each."""


@dataclass(kw_only=True)
class EvaluateConfig(BaseConfig):
    """`megatron-rlhf evaluate`: sample responses, score them, measure the loss on held-out text."""

    data: EvaluationDataConfig = field(default_factory=EvaluationDataConfig)
    """Prompts, tokenizer, pretraining text for the held-out loss."""
    policy: RoleConfig = field(default_factory=RoleConfig)
    """The model that answers."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """What scores the answers, optional: a reward model, a function instead of it or beside it."""
    rewards: dict[str, WeightedRewardConfig] = field(default_factory=dict)
    """Instead of `reward`: several by name, as in PPO."""
    critic_parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of reward models."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are sampled."""
    evaluate: EvaluateAlgorithmConfig = field(default_factory=EvaluateAlgorithmConfig)
    """How many, which weights, what else to measure."""

    @property
    def reward_models(self) -> list[NamedReward]:
        """The parts of the reward that are models."""
        return [part for part in named_rewards(self.reward, self.rewards) if not part.is_function]
