"""DPO: losses against formulas, the derivation by enumeration, pairs however cut, and runs that resume."""

import copy
import datetime
import itertools
import json
import math
import types

import pytest
import torch
from conftest import FAMILIES, family, make_tokenizer
from test_reinforce import prompts_file, weights
from transformers.utils import chat_template_utils

import common
import dpo
from common import World
from dpo import (
    encode_preferences,
    in_order,
    micro_batches_of_pairs,
    pair_logprobs,
    preference_loss,
    share_of_process,
)

CPU = World(0, 1, torch.device("cpu"), torch.float32)
PAIRS = [([7, 12, 3], [5, 9, 1], [6, 1]), ([5, 9, 11, 30, 31, 14], [20, 21, 22, 23, 24, 1], [8, 1]), ([6], [9, 1], [33, 34, 35, 1]), ([33, 21], [4, 1], [4, 5, 1])]  # fmt: skip


def args(**flags):
    return dpo.resolve(dpo.Args(**flags))


# --- the losses ---


def numbers(seed=0):
    g = torch.Generator().manual_seed(seed)
    logprobs = [-20 * torch.rand(5, generator=g, dtype=torch.float64) for _ in range(4)]
    return logprobs, torch.tensor([3, 9, 1, 4, 7]), torch.tensor([5, 2, 1, 8, 7])


FORMULAS = {
    "sigmoid": lambda c, r, a, b, m, n, beta: -math.log(sigmoid(beta * ((c - a) - (r - b)))),
    "ipo": lambda c, r, a, b, m, n, beta: ((c - a) / m - (r - b) / n - 1 / (2 * beta)) ** 2,
    "hinge": lambda c, r, a, b, m, n, beta: max(0.0, 1 - beta * ((c - a) - (r - b))),
    "simpo": lambda c, r, a, b, m, n, beta: -math.log(sigmoid(beta * (c / m - r / n) - 0.7)),
}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("loss", FORMULAS)
def test_losses_against_their_formulas(loss, beta):
    (c, r, a, b), m, n = numbers()
    got = preference_loss(c, r, a, b, m, n, args(loss=loss, beta=beta, simpo_margin=0.7))
    for i in range(5):
        wanted = FORMULAS[loss](*(x[i].item() for x in (c, r, a, b, m, n)), beta)
        assert got[i].item() == pytest.approx(wanted, rel=1e-10)
    held = preference_loss(
        c, r, a, b, m, n, args(loss=loss, beta=beta, simpo_margin=0.7, sft_coef=0.3)
    )
    torch.testing.assert_close(held - got, -0.3 * c / m)


def test_label_smoothing_acts_and_is_the_mean_over_who_is_right():
    (c, r, a, b), m, n = numbers()
    plain = preference_loss(c, r, a, b, m, n, args(beta=0.3))
    turned = preference_loss(r, c, b, a, n, m, args(beta=0.3))
    smooth = preference_loss(c, r, a, b, m, n, args(beta=0.3, label_smoothing=0.2))
    torch.testing.assert_close(smooth, 0.8 * plain + 0.2 * turned)
    assert (smooth - plain).abs().min() > 1e-6


def test_the_gradient_raises_chosen_and_lowers_rejected_by_how_wrong_the_pair_is():
    (c, r, a, b), m, n = numbers()
    c, r = c.requires_grad_(), r.requires_grad_()
    preference_loss(c, r, a, b, m, n, args(beta=0.3)).sum().backward()
    h = 0.3 * ((c - a) - (r - b)).detach()
    torch.testing.assert_close(c.grad, -0.3 * torch.sigmoid(-h))
    torch.testing.assert_close(r.grad, 0.3 * torch.sigmoid(-h))


def test_the_derivation_by_enumeration():
    """(2) is the optimum of (1): any other policy has less, by beta KL(pi || pi*); and the differences of (3) are those of r."""
    g = torch.Generator().manual_seed(0)
    ref, r, beta = (
        torch.randn(6, generator=g).double().softmax(0),
        torch.randn(6, generator=g).double(),
        0.4,
    )

    def objective(p):
        return (p * r).sum() - beta * (p * (p / ref).log()).sum()

    best = ref * (r / beta).exp()
    Z = best.sum()
    best = best / Z
    for _ in range(50):
        p = torch.randn(6, generator=g).double().softmax(0)
        torch.testing.assert_close(
            objective(best) - objective(p), beta * (p * (p / best).log()).sum()
        )
    torch.testing.assert_close(objective(best), beta * Z.log())
    implicit = beta * (best / ref).log()
    torch.testing.assert_close(implicit - implicit[0], r - r[0])


# --- log-probabilities of pairs ---


@pytest.mark.parametrize("name", FAMILIES)
def test_summed_log_probabilities_against_plain_forwards_with_and_without_sharing(name):
    """EOS included, padding not, both sides in one batch with longer pairs; one prompt for both sides, or one each."""
    model, tokenizer = family(name), make_tokenizer()
    for share in (False, True) if name != "mamba" else (False,):
        with torch.no_grad():
            got = pair_logprobs(model, tokenizer, PAIRS, share, CPU)
            for i, (prompt, *sides) in enumerate(PAIRS):
                for j, side in enumerate(sides):
                    ids = torch.tensor([prompt + side])
                    logprobs = model(ids).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
                    wanted = logprobs.gather(1, torch.tensor(side)[:, None]).sum()
                    torch.testing.assert_close(
                        got[i, j], wanted, atol=2e-3 if name == "mamba" else 2e-4, rtol=1e-4
                    )


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("loss", FORMULAS)
def test_the_gradient_is_the_same_however_the_step_is_cut(loss, share):
    """Field notes, test 3."""
    model, tokenizer = family("llama").double(), make_tokenizer()
    settings = args(loss=loss, beta=0.5, sft_coef=0.1)
    ref = torch.tensor([[-9.0, -4.0], [-30.0, -3.0], [-5.0, -20.0], [-5.0, -9.0]])
    grads = []
    for tokens in (100_000, 40, 1):
        model.zero_grad()
        parts = micro_batches_of_pairs(PAIRS, share, tokens, CPU)
        assert sorted(i for p in parts for i in p) == [0, 1, 2, 3] and (
            tokens > 50 or len(parts) > 1
        )
        for part in parts:
            chosen, rejected = pair_logprobs(
                model, tokenizer, [PAIRS[i] for i in part], share, CPU
            ).T
            n = torch.tensor([[len(PAIRS[i][1]), len(PAIRS[i][2])] for i in part])
            (preference_loss(chosen, rejected, *ref[part].T, *n.T, settings).sum() / 4).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in grads[1:]:
        assert (grads[0] - other).norm() < 1e-6 * grads[0].norm() and grads[0].norm() > 0


def test_a_part_keeps_to_its_budget():
    for tokens in (12, 30, 60):
        for share in (False, True):
            for part in micro_batches_of_pairs(PAIRS, share, tokens, CPU):
                prompt = max(len(PAIRS[i][0]) for i in part) * (1 if share else 2)
                answer = max(len(x) for i in part for x in PAIRS[i][1:])
                assert len(part) == 1 or len(part) * (prompt + 2 * answer) <= tokens


def test_every_process_gets_as_many_parts_as_the_one_with_most_and_none_is_empty(monkeypatch):
    """FSDP gathers weights in all processes or in none."""
    for tokens in (100_000, 40):
        own = len(micro_batches_of_pairs(PAIRS, True, tokens, CPU))
        for most in (1, 3, 4):
            with monkeypatch.context() as patch:
                patch.setattr(
                    common,
                    "all_gather",
                    lambda world, count, most=most: torch.tensor([count, most]),
                )
                parts = micro_batches_of_pairs(PAIRS, True, tokens, CPU)
            assert all(parts) and len(parts) == max(own, most)
            assert sorted(i for part in parts for i in part) == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_scores_of_all_processes_come_back_once_and_in_order(size, monkeypatch):
    """Equally many on each, so that parts can be divided; also with fewer pairs than processes."""
    for count in (1, 2, 3, 7, 10):
        shares = [
            share_of_process(list(range(count)), World(rank, size, CPU.device, CPU.dtype))
            for rank in range(size)
        ]
        assert {len(share) for share in shares} == {math.ceil(count / size)}
        results = [torch.tensor([[i, -i] for i in share]) for share in shares]
        monkeypatch.setattr(
            common, "all_gather", lambda world, own, results=results: torch.cat(results)
        )
        for rank in range(size):
            found = in_order(results[rank], count, World(rank, size, CPU.device, CPU.dtype))
            assert found.tolist() == [[i, -i] for i in range(count)]


def test_pairs_equal_or_too_long_are_left_out_and_counted_and_messages_are_pairs_too(
    tmp_path, capsys
):
    talk = [{"role": "user", "content": "w5"}]
    rows = [
        {"prompt": "w5", "chosen": "w6 w7", "rejected": "w8"},
        {"prompt": "w5", "chosen": "w6", "rejected": "w6"},
        {"prompt": "w5", "chosen": "w6 " * 30, "rejected": "w8"},
        {
            "chosen": [*talk, {"role": "assistant", "content": "w6 w7"}],
            "rejected": [*talk, {"role": "assistant", "content": "w8"}],
        },
    ]
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    pairs = encode_preferences(dpo.read_pairs(prompts_file(tmp_path, rows), "--data"), make_tokenizer(template=template), args(max_tokens=20), "--data")  # fmt: skip
    assert "1 left out as equal or empty, 1 as over --max_tokens 20" in capsys.readouterr().out
    assert len(pairs) == 2 and pairs[0] == pairs[1] and pairs[0][1][-1] == pairs[0][2][-1] == 1, (
        "both end with EOS"
    )


def test_a_pair_as_long_as_may_be_is_kept():
    rows = [{"prompt": "w5", "chosen": "w6 w7", "rejected": "w8"}]
    kept = encode_preferences(rows, make_tokenizer(), args(max_tokens=4), "--data")
    assert kept == [([5], [6, 7, 1], [8, 1])]
    with pytest.raises(SystemExit):
        encode_preferences(rows, make_tokenizer(), args(max_tokens=3), "--data")


@pytest.mark.parametrize("loss", FORMULAS)
def test_held_out_numbers_by_hand(loss, monkeypatch):
    settings = args(loss=loss, beta=0.3, simpo_margin=0.7)
    logprobs = torch.tensor([[-9.0, -7.0], [-12.0, -3.0], [-5.0, -20.0], [-5.0, -12.0]])
    ref = torch.tensor([[-9.5, -3.0], [-10.0, -8.0], [-7.0, -11.0], [-5.0, -9.0]])
    if loss == "simpo":
        ref = torch.zeros(4, 2)
    monkeypatch.setattr(dpo, "score_pairs", lambda *given: logprobs)
    found = dpo.evaluate_pairs(None, None, PAIRS, ref, False, settings, CPU)
    losses, margins = [], []
    for (_, *sides), (c, r), (a, b) in zip(PAIRS, logprobs.tolist(), ref.tolist()):
        m, n = map(len, sides)
        losses.append(FORMULAS[loss](c, r, a, b, m, n, 0.3))
        by_length = loss in ("ipo", "simpo")
        of_chosen, of_rejected = ((c - a) / m, (r - b) / n) if by_length else (c - a, r - b)
        margins.append(0.3 * (of_chosen - of_rejected))
    won = sum(margin > 0 for margin in margins)
    assert won == 3, "not as many as are lost"
    wanted = {
        "eval/accuracy": won / 4,
        "eval/margin": sum(margins) / 4,
        "eval/loss": sum(losses) / 4,
        "held_out/pairs": 4,
    }
    assert found == pytest.approx(wanted, rel=1e-5)


# --- a whole step, against one written out in float64 ---


@pytest.mark.parametrize("loss", FORMULAS)
def test_one_step_of_the_script_is_the_step_written_out(loss, tmp_path, monkeypatch):
    """Every flag in its place: another reference, an SFT term, plain gradient descent, micro-batches; the weights after the step
    and the numbers logged, against loops over pairs with plain forwards."""
    start, honest = {}, common.load_reference

    def moved(*everything):
        model, generator = honest(*everything), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * p.std() * torch.randn(p.shape, generator=generator))
        return model

    def sgd(model, rate):
        start["policy"] = copy.deepcopy(model).double()
        return torch.optim.SGD(model.parameters(), lr=rate)

    monkeypatch.setattr(common, "load_reference", moved)
    monkeypatch.setattr(common, "make_optimizer", sgd)
    data = few_pairs(tmp_path, 6)
    flags = {
        "loss": loss,
        "beta": 0.3,
        "sft_coef": 0.2,
        "simpo_margin": 0.7,
        "learning_rate": 0.05,
        "max_grad_norm": 1e9,
    }
    m = run(tmp_path, data=data, eval_data=data, reference="" if loss == "simpo" else dpo.Args.model, steps=1, pairs_per_step=6, warmup=0, schedule="constant",
            tokens_per_micro_batch=60, **flags)  # fmt: skip
    policy, reference = start["policy"], moved(dpo.Args.model, CPU).double()
    before = {k: p.detach().clone() for k, p in policy.named_parameters()}
    tokenizer, total, sums = common.load_tokenizer(dpo.Args.model), 0.0, torch.zeros(5)
    rows = [json.loads(line) for line in open(data)]

    def logprob(model, prompt, side):
        logits = model(torch.tensor([prompt + side])).logits[0].double()
        return (
            logits.log_softmax(-1)[len(prompt) - 1 : -1]
            .gather(1, torch.tensor(side)[:, None])
            .sum()
        )

    for row in rows:
        prompt = common.encode_prompt(tokenizer, row["prompt"])
        sides = [
            tokenizer(row[k], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            for k in ("chosen", "rejected")
        ]
        (c, r), (m_c, m_r) = (logprob(policy, prompt, x) for x in sides), map(len, sides)
        with torch.no_grad():
            a, b = (logprob(reference, prompt, x) for x in sides)
        h = {
            "ipo": (c - a) / m_c - (r - b) / m_r,
            "simpo": 0.3 * (c / m_c - r / m_r) - 0.7,
        }.get(loss, 0.3 * ((c - a) - (r - b)))
        one = {"ipo": (h - 1 / 0.6) ** 2, "hinge": (1 - h).clamp(min=0)}.get(
            loss, -torch.nn.functional.logsigmoid(h)
        )
        total = total + (one - 0.2 * c / m_c) / len(rows)
        good, bad = {"ipo": ((c - a) / m_c, (r - b) / m_r), "simpo": (c / m_c, r / m_r)}.get(
            loss, (c - a, r - b)
        )
        sums += torch.tensor([x.item() for x in (0.3 * good, 0.3 * bad, c, r, good > bad)]) / len(
            rows
        )
    total.backward()
    names = ("chosen", "rejected", "logprobs/chosen", "logprobs/rejected", "accuracy")
    for name, wanted in zip(names, sums.tolist()):
        assert m[1][name] == pytest.approx(wanted, rel=1e-3, abs=1e-4), name
    assert m[1]["loss"] == pytest.approx(total.item(), rel=1e-3) and m[0][
        "eval/loss"
    ] == pytest.approx(total.item(), rel=1e-3)
    assert m[0]["eval/margin"] == pytest.approx(sums[0].item() - sums[1].item(), rel=1e-3, abs=1e-4)
    after = weights(tmp_path, "run")
    for k, p in policy.named_parameters():
        way = -0.05 * p.grad
        assert (after[k] - before[k] - way).norm() <= 2e-3 * way.norm() + 1e-6, k


# --- whole runs, on the bundled model ---


def run(tmp_path, name="run", **flags):
    settings = {
        "out": str(tmp_path / name),
        "device": "cpu",
        "eval_data": "",
        "eval_prompts": "",
        "seed": 1,
    }
    dpo.train(dpo.Args(**settings | flags))
    return [
        json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]


def few_pairs(tmp_path, n=48):
    lines = (dpo.TINY / "pairs_train.jsonl").read_text().splitlines()[:n]
    return prompts_file(tmp_path, [json.loads(line) for line in lines])


SMALL = {"pairs_per_step": 8, "warmup": 0}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_at_step_0_the_loss_is_log_2_and_the_margin_0(checkpointing, tmp_path):
    data = few_pairs(tmp_path)
    flags = SMALL | {"learning_rate": 1e-4, "gradient_checkpointing": checkpointing}
    m = run(tmp_path, steps=2, data=data, eval_data=data, **flags)
    assert (
        m[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
        and m[0]["eval/margin"] == 0
        and m[0]["eval/accuracy"] == 0.5
    )
    assert m[1]["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(m[1]["margin"]) < 1e-4
    assert m[2]["eval/loss"] < m[0]["eval/loss"] and m[2]["eval/margin"] > 0.01


def test_without_steps_a_model_is_held_against_the_reference_that_it_started_from(
    tmp_path, monkeypatch
):
    """As at the end of its training. Both are in memory, which is what the run says."""
    data = few_pairs(tmp_path, 16)
    flags = {"eval_data": data, "beta": 0.5}
    trained = run(tmp_path, steps=6, data=data, learning_rate=3e-4, warmup=0, **flags)[-1]
    begin_log = common.begin_log
    counts = []

    def noted(*given, **named):
        counts.append(given[-2:])
        return begin_log(*given, **named)

    monkeypatch.setattr(common, "begin_log", noted)
    flags |= {"steps": 0, "model": str(tmp_path / "run" / "model"), "reference": dpo.Args.model}
    found = run(tmp_path, "evaluated", **flags)[-1]
    for name in ("eval/loss", "eval/margin", "eval/accuracy"):
        assert found[name] == pytest.approx(trained[name], abs=1e-5), name
    assert found["eval/margin"] > 0.01

    # without pairs the reference has nothing to score
    monkeypatch.setattr(common, "load_reference", lambda *given: pytest.fail("loaded"))
    flags |= {"eval_data": "", "eval_prompts": str(dpo.TINY / "sort_test.jsonl")}
    run(tmp_path, "sampled", **flags)
    model, reference = flags["model"], flags["reference"]
    assert counts == [(0, [model, reference]), (0, [model, ""])], "that learn, and frozen"


@pytest.mark.parametrize("loss", FORMULAS)
def test_every_loss_learns_to_rank(loss, tmp_path):
    m = run(
        tmp_path,
        steps=12,
        data=few_pairs(tmp_path, 16),
        loss=loss,
        pairs_per_step=16,
        learning_rate=3e-4,
        warmup=0,
    )
    assert (
        m[-1]["loss"] < m[1]["loss"]
        and m[-1]["margin"] > m[1]["margin"]
        and m[-1]["accuracy"] >= m[1]["accuracy"]
    )
    chosen, rejected = (
        m[-1][f"logprobs/{k}"] - m[1][f"logprobs/{k}"] for k in ("chosen", "rejected")
    )
    assert chosen > rejected


def test_an_sft_term_keeps_the_chosen_ones_likely(tmp_path):
    flags = {
        "steps": 12,
        "data": few_pairs(tmp_path, 16),
        "pairs_per_step": 16,
        "learning_rate": 3e-4,
        "warmup": 0,
    }
    free, held = run(tmp_path, "free", **flags), run(tmp_path, "held", sft_coef=1.0, **flags)
    assert held[-1]["logprobs/chosen"] > free[-1]["logprobs/chosen"] + 0.1


def test_resuming_is_never_having_stopped_and_the_reference_is_the_first_policy(
    tmp_path, monkeypatch
):
    """Field notes, test 12. The reference's numbers come from the folder: those of the resumed policy would be others."""
    flags = SMALL | {"data": few_pairs(tmp_path), "save_every": 2, "schedule": "constant"}
    straight = run(tmp_path, "a", steps=4, **flags)
    honest = common.save_checkpoint

    def crash(*everything):
        honest(*everything)
        raise common.Stop("the machine is wanted back")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common, "save_checkpoint", crash)
        run(tmp_path, "b", steps=4, **flags)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "score_pairs", lambda *a: 1 / 0)
        resumed = run(tmp_path, "b", steps=4, resume=True, **flags)
    clocks = ("time/train", "tokens_per_second", "memory_gib")
    for a, b in zip(straight, resumed, strict=True):
        assert {k: v for k, v in a.items() if k not in clocks} == {
            k: v for k, v in b.items() if k not in clocks
        }
    a, b = weights(tmp_path, "a"), weights(tmp_path, "b")
    assert all(torch.equal(a[k], b[k]) for k in a)
    few_pairs(tmp_path, 47)
    with pytest.raises(SystemExit):
        run(tmp_path, "b", steps=4, resume=True, **flags)  # other pairs than those that were scored
    few_pairs(tmp_path)
    run(tmp_path, "c", steps=2, **flags)
    (
        tmp_path / "c" / "reference.pt"
    ).unlink()  # lost: made again from the model that the run began with
    again = run(tmp_path, "c", steps=4, resume=True, **flags)
    assert again[-1]["loss"] == pytest.approx(straight[-1]["loss"], abs=1e-5)


def test_scores_of_as_many_other_pairs_are_not_taken_for_those_of_a_resumed_runs(tmp_path, capsys):
    """A pair that was changed in the file would be held against the score of what it was."""
    flags = SMALL | {"data": few_pairs(tmp_path, 8), "schedule": "constant"}
    run(tmp_path, steps=1, **flags)
    rows = [json.loads(line) for line in open(flags["data"])]
    rows[3]["chosen"] = rows[3]["chosen"][::-1] + "0"
    prompts_file(tmp_path, rows)
    with pytest.raises(SystemExit):
        run(tmp_path, steps=2, resume=True, **flags)
    assert "has scores of other pairs" in capsys.readouterr().err


def test_a_resumed_run_holds_its_held_out_pairs_against_the_first_policy(tmp_path):
    """Their reference scores are computed anew, before the checkpoint is loaded."""
    data = few_pairs(tmp_path)
    flags = SMALL | {
        "data": data,
        "eval_data": data,
        "save_every": 2,
        "schedule": "constant",
        "learning_rate": 1e-3,
    }
    straight = run(tmp_path, "a", steps=4, **flags)
    run(tmp_path, "b", steps=2, **flags)
    resumed = run(tmp_path, "b", steps=4, resume=True, **flags)
    scores = [{k: v for k, v in rows[-1].items() if "eval/" in k} for rows in (straight, resumed)]
    assert scores[0] == scores[1] and scores[0]["eval/margin"] != 0


def test_prompts_are_shared_with_the_policy_only_where_only_it_was_tried(tmp_path, monkeypatch):
    """Another family's cache may not serve, and its scores would be wrong in silence."""
    asked, honest = [], dpo.score_pairs

    def spy(model, tokenizer, pairs, share, *rest):
        asked.append(share)
        return honest(model, tokenizer, pairs, share, *rest)

    monkeypatch.setattr(dpo, "score_pairs", spy)
    flags = {"steps": 1, "data": few_pairs(tmp_path, 16), "pairs_per_step": 16}
    run(tmp_path, "own", **flags)
    run(tmp_path, "other", reference=dpo.Args.model, **flags)
    assert asked == [True, False]


def test_a_signal_while_the_reference_scores_keeps_what_it_has_scored(tmp_path, monkeypatch):
    flags = SMALL | {"data": few_pairs(tmp_path), "schedule": "constant"}
    straight = run(tmp_path, "a", steps=2, **flags)
    with (
        monkeypatch.context() as patch,
        pytest.raises(
            SystemExit,
            match="(?s)stopped by a signal while.*start again in this folder with.*--resume",
        ),
    ):
        patch.setattr(common, "catch_signals", lambda steps: lambda: True)
        run(tmp_path, "b", steps=2, **flags)
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "score_pairs", lambda *a: 1 / 0)  # nobody is asked again
        again = run(tmp_path, "b", steps=2, resume=True, **flags)
    assert again[-1]["loss"] == straight[-1]["loss"]


def test_before_a_step_was_made_another_reference_scores_anew(tmp_path, monkeypatch):
    """Without a checkpoint a run may be resumed with other flags, and the old reference's scores are not those of the new."""
    torch.manual_seed(0)
    other = common.load_policy(
        dpo.Args.model, common.World(0, 1, torch.device("cpu"), torch.float32)
    )
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn_like(p))
    common.save_model(
        other, common.load_tokenizer(dpo.Args.model), tmp_path / "other", common.start("cpu")
    )
    flags = SMALL | {"data": few_pairs(tmp_path), "schedule": "constant"}
    wanted = run(tmp_path, "a", steps=1, reference=str(tmp_path / "other"), **flags)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common, "catch_signals", lambda steps: lambda: True)
        run(tmp_path, "b", steps=1, **flags)
    got = run(tmp_path, "b", steps=1, reference=str(tmp_path / "other"), resume=True, **flags)
    assert got[-1]["loss"] == wanted[-1]["loss"] != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("rate, loud", [(3e-3, True), (1e-5, False)])
def test_chosen_answers_that_become_unlikely_are_told_of(rate, loud, tmp_path, monkeypatch, capsys):
    """The pairs' loss looks perfect meanwhile."""
    monkeypatch.setattr(common.tqdm, "write", print)
    run(
        tmp_path,
        steps=30,
        data=few_pairs(tmp_path, 16),
        pairs_per_step=16,
        learning_rate=rate,
        warmup=0,
    )
    assert capsys.readouterr().out.count("even chosen answers are") == loud


def test_the_fall_that_is_told_of_is_that_of_chosen_sides_in_nats_a_token():
    model, tokenizer, meter = family("llama"), make_tokenizer(), common.Meter()
    ref = torch.tensor([[-9.0, -4.0], [-30.0, -3.0], [-5.0, -20.0], [-5.0, -9.0]])
    logprobs = pair_logprobs(model, tokenizer, PAIRS, False, CPU).tolist()
    dpo.update_loss(model, tokenizer, PAIRS, ref, False, args(), CPU, meter)
    falls = []
    for (_, chosen, _), before, now in zip(PAIRS, ref.tolist(), logprobs):
        falls.append((before[0] - now[0]) / len(chosen))
    assert meter.result(CPU)["lost"] == pytest.approx(sum(falls) / len(falls), rel=1e-4)


def test_the_speed_is_that_of_both_sides_each_with_its_prompt(tmp_path, monkeypatch):
    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr(dpo, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    data = few_pairs(tmp_path, 6)
    log = run(tmp_path, data=data, steps=1, pairs_per_step=6)
    rows = [json.loads(line) for line in open(data)]
    tokens = sum(len(row["prompt"] + row[k]) + 1 for row in rows for k in ("chosen", "rejected"))
    assert (log[1]["time/train"], log[1]["tokens_per_second"]) == (2.0, tokens / 2)


def test_samples_of_held_out_prompts_can_be_read(tmp_path):
    rows = [{"prompt": "52817=", "answer": "12578"}, {"prompt": "31=", "answer": "13"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = {"eval_prompts": f"{tmp_path}/prompts.jsonl", "eval_every": 1}
    run(tmp_path, steps=1, data=few_pairs(tmp_path, 16), pairs_per_step=16, **flags)
    shown = [
        json.loads(line)
        for line in (tmp_path / "run" / "eval_samples.jsonl").read_text().splitlines()
    ]
    assert [(x["step"], x["prompt"]) for x in shown] == [
        (s, p) for s in (0, 1) for p in ("52817=", "31=")
    ]
    assert all(x["reward"] in (0.0, 1.0) and x["completion"] for x in shown)


def test_only_pairs_that_the_run_visits_are_scored_by_the_reference(tmp_path, monkeypatch):
    seen, honest = [], dpo.score_pairs

    def count(model, tokenizer, pairs, *rest):
        seen.append(len(pairs))
        return honest(model, tokenizer, pairs, *rest)

    monkeypatch.setattr(dpo, "score_pairs", count)
    flags = SMALL | {"data": few_pairs(tmp_path), "schedule": "constant", "save_every": 2}
    run(tmp_path, steps=2, **flags)
    assert seen == [16]
    m = run(tmp_path, steps=4, resume=True, **flags)
    assert seen == [16, 16] and all(math.isfinite(row["loss"]) for row in m[1:])


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"beta": 0.0}, "--beta 0.0: must be above 0"),
        ({"label_smoothing": 0.5}, "--label_smoothing 0.5: must be from 0 to below 0.5"),
        (
            {"label_smoothing": 0.1, "loss": "ipo"},
            "--label_smoothing acts with --loss sigmoid only",
        ),
        ({"sft_coef": -1.0}, "--sft_coef -1.0: must be 0 or more"),
        ({"resume": True, "steps": 0}, "--steps 0 evaluates a model"),
        ({"steps": 0}, "name a file by --eval_data or --eval_prompts"),
        (
            {"steps": 0, "eval_data": str(dpo.TINY / "pairs_test.jsonl")},
            "compares --model with itself",
        ),
        ({"eval_data": "held_out.jsonl"}, "needs --data: the bundled data is for the bundled"),
        ({"simpo_margin": math.inf}, "--simpo_margin inf: must be finite"),
        ({"data": "no_such.jsonl"}, "--data no_such.jsonl"),
        ({"max_tokens": 3}, "no pair is left"),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, **flags)
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and words in error
        and error.count("\n") == 1
        and not (tmp_path / "run").exists()
    )


def test_a_reference_has_the_same_tokens_and_its_context_is_a_limit(tmp_path, capsys):
    family("llama").save_pretrained(tmp_path / "words")
    make_tokenizer().save_pretrained(tmp_path / "words")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, reference=str(tmp_path / "words"))
    assert stop.value.code == 2 and not (tmp_path / "run").exists()
    assert "/words: has other tokens than --model" in capsys.readouterr().err

    tokenizer = common.load_tokenizer(dpo.Args.model)
    size = common.read_config(dpo.Args.model).vocab_size
    short = family("llama", vocab_size=size, max_position_embeddings=20)
    short.save_pretrained(tmp_path / "short")
    tokenizer.save_pretrained(tmp_path / "short")
    flags = SMALL | {"steps": 1, "data": few_pairs(tmp_path)}
    run(tmp_path, reference=str(tmp_path / "short"), **flags)
    assert "--max_tokens 1024 is lowered to 20" in capsys.readouterr().out


def test_held_out_prompts_are_sampled_for(tmp_path):
    prompts = (dpo.TINY / "sort_test.jsonl").read_text().splitlines()[:64]
    (tmp_path / "p.jsonl").write_text("\n".join(prompts))
    m = run(
        tmp_path, steps=1, data=few_pairs(tmp_path), eval_prompts=str(tmp_path / "p.jsonl"), **SMALL
    )
    assert 0 < m[0]["eval/exact"] < 1 and "eval/exact" in m[-1] and "eval/accuracy" not in m[-1]


def test_a_run_with_a_dated_thinking_template_goes_on_the_next_day(tmp_path, monkeypatch):
    """The reference's scores are of the first day's prompts, and a resumed run must not read others:
    a template that prints the date prints a fixed one. The sides of a pair begin with the empty thought that the template gives a given
    answer."""
    template = (
        "{{ strftime_now('w%d') }} {% for m in messages %}{{ m.content if m.role == 'user' else '<think> ' + m.content }} "
        "<eos> {% endfor %}{{ '<think> ' if add_generation_prompt and off is defined else '' }}"
    )
    tokenizer = make_tokenizer(template=template)
    tokenizer.add_tokens(["<think>"])
    think = tokenizer.convert_tokens_to_ids("<think>")
    family("llama", vocab_size=60).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "w5", "chosen": "w6", "rejected": "w7"}] * 4
    honest = dpo.encode_preferences
    seen = []

    def watch(*given):
        seen.append(honest(*given)[0])
        return honest(*given)

    monkeypatch.setattr(dpo, "encode_preferences", watch)
    flags = {"model": str(tmp_path / "base"), "data": prompts_file(tmp_path, rows)}
    flags |= {"pairs_per_step": 4, "learning_rate": 1e-4}
    monkeypatch.setattr(common, "DATE", common.DATE.replace(day=11))
    run(tmp_path, steps=1, **flags)
    tomorrow = types.SimpleNamespace(now=lambda: datetime.datetime(2001, 1, 12))
    monkeypatch.setattr(chat_template_utils, "datetime", tomorrow)
    run(tmp_path, steps=2, resume=True, **flags)
    run(tmp_path, "off", steps=1, template_args='{"off": true}', **flags)
    asked, chosen, rejected = [11, 5, 1], [think, 6, 1], [think, 7, 1]
    assert seen == [(asked, chosen, rejected)] * 2 + [([11, 5, 1, think], [6, 1], [7, 1])]


def test_the_bundled_model_alone_is_only_sampled_from():
    """With --steps 0 and no reference every margin is 0, so no pairs are held out; simpo needs none."""
    alone = args(steps=0)
    assert alone.eval_data == "" and alone.eval_prompts.endswith("sort_test.jsonl")
    for flags in ({"loss": "simpo"}, {"reference": "another"}):
        assert args(steps=0, **flags).eval_data.endswith("pairs_test.jsonl")
    assert args().eval_data.endswith("pairs_test.jsonl")
