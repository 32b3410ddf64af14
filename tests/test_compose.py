"""Settings from the command line: text taken literally, and mistakes reported before anything is composed."""

import pytest

from megatron_rlhf.cli import STAGES, share_out_overrides
from megatron_rlhf.compose import compose_config
from megatron_rlhf.config.errors import UserError
from megatron_rlhf.config.stages import PPOConfig

TEMPLATES = [
    "{instruction}\n",
    r"{instruction}\n\n{input}\n",
    "Q: {q}, A:",
    "it's {a}",
    '"{a}" and "{b}"',
    "{a}: {b}",
    "[INST] {a} [/INST]",
    "<|user|>\n{a}<|end|>",
    "Cost: ${price}",
    r"\${a} and \\${b}",
    "{a}\\",
    "a={b}",
    "# {a}",
    "null {a}",
    "{{a}} {b}",
    "  {a} ",
    "(x, {a})",
    "ünï {a} 中",
    "$HOME {a}",
    "'{a}' \\",
    "{a}\\'",
    "%s~@`{a};",
]
PATHS = [
    "a b",
    "a&b",
    "a#b",
    "a(b)",
    "a=b",
    "a,b",
    "a'b",
    'a"b',
    "100%",
    "a[b]",
    "$x",
    "ünï",
    "a:b",
    "{x}",
    "a\\b",
    "[x",
]
PATHS += ["*?", "'", '"', "\\", "\\'", " x", "-x", "true", "1e3", "007", "~/x", "a\tb"]


def composed(*overrides: str, stage: str = "sft"):
    return compose_config(stage, STAGES[stage].schema, ["data.tokenizer=t", *overrides])[0]


@pytest.mark.parametrize("text", TEMPLATES)
def test_a_template_arrives_as_it_was_written(text):
    assert composed("run.dir=x", f"data.columns.prompt={text}").data.columns.prompt == text


@pytest.mark.parametrize("text", PATHS)
def test_a_path_arrives_as_it_was_written(text):
    assert composed(f"run.dir={text}").run.dir == text


def test_a_name_of_the_users_is_a_group_of_keys():
    with pytest.raises(UserError, match=r"rewards\.a=runs/rm: rewards\.a is a group of keys: rewards\.a\.init_from, "):
        composed("run.dir=x", "rewards.a=runs/rm", stage="ppo")
    assert (
        composed("run.dir=x", "data.prompts=p", "rewards={a: {init_from: r}}", stage="ppo").rewards["a"].init_from
        == "r"
    )


def test_hydras_own_quotes_null_and_references_still_mean_what_they_do_there():
    assert composed("run.dir='a,b'").run.dir == "a,b"
    assert composed('run.dir="a b"').run.dir == "a b"
    assert composed("run.dir=runs/${run.seed}").run.dir == "runs/1234"
    assert composed(r"run.dir=runs/\${run.seed}").run.dir == "runs/${run.seed}"
    assert composed("run.dir=x", "run.wandb_project=null").run.wandb_project is None
    assert composed("run.dir=x", "+run.wandb_project=null or not").run.wandb_project == "null or not"
    assert list(composed("run.dir=x", "policy.optimizer.betas=[0.8,0.9]").policy.optimizer.betas) == [0.8, 0.9]


def test_a_written_newline_is_one():
    columns = composed("run.dir=x", r"data.columns.prompt={a}\n\t{b}\\n").data.columns
    assert columns.given() == {"prompt": "{a}\n\t{b}\\n"}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["run.dir=${nope}"], r"run.dir=${nope}: Interpolation key 'nope' not found; "),
        (["sft.batch_size=4("], "sft.batch_size=4(: not a value that can be read"),
        (["policy.optimizer.betas=[0.9"], "policy.optimizer.betas=[0.9: not a value that can be read"),
        (["sft.batch_size=4,8"], "sft.batch_size=4,8: a run takes one value"),
        (["--multirun"], "--multirun: there is no such flag"),
        (["sft.epochs", "=", "3"], "sft.epochs: a setting is key=value"),
        (["model.num_layers=3"], "model.num_layers=3: a key inside a group that is not chosen"),
        (["data.columns.promt=x"], "did you mean data.columns.prompt?"),
        (["rewards.a=rm"], "rewards.a=rm: there is no key rewards.a"),
        (["placement=disaggregated"], "placement=disaggregated: there is no key placement"),
    ],
)
def test_a_mistake_names_the_override(overrides, says):
    with pytest.raises(UserError) as caught:
        composed("run.dir=x", *overrides)
    assert says in str(caught.value)


def test_each_stage_of_a_script_takes_what_it_knows():
    shares = share_out_overrides(
        ["ppo.ptx_coef=2", "policy.optimizer.lr=1e-4", "model.num_layers=2", "critic_parallel.tensor=2"], list(STAGES)
    )
    assert shares == {
        "sft": ["policy.optimizer.lr=1e-4", "model.num_layers=2"],
        "reward_model": ["model.num_layers=2"],
        "ppo": ["ppo.ptx_coef=2", "policy.optimizer.lr=1e-4", "model.num_layers=2", "critic_parallel.tensor=2"],
        "evaluate": ["model.num_layers=2", "critic_parallel.tensor=2"],
    }


@pytest.mark.parametrize(
    ("override", "says"),
    [("ppo.ptx_coeff=2", "did you mean ppo.ptx_coef?"), ("ppo.clip=-1", "ppo.clip=-1.0 must be more than 0")],
)
def test_what_no_stage_takes_is_said_before_the_first(override, says):
    with pytest.raises(UserError) as caught:
        share_out_overrides([override], list(STAGES))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model=nope", "model=nope: there is no conf/model/nope.yaml; there are gpt3_125m"),
        ("model=[a,b]", "model=[a,b]: there is no conf/model/[a,b].yaml"),
        ("~ppo.kl_coef", "~ppo.kl_coef: ppo.kl_coef cannot be taken away"),
        ("~data", "~data: data cannot be taken away"),
        ("ppo.kl_coef=[1", "ppo.kl_coef=[1: not a value that can be read"),
        ("--multirun", "--multirun: there is no such flag"),
    ],
)
def test_hydras_grammar_is_answered_in_our_terms(override, says):
    with pytest.raises(UserError) as caught:
        compose_config("ppo", PPOConfig, ["run.dir=run", override], missing="-")
    assert str(caught.value).startswith(says)
    assert "++" not in str(caught.value) and "HYDRA" not in str(caught.value)


@pytest.mark.parametrize("sign", ["+", "++"])
def test_a_plus_before_a_key_that_is_there_changes_nothing(sign):
    plain, _ = compose_config("ppo", PPOConfig, ["run.dir=run", "ppo.kl_coef=0.5", "model=tiny"], missing="-")
    signed, _ = compose_config(
        "ppo", PPOConfig, ["run.dir=run", f"{sign}ppo.kl_coef=0.5", f"{sign}model=tiny"], missing="-"
    )
    assert signed == plain
