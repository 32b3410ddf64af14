"""PPO with pretraining gradients, PPO-ptx (Ouyang et al. 2022, section 3.5, equation 2, and appendix C.4)."""

import copy
import itertools
import math
import statistics

import torch
from reference import data, models
from reference.data import Settings
from reference.episodes import Episode, explained_variance, rollout_metrics, update_metrics
from reference.models import Adam
from reference.sampling import Vocabulary, respond, row_key
from reference.sft import Result
from torch import Tensor


class Run:
    """One run, iteration by iteration."""

    def __init__(self, s: Settings):
        self.s = s
        self.policy = models.language_model(s["policy.init_from"])
        self.reference = models.language_model(s["policy.init_from"])
        self.reward = models.scalar_model(s["reward.init_from"])
        self.value = models.scalar_model(s["value.init_from"]) if s["ppo.advantages"] == "gae" else None
        self.average = copy.deepcopy(self.policy)
        self.policy_adam = Adam(self.policy, s, "policy")
        self.value_adam = Adam(self.value, s, "value") if self.value else None
        self.vocabulary = Vocabulary.of(s)
        self.prompts = data.prompts(s)
        self.batches = data.shuffled_batches(
            len(self.prompts), s["ppo.batch_size"] // s["ppo.samples_per_prompt"], s["run.seed"], whole=True
        )
        updates = s["ppo.iterations"] * s["ppo.inner_epochs"] * s["ppo.batch_size"] // s["ppo.minibatch_size"]
        self.text = data.pretraining_text(s, updates * s["ppo.minibatch_size"] * s["ppo.ptx_ratio"])
        self.next_text = itertools.cycle(self.text.train)
        self.kl_coef = s["ppo.kl_coef"]
        self.ptx_coef = 1.0 if s["ppo.ptx_coef"] == "auto" else s["ppo.ptx_coef"]
        self.averages = {"ppo": 0.0, "text": 0.0}
        self.trained_tokens = 0

    def collect(self, iteration: int) -> list[Episode]:
        """The policy answers, all models judge. A repeated prompt gets a different sample."""
        s, temperature, seen, episodes = self.s, self.s["rollout.temperature"], [], []
        for number in [number for number in next(self.batches) for _ in range(s["ppo.samples_per_prompt"])]:
            prompt = self.prompts[number]
            key = row_key(s["run.seed"], iteration, prompt.number, seen.count(number))
            seen.append(number)
            response = respond(self.policy, prompt.tokens, key, s, "rollout", self.vocabulary)
            tokens, first = prompt.tokens + response.tokens, len(prompt.tokens)
            with torch.no_grad():
                score = models.scalars(self.reward, tokens)[-1].item()
                old, reference = (
                    models.of_tokens(models.logprobs(model, tokens, temperature, self.vocabulary.known), tokens)[
                        first - 1 :
                    ]
                    for model in (self.policy, self.reference)
                )
                episodes.append(
                    Episode(
                        number,
                        prompt.tokens,
                        response,
                        score,
                        score if response.stopped else score - s["ppo.missing_stop_penalty"],
                        old,
                        old - reference,
                        models.scalars(self.value, tokens)[first - 1 : -1] if self.value else torch.zeros(len(old)),
                    )
                )
        return episodes

    def judge(self, episodes: list[Episode]) -> None:
        """Rewards (equation 2), advantages and returns; whitening, if it is asked for, or usual for the estimator."""
        estimator = self.s["ppo.advantages"]
        if estimator == "gae":
            self.judge_by_value(episodes)
        else:
            self.judge_among_samples(episodes, estimator)
        whitens = self.s["ppo.whiten_advantages"]
        if whitens or (whitens is None and estimator in ("gae", "reinforce_baseline")):
            every = torch.cat([episode.advantages for episode in episodes])
            for episode in episodes:
                episode.advantages = (episode.advantages - every.mean()) / (every.var() + 1e-8).sqrt()

    def rewards(self, episode: Episode) -> Tensor:
        rewards = -self.kl_coef * episode.kl
        rewards[-1] += episode.total
        return rewards

    def judge_among_samples(self, episodes: list[Episode], estimator: str) -> None:
        """Returns less those of the prompt's others (rloo), also with the score standardised (grpo), or token by token
        (reinforce_baseline)."""
        for episode in episodes:
            discounts = self.s["ppo.gamma"] ** torch.arange(episode.length)
            rewards = self.rewards(episode)
            episode.returns = torch.stack(
                [rewards[t:] @ discounts[: episode.length - t] for t in range(episode.length)]
            )
        for episode in episodes:
            samples = [e for e in episodes if e.number == episode.number]
            whole = {id(e): float(e.returns[0]) for e in samples}
            if estimator == "reinforce_baseline":
                episode.advantages = episode.returns - statistics.fmean(whole.values())
                continue
            advantage = 0.0
            if estimator == "grpo":  # the score by itself, and the rest of the return as rloo has the whole
                totals = [e.total for e in samples]
                advantage = (episode.total - statistics.fmean(totals)) / (statistics.stdev(totals) + 1e-4)
                whole = {id(e): whole[id(e)] - self.s["ppo.gamma"] ** (e.length - 1) * e.total for e in samples}
            mine = whole.pop(id(episode))
            episode.advantages = torch.full([episode.length], advantage + mine - statistics.fmean(whole.values()))

    def judge_by_value(self, episodes: list[Episode]) -> None:
        """Schulman et al. 2016, equations 11 and 16."""
        gamma, lam = self.s["ppo.gamma"], self.s["ppo.lam"]
        for episode in episodes:
            rewards = self.rewards(episode)
            values = [*episode.values, 0.0]  # the episode has ended
            deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(episode.length)]
            episode.advantages = torch.stack(
                [
                    sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, episode.length))
                    for t in range(episode.length)
                ]
            )
            episode.returns = episode.advantages + episode.values

    def minibatches(self, episodes: list[Episode], iteration: int, epoch: int) -> list[list[Episode]]:
        seed = hash((self.s["run.seed"], iteration, epoch)) % 2**63
        order = torch.randperm(len(episodes), generator=torch.Generator().manual_seed(seed)).tolist()
        size = self.s["ppo.minibatch_size"]
        return [[episodes[i] for i in order[start : start + size]] for start in range(0, len(order), size)]

    def update_policy(
        self, minibatch: list[Episode], rate: float, report: bool
    ) -> tuple[dict[str, float], list[list[int]]]:
        """PPO's loss plus the text's times its coefficient (equation 2); the texts that were read.

        `report`: also the norms of the two gradients and the cosine of the angle between them.
        """
        s, weights = self.s, list(self.policy.parameters())
        texts = list(itertools.islice(self.next_text, s["ppo.ptx_ratio"] * s["ppo.minibatch_size"]))
        text_loss = models.text_loss(
            self.policy, [(text, 1) for text in texts], lambda part: (self.ptx_coef * part).backward()
        )
        of_text = torch.cat([weight.grad.flatten().double() for weight in weights])
        figures = self.clipped_objective(minibatch) | {"ptx/loss": text_loss}
        rest = torch.cat([weight.grad.flatten().double() for weight in weights]) - of_text
        if report:
            norms = {"policy/ppo_grad_norm": rest.norm().item(), "policy/ptx_grad_norm": of_text.norm().item()}
            figures |= norms | {"policy/grad_cosine": float(rest @ of_text) / math.prod(norms.values())}
        figures["policy/grad_norm"] = self.policy_adam.step(rate)
        with torch.no_grad():
            for average, weight in zip(self.average.parameters(), weights, strict=True):
                average.copy_(s["ppo.ema_decay"] * average + (1 - s["ppo.ema_decay"]) * weight)
        return figures, texts

    def clipped_objective(self, minibatch: list[Episode]) -> dict[str, float]:
        """Gradients of the clipped objective (Schulman et al. 2017, equation 7), and its metrics."""
        s, clip = self.s, self.s["ppo.clip"]
        tokens = sum(episode.length for episode in minibatch)
        names = ("loss", "ratio_mean", "clip_fraction", "approx_kl", "entropy")
        sums, gaps = dict.fromkeys((f"policy/{name}" for name in names), 0.0), []
        for episode in minibatch:
            every = models.logprobs(self.policy, episode.tokens, s["rollout.temperature"], self.vocabulary.known)
            every = every[len(episode.prompt) - 1 :]
            new = every.gather(1, torch.tensor(episode.response.tokens).unsqueeze(1)).squeeze(1)
            ratio = (new - episode.logprobs).exp()
            gain, clipped = ratio * episode.advantages, ratio.clamp(1 - clip, 1 + clip) * episode.advantages
            loss = -torch.minimum(gain, clipped).sum() / tokens
            entropy = -(every.exp() * every).sum() / tokens
            (loss - s["ppo.entropy_coef"] * entropy).backward()
            log_ratio = (new - episode.logprobs).detach()
            figures = (
                loss,
                ratio.sum() / tokens,
                (clipped < gain).sum() / tokens,
                # KL(old || new) by Schulman's k3, for tokens drawn from the old
                (log_ratio.exp() - 1 - log_ratio).sum() / tokens,
                entropy,
            )
            sums = {name: total + float(x.detach()) for (name, total), x in zip(sums.items(), figures, strict=True)}
            gaps.append((ratio.detach() - 1).abs().max().item())
        return sums | {"policy/first_ratio_max_gap": max(gaps)}

    def update_value(self, minibatch: list[Episode]) -> dict[str, float]:
        """Half the larger of two squared errors, one of the value clipped around the old (Engstrom et al. 2020, section 3)."""
        clip, tokens = self.s["ppo.value_clip"], sum(episode.length for episode in minibatch)
        sums = {"value/loss": 0.0, "value/clip_fraction": 0.0}
        for episode in minibatch:
            new = models.scalars(self.value, episode.tokens)[len(episode.prompt) - 1 : -1]
            near = new.clamp(episode.values - clip, episode.values + clip)
            error, clipped = (new - episode.returns) ** 2, (near - episode.returns) ** 2
            loss = torch.maximum(error, clipped).sum() / 2 / tokens
            loss.backward()
            sums["value/loss"] += loss.item()
            sums["value/clip_fraction"] += (clipped > error).sum().item() / tokens
        return sums | {"value/grad_norm": self.value_adam.step(self.s["value.optimizer.lr"])}

    def iterate(self, iteration: int) -> tuple[dict[str, float], list[Episode], dict[str, list[list[int]]]]:
        """Metrics, episodes and the data that was read."""
        s, policy_updates, value_updates = self.s, [], []
        episodes = self.collect(iteration)
        self.judge(episodes)
        read = {"prompt": [episode.prompt for episode in episodes], "text": []}
        rate, warmup = s["policy.optimizer.lr"], s["ppo.warmup_iterations"]
        done = iteration - s["ppo.critic_warmup_iterations"]  # of the policy; none while only the critic learns
        learns = done >= 0
        report = s["ppo.ptx_coef"] == "auto" or (iteration + 1) % s["ppo.gradient_report_every"] == 0
        if done < warmup:  # from one tenth of the peak (appendix C.4)
            rate *= 0.1 + 0.9 * done / warmup
        for epoch in range(s["ppo.inner_epochs"]):
            for minibatch in self.minibatches(episodes, iteration, epoch):
                if learns:
                    update, texts = self.update_policy(minibatch, rate, report and not policy_updates)
                    policy_updates.append(update)
                    read["text"] += texts
                if self.value:
                    value_updates.append(self.update_value(minibatch))
        row = {
            "step": iteration + 1,
            "samples": (iteration + 1) * s["ppo.batch_size"],
            "skipped_updates": 0,
            **rollout_metrics(episodes),
            **({"rollout/logprob_gap_max": 0.0} if self.recomputes(iteration) else {}),
            **(explained_variance(episodes) if self.value else {}),
            "kl/coef": self.kl_coef,
            **update_metrics(value_updates),
            **update_metrics(policy_updates),
            "policy/lr": rate if learns else 0.0,
            **({"ptx/coef": self.ptx_coef} if learns else {}),
            **self.costs(episodes, read["text"], bool(policy_updates), 1 + self.recomputes(iteration)),
        }
        if (iteration + 1) % s["ppo.tax_every"] == 0:
            row |= self.tax()
        if learns:
            self.control_kl(row["kl/mean"])
            self.balance_text(row)
        return row, episodes, read

    def recomputes(self, iteration: int) -> bool:
        """The policy reads the whole rollout once more; where the sampler's log-probabilities serve, only now and then."""
        s = self.s
        return s["ppo.old_logprobs"] == "recomputed" or (iteration + 1) % s["ppo.recheck_every"] == 0

    def control_kl(self, kl: float) -> None:
        """Ziegler et al. 2019, section 2.2."""
        if self.s["ppo.kl_control"] == "adaptive":
            error = min(max(kl / self.s["ppo.kl_target"] - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * self.s["ppo.batch_size"] / self.s["ppo.kl_horizon"]

    def balance_text(self, row: dict[str, float]) -> None:
        """Holds the text's gradient at a multiple of PPO's: a quotient of averaged norms, the text's without coefficient."""
        if self.s["ppo.ptx_coef"] == "auto":
            norms = {"ppo": row["policy/ppo_grad_norm"], "text": row["policy/ptx_grad_norm"] / self.ptx_coef}
            self.averages = {name: 0.9 * x + 0.1 * norms[name] for name, x in self.averages.items()}
            self.ptx_coef = self.s["ppo.ptx_gradient_ratio"] * self.averages["ppo"] / self.averages["text"]

    @torch.no_grad()
    def tax(self) -> dict[str, float]:
        """Loss on held-out text, of the policy and of the reference."""
        texts = [(text, 1) for text in self.text.held_out[: self.s["data.pretraining.held_out_samples"]]]
        policy, reference = (
            models.text_loss(model, texts, lambda part: None) for model in (self.policy, self.reference)
        )
        return {"tax/pretraining_loss": policy, "tax/reference_pretraining_loss": reference}

    def costs(
        self, episodes: list[Episode], texts: list[list[int]], learns: bool, policy_reads: int
    ) -> dict[str, float]:
        """Tokens that the policy trained on; 2 FLOPs per weight and token forward, 6 with backward (Kaplan et al. 2020)."""
        policy, reward = models.count_weights(self.policy), models.count_weights(self.reward)
        value = models.count_weights(self.value) if self.value else 0
        sampled = sum(len(episode.tokens) for episode in episodes)
        learned = self.s["ppo.inner_epochs"] * sampled
        trained = learned * learns + sum(len(text) - 1 for text in texts)
        self.trained_tokens += trained
        # Of one minibatch, the first update finds the values.
        scored = value if self.s["ppo.minibatch_size"] < self.s["ppo.batch_size"] else 0
        # Sampling, perhaps scoring, and the reference; reward and value model.
        forward = 2 * sampled * ((policy_reads + 1) * policy + reward + scored)
        return {
            "tokens": self.trained_tokens,
            "step_tokens": trained,
            "step_flops": forward + 6 * (trained * policy + learned * value),
        }


def run(s: Settings) -> tuple[Result, list[dict[str, object]]]:
    """The result, and the rows of samples.jsonl."""
    result, samples, ppo = Result([], [], {}), [], Run(s)
    decode = ppo.vocabulary.tokenizer.decode
    for iteration in range(s["ppo.iterations"]):
        row, episodes, read = ppo.iterate(iteration)
        result.rows.append(row)
        result.read.append(read)
        samples += [
            {
                "step": iteration + 1,
                "prompt": decode(episode.prompt, skip_special_tokens=True),
                "response": decode(episode.response.tokens, skip_special_tokens=True),
                "score": episode.score,
                "total": episode.total,
                "kl": float(episode.kl.sum()),
            }
            for episode in episodes[:8]
        ]
    for name in ("policy", "value", "average") if ppo.value else ("policy", "average"):
        result.weights[name] = models.weights_of(getattr(ppo, name))
    assert all(math.isfinite(x) for row in result.rows for x in row.values())
    return result, samples
