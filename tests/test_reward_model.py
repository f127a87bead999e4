"""The reward model: Bradley-Terry's loss, where the score is read, what is saved, and best-of-N against brute force."""

import copy
import inspect
import itertools
import json
import math
import random
import statistics
import types

import pytest
import torch
import transformers
from conftest import family, load_scorer, make_tokenizer

import common
import reward_model
from common import World
from reward_model import (
    best_of,
    encode_pairs,
    micro_batches_of_pairs,
    pair_loss,
    pair_metrics,
    pair_scores,
    read_pairs,
)

CPU = World(0, 1, torch.device("cpu"), torch.float32)


# --- the loss ---


def test_the_loss_is_log_2_where_the_model_cannot_tell_and_falls_with_the_difference():
    zero = torch.zeros(3)
    assert abs(pair_loss(zero, zero, zero, 3, 0.0).item() - math.log(2)) < 1e-6
    c, r, m = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]), torch.tensor([0.0, 0.5])
    by_hand = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(4.5))) / 2
    assert abs(pair_loss(c, r, m, 2, 0.0).item() - by_hand) < 1e-6
    assert abs(pair_loss(c, r, m, 2, 0.1).item() - by_hand - 0.1 * (2.5**2 + 2.0**2) / 2) < 1e-6


def test_the_gradient_raises_chosen_lowers_rejected_and_sees_only_the_difference():
    c, r = (
        torch.tensor([0.3, 5.0], requires_grad=True),
        torch.tensor([0.1, -5.0], requires_grad=True),
    )
    pair_loss(c, r, torch.zeros(2), 2, 0.0).backward()
    assert (c.grad < 0).all() and torch.equal(c.grad, -r.grad) and c.grad[0] < 100 * c.grad[1], (
        "a sure pair teaches little"
    )


def test_scores_beyond_floating_point_stay_finite():
    c = torch.tensor([-1e4], requires_grad=True)
    loss = pair_loss(c, torch.tensor([1e4]), torch.zeros(1), 1, 0.0)
    loss.backward()
    assert loss.item() == 2e4 and c.grad.item() == -1


# --- best of N ---


def test_best_of_n_against_every_choice_of_n():
    """For every subset of n of the M samples the true value of its best; with ties all that tie count alike."""
    scores = torch.tensor(
        [[0.3, 0.1, 0.9, 0.9, -1.0], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float64
    )
    values = torch.tensor(
        [[1.0, 5.0, 2.0, 3.0, 7.0], [1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64
    )
    for n in range(1, 6):
        wanted = []
        for s, v in zip(scores.tolist(), values.tolist()):
            picks = []
            for chosen in itertools.combinations(range(5), n):
                top = [i for i in chosen if s[i] == max(s[j] for j in chosen)]
                picks.append(sum(v[i] for i in top) / len(top))
            wanted.append(sum(picks) / len(picks))
        torch.testing.assert_close(
            best_of(scores, values, n), torch.tensor(wanted, dtype=torch.float64)
        )


def test_the_best_of_one_is_the_mean_and_the_score_rises_with_n():
    scores = torch.rand(4, 16, dtype=torch.float64)
    torch.testing.assert_close(best_of(scores, scores, 1), scores.mean(1))
    torch.testing.assert_close(best_of(scores, scores, 16), scores.amax(1))
    rising = torch.stack([best_of(scores, scores, n) for n in range(1, 17)])
    assert (rising.diff(dim=0) > 0).all()


def test_the_bound_on_the_kl_holds_for_a_policy_one_can_enumerate():
    """Best of n of a uniform policy over k outcomes of distinct scores: P(i) = (i^n - (i-1)^n) / k^n."""
    for k, n in ((4, 2), (50, 4), (1000, 16)):
        p = [(i**n - (i - 1) ** n) / k**n for i in range(1, k + 1)]
        kl = sum(x * math.log(x * k) for x in p if x)
        assert 0 < kl <= math.log(n) - (n - 1) / n


# --- metrics ---


def test_metrics_by_hand():
    chosen = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    rejected = torch.tensor([0.0, 1.0, 2.0, -0.5], dtype=torch.float64)
    m = pair_metrics(chosen, rejected, torch.tensor([3, -2, 0, 1]))
    assert m["eval/accuracy"] == 0.625 and m["eval/margin"] == 0.25, "a tie counts half"
    assert m["eval/accuracy_longer"] == 1.0 and m["eval/accuracy_shorter"] == 0.0
    # |margin| 1 three times, predicted 0.731, won twice; |margin| 0 once, predicted 0.5, won half
    assert abs(m["eval/calibration"] - 0.75 * abs(1 / (1 + math.exp(-1)) - 2 / 3)) < 1e-9


@pytest.mark.parametrize("sign, there", [(1, {"longer"}), (-1, {"shorter"}), (0, set())])
def test_an_accuracy_of_no_pairs_is_not_reported(sign, there):
    gap = torch.tensor([1.0, -2.0, 3.0])
    metrics = reward_model.pair_metrics(gap, torch.zeros(3), sign * torch.tensor([1, 5, 2]))
    assert {k.split("_")[1] for k in metrics if "accuracy_" in k} == there
    assert all(math.isfinite(value) for value in metrics.values())


def test_a_calibrated_model_is_found_to_be_so():
    g = torch.Generator().manual_seed(0)
    margin = 2 * torch.randn(200_000, generator=g, dtype=torch.float64)
    won = torch.rand(200_000, generator=g, dtype=torch.float64) < margin.sigmoid()
    sign = torch.where(won, 1.0, -1.0)
    good = pair_metrics(margin * sign, 0 * margin, margin * 0)["eval/calibration"]
    sure = pair_metrics(3 * margin * sign, 0 * margin, margin * 0)["eval/calibration"]
    assert good < 0.01 < 0.05 < sure


# --- pairs ---


def pairs_file(tmp_path, rows):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(tmp_path / "pairs.jsonl")


def test_pairs_may_be_texts_or_messages_with_the_prompt_in_them(tmp_path):
    user = {"role": "user", "content": "w5"}
    said = [{"role": "assistant", "content": "w6"}], [{"role": "assistant", "content": "w7"}]
    rows = [
        {"prompt": "w5", "chosen": "w6", "rejected": "w7"},
        {"prompt": [user], "chosen": said[0], "rejected": said[1]},
        {"chosen": [user, *said[0]], "rejected": [user, *said[1]]},
        {"prompt": "w5", "chosen": [user, *said[0]], "rejected": [user, *said[1]]},
    ]
    read = read_pairs(pairs_file(tmp_path, rows), "--data")
    tokenizer = make_tokenizer()
    ids = {tuple(common.encode_answer(tokenizer, r["prompt"], r["chosen"])) for r in read}
    assert ids == {(5, 6, 1)} and {r["rejected"] for r in read} == {"w7"}


def test_equal_and_long_pairs_are_left_out_and_counted(tmp_path, capsys):
    rows = [{"prompt": "w5", "chosen": "w6", "rejected": x} for x in ("w7", "w6", "w7 w8 w9 w10")]
    args = reward_model.Args(max_tokens=4)
    kept, records = encode_pairs(
        read_pairs(pairs_file(tmp_path, rows), "--data"), make_tokenizer(), args, "--data"
    )
    assert len(kept) == 1 and records[0]["rejected"] == "w7"
    assert "of 3 pairs 1 left out as equal, 1 as over --max_tokens 4" in capsys.readouterr().out


def test_a_pair_as_long_as_may_be_is_kept():
    rows = [{"prompt": "w5", "chosen": "w6 w7", "rejected": "w8"}]
    kept, _ = encode_pairs(rows, make_tokenizer(), reward_model.Args(max_tokens=4), "--data")
    assert kept == [([5], [6, 7, 1], [8, 1])]
    with pytest.raises(SystemExit):
        encode_pairs(rows, make_tokenizer(), reward_model.Args(max_tokens=3), "--data")


def test_what_both_sides_begin_with_is_split_off_and_each_keeps_a_token(tmp_path):
    """The prompt, and sometimes more. A side that is the beginning of the other has its last token left."""
    sides = [("w6 w7", "w8"), ("w6 w7", "w6 w8 w9"), ("w6 w7 <eos>", "w6 w7 <eos> w8")]
    rows = [{"prompt": "w5", "chosen": c, "rejected": r} for c, r in sides]
    read = read_pairs(pairs_file(tmp_path, rows), "--data")
    pairs, records = encode_pairs(read, make_tokenizer(), reward_model.Args(), "--data")
    assert records == read
    assert pairs == [
        ([5], [6, 7, 1], [8, 1]),
        ([5, 6], [7, 1], [8, 9, 1]),
        ([5, 6, 7], [1], [1, 8, 1]),
    ]


@pytest.mark.parametrize("tokens", [1, 20, 60, 10_000])
def test_micro_batches_hold_every_pair_once_and_keep_to_the_budget(tokens):
    pairs = pairs_of(20)
    for share in (False, True):
        parts = micro_batches_of_pairs(pairs, share, tokens, CPU)
        assert sorted(i for p in parts for i in p) == list(range(20))
        for part in parts:
            prompt = max(len(pairs[i][0]) for i in part) * (1 if share else 2)
            answer = max(len(x) for i in part for x in pairs[i][1:])
            assert len(part) == 1 or len(part) * (prompt + 2 * answer) <= tokens


# --- the model ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    family("llama").save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    return out


def pairs_of(n=6):
    g = torch.Generator().manual_seed(0)

    def text():
        size = int(torch.randint(2, 9, (1,), generator=g))
        return torch.randint(3, 48, (size,), generator=g).tolist() + [1]

    return [([5, 6, 7], text(), text()) for _ in range(n)]


@pytest.mark.parametrize("share", [False, True])
def test_the_score_is_read_at_the_last_real_token_whatever_the_padding(share, folder):
    """Alone, in a batch with longer texts, and where a text ends in the pad id itself, which transformers' pooling skips."""
    tokenizer = make_tokenizer()
    model = common.load_scalar(folder, CPU, tokenizer, 0.2).eval()
    pairs = [*pairs_of(), ([5], [6, 0], [8, 9, 10, 11, 12, 13, 14, 15])]
    chosen, rejected = pair_scores(model, tokenizer, pairs, share, CPU).T
    for i, pair in enumerate(pairs):
        alone = pair_scores(model, tokenizer, [pair], share, CPU)[0]
        assert (
            abs(alone[0].item() - chosen[i].item()) < 1e-5
            and abs(alone[1].item() - rejected[i].item()) < 1e-5
        )
    # by hand: the trunk's last state times the head
    with torch.no_grad():
        state = model.model(input_ids=torch.tensor([[5, 6, 0]])).last_hidden_state[0, -1]
    assert abs((model.score.weight @ state).item() - chosen[-1].item()) < 1e-5
    pooled = model(input_ids=torch.tensor([[5, 6, 0]])).logits.item()
    assert abs(pooled - chosen[-1].item()) > 1e-3, (
        "the pooling by pad id would have scored another token"
    )


def test_a_process_with_few_texts_scores_them_in_as_many_rounds_as_the_one_with_most(
    folder, monkeypatch
):
    """Sharded weights are gathered by all or by none. Its scores are of its own texts, each once."""
    tokenizer = make_tokenizer()
    model = common.load_scalar(folder, CPU, tokenizer, 0.2).eval()
    texts = [[5, 6, 1], [7, 8, 9, 1], [10, 1]]
    alone = common.score_ids(model, tokenizer, texts, CPU)
    rounds = []
    model.register_forward_pre_hook(lambda *given: rounds.append(1))
    other = torch.tensor([[130, 9]])  # texts, and the tokens of the longest
    monkeypatch.setattr(common, "all_gather", lambda world, mine: torch.cat([mine, other]))
    assert common.score_ids(model, tokenizer, texts, CPU) == pytest.approx(alone, abs=1e-6)
    assert len(rounds) == 3, "64 texts in each"


@pytest.mark.parametrize("steps", [1, 0])
def test_held_out_scores_that_are_not_finite_stop_a_run(steps, folder):
    tokenizer = make_tokenizer()
    model = common.load_scalar(folder, CPU, tokenizer, 0.2)
    torch.nn.init.constant_(model.score.weight, math.nan)
    args = reward_model.Args(steps=steps, tokens_per_micro_batch=60)
    with pytest.raises(common.Stop, match="a score that is not finite"):
        reward_model.score_all(model, tokenizer, pairs_of(), False, args, CPU)


def test_completions_for_best_of_n_are_short_enough_for_a_model_that_reads_more_of_a_prompt(
    folder, tmp_path
):
    """Its template writes more than the policy's prompt has, which has none."""
    template = "w30 w31 {% for m in messages %}{{ m.role[0] == 'u' and 'w10' or 'w11' }} {{ m.content }} <eos> {% endfor %}"
    tokenizer = make_tokenizer(template=template)
    judge = common.load_scalar(folder, CPU, tokenizer, 0.2)
    judge.config.max_position_embeddings = 20
    common.save_model(judge, tokenizer, tmp_path / "judge", CPU)
    (tmp_path / "asked.jsonl").write_text('{"prompt": "w5 w6 w7"}\n')
    files = {"model": str(tmp_path / "judge"), "policy": str(folder)}
    tokenizer = common.load_tokenizer(files["model"])
    args = reward_model.Args(**files, eval_prompts=str(tmp_path / "asked.jsonl"))
    args, _, prompts, _ = reward_model.load_best_of(args, tokenizer, CPU)
    longest = " ".join(["w9"] * args.max_new_tokens)
    assert prompts[0][0] == [5, 6, 7]
    assert len(common.encode_answer(tokenizer, "w5 w6 w7", longest)) == 20


@pytest.mark.parametrize("tokens", [30, 60])
def test_the_gradient_is_the_same_however_the_step_is_cut(tokens, folder):
    tokenizer, grads = make_tokenizer(), []
    pairs = pairs_of()
    torch.manual_seed(0)
    model = common.load_scalar(folder, CPU, tokenizer, 0.2)
    for budget, share in ((10_000, False), (tokens, False), (tokens, True)):
        model.zero_grad()
        for part in micro_batches_of_pairs(pairs, share, budget, CPU):
            c, r = pair_scores(model, tokenizer, [pairs[i] for i in part], share, CPU).T
            pair_loss(c, r, 0.1 * torch.tensor(part), 6, 0.01).backward()
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert all((grads[0] - g).norm() < 1e-5 * grads[0].norm() for g in grads[1:])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "mistral", "gemma2", "phi3"])
def test_scores_of_every_family_agree_with_transformers_pipeline_saved_and_loaded(name, tmp_path):
    """To 1e-5, in any company; with a tokenizer whose pad was its EOS."""
    family(name).save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer(pad="<eos>")
    common.own_pad(tokenizer)
    torch.manual_seed(0)
    model = common.load_scalar(tmp_path / "base", CPU, tokenizer, 0.2)
    pairs = pairs_of()
    chosen, rejected = pair_scores(model, tokenizer, pairs, False, CPU).T.tolist()
    assert common.prompts_can_be_shared(model, CPU, False)
    shared = pair_scores(model, tokenizer, pairs, True, CPU).T.tolist()
    assert shared[0] == pytest.approx(chosen, abs=1e-5) and shared[1] == pytest.approx(
        rejected, abs=1e-5
    )
    common.save_model(model, tokenizer, tmp_path / "model", CPU)
    # the class is named, because AutoTokenizer would read these words with the class that goes with the family's own vocabulary
    read = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    assert read.pad_token_id != read.eos_token_id
    pipe = transformers.pipeline("text-classification", str(tmp_path / "model"), tokenizer=read)
    texts = [tokenizer.decode(start + c) for start, c, _ in pairs]
    assert [x["score"] for x in pipe(texts)] == pytest.approx(chosen, abs=1e-5)
    assert [x["score"] for x in pipe(texts, batch_size=6)] == pytest.approx(chosen, abs=1e-5)


def test_a_family_without_a_classifier_gets_a_sentence(tmp_path, capsys):
    family("mamba").save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        common.load_scalar(tmp_path, CPU, make_tokenizer(), 0.2)
    assert "no sequence classifier for the family 'mamba'" in capsys.readouterr().err


TEMPLATE = "{% for m in messages %}w40 {{ m.content }} w41 {% endfor %}{% if add_generation_prompt %}w42{% endif %}"


def test_with_a_template_whole_conversations_are_rendered_and_no_second_bos_is_put_before(tmp_path):
    tokenizer = make_tokenizer(bos="<bos>", template="<bos> " + TEMPLATE)
    ids = common.encode_answer(tokenizer, [{"role": "user", "content": "w5"}], "w6")
    assert ids == [2, 40, 5, 41, 40, 6, 41] and common.encode_answer(tokenizer, "w5", "w6") == ids
    raw = make_tokenizer(bos="<bos>")
    assert common.encode_answer(raw, "w5", "w6") == [2, 5, 6, 1], (
        "without one: prompt and answer, ended by EOS"
    )


def test_without_the_template_the_result_has_none(tmp_path, folder):
    family("llama").save_pretrained(tmp_path / "base")
    make_tokenizer(template=TEMPLATE).save_pretrained(tmp_path / "base")
    data = pairs_file(tmp_path, [{"prompt": "w5", "chosen": "w6", "rejected": "w7"}])
    for chat, there in ((True, True), (False, False)):
        run(
            tmp_path,
            f"{chat}",
            model=str(tmp_path / "base"),
            data=data,
            steps=1,
            pairs_per_step=1,
            chat=chat,
        )
        assert (
            bool(common.load_tokenizer(str(tmp_path / f"{chat}" / "model")).chat_template) == there
        )


def test_a_classifier_with_two_labels_is_refused(tmp_path, capsys):
    config = transformers.LlamaConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=48,
        num_labels=2,
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        common.load_scalar(tmp_path, CPU, make_tokenizer())
    assert "has 2 labels; a reward model has one" in capsys.readouterr().err


def test_starts_longer_than_a_sliding_window_are_shared_rightly(tmp_path):
    family("mistral").save_pretrained(tmp_path)  # its window is 8
    model, start = common.load_scalar(tmp_path, CPU, make_tokenizer(), 0.2), list(range(3, 23))
    pairs = [(start, c, r) for _, c, r in pairs_of()]
    assert common.prompts_can_be_shared(model, CPU, False)
    plain, shared = (
        pair_scores(model, make_tokenizer(), pairs, share, CPU) for share in (False, True)
    )
    torch.testing.assert_close(plain, shared, atol=1e-5, rtol=1e-5)


def test_a_pad_token_that_is_eos_gets_one_of_its_own(tmp_path, folder):
    """With pad == EOS transformers would score the token before the end."""
    tokenizer = make_tokenizer(pad="<eos>")
    common.own_pad(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer.pad_token == "<|pad|>"
    model = common.load_scalar(folder, CPU, tokenizer, 0.2)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 49
    common.save_model(model, tokenizer, tmp_path / "model", CPU)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert again.config.pad_token_id == 48 and again.config.vocab_size == 49
    kept = make_tokenizer()
    common.own_pad(kept)
    assert kept.pad_token == "<pad>"


# --- whole runs, on the bundled model ---


def run(tmp_path, name="run", **flags):
    flags = {
        "out": str(tmp_path / name),
        "device": "cpu",
        "eval_data": "",
        "policy": "",
        "eval_prompts": "",
        "data": str(reward_model.TINY / "pairs_train.jsonl"),
        "pairs_per_step": 8,
        "seed": 1,
    } | flags
    reward_model.train(reward_model.Args(**flags))
    return [
        json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]


def few(tmp_path, name, count):
    lines = (reward_model.TINY / name).read_text().splitlines()[:count]
    (tmp_path / name).write_text("\n".join(lines))
    return str(tmp_path / name)


def test_a_saved_model_scores_the_same_by_every_way(tmp_path):
    """Field notes, test 11: our scorer on the saved folder, plain transformers, and its pipeline agree with the model trained."""
    run(tmp_path, steps=2)
    tokenizer = common.load_tokenizer(str(tmp_path / "run" / "model"))
    rows = [{"prompt": "52817="}, {"prompt": "31="}, {"prompt": "9074391="}]
    texts = ["12578", "13", "0134799"]
    reward = load_scorer(str(tmp_path / "run" / "model"), CPU)
    ours = reward(texts, rows)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "model"
    ).eval()
    assert plain.config.num_labels == 1 and plain.config.problem_type == "regression"
    assert plain.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    pipe = transformers.pipeline("text-classification", str(tmp_path / "run" / "model"))
    for score, text, row in zip(ours, texts, rows):
        with torch.no_grad():
            alone = plain(
                input_ids=torch.tensor([common.encode_answer(tokenizer, row["prompt"], text)])
            ).logits.item()
        piped = pipe(row["prompt"] + text + tokenizer.eos_token)[0]["score"]
        assert abs(alone - score) < 1e-5 and abs(piped - score) < 1e-5


def test_scores_have_unit_spread_at_the_end_and_the_order_they_had(tmp_path):
    data = few(tmp_path, "pairs_train.jsonl", 64)
    run(tmp_path, "scaled", steps=8, data=data)
    run(tmp_path, "raw", steps=8, data=data, unit_scale=False)
    _, rows = encode_pairs(
        read_pairs(data, "--data"),
        common.load_tokenizer(reward_model.Args.model),
        reward_model.Args(max_tokens=32),
        "",
    )
    texts = [r[side] for r in rows for side in ("chosen", "rejected")]
    doubled = [r for r in rows for _ in range(2)]
    scaled, raw = (
        torch.tensor(load_scorer(str(tmp_path / n / "model"), CPU)(texts, doubled))
        for n in ("scaled", "raw")
    )
    assert abs(scaled.std(unbiased=False).item() - 1) < 1e-3 < abs(raw.std().item() - 1)
    torch.testing.assert_close(scaled / scaled.std(), raw / raw.std(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("where", ["data", "eval_data"])
def test_pairs_whose_sides_have_no_beginning_in_common_are_scored_as_ever(
    where, folder, tmp_path, monkeypatch
):
    """An empty beginning, computed once, would be a forward of no tokens."""
    rows = [{"prompt": "w5 w9", "chosen": "w6 w7", "rejected": x} for x in ("w8", "w7 w8 w9")]
    apart = {"prompt": " ", "chosen": "w6", "rejected": "w7 w8"}
    files = {"data": tmp_path / "data.jsonl", "eval_data": tmp_path / "eval_data.jsonl"}
    for name, path in files.items():
        mine = [*rows, apart] if name == where else rows
        path.write_text("".join(json.dumps(row) + "\n" for row in mine))
    flags = {name: str(path) for name, path in files.items()} | {"model": str(folder), "steps": 1}
    flags |= {"pairs_per_step": 6, "learning_rate": 1e-3, "unit_scale": False}
    flags |= {"tokens_per_micro_batch": 1}  # each pair is a forward of its own
    log = run(tmp_path, "shared", **flags)
    monkeypatch.setattr(common, "prompts_can_be_shared", lambda *given: False)
    wanted = run(tmp_path, "apart", **flags)
    for name in ("loss", "margin", "chosen", "grad_norm", "eval/margin", "eval/loss"):
        assert log[1][name] == pytest.approx(wanted[1][name], rel=1e-4), name


def test_before_the_scale_is_found_the_model_is_written(tmp_path, monkeypatch):
    """It may be a long wait, and somebody may end it. Short runs find it on few pairs."""
    honest = reward_model.score_all
    monkeypatch.setattr(reward_model, "evaluate", lambda *given: {})

    def stopped(model, tokenizer, pairs, *rest):
        assert len(pairs) == 2 * 8
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
        raise common.Ended("stopped")

    monkeypatch.setattr(reward_model, "score_all", stopped)
    with pytest.raises(SystemExit, match="stopped"):
        run(tmp_path, steps=2)
    raw = load_scorer(str(tmp_path / "run" / "model"), CPU)(["25"], [{"prompt": "52="}])
    monkeypatch.setattr(reward_model, "score_all", honest)
    scale = run(tmp_path, steps=2, resume=True)[-1]["scale/spread"]
    found = load_scorer(str(tmp_path / "run" / "model"), CPU)(["25"], [{"prompt": "52="}])
    assert scale * found[0] == pytest.approx(raw[0], rel=1e-4)


def test_a_head_with_a_bias_gets_scores_of_mean_0_and_spread_1(folder):
    tokenizer, pairs = make_tokenizer(), pairs_of()
    args = reward_model.Args(tokens_per_micro_batch=60)
    model = common.load_scalar(folder, CPU, tokenizer, 0.2)
    head = torch.nn.Linear(32, 1)
    torch.nn.init.constant_(head.bias, 3.0)
    model.score = head
    before = reward_model.score_all(model, tokenizer, pairs, False, args, CPU)
    found = reward_model.fold_scale(model, tokenizer, pairs, False, args, CPU)
    after = reward_model.score_all(model, tokenizer, pairs, False, args, CPU)
    mean, spread = before.mean().item(), before.std(unbiased=False).item()
    assert found == pytest.approx({"scale/mean": mean, "scale/spread": spread})
    torch.testing.assert_close(after, (before - mean) / spread, atol=1e-5, rtol=1e-5)


def test_resuming_equals_never_having_stopped(tmp_path):
    flags = {"eval_data": few(tmp_path, "pairs_test.jsonl", 40), "eval_every": 2}
    straight = run(tmp_path, "a", steps=4, **flags)
    run(tmp_path, "b", steps=2, **flags)
    resumed = run(tmp_path, "b", steps=4, resume=True, **flags)
    clocks = ("time/train", "tokens_per_second", "memory_gib")
    assert [{k: v for k, v in m.items() if k not in clocks} for m in resumed] == [
        {k: v for k, v in m.items() if k not in clocks} for m in straight
    ]
    a, b = (
        transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / n / "model"
        ).state_dict()
        for n in ("a", "b")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_model_reports_best_of_n_without_training(tmp_path):
    run(tmp_path, "rm", steps=1)
    flags = {
        "policy": str(reward_model.TINY / "model"),
        "eval_prompts": few(tmp_path, "sort_test.jsonl", 16),
    }
    m = run(
        tmp_path,
        "bon",
        model=str(tmp_path / "rm" / "model"),
        steps=0,
        best_of=(1, 4),
        max_new_tokens=12,
        **flags,
    )[-1]
    assert m["best_of/score@1"] < m["best_of/score@4"] and 0 <= m["best_of/true@1"] <= 1
    assert m["best_of/kl@1"] == 0 and abs(m["best_of/kl@4"] - (math.log(4) - 0.75)) < 1e-12
    assert not (tmp_path / "bon" / "model").exists()


@pytest.mark.parametrize(
    "flags, rows, words",
    [
        ({}, [{"prompt": "5=", "chosen": "5"}], 'line 1: needs "rejected"'),
        ({}, [{"prompt": "5=", "chosen": "5", "rejected": "5"}], "no pair is left"),
        (
            {"use_margin": True},
            [{"prompt": "5=", "chosen": "5", "rejected": "6"}],
            '--use_margin needs a "margin"',
        ),
        ({"max_tokens": 2}, [{"prompt": "5=", "chosen": "5", "rejected": "6"}], "no pair is left"),
        (
            {},
            [
                {
                    "chosen": [
                        {"role": "user", "content": "5="},
                        {"role": "assistant", "content": "5"},
                    ],
                    "rejected": [
                        {"role": "user", "content": "6="},
                        {"role": "assistant", "content": "5"},
                    ],
                }
            ],
            "the prompt is not what the messages before the answer say",
        ),
        ({"temperature": 0.0}, [], "--temperature 0.0: must be above 0"),
        (
            {"steps": 0, "eval_data": "", "data": ""},
            [],
            "--steps 0 evaluates; name a file by --eval_data or --eval_prompts",
        ),
        (
            {"steps": 0, "eval_data": "tests/tiny/pairs_test.jsonl"},
            [{"prompt": "5=", "chosen": "5", "rejected": "6"}],
            "is no reward model yet",
        ),
        ({"policy": "tests", "eval_prompts": ""}, [], "both are needed"),
        ({"pairs_per_step": 0}, [], "must be 1 or more"),
    ],
)
def test_a_mistake_is_one_line(flags, rows, words, tmp_path, capsys):
    data = pairs_file(tmp_path, rows)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, **{"data": data} | flags)
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and words in error
        and error.count("\n") == 1
        and not (tmp_path / "run").exists()
    )


def test_a_signal_in_best_of_n_leaves_a_saved_model_and_can_be_gone_on_from(tmp_path, monkeypatch):
    flags = {
        "policy": str(reward_model.TINY / "model"),
        "eval_prompts": few(tmp_path, "sort_test.jsonl", 4),
        "best_of": (1, 2),
    }
    flags |= {
        "steps": 1,
        "data": few(tmp_path, "pairs_train.jsonl", 8),
        "pairs_per_step": 8,
        "max_new_tokens": 6,
    }
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match="(?s)stopped by a signal in best-of-N.*--resume"),
    ):
        patch.setattr(common, "catch_signals", lambda steps: lambda: True)
        run(tmp_path, **flags)
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert "best_of/true@2" in run(tmp_path, resume=True, **flags)[-1]


HAND = [
    {"prompt": "52817=", "chosen": "12578", "rejected": "1", "margin": 0.3},
    {"prompt": "31=", "chosen": "13", "rejected": "3113", "margin": 0.0},
    {"prompt": "9074391=", "chosen": "0134799", "rejected": "01", "margin": 1.0},
]


def test_a_step_and_the_held_out_numbers_by_hand(tmp_path):
    """From a finished model, whose head is kept: loss with margin and centering, the logged means, the rate that was stepped with."""
    run(tmp_path, "rm", steps=2)
    start, data = str(tmp_path / "rm" / "model"), pairs_file(tmp_path, HAND)
    flags = {
        "model": start,
        "data": data,
        "eval_data": data,
        "unit_scale": False,
        "use_margin": True,
        "center": 0.1,
    }
    before, first = run(tmp_path, steps=1, pairs_per_step=3, learning_rate=4e-4, warmup=3, **flags)
    score = load_scorer(start, CPU)
    c, r = (
        torch.tensor(score([row[side] for row in HAND], HAND)) for side in ("chosen", "rejected")
    )
    m = torch.tensor([row["margin"] for row in HAND])
    loss = (
        sum(math.log(1 + math.exp(-x)) for x in (c - r - m).tolist()) / 3
        + 0.1 * ((c + r) ** 2).mean().item()
    )
    assert c.std() > 1e-3 and (c != r).all()
    assert first["loss"] == pytest.approx(loss, abs=1e-5) and first["accuracy"] == pytest.approx(
        (c > r).float().mean().item()
    )
    assert [first[k] for k in ("chosen", "rejected", "margin")] == pytest.approx(
        [c.mean().item(), r.mean().item(), (c - r).mean().item()], abs=1e-5
    )
    assert before["eval/margin"] == pytest.approx((c - r).mean().item(), abs=1e-5)
    assert before["eval/loss"] == pytest.approx(
        sum(math.log(1 + math.exp(-x)) for x in (c - r).tolist()) / 3, abs=1e-5
    )
    assert before["eval/accuracy"] == pytest.approx((c > r).float().mean().item())
    assert before["eval/accuracy_longer"] == pytest.approx((c > r)[[0, 2]].float().mean().item())
    assert before["eval/accuracy_shorter"] == float(c[1] > r[1])
    a, b = (
        transformers.AutoModelForSequenceClassification.from_pretrained(p)
        for p in (start, tmp_path / "run" / "model")
    )
    moved = max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters()))
    assert first["learning_rate"] == pytest.approx(1e-4) and moved == pytest.approx(
        1e-4, rel=0.05
    ), "Adam's first step is the rate"


def test_calibration_against_bins_counted_by_hand():
    """Ten bins of the predicted chance from 0.5 to 1, each weighted by its pairs."""
    margin = torch.tensor([0.05, -0.1, 0.15, 1.0, -1.1, 1.05, 3.0, 5.0], dtype=torch.float64)
    bins = {}
    for x in margin.tolist():
        sure = 1 / (1 + math.exp(-abs(x)))
        bins.setdefault(int((sure - 0.5) * 20), []).append((sure, float(x > 0)))
    off = sum(abs(sum(s for s, _ in b) - sum(w for _, w in b)) for b in bins.values()) / 8
    got = pair_metrics(margin, torch.zeros(8, dtype=torch.float64), torch.zeros(8))
    assert len(bins) == 4 and got["eval/calibration"] == pytest.approx(off)


def test_a_model_from_elsewhere_is_read_as_reward_and_pipeline_read_it(tmp_path):
    """Its pad is its EOS, so that transformers score the token before the end: --steps 0 says what --reward would pay."""
    tokenizer = common.load_tokenizer(str(reward_model.TINY / "model"))
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(3)
    model = common.load_scalar(str(reward_model.TINY / "model"), CPU, tokenizer, 0.5)
    common.save_model(model, tokenizer, tmp_path / "theirs", CPU)
    found = run(
        tmp_path,
        model=str(tmp_path / "theirs"),
        steps=0,
        data="",
        eval_data=pairs_file(tmp_path, HAND),
    )[0]
    score = load_scorer(str(tmp_path / "theirs"), CPU)
    c, r = (
        torch.tensor(score([row[side] for row in HAND], HAND)) for side in ("chosen", "rejected")
    )
    assert (
        found["eval/margin"] == pytest.approx((c - r).mean().item(), abs=1e-5)
        and abs(found["eval/margin"]) > 1e-2
    )


@pytest.mark.parametrize("pad", [0, None])
def test_a_models_own_config_says_what_pads_where_its_tokenizer_says_nothing(pad, tmp_path):
    """Read with pad = EOS instead, the score would be that of the token before the end, and the pipeline's another."""
    tokenizer = common.load_tokenizer(str(reward_model.TINY / "model"))
    torch.manual_seed(3)
    model = common.load_scalar(str(reward_model.TINY / "model"), CPU, tokenizer, 0.5)
    model.config.pad_token_id = pad
    common.save_model(model, tokenizer, tmp_path, CPU)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (tmp_path / name).exists():
            settings = json.loads((tmp_path / name).read_text())
            settings.pop("pad_token", None)
            (tmp_path / name).write_text(json.dumps(settings))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    pipe = transformers.pipeline("text-classification", str(tmp_path))
    score = load_scorer(str(tmp_path), CPU)
    for row in HAND:
        ids = common.encode_answer(tokenizer, row["prompt"], row["chosen"])
        piped = pipe(tokenizer.decode(ids), add_special_tokens=False)[0]["score"]
        assert score([row["chosen"]], [row])[0] == pytest.approx(piped, abs=1e-5)


def test_the_true_reward_is_that_of_the_best_by_score(tmp_path, monkeypatch):
    """Not the best true reward there is, which would be pass@N; in rounds of few rows, each drawn with a seed of its own."""
    asked = []

    def sample(policy, tokenizer, ids, n, max_new_tokens, temperature, seed):
        asked.append((len(ids), n, temperature, seed))
        return common.Samples(*[None] * 6, texts=[f"{p[0]}{j}" for p in ids for j in range(n)])

    monkeypatch.setattr(common, "load_reference", lambda *a: None)
    monkeypatch.setattr(common, "sample", sample)
    monkeypatch.setattr(
        common,
        "score_texts",
        lambda m, t, texts, rows, w: [{"0": 2.0, "1": 1.0, "2": 0.0}[x[1]] for x in texts],
    )
    true = {
        "00": 0.0,
        "01": 1.0,
        "02": 1.0,
        "10": 1.0,
        "11": 0.0,
        "12": 0.0,
        "20": 0.0,
        "21": 0.0,
        "22": 1.0,
    }
    args = reward_model.Args(
        best_of=(1, 3), sample_rows=6, temperature=0.7, policy="x", max_new_tokens=4
    )
    prompts = [([i], {"prompt": str(i)}) for i in range(3)]
    paid = common.Reward(
        lambda samples, rows: {"reward": [true[x] for x in samples.texts]}, None, {}
    )
    for reward in (paid, None):
        got = reward_model.report_best_of(
            None, None, None, prompts, reward, args, CPU, lambda: False
        )
        assert got["best_of/score@1"] == pytest.approx(1.0) and got[
            "best_of/score@3"
        ] == pytest.approx(2.0)
        assert ("best_of/true@3" in got) == (reward is not None)
        if reward:
            assert got["best_of/true@1"] == pytest.approx(4 / 9) and got[
                "best_of/true@3"
            ] == pytest.approx(1 / 3)
    assert [a[:3] for a in asked[:2]] == [(2, 3, 0.7), (1, 3, 0.7)] and asked[0][3] != asked[1][3]


def test_best_of_n_without_answers_reports_the_score_alone(tmp_path):
    run(tmp_path, "rm", steps=1)
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "52="}\n{"prompt": "31="}\n')
    flags = {
        "policy": str(reward_model.TINY / "model"),
        "eval_prompts": str(data),
        "best_of": (1, 2),
        "max_new_tokens": 6,
    }
    found = run(tmp_path, "bon", model=str(tmp_path / "rm" / "model"), steps=0, **flags)[-1]
    assert "best_of/score@2" in found and not any("true" in k for k in found)
    data.write_text('{"prompt": "52="}\n{"prompt": "31=", "answer": "13"}\n')
    with pytest.raises(SystemExit):
        run(tmp_path, "some", model=str(tmp_path / "rm" / "model"), steps=0, **flags)


def test_what_the_console_shows_is_what_the_pipeline_is_to_be_given(tmp_path, capsys):
    """With a tokenizer that puts BOS before a text, too: the text shows it, and the printed line adds none."""
    run(tmp_path, steps=2)
    said = capsys.readouterr().out
    assert "16 pairs will be drawn from 3711, 0.0 passes\nthe head is new\n" in said
    shown = next(line for line in said.splitlines() if line.startswith("first text"))
    shown = eval(shown.partition(": ")[2])
    exec(said[said.index("  from transformers") :].replace("\n  ", "\n").strip(), {})
    printed = eval(capsys.readouterr().out)[0]["score"]
    folder = str(tmp_path / "run" / "model")
    trained = common.load_tokenizer(folder)
    ids = trained(shown, add_special_tokens=False).input_ids
    model = common.load_scalar(folder, CPU, trained, frozen=True)
    assert printed == pytest.approx(common.score_ids(model, trained, [ids], CPU)[0], abs=1e-5)
    tokenizer = make_tokenizer(bos="<bos>")
    family("llama").save_pretrained(tmp_path / "base")
    common.own_pad(tokenizer)
    model = common.load_scalar(tmp_path / "base", CPU, tokenizer, 0.2)
    common.save_model(model, tokenizer, tmp_path / "model", CPU)
    read = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "model")
    ids = common.encode_answer(tokenizer, "w5 w6", "w7")
    pipe = transformers.pipeline("text-classification", str(tmp_path / "model"), tokenizer=read)
    score = common.score_ids(model, tokenizer, [ids], CPU)[0]
    assert ids[0] == tokenizer.bos_token_id
    assert pipe(tokenizer.decode(ids), add_special_tokens=False)[0]["score"] == pytest.approx(
        score, abs=1e-5
    )


@pytest.mark.parametrize("load", ["policy", "reference", "scalar"])
def test_weights_that_a_folder_lacks_are_not_drawn_at_random(load, tmp_path, capsys):
    """All keys under another name, as some trainers write them: transformers would start from noise with a warning."""
    from safetensors.torch import load_file, save_file

    family("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(
        {f"module.{k}": v for k, v in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        if load == "scalar":
            common.load_scalar(tmp_path, CPU, make_tokenizer(), 0.2)
        else:
            (common.load_policy if load == "policy" else common.load_reference)(tmp_path, CPU)
    assert "the folder has no weights for" in capsys.readouterr().err


def test_the_end_of_a_turn_is_no_pad_either():
    """Where the template ends an answer with the token that pads, transformers would score the one before it."""
    tokenizer = make_tokenizer(template="{% for m in messages %}{{ m.content }}<pad>{% endfor %}")
    assert common.turn_end(tokenizer) == tokenizer.pad_token_id
    common.own_pad(tokenizer)
    assert tokenizer.pad_token not in ("<pad>", tokenizer.eos_token)


@pytest.mark.parametrize("name", ["BertConfig", "RobertaConfig", "BartConfig"])
def test_a_model_whose_score_is_not_read_at_the_last_token_is_refused(name, tmp_path, capsys):
    small = {
        "vocab_size": 48,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    small |= (
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1} if name == "BartConfig" else {}
    )
    getattr(transformers, name)(**small).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        run(tmp_path, model=str(tmp_path), steps=1)
    assert (
        "has no score that is read at a text's last token" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )


# --- a whole run, against one written out in float64 ---

PAIRS = [
    {"prompt": "52817=", "chosen": "12578", "rejected": "1", "margin": 0.3},
    {"prompt": "31=", "chosen": "13", "rejected": "3113", "margin": -0.2},
    {"prompt": "9074391=", "chosen": "0134799", "rejected": "01", "margin": 1.5},
    {"prompt": "4=", "chosen": "4", "rejected": "4"},  # equal: left out, and in need of no margin
    {"prompt": "660=", "chosen": "066", "rejected": "606", "margin": 0.7},
    {"prompt": "85=", "chosen": "58", "rejected": "885", "margin": 0.0},
    {"prompt": "7402=", "chosen": "0247", "rejected": "0274913", "margin": 0.4},
]
ASKED = [
    {"prompt": "40=", "answer": "04"},
    {"prompt": "9318=", "answer": "1389"},
    {"prompt": "772=", "answer": "277"},
]


def paid(completion, row):
    """A true reward by which other completions are best than by the score."""
    started = completion[:1] == row["answer"][:1]
    return 0.1 * len(completion) - 0.3 * len(row["prompt"]) + float(started)


def score_by_hand(model, tokenizer, prompt, completion):
    """The head on the state of the last token, the end, by a plain forward of one text."""
    ids = [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]
    return model.score.weight[0] @ model.model(torch.tensor([ids])).last_hidden_state[0, -1]


def sides_by_hand(model, tokenizer, row):
    return [score_by_hand(model, tokenizer, row["prompt"], row[k]) for k in ("chosen", "rejected")]


def rate_by_hand(step, f):
    if step <= f.warmup:
        return f.learning_rate * step / (f.warmup + 1)
    # 1 in the first step after the warm-up, 0 one step after the last
    left = (f.steps - step + 1) / (f.steps - f.warmup)
    shapes = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return f.learning_rate * shapes[f.schedule]


def pairs_by_hand(pairs, step, f):
    """The pairs of a step: the data is shuffled anew each time that it is used up."""
    found = []
    for k in range((step - 1) * f.pairs_per_step, step * f.pairs_per_step):
        order = random.Random(common.seed_from(f.seed, k // len(pairs), common.ORDER))
        found.append(pairs[order.sample(range(len(pairs)), len(pairs))[k % len(pairs)]])
    return found


def step_of_pairs_by_hand(step, model, tokenizer, f, pairs):
    """Moves the model by one step -> what is logged."""
    batch, loss, scores = pairs_by_hand(pairs, step, f), 0.0, []
    for row in batch:
        c, r = sides_by_hand(model, tokenizer, row)
        wanted = row["margin"] if f.use_margin else 0.0
        loss = loss + ((1 + (-(c - r - wanted)).exp()).log() + f.center * (c + r) ** 2) / len(batch)
        scores.append((c.item(), r.item()))
    model.zero_grad()
    loss.backward()
    learning = [p for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in learning))
    with torch.no_grad():
        for p in learning:
            p -= rate_by_hand(step, f) * min(1.0, f.max_grad_norm / norm) * p.grad
    tokens = sum(len(row["prompt"] + row[k]) + 1 for row in batch for k in ("chosen", "rejected"))
    return {
        "step": step,
        "loss": loss.item(),
        "accuracy": statistics.mean(float(c > r) for c, r in scores),
        "margin": statistics.mean(c - r for c, r in scores),
        "chosen": statistics.mean(c for c, _ in scores),
        "rejected": statistics.mean(r for _, r in scores),
        "grad_norm": norm,
        "learning_rate": rate_by_hand(step, f),
        "time/train": 3,
        "tokens_per_second": tokens / 3,
        "memory_gib": 5.0,
    }


@torch.no_grad()
def evaluated_by_hand(model, tokenizer, pairs):
    margins, bins, won_where = [], {}, {"shorter": [], "longer": []}
    for row in pairs:
        c, r = sides_by_hand(model, tokenizer, row)
        margins.append((c - r).item())
        shorter = len(row["chosen"]) < len(row["rejected"])
        if len(row["chosen"]) != len(row["rejected"]):
            won_where["shorter" if shorter else "longer"].append(float(c > r))
        sure = 1 / (1 + math.exp(-abs(margins[-1])))
        bins.setdefault(int((sure - 0.5) * 20), []).append((sure, margins[-1] > 0))
    off = [abs(sum(s for s, _ in b) - sum(won for _, won in b)) for b in bins.values()]
    return {
        "eval/accuracy": statistics.mean(float(m > 0) for m in margins),
        "eval/margin": statistics.mean(margins),
        "eval/loss": statistics.mean(math.log(1 + math.exp(-m)) for m in margins),
        "eval/accuracy_shorter": statistics.mean(won_where["shorter"]),
        "eval/accuracy_longer": statistics.mean(won_where["longer"]),
        "eval/calibration": sum(off) / len(margins),
        "held_out/pairs": len(pairs),
    }


@torch.no_grad()
def best_by_hand(model, policy, tokenizer, f, asked):
    """Draws token by token, in rounds of as many prompts as --sample_rows has room for; takes the
    best of every N of a prompt's samples, one choice after the other."""
    M, found, end = max(f.best_of), {}, tokenizer.eos_token_id
    size = f.sample_rows // M
    for begin in range(0, len(asked), size):
        rows = [row for row in asked[begin : begin + size] for _ in range(M)]
        generator = torch.Generator().manual_seed(common.seed_from(f.seed, begin, 0, common.DRAW))
        drawn = [[] for _ in rows]
        for _ in range(f.max_new_tokens):
            u = torch.rand(len(rows), dtype=torch.float64, generator=generator)
            for i, row in enumerate(rows):
                if drawn[i][-1:] != [end]:
                    ids = torch.tensor([tokenizer(row["prompt"]).input_ids + drawn[i]])
                    logits = policy(ids).logits[0, -1].double() / f.temperature
                    drawn[i].append(int((logits.softmax(-1).cumsum(-1) > u[i]).nonzero()[0]))
            if all(d[-1] == end for d in drawn):
                break
        texts = [tokenizer.decode([t for t in d if t != end]) for d in drawn]
        scores, true = [], []
        for row, text in zip(rows, texts):
            scores.append(score_by_hand(model, tokenizer, row["prompt"], text).item())
            true.append(paid(text, row))
        for first in range(0, len(rows), M):
            for N in f.best_of:
                best = []
                for choice in itertools.combinations(range(first, first + M), N):
                    top = max(scores[i] for i in choice)
                    ties = [i for i in choice if scores[i] > top - 1e-9]
                    best.append((top, statistics.mean(true[i] for i in ties)))
                for name, k in (("score", 0), ("true", 1)):
                    share = statistics.mean(b[k] for b in best) / len(asked)
                    found[f"best_of/{name}@{N}"] = found.get(f"best_of/{name}@{N}", 0.0) + share
    return found | {f"best_of/kl@{N}": math.log(N) - (N - 1) / N for N in f.best_of}


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"use_margin": False, "center": 0.0, "schedule": "linear", "gradient_checkpointing": True},
        {"unit_scale": False, "schedule": "constant", "max_grad_norm": 1e9, "learning_rate": 0.002},
    ],
    ids=["margin and center", "plain", "no unit scale"],
)
def test_every_step_of_the_script_is_the_step_written_out(flags, tmp_path, monkeypatch):
    """Every flag in its place: weights after each of three steps, each logged number, the held-out
    scores, the unit scale, best-of-N. The optimizer is gradient descent, the clock the test's."""
    f = {
        "steps": 3, "pairs_per_step": 4, "use_margin": True, "center": 0.05, "learning_rate": 0.02,
        "schedule": "cosine", "warmup": 1, "max_grad_norm": 1.0, "tokens_per_micro_batch": 40,
        "eval_every": 2, "unit_scale": True, "best_of": (1, 2, 3), "max_new_tokens": 4,
        "temperature": 0.8, "sample_rows": 7, "seed": 5,
    } | flags  # fmt: skip
    f, seen, clock = types.SimpleNamespace(**f), {}, [0]

    class Descent(torch.optim.SGD):
        def step(self):
            clock[0] += 3
            super().step()

    def descent(model, rate):
        assert rate == f.learning_rate
        seen["model"] = copy.deepcopy(model).double().eval()
        return Descent(model.parameters(), lr=1.0)

    monkeypatch.setattr(common, "make_optimizer", descent)
    monkeypatch.setattr(common, "memory_used", lambda world: 5 * 2**30)
    monkeypatch.setattr(reward_model, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))
    (tmp_path / "r.py").write_text(inspect.getsource(paid))
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, ASKED)))
    data = pairs_file(tmp_path, PAIRS)
    start = str(reward_model.TINY / "model")
    files = {"data": data, "eval_data": data, "policy": start}
    files |= {"eval_prompts": str(tmp_path / "asked.jsonl"), "reward": f"{tmp_path}/r.py:paid"}
    log = run(tmp_path, **vars(f) | files | {"save_every": 1, "keep": 9})

    model, tokenizer = seen["model"], common.load_tokenizer(start)
    policy = common.load_reference(start, CPU).double()
    assert model.score.weight.std().item() == pytest.approx(129**-0.5, rel=0.25), "a new head"
    pairs = [row for row in PAIRS if row["chosen"] != row["rejected"]]
    wanted, norms = [{"step": 0} | evaluated_by_hand(model, tokenizer, pairs)], []
    for step in range(1, f.steps + 1):
        before = {k: p.detach().clone() for k, p in model.named_parameters()}
        wanted.append(step_of_pairs_by_hand(step, model, tokenizer, f, pairs))
        norms.append(wanted[-1]["grad_norm"])
        if step in (2, 3):
            wanted[-1] |= evaluated_by_hand(model, tokenizer, pairs)
        saved = torch.load(tmp_path / "run" / "checkpoint" / f"{step:06d}.pt")["models"]["model"]
        for k, p in model.named_parameters():
            assert (saved[k] - p).norm() <= 2e-3 * (p - before[k]).norm() + 2e-6, (step, k)

    wanted.append({"step": f.steps})
    if f.unit_scale:
        scores = [x.item() for row in pairs for x in sides_by_hand(model, tokenizer, row)]
        spread = statistics.pstdev(scores)
        wanted[-1] |= {"scale/mean": statistics.mean(scores), "scale/spread": spread}
        with torch.no_grad():
            model.score.weight /= spread
    wanted[-1] |= best_by_hand(model, policy, tokenizer, f, ASKED)
    folder = tmp_path / "run" / "model"
    kept = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(kept.score.weight.double(), model.score.weight, rtol=1e-3, atol=1e-5)
    assert len(log) == len(wanted)
    for got, numbers in zip(log, wanted):
        assert got.keys() == numbers.keys()
        for name, value in numbers.items():
            assert got[name] == pytest.approx(value, rel=1e-3, abs=2e-6), (got["step"], name)
    # what would not act would not be tested
    assert f.max_grad_norm > 1e6 or max(norms) > 1.1 * f.max_grad_norm


def test_where_all_scores_are_equal_the_logged_accuracy_is_that_of_a_coin(tmp_path, monkeypatch):
    """A tie counts half, in training as in `pair_metrics`."""
    honest = common.load_scalar

    def headless(path, world, tokenizer, head_std, *rest, **settings):
        return honest(path, world, tokenizer, 0.0, *rest, **settings)

    monkeypatch.setattr(common, "load_scalar", headless)
    assert run(tmp_path, steps=1)[1]["accuracy"] == 0.5


def test_contents_in_parts_want_a_template(capsys):
    with pytest.raises(SystemExit):
        parts = [{"type": "text", "text": "w5"}]
        common.encode_answer(make_tokenizer(), [{"role": "user", "content": parts}], "w6")
    assert "no chat template to render it" in capsys.readouterr().err


def test_an_empty_prompt_is_that_of_the_conversations(tmp_path):
    talk = [{"role": "user", "content": "5="}]
    sides = {
        side: [*talk, {"role": "assistant", "content": x}]
        for side, x in (("chosen", "5"), ("rejected", "7"))
    }
    assert [
        r["prompt"] for r in read_pairs(pairs_file(tmp_path, [{"prompt": "", **sides}]), "--data")
    ] == [talk]
