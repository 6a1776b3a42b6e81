"""Labs: a function of the eight files is emptied, you write it, small cases tell whether it is right.

    python tests/labs.py                list of the labs            (make labs)
    python tests/labs.py start 7        a copy of the folder in labs/7, its function emptied  (make lab N=7)
    python tests/labs.py check 7        the cases of lab 7, on labs/7 if it is there       (make check N=7)

A check runs its cases in order, the plainest first, and ends at the first that fails: it says what
was to be seen there, what was expected and what came. The answer stands in the folder that was copied.
"""

import argparse
import ast
import importlib
import math
import shutil
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1]
COPIED = ["*.py", "tests", "assets", ".ci", "Makefile", "requirements.txt", "README.md"]


@dataclass
class Lab:
    """title; emptied: {file: its functions}, named as in the source; read: where the documents and
    papers have it; task: what to write; then: what to change after, and what is seen."""

    title: str
    emptied: dict
    read: str
    task: str
    then: str
    cases: list = field(default_factory=list)


LABS = {
    1: Lab("Byte-pair encoding: one merge", {"data": ["merged"]}, "D4 2.3.2; Sennrich et al. 2016",
           "Replace a pair of tokens by one new token, everywhere in a word.",
           "python pretrain.py --data FILE --vocab-size 512, then 4096: fewer and longer tokens. bits_per_byte in "
           "eval.json compares them, the loss per token does not."),
    2: Lab("Rotary positions", {"model": ["rotate"]}, "RoFormer (2021), eq. 34",
           "Turn each pair of a vector by its position's angle. cos and sin are given.",
           "Set FAST = False in model.py, so that your function is the one that runs, and leave the turning out in "
           "Attention.forward: what does a short pretraining lose?"),
    3: Lab("Causal self-attention", {"model": ["attention_formula"]}, "D4 2.2; Vaswani et al. 2017, eq. 1",
           "Weigh the values by softmax of query · key, behind a mask.",
           "Let the mask in Decoder.positions be zero everywhere and FAST = False: in pretraining each token now sees "
           "the next one. Watch the loss, then the sample at the end."),
    4: Lab("Targets: the shift and the loss mask", {"data": ["collate"]}, "D0 4.2.2; D4 2.2.2",
           "Make input ids and targets of rows with masks: the next token where it is trained, IGNORE elsewhere.",
           "python data.py show FILE shows the trained tokens in green; --turns last and --turns split are D0's two "
           "other ways."),
    5: Lab("Reward model: Bradley-Terry", {"reward": ["bradley_terry_loss"]}, "D2 4; InstructGPT, eq. 1",
           "The loss of all pairs of N ranked replies.",
           "python reward.py --objective regression: fits the labels themselves, as D3 says, and ranks worse (README, "
           "What the documents claim)."),
    6: Lab("Advantages: GAE", {"ppo": ["gae"]}, "D4 3.5.2; Schulman et al. 2016, eq. 16",
           "From rewards and values to advantages, walking from the last token back.",
           "python ppo.py --lam 1, --lam 0 and --advantage reinforce; explained_variance in metrics.jsonl tells "
           "how much of the return the critic foresees."),
    7: Lab("PPO's clip", {"ppo": ["policy_loss"]}, "D4 3.5.2; PPO, eq. 7",
           "The clipped surrogate objective, per token.",
           "python ppo.py --ppo-epochs 4 --minibatches 4 with and without --cliprange 1e9: without the clip KL ends "
           "higher (README, What each detail of PPO does)."),
    8: Lab("The price of KL", {"ppo": ["k3", "token_rewards"]}, "D2 5; InstructGPT, eq. 2; joschu.net/blog/kl-approx",
           "Two estimators of KL, and each token's reward.",
           "python ppo.py --kl-coef 0, then 1: how far the policy may go, and what it gains there."),
    9: Lab("DPO's loss", {"dpo": ["dpo_loss"]}, "D0 4.2.3; Rafailov et al. 2023, eq. 7",
           "A reward model inside the policy: its log-ratios to the reference.",
           "python dpo.py --beta 0.05, then 2: margin, and gold score over KL (python tests/experiments.py frontier). "
           "--nll-coef 0 is the paper."),
    10: Lab("LoRA", {"model": ["LoRA.forward", "LoRA.merged"]}, "D4 3.2.2; Hu et al. 2022",
            "A frozen matrix and a trained product of two thin ones; then both as one matrix.",
            "python sft.py --tune lora --tune-size 1, then 64: trained parameters, held-out loss."),
    11: Lab("Activation checkpointing", {"model": ["Decoder.run"]}, "D4 2.4.2; Chen et al. 2016",
            "Keep a block's input alone, and compute the block again in backward.",
            "python zero.py measure prints what is saved for backward with and without."),
    12: Lab("ZeRO-1: everyone updates a part", {"zero": ["AdamW.publish"]}, "D0 DeepSpeed; ZeRO, section 5.1",
            "After the update of its own slice each rank needs all the others'.",
            "torchrun --nproc-per-node 2 zero.py measure: optimizer bytes of stages 0 and 1."),
    13: Lab("ZeRO-2: nobody keeps the whole gradient", {"zero": ["AdamW.finish_sum"]}, "D0 DeepSpeed; ZeRO, section 5.2",
            "What becomes of a summed gradient in stages 0, 1 and 2.",
            "torchrun --nproc-per-node 2 zero.py measure: gradient bytes of stages 1 and 2."),
    14: Lab("ZeRO-3: weights come and go", {"zero": ["Unit.gather", "Unit.release"]}, "D0 DeepSpeed; ZeRO, section 5.3",
            "Collect a layer's weights before it computes, free them after.",
            "torchrun --nproc-per-node 2 zero.py measure: parameter bytes and bytes sent of stages 2 and 3."),
}


# ==================================================================================== the cases

def case(number, what, expected, got):
    """Adds to a lab: what is to be seen, what is expected, and a function that gives what came."""
    LABS[number].cases.append((what, expected, got))


def of(module):
    return importlib.import_module(module)


def floats(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


case(1, "two neighbours become one token, the others stay", [7, 9, 3],
     lambda: of("data").merged([7, 1, 2, 3], (1, 2), 9))
case(1, "every occurrence is replaced, not the first alone", [9, 4, 9],
     lambda: of("data").merged([1, 2, 4, 1, 2], (1, 2), 9))
case(1, "the order counts: (2, 1) is another pair", [2, 1],
     lambda: of("data").merged([2, 1], (1, 2), 9))
case(1, "no token is used twice, and the first from the left wins", [9, 5],
     lambda: of("data").merged([5, 5, 5], (5, 5), 9))
case(1, "two merges side by side", [9, 9],
     lambda: of("data").merged([5, 5, 5, 5], (5, 5), 9))
case(1, "with it the merges of 'aaabdaaabac' are aa, ab, aaab", [(97, 97), (97, 98), (256, 257)],
     lambda: of("data").train_bpe(["aaabdaaabac"], 259))


def turned(x, angle):
    """x (4,) turned by one angle: cos and sin as rope_table lays them out."""
    cos, sin = math.cos(angle), math.sin(angle)
    table = floats(cos, cos, cos, cos)[None], floats(-sin, -sin, sin, sin)[None]
    return of("model").rotate(floats(*x).view(1, 1, 1, 4), *table).flatten()


def product(i, j):
    """Query · key at positions i and j."""
    config = of("model").ModelConfig(11, 8, 8, 1, 2, 2, max_position_embeddings=32)
    cos, sin = of("model").rope_table(config)
    q, k = floats(1, -2, 0.5, 3).view(1, 1, 1, 4), floats(0.3, 1, -1, 2).view(1, 1, 1, 4)
    at = [of("model").rotate(x, cos[p : p + 1], sin[p : p + 1]) for x, p in ((q, i), (k, j))]
    return (at[0] * at[1]).sum().view(1)


case(2, "at angle 0 nothing turns", floats(1, 2, 3, 4),
     lambda: turned((1, 2, 3, 4), 0))
case(2, "a quarter turn takes the pairs (a, b) = (1, 3), (2, 4) to (-b, a): x_i goes with x_{i+D/2}",
     floats(-3, -4, 1, 2),
     lambda: turned((1, 2, 3, 4), math.pi / 2))
case(2, "a sixth of a turn: (a·cos - b·sin, b·cos + a·sin)",
     floats(0.5, 0, 3**0.5 / 2, 0),
     lambda: turned((1, 0, 0, 0), math.pi / 3))
case(2, "query · key depends on the distance alone: positions 9 and 7 give what 3 and 1 give (their difference is)",
     floats(0),
     lambda: product(9, 7) - product(3, 1))


def attended(q, k, v, mask=None):
    """One row; q (H, T, D), k, v (K, S, D)."""
    q, k, v = (torch.tensor(x, dtype=torch.float64)[None] for x in (q, k, v))
    mask = torch.zeros(q.shape[2], k.shape[2]) if mask is None else torch.tensor(mask)
    return of("model").attention_formula(q, k, v, mask)[0].flatten()


NOT = -math.inf
case(3, "a query like no key looks at all of them equally: the mean of the values", floats(2, 4),
     lambda: attended([[[0.0, 0]]], [[[1.0, 2], [3, 4], [5, 6]]], [[[1.0, 3], [2, 4], [3, 5]]]))
case(3, "-inf in the mask hides a key: the first query sees the first value alone, the second both",
     floats(1, 2),
     lambda: attended([[[0.0], [0]]], [[[1.0], [2]]], [[[1.0], [3]]], [[0.0, NOT], [0, 0]]))
case(3, "scores are divided by √D before softmax: here 4/√4 = 2 and 0", floats(1 / (1 + math.exp(-2))),
     lambda: attended([[[1.0, 1, 1, 1]]], [[[1.0, 1, 1, 1], [0, 0, 0, 0]]], [[[1.0], [0]]]))
case(3, "softmax goes over the keys of a query, not over queries", floats(1 / (1 + math.exp(-1)), 0.5),
     lambda: attended([[[1.0], [0]]], [[[1.0], [0]]], [[[1.0], [0]]]))
case(3, "four query heads on two key-value heads: 0 and 1 look at the first, 2 and 3 at the second",
     floats(10, 10, 20, 20),
     lambda: attended([[[1.0]]] * 4, [[[1.0]], [[2.0]]], [[[10.0]], [[20.0]]]))


def collated(*rows, which):
    return of("data").collate(list(rows), 0)[which].tolist()


ROW, SHORT = ([5, 6, 7, 8], [0, 0, 1, 1]), ([3, 4], [0, 1])
X = -100
case(4, "inputs are the ids, padded on the right to a multiple of 8", [[5, 6, 7, 8, 0, 0, 0, 0]],
     lambda: collated(ROW, which=0))
case(4, "a target is the NEXT token, where that one's mask is 1; prompt and padding are IGNORE",
     [[X, 7, 8, X, X, X, X, X]],
     lambda: collated(ROW, which=1))
case(4, "rows of different lengths are padded to the longest",
     [[X, 7, 8, X, X, X, X, X], [4, X, X, X, X, X, X, X]],
     lambda: collated(ROW, SHORT, which=1))
case(4, "nine ids make eight inputs: the last is a target only", [[1, 2, 3, 4, 5, 6, 7, 8]],
     lambda: collated((list(range(1, 10)), [1] * 9), which=0))
case(4, "no rows (a rank out of work) give one row without a target", [[X] * 8],
     lambda: collated(which=1))


def bradley_terry(scores, labels):
    return of("reward").bradley_terry_loss(floats(*scores), floats(*labels)).view(1)


case(5, "equal scores: -log σ(0) = ln 2", floats(math.log(2)),
     lambda: bradley_terry((3, 3), (1, 0)))
case(5, "the better one 1 ahead: log(1 + e⁻¹)", floats(math.log(1 + math.exp(-1))),
     lambda: bradley_terry((2, 1), (1, 0)))
case(5, "the better one 1 behind, the other way round in the list", floats(math.log(1 + math.e)),
     lambda: bradley_terry((2, 1), (0, 1)))
case(5, "three replies are three pairs, and the loss their mean",
     floats((2 * math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-2))) / 3),
     lambda: bradley_terry((2, 1, 0), (5, 4, 1)))
case(5, "equal labels are no pair: two pairs of three remain",
     floats((math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2),
     lambda: bradley_terry((2, 1, 0), (1, 1, 0)))
case(5, "a difference of -1000 costs 1000, not inf: mind how log σ is computed", floats(1000),
     lambda: bradley_terry((0, 1000), (1, 0)))


def advantages(rewards, values, gamma, lam, which=0):
    return of("ppo").gae(floats(*rewards), floats(*values), gamma, lam)[which]


case(6, "λ = 0: A is δ = r + γ V(next) - V, and V after the end is 0",
     floats(0.5 * 4 - 2, 0.5 * 6 - 4, 1 - 6),
     lambda: advantages((0, 0, 1), (2, 4, 6), 0.5, 0.0))
case(6, "λ = 1, γ = 1: A is all that was still to come, minus V", floats(6 - 1, 5 - 1, 3 - 1),
     lambda: advantages((1, 2, 3), (1, 1, 1), 1.0, 1.0))
case(6, "between: A_t = δ_t + γλ A_{t+1}; one token's reward reaches the earlier ones by γλ = 0.25 a step",
     floats(0.0625, 0.25, 1),
     lambda: advantages((0, 0, 1), (0, 0, 0), 0.5, 0.5))
case(6, "the critic's targets are A + V", floats(6, 5, 3),
     lambda: advantages((1, 2, 3), (1, 1, 1), 1.0, 1.0, which=1))


def clipped(ratio, advantage, which=0):
    return of("ppo").policy_loss(floats(math.log(ratio) - 3), floats(-3), floats(advantage), 0.2)[which]


case(7, "ratio 1: the loss is -A", floats(-2),
     lambda: clipped(1, 2))
case(7, "the ratio is π/π_old = exp(log π - log π_old), returned beside the loss", floats(1.1),
     lambda: clipped(1.1, 2, which=1))
case(7, "A > 0 and the token is already 1.5 times as likely: no more than 1.2 is rewarded", floats(-2.4),
     lambda: clipped(1.5, 2))
case(7, "A < 0 and it is already half as likely: no less than 0.8 is rewarded", floats(1.6),
     lambda: clipped(0.5, -2))
case(7, "A < 0 but it became MORE likely: the whole mistake counts, nothing is clipped", floats(3),
     lambda: clipped(1.5, -2))
case(7, "A > 0 but it became less likely: nothing is clipped either", floats(-1),
     lambda: clipped(0.5, 2))


def rewarded(score, logprobs, ref, coefficient, *estimator):
    return of("ppo").token_rewards(score, floats(*logprobs), floats(*ref), coefficient, *estimator)


case(8, "policy = reference: no price, and the score stands at the last token alone", floats(0, 0, 5),
     lambda: rewarded(5.0, (-1, -2, -3), (-1, -2, -3), 0.1))
case(8, "a token more likely than in the reference costs β·(log π - log π_ref); one less likely earns",
     floats(-0.1, 0.2, 5),
     lambda: rewarded(5.0, (-1, -3, -1), (-2, -1, -1), 0.1))
case(8, "k3 = r - 1 - log r with r = q/p = 2", floats(1 - math.log(2)),
     lambda: of("ppo").k3(floats(math.log(2))))
case(8, "k3 is never negative: r = 1/2", floats(0.5 - 1 + math.log(2)),
     lambda: of("ppo").k3(floats(-math.log(2))))
case(8, "k3 near 0 keeps its digits: log r = 10⁻⁴ gives 10⁻⁸·(1/2 + 10⁻⁴/6 + …)",
     floats(0.5 + 1e-4 / 6 + 1e-8 / 24),
     lambda: of("ppo").k3(floats(1e-4)) * 1e8)
case(8, "k3 as the price: log r is log π_ref - log π", floats(-0.1 * (1 - math.log(2)), 5),
     lambda: rewarded(5.0, (-2, -1), (-2 + math.log(2), -1), 0.1, "k3"))


def preference(chosen, rejected, ref_chosen, ref_rejected, beta, which=0):
    logprobs = [torch.tensor([float(x)], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
    return of("dpo").dpo_loss(*logprobs, floats(ref_chosen), floats(ref_rejected), beta)[which]


case(9, "policy = reference: ln 2, whatever the two replies' likelihoods", floats(math.log(2)),
     lambda: preference(-5, -90, -5, -90, 0.1))
case(9, "chosen 3 nats above the reference, rejected 1 below, β = 0.5: log(1 + e⁻²)",
     floats(math.log(1 + math.exp(-2))),
     lambda: preference(-7, -11, -10, -10, 0.5))
case(9, "the implicit reward of the chosen reply is β·(log π - log π_ref)", floats(1.5),
     lambda: preference(-7, -11, -10, -10, 0.5, which=1))
case(9, "and that of the rejected one", floats(-0.5),
     lambda: preference(-7, -11, -10, -10, 0.5, which=2))
case(9, "far on the wrong side the loss is a number, not inf", floats(1000),
     lambda: preference(-1000, 0, 0, 0, 1.0))
case(9, "rewards are for logging: they carry no gradient", False,
     lambda: preference(-7, -11, -10, -10, 0.5, which=1).requires_grad)


def lora(B=None, what="forward", on=True):
    """W = 2·I (2 × 2), A = (1, 1), alpha / rank = 3; x = (1, 4)."""
    plain = torch.nn.Linear(2, 2, bias=True, dtype=torch.float64)
    plain.weight.data, plain.bias.data = 2 * torch.eye(2, dtype=torch.float64), floats(10, 20)
    layer = of("model").LoRA(plain, 1, 3).double()
    layer.weight, layer.bias = plain.weight, plain.bias  # .double() must not copy them
    layer.lora_A.weight.data = floats(1, 1)[None]
    layer.on = on
    if B:
        layer.lora_B.weight.data = floats(*B)[:, None]
    if what == "merged":
        return layer.merged()(floats(1, 4))
    return layer(floats(1, 4))


case(10, "at the start B is 0 and the layer computes what its base does", floats(12, 28),
     lambda: lora())
case(10, "W·x + bias + alpha/rank · B·(A·x): A·x = 5, scale 3", floats(12 + 15, 28 - 30),
     lambda: lora((1, -2)))
case(10, "switched off it is its base again (PPO's reference)", floats(12, 28),
     lambda: lora((1, -2), on=False))
case(10, "merged into one matrix it computes the same", floats(12 + 15, 28 - 30),
     lambda: lora((1, -2), "merged"))


def checkpointed(what, on):
    """Loss, a gradient, or the bytes kept for backward, of one small model."""
    torch.manual_seed(0)
    net = of("model").CausalLM(of("model").ModelConfig(29, 16, 32, 2, 2, 2, max_position_embeddings=32))
    net.model.activation_checkpointing = on
    ids = torch.arange(16)[None]

    def loss(net):
        return of("model").token_logprobs(net, ids, ids).mean()

    calls = []
    net.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    value = loss(net)
    value.backward()
    return {"loss": value.view(1).detach(), "gradient": net.model.layers[0].mlp.up_proj.weight.grad,
            "calls": len(calls), "kept": of("zero").saved_bytes(loss, net)}[what]


case(11, "without it a block runs once a step", 1,
     lambda: checkpointed("calls", False))
case(11, "with it backward runs the block once more", 2,
     lambda: checkpointed("calls", True))
case(11, "the loss is the same (the difference is)", floats(0),
     lambda: checkpointed("loss", True) - checkpointed("loss", False))
case(11, "and so are the gradients (the largest difference is)", floats(0),
     lambda: (checkpointed("gradient", True) - checkpointed("gradient", False)).abs().max().view(1))
case(11, "less than half of the bytes is kept for backward", True,
     lambda: checkpointed("kept", True) < checkpointed("kept", False) / 2)


def trained(rank, stage, kind):
    """Three steps of a small net on two ranks. The largest difference to torch's AdamW on both
    ranks' rows; what this rank holds at rest; the weights' NaNs between steps."""
    torch.manual_seed(0)
    plain, net = (torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)).double() for _ in "12")
    net.load_state_dict(plain.state_dict())
    groups = [{"params": [p for p in plain.parameters() if (p.dim() >= 2) == wide],
               "weight_decay": 0.1 * wide} for wide in (True, False)]
    reference = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), eps=1e-3)
    optimizer = of("zero").AdamW(net, stage, eps=1e-3, grad_clip=1e9)
    for step in range(3):
        x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        plain(x).square().sum().backward()
        reference.step()
        reference.zero_grad()
        for row in x[2 * rank : 2 * rank + 2]:  # two micro-batches of this rank
            optimizer.backward(net(row[None]).square().sum())
        optimizer.step(0.05)
    resting = optimizer.live_bytes()
    away = sum(bool(p.isnan().any()) for p in net.parameters())
    with optimizer.gathered():
        apart = max((a - b).abs().max().item() for a, b in zip(net.parameters(), plain.parameters()))
    return {"apart": round(apart, 9), "away": away, **resting}[kind]


POOL = []


def on_two_ranks(stage, kind):
    """What each of two ranks says."""
    if not POOL:
        from pool import Pool
        POOL.append(Pool(Path(tempfile.mkdtemp())))
    return POOL[0](2, trained, stage, kind)


SIZE = 8 * (36 + 18)  # bytes of two layers: 6·5 + 5 and 5·3 + 3 fp64 numbers, each padded to an even count
case(12, "stage 1 trains what torch.optim.AdamW trains on both ranks' rows, on BOTH ranks (largest difference)",
     [0, 0],
     lambda: on_two_ranks(1, "apart"))
case(12, "stage 3 too, where nobody needs the other slices yet", [0, 0],
     lambda: on_two_ranks(3, "apart"))
case(12, "a rank holds half of Adam's two moments", [SIZE, SIZE],
     lambda: on_two_ranks(1, "optimizer"))
case(13, "stage 0: every rank needs the whole sum (largest difference to torch's AdamW)", [0, 0],
     lambda: on_two_ranks(0, "apart"))
case(13, "stage 1: the sum of this rank's part stands in the bucket", [0, 0],
     lambda: on_two_ranks(1, "apart"))
case(13, "stage 2: the parts of two micro-batches add up", [0, 0],
     lambda: on_two_ranks(2, "apart"))
case(13, "stage 2: at rest a rank holds half of the gradient", [SIZE // 2] * 2,
     lambda: on_two_ranks(2, "gradients"))
case(13, "and the bucket is gone", [0, 0],
     lambda: on_two_ranks(2, "buffers"))
case(14, "stage 3 trains what torch.optim.AdamW trains (largest difference)", [0, 0],
     lambda: on_two_ranks(3, "apart"))
case(14, "between steps the weights are away: each of the four parameters is NaN", [4, 4],
     lambda: on_two_ranks(3, "away"))
case(14, "and no gathered buffer is left", [0, 0],
     lambda: on_two_ranks(3, "buffers"))
case(14, "a rank holds half of the weights", [SIZE // 2] * 2,
     lambda: on_two_ranks(3, "parameters"))


# ==================================================================================== the commands

def bodies(source, names):
    """(first, last) line of what stands after the docstring of each function, by its name."""
    found = {}

    def look(node, path):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{path}.{child.name}".lstrip(".")
                if name in names:
                    first = child.body[1 if ast.get_docstring(child) else 0]
                    found[name] = first.lineno, child.end_lineno
                look(child, name)

    look(ast.parse(source), "")
    return [found[name] for name in names]


def empty(source, number, names) -> str:
    """The source with those functions emptied; their docstrings stay."""
    lines = source.splitlines(keepends=True)
    for first, last in sorted(bodies(source, names), reverse=True):
        start = lines[first - 1]
        indent = start[: len(start) - len(start.lstrip())]
        while lines[first - 2].strip().startswith("#"):  # a comment on the first line goes too
            first -= 1
        lines[first - 1 : last] = [f'{indent}raise NotImplementedError("lab {number}: write this")\n']
    return "".join(lines)


def start(number, folder):
    """Copies the project to the folder, with the lab's functions emptied."""
    lab = LABS[number]
    if folder.exists():
        raise SystemExit(f"{folder} is there already: go on in it, or remove it first")
    for pattern in COPIED:
        for path in HERE.glob(pattern):
            target = folder / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, target)
    print(f"Lab {number}: {lab.title}  ({lab.read})\n{lab.task}\n")
    for module, names in lab.emptied.items():
        path = folder / f"{module}.py"
        text = empty(path.read_text(encoding="utf-8"), number, names)
        path.write_text(text, encoding="utf-8")
        for i, line in enumerate(text.splitlines(), 1):
            if f"lab {number}: write this" in line:
                print(f"  {path}:{i}")
    print(f"\nThen: make check N={number}, until every case is ok.\nAfter that: {lab.then}")


def same(expected, got) -> bool:
    """Tensors to nine digits, anything else as it is."""
    if isinstance(expected, torch.Tensor) and got is not None:  # None: a return was forgotten
        got = torch.as_tensor(got).double()
        return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-9, atol=1e-9)
    return got is not None and got == expected


def shown(value):
    return value.tolist() if hasattr(value, "tolist") else value


def places(lab) -> str:
    return ", ".join(f"{' and '.join(names)} in {module}.py" for module, names in lab.emptied.items())


def check(number) -> bool:
    """Runs a lab's cases until one fails; says what that one is about."""
    lab = LABS[number]
    print(f"Lab {number}: {lab.title}")
    for what, expected, got in lab.cases:
        try:
            came = got()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            came = f"got      {type(error).__name__} in {last.filename}:{last.lineno}: {error}"
            if f"lab {number}: write this" in f"{error}":
                came = f"still empty: write {places(lab)}"
            print(f"   ✗ {what}\n     expected {shown(expected)}\n     {came}")
            return False
        if not same(expected, came):
            print(f"   ✗ {what}\n     expected {shown(expected)}\n     got      {shown(came)}\n     "
                  f"Read: {lab.read}, and the docstring of {places(lab)}.")
            return False
        print(f"   ✓ {what}")
    print(f"All {len(lab.cases)} are right. Then: {lab.then}")
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="list", choices=["list", "start", "check"])
    parser.add_argument("number", nargs="*", type=int, help="of the lab; check: all if none is given")
    args = parser.parse_args()
    if set(args.number) - set(LABS):
        raise SystemExit(f"there are labs 1 to {len(LABS)}")
    if args.what == "list":
        for number, lab in LABS.items():
            print(f"{number:>3}  {lab.title}: {places(lab)}  ({lab.read})")
        return
    if args.what == "start":
        if not args.number:
            raise SystemExit("which lab? make lab N=7; make labs lists them")
        for number in args.number:
            start(number, HERE / "labs" / str(number))
        return
    folder = HERE / "labs" / str(args.number[0]) if len(args.number) == 1 else HERE
    if not folder.exists():
        print(f"{folder} is not there: make lab N={args.number[0]} first. This is the code as it stands:")
        folder = HERE
    sys.path[:0] = [str(folder), str(HERE / "tests")]
    right = [check(number) for number in args.number or LABS]
    for pool in POOL:
        pool.close()
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
