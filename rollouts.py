"""Rollouts: what a step of reinforcement learning needs around its loss. grpo.py calls each part in one place.

Papers   Nemotron 3 Nano, arXiv:2512.20848, sections 3.2 and 3.3 (curriculum, length control, circular comparisons);
         Nemotron 3 Ultra, 2606.15007 (low effort; multi-teacher on-policy distillation, MOPD); DAPO, 2503.14476
         (overlong penalty, dynamic sampling); DPO, 2305.18290.
Idea     Answers are sampled with the log-probabilities that training compares itself with. A curriculum keeps prompts
         on which answers differ, from easy to hard. Length control and low effort pay for short thoughts where that
         costs no accuracy. A teacher's log-probability gives every token an advantage of its own, without groups.
Picture  pass rates [n] --Curriculum--> tasks --sample_answers--> Answers [BG, T] --judged_answers--> rewards [B, G]
                 lengths [B, G] --low_effort_reward--> rewards --grpo.advantages--> A --+ length_control--> A [B, G]
                 teacher_logprob [B, T] - old_logprob [B, T] --mopd_advantages--> A [B, T]
Symbols  code        paper   meaning
         mean        mu      pass rate that a curriculum aims at, a function of the step
         U, a, c             length that low effort allows, what is gained below it, what is lost above it
         beta        beta    strength of the tie to the reference in DPO
Limits   Groups of equal lengths change nothing; one token and one teacher make MOPD the reverse KL; DPO is log 2 at the
         reference: see tests/test_grpo.py.
Differs  Length control is the paper's, not the released server's. It is added to advantages, not to rewards, and for
         right answers only: in a group of equal rewards a normalised advantage would cancel its coefficient, and the
         shortest wrong answer would win. `overlong_penalty`, `faithful`, `circular_scores` and `dpo_loss` are building
         blocks: grpo.py's objective does without them.
Files    rollouts.py + decoding.py + kernels.py + nano_hybrid.py + decode_kernels.py + latent_moe.py + lla.py +
         ssd.py + expert_kernels.py + nvfp4.py + common/tasks.py + common/accounting.py + common/checkpoints.py +
         common/objectives.py + common/presets.py + common/ranges.py + common/sampling.py + common/data.py +
         common/files.py: 10,174 lines in all
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.tasks import LOW_EFFORT, sample_task, score_all
from decoding import generate
from kernels import at_least_float32, expect, fresh_casts
from nano_hybrid import Hybrid

# ---- 1. answers: sampled, then judged -------------------------------------------------------------------------------


@dataclass
class Answers:
    """Sampled completions, each behind its prompt and padded on the right: what a training step reads."""

    ids: torch.Tensor  # [N, T] int64
    mask: torch.Tensor  # bool [N, T-1], of the targets ids[:, 1:]: those the policy wrote, its end of text too
    logprob: torch.Tensor  # [N, T-1] float32: of those, as they were sampled; 0 elsewhere
    completions: list  # N texts, without the end of text
    finished: torch.Tensor  # bool [N]: whether it wrote an end of text before max_new_tokens

    def select(self, rows):
        """Returns the Answers of these rows, int64 [n]."""
        tensors = {name: getattr(self, name) for name in ("ids", "mask", "logprob", "finished")}
        tensors = {name: value[rows.to(value.device)] for name, value in tensors.items()}
        return Answers(completions=[self.completions[i] for i in rows.tolist()], **tensors)


@torch.no_grad()
@fresh_casts()
def sample_answers(
    model, tokenizer, prompts, max_new_tokens, temperature=1.0, generator=None, budget=None, session=None
):
    """Returns the Answers of a model to N prompts (text), sampled together. An end of text stands before each prompt.

    Temperature only: where top_k or top_p cut tokens off, the sampler is another policy than the one in training.
    budget: a ThinkingBudget. With one, or at temperature 0, there is nothing to learn from: all of logprob is 0.
    session: a `DecodeSession` shared by calls of one shape and generator: several times faster on a GPU.
    """
    training, end, logprobs = model.training, tokenizer.end_of_text, None if budget or temperature == 0 else []
    encoded = {prompt: [end, *tokenizer.encode(prompt)] for prompt in set(prompts)}
    starts = [encoded[prompt] for prompt in prompts]
    model.eval()
    steps = generate(
        model, starts, max_new_tokens, temperature, stop=[end], generator=generator, budget=budget,
        logprobs=logprobs, session=session,
    )  # fmt: skip
    tokens = torch.stack(list(steps), 1)  # [N, new], -1 behind the end
    model.train(training)
    N, new = tokens.shape
    wrote, logprob = tokens >= 0, torch.stack(logprobs[:new], 1) if logprobs else torch.zeros(N, new).to(tokens.device)
    lengths = torch.tensor([len(start) for start in starts], device=tokens.device)
    before = int(lengths.max())
    prompt = torch.tensor([[end] * (before - len(start)) + start for start in starts], device=tokens.device)
    # Prompts are padded on the left so that answers begin together; rotating each row moves its padding to the right.
    turn = (torch.arange(before + new, device=tokens.device) + (before - lengths)[:, None]) % (before + new)
    ids = torch.cat([prompt, tokens.where(wrote, end)], 1).gather(1, turn)  # [N, T]
    mask = F.pad(wrote, (before, 0)).gather(1, turn)[:, 1:]
    logprob = F.pad(logprob.where(wrote, 0), (before, 0)).gather(1, turn)[:, 1:]
    T = int((lengths + wrote.sum(1)).max())
    finished = (tokens == end).any(1)
    n_text = (wrote.sum(1) - finished.long()).tolist()  # a row stops at its end of text
    completions = [tokenizer.decode(row[:n]) for row, n in zip(tokens.tolist(), n_text)]
    return Answers(ids[:, :T], mask[:, : T - 1], logprob[:, : T - 1], completions, finished)


def judged_answers(tasks, answers):
    """Returns (reward, problem of the verifier or None) of each answer. One that has not ended is worth nothing."""
    verdicts = score_all(tasks, answers.completions)
    return [(reward * end, problem) for (reward, problem), end in zip(verdicts, answers.finished.tolist())]


def joined(parts, fill=0):
    """Returns the rows of tensors [N, T] (or [N]) with different T, padded on the right to the widest."""
    T = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, T - part.shape[1]), value=fill) if part.dim() == 2 else part for part in parts])


def join_answers(parts, end):
    """Returns the Answers of several calls as one. end: the token that pads ids."""
    fills = dict(ids=end, mask=False, logprob=0.0, finished=False)
    tensors = {name: joined([getattr(part, name) for part in parts], fill) for name, fill in fills.items()}
    return Answers(completions=[text for part in parts for text in part.completions], **tensors)


def mean_rewards(tasks, verdicts):
    """Returns reward_<env>, the mean reward of each environment, and reward, the mean of those."""
    scores = {}
    for task, (reward, _) in zip(tasks, verdicts):
        scores.setdefault(task.env, []).append(reward)
    means = {f"reward_{env}": sum(values) / len(values) for env, values in scores.items()}
    return dict(reward=sum(means.values()) / len(means)) | means


def rollout_metrics(envs, tasks, answers, verdicts):
    """Returns name -> float, the metrics of all the answers of a step.

    train_reward   mean of what the verifiers gave           train_reward_<env>   of the answers of one environment
    length         tokens of an answer                       truncated            share that wrote no end of text
    problems       answers whose verifier raised, hung, or gave no number in [0, 1]
    """
    rewards, names = np.array([reward for reward, _ in verdicts]), np.array([task.env for task in tasks])
    metrics = dict(train_reward=rewards.mean(), problems=sum(problem is not None for _, problem in verdicts))
    metrics |= {f"train_reward_{env.name}": rewards[names == env.name].mean() for env in envs}
    metrics["length"] = answers.mask.sum(1).float().mean().item()
    metrics["truncated"] = (~answers.finished).float().mean().item()
    return {name: float(value) for name, value in metrics.items()}


# ---- 2. tasks: from easy to hard, and where answers still differ ----------------------------------------------------


class Curriculum:
    """Draws tasks from easy to hard: by a Gaussian over their pass rate whose mean moves linearly with the step.

    pass_rates [n], of the model before training; tasks of pass rate 1 are dropped, those of 0 too if drop_unsolved.
    The weight N(p; mu, sigma) is divided by the number of tasks left in the same of `bins` bins, or the mean of a batch
    would follow the pool and not mu. Tasks are drawn without replacement: a bin begins anew when it is used up. `left`,
    bool [n], is the whole state. Use one for each environment, each with a fixed quota in the batch; at a plateau make
    another from new pass rates. Source: Nemotron 3 Nano, section 3.2.2 and Figure 6 (.7 to .4 in 600 steps), which
    gives no sigma and no bins.
    """

    def __init__(self, pass_rates, steps, easy=0.7, hard=0.4, sigma=0.15, bins=10, drop_unsolved=False):
        self.pass_rates = torch.as_tensor(pass_rates, dtype=torch.float64)
        if self.pass_rates.dim() != 1 or not ((self.pass_rates >= 0) & (self.pass_rates <= 1)).all():
            raise ValueError("pass_rates must be a list of numbers from 0 to 1, one for a task")
        self.steps, self.easy, self.hard, self.sigma = steps, easy, hard, sigma
        self.usable = (self.pass_rates < 1) & (self.pass_rates >= (1e-9 if drop_unsolved else 0))
        self.bin = (self.pass_rates * bins).long().clamp(max=bins - 1)  # [n]
        self.left = self.usable.clone()

    def mean(self, step):
        """Returns mu, the pass rate aimed at."""
        return self.easy + (self.hard - self.easy) * min(1.0, max(0.0, step / self.steps))

    def draw(self, n, step, generator=None):
        """Returns int64 [n], indices of tasks, no two alike. generator: of torch, on the CPU."""
        if n > self.usable.sum():
            raise ValueError(f"n={n} tasks for a batch, but only {int(self.usable.sum())} of pass rate below 1")
        count = torch.bincount(self.bin[self.left], minlength=int(self.bin.max()) + 1)
        self.left |= self.usable & (count[self.bin] == 0)
        if n > self.left.sum():
            self.left = self.usable.clone()
        density = torch.bincount(self.bin[self.left], minlength=len(count)).clamp(min=1)
        log_weight = -(((self.pass_rates - self.mean(step)) / self.sigma) ** 2) / 2 - density[self.bin].log()
        # The n largest sums of log weight and Gumbel noise are n draws without replacement. In logs, the weight of a
        # task far from mu does not underflow to 0.
        gumbel = -torch.empty_like(log_weight).exponential_(generator=generator).log()
        drawn = (log_weight + gumbel).masked_fill(~self.left, -math.inf).topk(n).indices
        self.left[drawn] = False
        return drawn


class Curricula:
    """A `Curriculum` for each environment, over a pool of its tasks, with equal quotas in each batch.

    envs: environments; n_tasks: of each pool; steps: from easy to hard. Until `start`, `orders` is empty.
    """

    def __init__(self, envs, n_tasks, steps, seed=0, rank=0):
        self.envs, self.n_tasks, self.steps, self.seed, self.rank = envs, n_tasks, steps, seed, rank
        self.pools, self.orders = [], []  # by environment: its tasks; its Curriculum
        self.drawn_rates = []  # pass rates of the tasks drawn since it was last emptied

    def pool(self, env):
        """Returns the tasks of an environment that its curriculum orders: the same for every call."""
        rng = np.random.default_rng((self.seed, self.rank, self.envs.index(env)))
        return [sample_task(env, rng) for _ in range(self.n_tasks)]

    def pass_rates(self, rewards_of, tries, batch_size):
        """Returns, for each environment, the mean reward [n_tasks] of `tries` answers to each task of its pool.

        rewards_of: function of at most batch_size tasks, which answers each once; returns a list of rewards.
        """
        rates = []
        for env in self.envs:
            tasks = [task for task in self.pool(env) for _ in range(tries)]
            batches = [tasks[i : i + batch_size] for i in range(0, len(tasks), batch_size)]
            rewards = [reward for batch in batches for reward in rewards_of(batch)]
            rates.append(torch.tensor(rewards).view(-1, tries).mean(1))
        return rates

    def start(self, pass_rates, left=None):
        """Makes the curricula from pass rates [n_tasks] of each environment. left: what `state` returned."""
        self.pools = [self.pool(env) for env in self.envs]
        self.orders = [Curriculum(rates, self.steps) for rates in pass_rates]
        for order, mask in zip(self.orders, left or []):
            order.left = mask.clone()

    def state(self):
        """Returns the `left` of each curriculum, all that a checkpoint needs beside the pass rates."""
        return [order.left for order in self.orders]

    def draw(self, n, step, rng):
        """Returns n tasks, as many of each environment; fresh ones of one with too few unsolved. step: since start."""
        generator, columns = torch.Generator().manual_seed(int(rng.integers(2**62))), []
        quota = -(-n // len(self.envs))
        for env, pool, order in zip(self.envs, self.pools, self.orders):
            if order.usable.sum() < quota:
                columns.append([sample_task(env, rng) for _ in range(quota)])
                continue
            drawn = order.draw(quota, step, generator)
            columns.append([pool[i] for i in drawn])
            self.drawn_rates += order.pass_rates[drawn].tolist()
        return [task for row in zip(*columns) for task in row][:n]


def informative(rewards):
    """Returns bool [B]: whether the rewards [B, G] of a group differ. Where they do not, all its advantages are 0.

    That alone does not take an uninformative group out of the loss: its tokens still count in the denominator, so steps
    become smaller as more prompts are always or never solved, and the KL and entropy terms still have a gradient there.
    `keep_only(mask, informative(rewards))` takes it out.
    """
    return rewards.amax(1) != rewards.amin(1)


def dynamic_sampling(draw, n, refills=4):
    """Returns (groups, share): the first n informative groups, and the share of the groups drawn that were informative.

    draw(n) returns (a list of n groups, their rewards [n, G]). Fewer than n come back when 1 + refills draws did not
    yield them: on a task too hard or too easy there is no end to it. Source: DAPO, "Dynamic Sampling".
    """
    groups, drawn = [], 0
    for _ in range(1 + refills):
        new, rewards = draw(n)
        groups += [group for group, is_informative in zip(new, informative(rewards).tolist()) if is_informative]
        drawn += len(new)
        if len(groups) >= n:
            break
    return groups[:n], len(groups) / max(1, drawn)


def keep_only(mask, keep):
    """Returns mask [B, T] with the rows that are not to be kept set to 0.

    keep: bool, one for a row, or one for each group of consecutive rows. The overlong filter of DAPO and Nemotron 3
    Nano is `keep_only(mask, ~truncated)`: an answer cut off at the limit has no gradient, but its reward still counts
    in its group's baseline.
    """
    if len(mask) % max(1, len(keep)):
        raise ValueError(f"keep is [{len(keep)}], expected a divisor of the {len(mask)} rows of mask")
    return mask * keep.to(mask.device).repeat_interleave(len(mask) // max(1, len(keep)))[:, None]


def focused(envs, n, weight, share, rng):
    """Returns the environments of n prompts: `share` of them drawn by weight, the others by turns, each at least once.

    weight: float64 [len(envs)], how often each has informative groups, or None: all by turns.
    """
    turns = [envs[i % len(envs)] for i in range(n)]
    if weight is not None:
        fixed = max(len(envs), round(n * (1 - share)))
        p = weight.numpy() / weight.numpy().sum()
        turns[fixed:] = [envs[i] for i in rng.choice(len(envs), max(0, n - fixed), p=p)]
    return turns


def track_informative(weight, envs, tasks, is_informative):
    """Returns weight [len(envs)] moved towards each environment's share of informative groups, over some twenty steps.

    tasks: one for each group; is_informative: bool, what `informative` says of each; weight: None at first.
    """
    weight = torch.ones(len(envs), dtype=torch.float64) if weight is None else weight
    for i, env in enumerate(envs):
        groups = torch.tensor([task.env == env.name for task in tasks])
        weight[i] += 0.05 * (is_informative[groups].double().mean() - weight[i])
    return weight.clamp_(min=1e-3)  # weights that are all 0 cannot be drawn by


# ---- 3. other policies: copies and teachers -------------------------------------------------------------------------


class PolicyCopies:
    """Frozen copies of the policy by name: "reference" for the KL, "sampler". state: a dict of their weights."""

    def __init__(self, state):
        self.state, self.models = state, {}

    def keep(self, name, model):
        """Copies the model's weights."""
        self.state[name] = {key: value.detach().clone() for key, value in model.state_dict().items()}
        self.models.pop(name, None)

    def get(self, name, model):
        """Returns a model with the weights kept under a name. model: one of the same shape."""
        if name not in self.models:
            self.models[name] = copy.deepcopy(model).requires_grad_(False)
            self.models[name].load_state_dict(self.state[name])
        return self.models[name]

    def sampler(self, model, step, every, updates):
        """Returns the model that samples: the one in training, or a copy of it, renewed every so many steps.

        step: since rewards began; updates: steps that share the answers of one sampler.
        """
        if every == 1:
            return model
        if "sampler" not in self.state or step % every < updates:
            self.keep("sampler", model)
        return self.get("sampler", model)


def faithful(old_logprob, behaviour_logprob, mask, limit=2.0):
    """Returns bool [B]: whether mean_t exp|log pi_old - log behaviour| <= limit, for `keep_only`. NeMo RL's filter."""
    gap = (at_least_float32(old_logprob) - at_least_float32(behaviour_logprob)).abs().exp()
    return torch.where(mask != 0, gap, 0).sum(1) / (mask != 0).sum(1).clamp(min=1) <= limit


def mopd_advantages(teacher_logprob, prox_logprob, limit=20.0):
    """Returns A [B, T] = sg[log pi_teacher - log pi_prox], within +-limit, of the student's own tokens.

    Multi-teacher on-policy distillation: `policy_loss` with an advantage for each token, from the teacher of the
    prompt's domain; no groups, one answer to a prompt. On-policy its mean gradient is that of the reverse KL to the
    teacher, given each prefix. Source: Nemotron 3 Ultra.
    """
    expect("teacher_logprob", teacher_logprob, *prox_logprob.shape, hint=", the shape of prox_logprob")
    return (at_least_float32(teacher_logprob) - at_least_float32(prox_logprob)).detach().clamp(-limit, limit)


def load_teachers(folders, envs):
    """Returns name of environment -> frozen model. folders: text, a run for each different environment, by commas."""
    names = list(dict.fromkeys(env.name for env in envs))
    folders = [folder.strip() for folder in folders.split(",") if folder.strip()]
    if folders and len(folders) != len(names):
        raise ValueError(f"--teachers names {len(folders)} runs, --envs {len(names)} environments")
    return {name: Hybrid.from_pretrained(Path(folder)).requires_grad_(False) for name, folder in zip(names, folders)}


@torch.no_grad()
@fresh_casts()
def teacher_logprobs(teachers, tasks, ids, mask, temperature):
    """Returns float32 [B, T-1]: log-probabilities of each row's tokens, by the teacher of its task's environment."""
    logprob = torch.zeros(mask.shape, device=ids.device)
    for name, teacher in teachers.items():
        rows = torch.tensor([task.env == name for task in tasks], device=ids.device)
        teacher = teacher.to(ids.device)
        logprob[rows] = teacher.logprobs(ids[rows], mask[rows], temperature)[0].float()
    return logprob


# ---- 4. rewards for lengths, and from judges ------------------------------------------------------------------------


def overlong_penalty(lengths, max_tokens, cache):
    """Returns what to add to rewards: 0, falling to -1 over the last `cache` tokens before max_tokens. lengths [...].

    Source: DAPO, "Soft Overlong Punishment".
    """
    if not 0 < cache <= max_tokens:
        raise ValueError(f"cache={cache} must be above 0 and at most max_tokens={max_tokens}")
    return ((max_tokens - cache - lengths) / cache).clamp(-1, 0)


def length_control(rewards, lengths, coef=0.5, bonus=0.5, quantile=0.8):
    """Returns what to add to rewards [B, G] for the lengths [B, G] of one part of each answer: brevity in the group.

    R = base + length_control(base, thought_lengths) + length_control(base, answer_lengths), each of the *base* rewards:
    coef (u - mean u), u = 1 - (l - min) / (max - min), which sums to 0, then + bonus for the shortest, if its reward is
    in the group's best (>= quantile). All 0 in a group of equal lengths. Source: Nemotron 3 Nano, section 3.3.
    The released server differs: characters for tokens, the third best of 16 for the quantile, bonuses first and in
    place, none for an empty part. Ours alone: all of several shortest get the bonus, so no order of answers matters.
    With 0/1 rewards of which few are 1 the quantile is 0 and a wrong answer can earn the bonus: set bonus=0 there.
    With dense rewards the term can turn the sign of an advantage: count those.
    """
    expect("lengths", lengths, *rewards.shape, hint=", the shape of rewards")
    rewards = at_least_float32(rewards)
    lengths = lengths.to(rewards.dtype)
    shortest, longest = lengths.amin(1, keepdim=True), lengths.amax(1, keepdim=True)  # [B, 1]
    u = (longest - lengths) / (longest - shortest).clamp(min=1e-12)  # all 0 if all are equal
    good = rewards >= rewards.quantile(quantile, dim=1, keepdim=True)
    won = good & (lengths == shortest) & (longest > shortest)
    return coef * (u - u.mean(1, keepdim=True)) + bonus * won


def brevity_advantages(rewards, lengths, coef):
    """Returns what to add to the advantages [B, G] for lengths, a list of [B, G]: of thoughts, of answers.

    Brevity counts for right answers alone: a wrong one is taken to be as long as the longest of its group.
    """
    total, right = torch.zeros_like(rewards), rewards > 0
    for length in lengths:
        length = torch.where(right, length, length.amax(1, keepdim=True))
        total = total + length_control(rewards, length, coef, bonus=0)
    return total


def low_effort_reward(rewards, lengths, U, a=0.1, c=1.0):
    """Returns r + r max(l, 0) + c min(l, 0), l = min(1, a (1 - length / U)): for prompts marked as low effort.

    Below U tokens a right answer gains, by a factor; above it every answer loses. Ultra: a = .1, c = 1, U = 15000.
    """
    effort = (a * (1 - lengths / U)).clamp(max=1)
    return rewards + rewards * effort.clamp(min=0) + c * effort.clamp(max=0)


def low_effort_rewards(rewards, tasks, lengths, U):
    """Returns rewards [B, G], those of prompts that ask for low effort by `low_effort_reward`. tasks: B of them."""
    marked = torch.tensor([task.prompt.startswith(LOW_EFFORT) for task in tasks])[:, None]
    return torch.where(marked, low_effort_reward(rewards, lengths, U), rewards)


def part_lengths(tasks, completions, tokenizer, G):
    """Returns int64 [B, G] twice: tokens of the thoughts and of the answers in B G completions."""
    parts = [task.parts(completion) for task, completion in zip(tasks, completions)]
    return [torch.tensor([len(tokenizer.encode(p[i])) for p in parts]).view(-1, G) for i in (0, 1)]


def circular_scores(first, second, ranking):
    """Returns rewards [..., N] of N answers: judgement i compares answer i with answer i + 1, the last with the first.

    first, second [..., N]: the scores that judgement i gave to the two; ranking [..., N]: 1 (first far better) .. 6,
    which breaks ties, by +(3.5 - ranking) and -(3.5 - ranking). A reward is the mean over both positions. N judgements
    instead of N (N - 1) / 2. Source: Nemotron 3 Nano, section 3.3.
    """
    tie = torch.where(first == second, 3.5 - ranking, 0.0)
    return (first + tie + (second - tie).roll(1, -1)) / 2


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """Returns mean of -log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))): log 2 at the reference.

    Each [B]: the log-probability of a whole answer, summed over its tokens, under the policy and the reference.
    Nemotron 3 Nano, appendix C, adds .2 times the cross-entropy of the chosen answer and .05 times a KL. Source: DPO,
    arXiv:2305.18290, equation (7).
    """
    chosen, rejected, ref_chosen, ref_rejected = map(at_least_float32, (chosen, rejected, ref_chosen, ref_rejected))
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


# ---- 5. checks ----------------------------------------------------------------------------------------------------


def check_choice(name, value, choices):
    """Raises ValueError, with the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}, expected one of {', '.join(map(str, choices))}")


def check_run(run, before, flags, source):
    """Raises ValueError for a run (RunInfo) that rewards cannot be learnt in, after `before` steps without them.

    flags: those that say so many steps, for the message; source: the flag that says what the tasks are.
    """
    c = run.config
    if run.world_size > 1:
        raise ValueError(f"--recipe={c.recipe} runs in one process, without torchrun; make --batch_size larger instead")
    if before >= c.steps:
        raise ValueError(f"{flags} leaves none of --steps={c.steps} for rewards")
    if unused := {"data", "context"} & run.given:
        raise ValueError(f"--{min(unused)} has no meaning with --recipe={c.recipe}: its tasks come from {source}")


def check_dropout(config):
    """Raises ValueError for a model config with dropout."""
    if config.hidden_dropout:
        raise ValueError("--hidden_dropout: with rewards the sampler and the trainer must be one policy; leave it 0")


def check_batch(settings, batch_size, grad_accum, envs, seed):
    """Raises ValueError unless grad_accum times `batch_size` answers can be drawn from, and shared out, as set."""
    rows, times = len(envs) * settings.group_size * settings.updates, f" times grad_accum={grad_accum}"
    if batch_size * grad_accum % rows:
        raise ValueError(
            f"batch_size={batch_size}{times if grad_accum > 1 else ''} must be a multiple of {rows}: {len(envs)} "
            f"environments times group_size={settings.group_size} times updates={settings.updates}"
        )
    if batch_size < settings.updates:
        raise ValueError(f"batch_size={batch_size} must be at least updates={settings.updates}, or some have no answer")
    if settings.cut_thoughts or settings.no_thoughts or settings.low_effort:
        if not any(env.sample(np.random.default_rng(seed)).thinks for env in envs):
            raise ValueError(f"--envs={settings.envs} has none that thinks, as chain or add:5:on does")
