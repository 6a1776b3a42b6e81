"""What ppo.py does with its formulas.   python -m pytest tests/test_wiring_ppo.py

test_algorithms.py has the formulas. Here two tiny models go through whole iterations of ppo.main in
float64, and through `plain_ppo`, which takes one reply at a time, pads nothing and leaves softmax,
AdamW and clipping to torch. What main logs, returns and saves must be the same.
"""

import io
import json
import re
import signal
from collections import Counter
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ppo
import zero
from data import Tokenizer, Tokens, epoch_rows, gold_score, render
from model import CausalLM, ModelConfig, ScalarModel, generate, load_model, save_model
from model import tune
from zero import keyed_seed

TOK = Tokenizer.from_merges([])  # bytes
END, STOP, REWARD = (TOK.ids[f"<|{name}|>"] for name in ("end", "endoftext", "reward"))
# No rate, range or factor is its default, and no two are alike: one lost or swapped shows.
FLAGS = SimpleNamespace(
    seed=7, steps=4, batch_size=5, micro_tokens=40, max_new_tokens=6, val_fraction=0.4,
    minibatches=2, lr=0.012, value_lr=0.01, warmup=0.5, min_lr=0.3, weight_decay=0.7,
    grad_clip=0.8, kl_coef=0.45, cliprange=0.25, cliprange_value=0.15, gamma=0.9, lam=0.75,
    missing_end_score=0.6)
PLAIN = dict(kl_target=0.0, kl_estimator="k1", advantage="gae", whiten=True, critic="reward",
             normalize=True, penalize=True, replies=1, entropy_coef=0.0, stop_kl=0.0, ptx_coef=0.0,
             ptx_rows=2, ppo_epochs=2)  # no switch is thrown
SWITCHED = {  # several at once, where none hides another
    "rewards": dict(kl_target=0.3, kl_estimator="k3", whiten=False, normalize=False,
                    penalize=False),
    "literal": dict(advantage="reinforce", whiten=False, replies=2, critic="sft"),
    "added": dict(entropy_coef=0.3, ptx_coef=0.6, stop_kl=0.2, ppo_epochs=3)}
RATES = (0.5, 1, 1, 0.3 + 0.7 / 2)  # up in half of the steps, then half of a cosine down to min_lr
MEAN, STD = 0.3, 1.7  # of the reward model's held-out scores
CONTEXT = 48  # the reward model's, and so everyone's: the policy alone could read 64 tokens
ROOM = CONTEXT - FLAGS.max_new_tokens - 1 - 3  # bytes of a prompt, which has three role tokens
# Prompts and the judge's answers. Two prompts are too long; of the others four are held out.
ASKED = {"What is a?": "a", "b?": "zz", "x" * ROOM: "zz", "x" * (ROOM + 1): "too long", "why": None,
         "cc": "zz", "a longer question": "zz", "Say it": None, "how": "zz",
         "one": None, "two": "ba", "y" * (ROOM + 2): "too long", "three": "b", "bomb": "no"}
TRAINED = 8  # the first of those that fit


def write_inputs(root):
    """A policy and a reward model of different shapes, and prompts. Coordinate 0 of the policy's
    hidden states is large, so column 0 of its head is a bias: it says a, b and often ends."""
    torch.manual_seed(1)
    shape = dict(vocab_size=TOK.vocab_size, hidden_size=16, intermediate_size=24,
                 num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False)
    sft = CausalLM(ModelConfig(**shape, num_hidden_layers=2))
    reward = ScalarModel(ModelConfig(**shape, num_hidden_layers=1, max_position_embeddings=CONTEXT))
    for p in [*sft.parameters(), *reward.parameters()]:
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    sft.model.embed_tokens.weight.data[:, 0] = 3.0
    sft.model.norm.weight.data[0] = 1.0
    bias = sft.lm_head.weight.data[:, 0].fill_(-4.0)
    bias[[*b"ab", STOP, END]] = torch.tensor([0.0, 0.0, 0.0, -0.15])
    for name, net in (("sft", sft), ("reward", reward), ("unseen", reward)):
        save_model(root / name, net)
        TOK.save(root / name)
    (root / "reward/eval.json").write_text(json.dumps({"score_mean": MEAN, "score_std": STD}))
    records = [{"question": text} | ({"answer": answer} if answer else {})
               for text, answer in ASKED.items()]
    records[-1]["kind"] = "harmful"
    (root / "prompts.json").write_text(json.dumps(records))
    (root / "text.txt").write_text("ab ba abba baab " * 20)


# ---------------------------------------------------------------- the plain loop


def spoken(net, query, reply):
    """log π of a reply's tokens (R,): position t of a row predicts token t + 1."""
    every = net(torch.tensor([query + reply]))[0].log_softmax(-1)
    return every[range(len(query) - 1, len(query + reply) - 1), reply]


def valued(net, query, reply):
    """The value before each token of a reply (R,)."""
    return net(torch.tensor([query + reply]))[0, len(query) - 1 : -1]


def scored(net, query, reply, switches):
    """The normalized score of a reply that ended, the fixed one of another."""
    raw = net(torch.tensor([query + reply + [REWARD]]))[0, -1].item()
    if reply[-1] != END and switches.penalize:
        return FLAGS.missing_end_score
    return (raw - MEAN) / STD if switches.normalize else raw


def sampled(net, query, *key):
    seed = keyed_seed(FLAGS.seed, *key)
    return generate(net, [query], FLAGS.max_new_tokens, [END, STOP], seeds=[seed])[0]


@torch.no_grad()
def observed(text, policy, value, reference, reward, price, switches):
    """What four models say of a (query, reply), and what follows for the reply's tokens."""
    r = SimpleNamespace(text=text, ended=text[1][-1] == END)
    r.score = scored(reward, *text, switches)
    r.logprobs, r.ref_logprobs = spoken(policy, *text), spoken(reference, *text)
    r.values = valued(value, *text)
    kl = r.logprobs - r.ref_logprobs
    if switches.kl_estimator == "k3":
        kl = (r.ref_logprobs - r.logprobs).exp() - 1 + kl
    rewards = -price * kl
    rewards[-1] += r.score
    deltas = rewards + FLAGS.gamma * torch.cat([r.values[1:], torch.zeros(1)]) - r.values
    powers = (FLAGS.gamma * FLAGS.lam) ** torch.arange(len(deltas), dtype=torch.float64)
    r.advantages = torch.stack([powers[: len(deltas) - t] @ deltas[t:] for t in range(len(deltas))])
    r.returns = r.advantages + r.values
    if switches.advantage == "reinforce":
        r.advantages = torch.full_like(r.values, rewards.sum().item())
    return r


def described(rollouts):
    """What an iteration's replies are like."""
    names, n = ("logprobs", "ref_logprobs", "values", "returns"), len(rollouts)
    logprobs, ref_logprobs, values, returns = (
        np.concatenate([getattr(r, name) for r in rollouts]) for name in names)
    return {"length": len(values) / n, "ended": sum(r.ended for r in rollouts) / n,
            "score": sum(r.score for r in rollouts) / n, "entropy": -logprobs.mean(),
            "kl": (logprobs - ref_logprobs).sum() / n,
            "kl_k3": (np.exp(ref_logprobs - logprobs) - 1 + logprobs - ref_logprobs).sum() / n,
            "explained_variance": 1 - np.var(returns - values) / np.var(returns)}


def losses(r, policy, value):
    """(4, R): of each token the policy's loss, the value model's, k3 and whether it was clipped."""
    ratio = (spoken(policy, *r.text) - r.logprobs).exp()
    near = ratio.clamp(1 - FLAGS.cliprange, 1 + FLAGS.cliprange)
    gain, clipped = torch.min(ratio * r.advantages, near * r.advantages), (ratio != near).double()
    values, step = valued(value, *r.text), FLAGS.cliprange_value
    near = values.clamp(r.values - step, r.values + step)
    squares = torch.max((values - r.returns) ** 2, (near - r.returns) ** 2)
    return torch.stack([-gain, squares / 2, ratio - 1 - ratio.log(), clipped])


def adamw(net):
    """torch's, in which matrices alone decay."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.dim() > 1) == matrix],
               "weight_decay": FLAGS.weight_decay * matrix} for matrix in (True, False)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)


LORA = dict(tune="lora", tune_size=3, alpha=7.5)


def with_lora(net, base):
    tune(net, "lora", LORA["tune_size"], LORA["alpha"], base)
    return net


def moved(net, optimizer, lr):
    """One step of a model; returns its rate and the gradient's norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), FLAGS.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return lr, norm.item()


def uncertain(net, query, reply):
    """The entropy of what each token of a reply was drawn from (R,)."""
    every = net(torch.tensor([query + reply]))[0].log_softmax(-1)[len(query) - 1 : -1]
    return -(every.exp() * every).sum(-1)


def textual(net, windows):
    """Mean loss per token of windows of a text."""
    ids = torch.tensor(windows)
    every = net(ids[:, :-1]).log_softmax(-1)
    return -every.gather(-1, ids[:, 1:, None]).mean()


def evaluated(net, reward, queries, records, switches):
    """Mean score of fresh replies, and the gold judge's mean over those it can judge."""
    replies = [sampled(net, query, "evaluate", i) for i, query in enumerate(queries)]
    scores = [scored(reward, *text, switches) for text in zip(queries, replies)]
    gold = [gold_score(record, TOK.decode(reply)) for record, reply in zip(records, replies)
            if "answer" in record]
    return np.mean(scores), np.mean(gold)


def plain_ppo(root, lora=False, until=len(RATES), **changes):
    """ppo.main, written for clarity alone. Returns all that is compared."""
    switches = SimpleNamespace(**PLAIN | changes)
    policy, reference = (load_model(root / "sft", dtype=torch.float64) for _ in range(2))
    value, reward = (load_model(root / "reward", ScalarModel, dtype=torch.float64)
                     for _ in range(2))
    if switches.critic == "sft":  # with a head of zeros
        value = load_model(root / "sft", ScalarModel, dtype=torch.float64)
    text = Tokens(f"{root}/plain.bin", f"{root}/text.txt", TOK)
    text.build()
    text = text.open(128)
    price = FLAGS.kl_coef
    if lora:  # reference and reward model are other models all the same
        torch.manual_seed(FLAGS.seed)
        policy, value = with_lora(policy, "sft"), with_lora(value, "reward")
    trained = [(policy, adamw(policy), FLAGS.lr), (value, adamw(value), FLAGS.value_lr)]
    records = [r for r in json.loads((root / "prompts.json").read_text())
               if r.get("answer") != "too long"]
    queries = [render([{"role": "user", "content": r["question"]}], TOK)[0] for r in records]
    metrics, passes, steps = [], [], {"CausalLM": [], "ScalarModel": []}
    for step, rate in enumerate(RATES[:until]):
        rollouts, seen, told = [], [], []
        prompts = FLAGS.batch_size // switches.replies
        for place, i in enumerate(epoch_rows(FLAGS.seed, step, prompts, TRAINED)):
            for k in range(switches.replies):
                reply = sampled(policy, queries[i], "rollout", step, place * switches.replies + k)
                rollouts.append(observed((queries[i], reply), policy, value, reference, reward,
                                         price, switches))
        advantages = torch.cat([r.advantages for r in rollouts])
        for r in rollouts:
            if switches.whiten:
                r.advantages = (r.advantages - advantages.mean()) / (advantages.var() + 1e-8).sqrt()
        for epoch in range(switches.ppo_epochs):
            order = np.random.default_rng([FLAGS.seed, step, epoch]).permutation(len(rollouts))
            for k, chosen in enumerate(np.array_split(order, FLAGS.minibatches)):
                seen.append(torch.cat([losses(rollouts[i], policy, value) for i in chosen], 1))
                loss = seen[-1][0].mean() + seen[-1][1].mean()
                entropy = [uncertain(policy, *rollouts[i].text) for i in chosen]
                loss -= switches.entropy_coef * torch.cat(entropy).mean()
                if switches.ptx_coef:
                    key = keyed_seed(FLAGS.seed, step, epoch)
                    told.append(textual(policy, text.batch(key, k, switches.ptx_rows)))
                    loss += switches.ptx_coef * told[-1]
                loss.backward()
                for net, optimizer, lr in trained:
                    steps[type(net).__name__].append(moved(net, optimizer, lr * rate))
            moved_by = torch.cat(seen[-FLAGS.minibatches :], 1)[2].mean()
            if switches.stop_kl and moved_by > switches.stop_kl:
                break
        passes.append(epoch + 1)
        means = torch.cat(seen, 1).mean(1).tolist()
        names = ("policy_loss", "value_loss", "approx_kl", "clipfrac")
        metrics.append({"step": step, "lr": FLAGS.lr * rate} | described(rollouts)
                       | dict(zip(names, means))
                       | {"ratio_error": 0, "grad_norm": steps["CausalLM"][-1][1]})
        if told:
            metrics[-1]["ptx_loss"] = torch.stack(told).mean().item()
        if switches.kl_target:
            error = (metrics[-1]["kl"] - switches.kl_target) / switches.kl_target
            price *= 1 + 0.1 * np.clip(error, -0.2, 0.2)
            metrics[-1]["kl_coef"] = price
    evaluation = {}
    for name, net in (("before", reference), ("after", policy)):
        score, gold = evaluated(net, reward, queries[TRAINED:], records[TRAINED:], switches)
        evaluation |= {f"score {name}": score, f"gold {name}": gold}
    return SimpleNamespace(root=root, metrics=metrics, passes=passes, steps=steps, evaluation=evaluation,
                           policy=policy, value=value)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = tmp_path_factory.mktemp("ppo")
    write_inputs(root)
    return plain_ppo(root)


# ---------------------------------------------------------------- ppo.main beside it


def run(rank, root, out, changes, errors=()):
    """ppo.main as one rank: what it said, returned and logged, (rate, norm) of its steps, the value
    model's weights, how often which module ran in training. errors: what each rank's first
    micro-batch has too little of old log-probability."""
    optimizers, steps, calls = {}, {"CausalLM": [], "ScalarModel": []}, Counter()
    plain_step, plain_loss = zero.AdamW.step, ppo.policy_loss
    errors = [errors[rank]] if errors else []

    def step(self, lr):
        norm, name = plain_step(self, lr), type(self.model).__name__
        optimizers[name] = self
        steps[name].append((lr, norm))
        return norm

    def policy_loss(logprobs, old_logprobs, *others):
        return plain_loss(logprobs, old_logprobs - (errors.pop() if errors else 0.0), *others)

    def count(module, inputs):
        calls[type(module).__name__] += torch.is_grad_enabled()

    folders = dict(init=f"{root}/sft", reward=f"{root}/reward", prompts=f"{root}/prompts.json",
                   ptx_data=f"{root}/text.txt",
                   out=f"{root}/{out}", dtype="fp64", device="cpu", threads=1)
    counting = torch.nn.modules.module.register_module_forward_pre_hook(count)
    said = io.StringIO()
    with counting, redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero.AdamW, "step", step)
        patch.setattr(ppo, "policy_loss", policy_loss)
        patch.setattr(signal, "signal", lambda *_: None)  # a run takes over two
        result = ppo.main(ppo.Config(**vars(FLAGS) | PLAIN | folders | changes))
    value = {n: p.double().numpy() for n, p in optimizers["ScalarModel"].full_parameters()}
    metrics = [json.loads(line) for line in open(root / out / "metrics.jsonl")]
    return SimpleNamespace(said=said.getvalue(), result=result, metrics=metrics, steps=steps,
                           value=value, calls=calls)


def agree(found, expected, what):
    """Two dicts of numbers or arrays."""
    off = {name: (found[name], x) for name, x in expected.items()
           if not np.allclose(found[name], x, rtol=1e-9, atol=1e-9)}
    assert not off, f"{what}: (ppo.main, plain loop) differ in {off}"


def weights(net):
    return {name: p.detach().numpy() for name, p in net.named_parameters()}


def compare(found, plain):
    """What a run logged, returned and trained."""
    for row, expected in zip(found.metrics, plain.metrics, strict=True):
        assert row.keys() == expected.keys() | {"seconds", "rollout_rate", "update_rate"}
        agree(row, expected, f"step {expected['step']}")
    agree(found.steps, plain.steps, "(learning rate, gradient norm) of every optimizer step")
    agree(found.value, weights(plain.value), "value model")
    agree(found.result, plain.evaluation, "evaluation")


def test_the_iterations_that_are_compared_meet_every_case(plain):
    for name in ("ended", "clipfrac"):
        assert any(0 < row[name] < 1 for row in plain.metrics), f"{name}: always the same"
    for name, steps in plain.steps.items():
        norms = [norm for _, norm in steps]
        assert min(norms) < FLAGS.grad_clip < max(norms), f"{name}: all or none are clipped"
    assert len(set(plain.evaluation.values())) == 4, "scores and gold move"


def held(said) -> dict:
    """{model: (parameters that are trained, bytes held)} of the lines that tell them."""
    models = {}
    for name, trained, kinds in re.findall(
            r"(\w+) +[\d,]+ parameters, +([\d,]+) trained; bytes here: (.*)", said):
        sizes = [int(size.replace(",", "")) for size in re.findall(r"[a-z]+ ([\d,]+)", kinds)]
        models[name] = int(trained.replace(",", "")), sum(sizes)
    return models


def test_whole_iterations_are_those_of_a_plain_loop(plain, alone):
    found, out = run(0, plain.root, "out", dict(checkpointing=True)), plain.root / "out"
    compare(found, plain)
    agree(json.loads((out / "eval.json").read_text()), plain.evaluation, "eval.json")
    agree(weights(load_model(out, dtype=torch.float64)), weights(plain.policy), "saved policy")
    assert Tokenizer.load(out).hash == TOK.hash
    inputs = json.loads((out / "run.json").read_text())["inputs"]
    names = ("prompts.json", "sft/model.safetensors", "reward/model.safetensors")
    assert set(inputs) == {f"{plain.root}/{name}" for name in names}, "if one changes: start over"
    assert f"2 of {len(ASKED)} do not fit the context of {CONTEXT}" in found.said
    assert f"{TRAINED} prompts, 4 held out; score (raw - {MEAN}) / {STD}" in found.said
    assert "first KL 0, expected 0" in found.said and "clearly negative" not in found.said
    assert found.calls["Decoder"] > 2 * len(plain.steps["CausalLM"]), "several micro-batches a step"
    assert found.calls["Block"] == 2 * 1.5 * found.calls["Decoder"], "2 layers and 1, each twice"


def test_two_processes_under_zero_3_do_the_same_and_share_the_memory(plain, ranks):
    both = ranks(2, run, plain.root, "two", dict(zero=3, offload=True))
    for found in both:
        compare(found, plain)
        assert found.calls["Block"] == 1.5 * found.calls["Decoder"], "2 layers and 1, each once"
    models = held(both[0].said)
    assert list(models) == ["reference", "policy", "reward", "value"]
    for name, (trained, size) in models.items():
        net = plain.policy if name in ("policy", "reference") else plain.value
        weights = sum(p.numel() for p in net.parameters())
        assert trained == (weights if name in ("policy", "value") else 0)
        numbers = 5 if trained else 1  # offload: fp64 weights here and in host memory
        share = numbers * 8 * weights / 2
        assert size == pytest.approx(share, rel=0.01), f"{name}: half of {numbers} numbers a weight"


def test_with_lora_two_models_do_what_four_do(plain, alone, ranks):
    lora = plain_ppo(plain.root, lora=True)
    assert lora.evaluation["score before"] != lora.evaluation["score after"]
    single = run(0, plain.root, "lora", LORA)
    both = ranks(2, run, plain.root, "lora-2", LORA | dict(zero=3))
    for found in (single, *both):
        compare(found, lora)
    merged = load_model(plain.root / "lora", dtype=torch.float64)
    ids = torch.tensor([[1, 2, 3, 250, 4]])
    agree({"logits": merged(ids).detach()}, {"logits": lora.policy(ids).detach()}, "saved policy")
    models = held(single.said)
    assert list(models) == ["policy", "value"], "the others are these without their LoRA"
    for name, net in (("policy", lora.policy), ("value", lora.value)):
        frozen, added = (sum(p.numel() for p in net.parameters() if p.requires_grad == trained)
                         for trained in (False, True))
        assert models[name] == (added, 8 * (frozen + 4 * added)), "a frozen weight is one number"


@pytest.mark.parametrize("name", SWITCHED)
def test_every_switch_does_what_it_says(plain, alone, ranks, name):
    expected = plain_ppo(plain.root, **SWITCHED[name])
    assert expected.evaluation != plain.evaluation
    if name == "added":
        assert set(expected.passes) == {2, 3}, "of three passes one is left out at times"
    compare(run(0, plain.root, name, SWITCHED[name]), expected)
    for found in ranks(2, run, plain.root, f"{name}-2", SWITCHED[name] | dict(zero=3)):
        compare(found, expected)


def test_a_run_that_diverges_ends_with_its_last_good_weights(plain, alone, ranks):
    kl = [row["kl"] for row in plain.metrics]
    last = kl.index(max(kl))
    assert last > 1, "no update led there"
    bound = dict(max_kl=sorted(kl)[-2])
    good = plain_ppo(plain.root, until=last - 1)  # before the update that led there
    single = run(0, plain.root, "far", bound)
    for found in (single, *ranks(2, run, plain.root, "far-2", bound | dict(zero=3))):
        assert len(found.metrics) == last, "what is beyond the bound teaches nothing"
        assert found.result.pop("stopped").startswith(f"iteration {last}: KL {max(kl):.3g} nats")
        agree(found.result, good.evaluation, "evaluation")
    run(0, plain.root, "first", dict(max_kl=1e-9, dtype="bf16"))  # masters are other tensors here
    start = load_model(plain.root / "sft", dtype=torch.bfloat16).double()
    agree(weights(load_model(plain.root / "first", dtype=torch.float64)), weights(start), "policy")
    for name in ("far", "far-2"):
        policy = load_model(plain.root / name, dtype=torch.float64)
        agree(weights(policy), weights(good.policy), "saved policy")


def test_a_run_resumed_where_it_diverges_says_that_it_knows_no_better_weights(plain, alone, monkeypatch):
    plain_boundary = zero.Run.boundary
    monkeypatch.setattr(zero.Run, "boundary", lambda self, step, **optimizers: (
        setattr(self, "stopping", self.first == 0 and step == 1), plain_boundary(self, step, **optimizers)))
    with pytest.raises(SystemExit):
        run(0, plain.root, "back", {})
    monkeypatch.setattr(ppo, "diverged", lambda metrics, *_: f"KL {metrics['kl']:.6f}")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    folders = dict(init=f"{plain.root}/sft", reward=f"{plain.root}/reward", prompts=f"{plain.root}/prompts.json",
                   ptx_data=f"{plain.root}/text.txt", out=f"{plain.root}/back", dtype="fp64", device="cpu", threads=1)
    found = ppo.main(ppo.Config(**vars(FLAGS) | PLAIN | folders))
    assert found["stopped"] == f"iteration 2: KL {plain.metrics[2]['kl']:.6f}; none before it are known"


def test_a_run_whose_replies_no_longer_end_is_stopped(plain, alone, monkeypatch):
    plain_respond, calls = ppo.respond, []

    def respond(*args):
        rollouts = plain_respond(*args)
        calls.append(1)
        for r in rollouts if len(calls) <= FLAGS.steps else []:
            r.ended = {1: False, 2: True}.get(len(calls), False)  # none ends at first: that is weak
        return rollouts

    monkeypatch.setattr(ppo, "respond", respond)
    found = run(0, plain.root, "endless", {})
    assert found.result["stopped"] == "iteration 2: no reply ends any more; the weights before it are kept"


def test_a_run_stopped_half_way_goes_on_as_if_it_had_not(plain, alone, monkeypatch):
    plain_boundary = zero.Run.boundary

    def boundary(self, step, **optimizers):
        self.stopping = self.first == 0 and step == 1
        plain_boundary(self, step, **optimizers)

    monkeypatch.setattr(zero.Run, "boundary", boundary)
    whole = plain_ppo(plain.root, **SWITCHED["rewards"])  # its price of KL has changed by then
    with pytest.raises(SystemExit):
        run(0, plain.root, "parts", SWITCHED["rewards"])
    found = run(0, plain.root, "parts", SWITCHED["rewards"])
    assert len(found.steps["CausalLM"]) == len(whole.steps["CausalLM"]) / 2, "not from the start"
    for row, expected in zip(found.metrics, whole.metrics, strict=True):
        agree(row, expected, f"step {expected['step']}")
    agree(found.value, weights(whole.value), "value model")


@pytest.mark.parametrize("fraction, held, std", [(0.0, 0, 1), (1.0, 11, 0.001)])
def test_one_prompt_is_left_to_train_on_and_a_score_without_spread_is_not_divided_by_0(
        plain, alone, fraction, held, std):
    if held:  # else the reward model has no eval.json at all
        (plain.root / "unseen/eval.json").write_text('{"score_std": 0.0}')
    changes = dict(steps=1, val_fraction=fraction, reward=f"{plain.root}/unseen", minibatches=9)
    found = run(0, plain.root, f"held-{held}", changes)
    assert f"{12 - held} prompts, {held} held out; score (raw - 0) / {std}\n" in found.said
    assert bool(found.result) == bool(held), "no prompt is held out: nothing to evaluate"
    assert len(found.steps["CausalLM"]) == PLAIN["ppo_epochs"] * FLAGS.batch_size, "none is empty"


def test_the_ratio_error_is_the_worst_of_all_processes_before_the_first_step(plain, ranks):
    error = np.log(1.5)
    single = ranks(1, run, plain.root, "error", dict(steps=1), (error,))
    for found in single + ranks(2, run, plain.root, "errors", dict(steps=1), (0.0, error)):
        agree(found.metrics[0], {"ratio_error": 0.5}, "the first ratios are 1 and 1.5")


def test_replies_that_are_not_the_policys_samples_are_noticed(plain, alone, monkeypatch):
    stale = load_model(plain.root / "sft", dtype=torch.float64)
    monkeypatch.setattr(ppo, "generate", lambda net, *rest, **more: generate(stale, *rest, **more))
    assert "KL is clearly negative" in run(0, plain.root, "stale", {}).said


def test_a_reward_model_with_another_tokenizer_is_refused(plain, alone, tmp_path):
    Tokenizer.from_merges([(97, 98)]).save(tmp_path)
    with pytest.raises(SystemExit, match="tokenizer and template"):
        run(0, plain.root, "other", dict(reward=str(tmp_path)))


@pytest.mark.parametrize("flags", [{}, {"critic": "sft"}, {"tune": "lora"}])
def test_a_reward_model_that_scores_nothing_is_refused(plain, alone, flags):
    with pytest.raises(SystemExit, match="no reward model"):
        run(0, plain.root, "nothing", dict(reward=f"{plain.root}/sft", **flags))
