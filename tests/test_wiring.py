"""Whether what a user sets reaches the place where it acts, in each script: flags, seeds, limits.

The numbers of a step are tested elsewhere, by hand. Here are lines that no number of a single
process shows: a seed that ignores the process, a flag that is not passed on.
"""

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import family, make_tokenizer
from test_reinforce import judge

import common
import dpo
import grpo
import ppo
import reinforce
import reward_model
from common import World

CPU = World(0, 1, torch.device("cpu"), torch.float32)
ROLLOUTS = [reinforce, ppo, grpo]  # scripts that draw what they learn from
SCRIPTS = [reinforce, ppo, grpo, dpo, reward_model]
TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'w10 ', 'system': 'w12 ', 'assistant': 'w11 '}[m['role']] }}"
    "{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w11 {% endif %}"
)


def named(script):
    return script.__name__


def process(rank, size=2):
    return World(rank, size, torch.device("cpu"), torch.float32)


STRICT = (
    "{% for m in messages %}{% if loop.previtem is defined and loop.previtem['role'] == m['role'] %}"
    "{{ raise_exception('turns, please') }}{% endif %}"
)
HONEST_BEGIN = common.begin_log


class Seen(Exception):
    """Ends a run where a test has seen enough."""


def stop_with(found):
    """A function in the place of another: keeps what it is given, and ends the run."""

    def stand_in(*given, **named):
        found.append((given, named))
        raise Seen

    return stand_in


def flags_of(script, tmp_path, **more):
    """The flags of a step on the bundled model that takes no time."""
    flags = {"steps": 1, "warmup": 0, "device": "cpu", "out": str(tmp_path / "run")}
    if script in ROLLOUTS:
        flags |= {"prompts_per_step": 4, "max_new_tokens": 4, "eval_data": ""}
        flags["samples_per_prompt"] = 2
    else:
        flags |= {"pairs_per_step": 4, "eval_data": "", "eval_prompts": ""}
        flags["data"] = str(reinforce.TINY / "pairs_train.jsonl")
    if script is reward_model:
        flags["policy"] = ""
    return script.Args(**(flags | more))


def run(script, tmp_path, **more):
    script.train(flags_of(script, tmp_path, **more))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- seeds and processes ---


@pytest.mark.parametrize("script", ROLLOUTS, ids=named)
def test_each_process_draws_its_completions_with_a_seed_of_its_own(script, tmp_path, monkeypatch):
    args = script.resolve(flags_of(script, tmp_path))
    found = []
    monkeypatch.setattr(common, "sample", stop_with(found))
    prompts = [([i], {"prompt": str(i)}) for i in range(8)]
    for rank in (0, 1):
        for step in (1, 2):
            with pytest.raises(Seen):
                script.rollout(
                    None, None, prompts, None, False, args, process(rank), step, common.Meter()
                )
    seeds = [named["seed"] for _, named in found]
    assert len(set(seeds)) == 4
    wanted = [common.seed_from(args.seed, s, r, common.DRAW) for r in (0, 1) for s in (1, 2)]
    assert seeds == wanted


def test_best_of_n_draws_with_a_seed_of_its_own_in_each_process(tmp_path, monkeypatch):
    args = reward_model.resolve(flags_of(reward_model, tmp_path, best_of=(1, 2)))
    found = []
    monkeypatch.setattr(common, "sample", stop_with(found))
    monkeypatch.setattr(common, "load_reference", lambda *given: None)
    monkeypatch.setattr(common, "all_sum", lambda world, *numbers: list(map(float, numbers)))
    prompts = [([i], {"prompt": str(i)}) for i in range(8)]
    for rank in (0, 1):
        with pytest.raises(Seen):
            reward_model.report_best_of(
                None, None, None, prompts, None, args, process(rank), lambda: False
            )
    assert found[0][1]["seed"] != found[1][1]["seed"]


def test_no_two_purposes_share_their_seeds():
    purposes = [common.ORDER, common.DRAW, common.CUT, common.PASS, common.EVAL]
    assert len(set(purposes)) == 5
    assert len({common.seed_from(seed, 3, 0, p) for seed in (1, 2) for p in purposes}) == 10


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_a_run_starts_with_its_seed_device_and_dtype(script, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(common, "start", stop_with(found))
    with pytest.raises(Seen):
        script.train(flags_of(script, tmp_path, seed=7, dtype="bfloat16"))
    assert found == [(("cpu", "bfloat16", 7), {})]


def test_a_batch_is_that_of_all_processes_where_advantages_are_divided_by_its_std(
    tmp_path, monkeypatch
):
    rewards = torch.tensor([0.0, 1.0, 1.0, 3.0])
    everyone = torch.cat([rewards, torch.tensor([10.0, 20.0, 10.0, 20.0])])
    A = grpo.group_advantages(rewards, everyone, 2, "batch", False)
    by_hand = torch.tensor([-0.5, 0.5, -1.0, 1.0]) / (everyone.std() + 1e-4)
    torch.testing.assert_close(A, by_hand)

    gathered = []

    def all_gather(world, value):
        if value.ndim and value.is_floating_point():
            gathered.append(torch.cat([value, value + 5]))
            return gathered[-1]
        return value

    honest = grpo.group_advantages

    def spy(rewards, all_rewards, *rest):
        assert torch.equal(all_rewards, torch.cat([rewards, rewards + 5]))
        return honest(rewards, all_rewards, *rest)

    monkeypatch.setattr(common, "all_gather", all_gather)
    monkeypatch.setattr(grpo, "group_advantages", spy)
    run(grpo, tmp_path, scale="batch")
    assert gathered


@pytest.mark.parametrize("script", ROLLOUTS, ids=named)
def test_an_evaluation_draws_as_much_at_once_as_a_process_of_the_rollout(
    script, tmp_path, monkeypatch
):
    args = script.resolve(flags_of(script, tmp_path, prompts_per_step=8))
    found = []
    monkeypatch.setattr(common, "rows_at_once", stop_with(found))
    held_out = [([i], {"prompt": str(i)}) for i in range(8)]
    for size in (1, 4):
        with pytest.raises(Seen):
            script.evaluate(None, None, held_out, None, args, process(0, size))
    assert [given[-1] for given, _ in found] == [16, 4]


def test_processes_share_prompts_only_if_all_of_them_can(monkeypatch):
    """One that computed prompts anew alone would make other forwards than the rest."""
    model = common.prepare(family("llama"), CPU)
    assert common.prompts_can_be_shared(model, CPU, False)
    monkeypatch.setattr(common, "all_sum", lambda world, *numbers: [1.0 for _ in numbers])
    assert not common.prompts_can_be_shared(model, process(0), False)


def test_only_the_first_process_speaks(tmp_path, monkeypatch, capsys):
    for rank in (0, 1):
        monkeypatch.setenv("RANK", f"{rank}")
        common.say(f"from {rank}")
        with (
            pytest.raises(SystemExit) as ended,
            common.short_errors(tmp_path, SimpleNamespace(steps=0), None),
        ):
            raise common.Stop("enough")
        assert (str(ended.value.code) == "error: enough") == (rank == 0)
    assert capsys.readouterr().out == "from 0\n"


# --- flags that change no number ---


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_checkpointing_is_on_in_what_learns(script, tmp_path, monkeypatch):
    found = []
    honest = common.make_optimizer

    def make_optimizer(model, *rest):
        blocks = [m for m in model.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        found.append([block.gradient_checkpointing for block in blocks])
        return honest(model, *rest)

    monkeypatch.setattr(common, "make_optimizer", make_optimizer)
    for is_on in (True, False):
        found.clear()
        run(script, tmp_path, gradient_checkpointing=is_on, out=str(tmp_path / "run"))
        assert len(found) == (2 if script is ppo else 1)
        assert all(blocks and set(blocks) == {is_on} for blocks in found)
        (tmp_path / "run").rename(tmp_path / f"run-{is_on}")


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_micro_batches_are_as_small_as_asked_for(script, tmp_path, monkeypatch):
    counts = []
    honest = script.update_loss if script is not ppo else ppo.add_gradients

    def spy(*given, **named):
        counts[-1] += 1
        return honest(*given, **named)

    monkeypatch.setattr(script, honest.__name__, spy)
    many = {}
    if script in ROLLOUTS:  # some are right and some are wrong, so that there are gradients
        many = {"prompts_per_step": 16, "samples_per_prompt": 8, "max_new_tokens": 12}
    for tokens in (1, 10**6):
        counts.append(0)
        run(script, tmp_path, tokens_per_micro_batch=tokens, **many)
        (tmp_path / "run").rename(tmp_path / f"run-{tokens}")
    assert counts[0] > counts[1]
    assert script in ROLLOUTS or counts == [4, 1]


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_the_log_has_the_memory_in_gib(script, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "memory_used", lambda world: 5 * 2**30)
    log = run(script, tmp_path)
    assert [line["memory_gib"] for line in log if "memory_gib" in line] == [5.0]


@pytest.mark.parametrize("script", [reinforce, ppo, grpo, dpo], ids=named)
def test_a_run_without_steps_writes_no_model(script, tmp_path):
    held_out = "eval_data" if script in ROLLOUTS else "eval_prompts"
    path = write_rows(tmp_path / "held_out.jsonl", [{"prompt": "52=", "answer": "25"}])
    run(script, tmp_path, steps=0, **{held_out: path})
    assert not (tmp_path / "run" / "model").exists()


def test_defaults_of_learning_rates_and_betas(tmp_path):
    family("llama").save_pretrained(tmp_path)
    other = {"model": str(tmp_path), "data": "d"}

    def rate(**flags):
        return ppo.resolve(ppo.Args(**flags)).critic_learning_rate

    assert rate() == 5e-4 and rate(critic="shared") == pytest.approx(5e-3)
    assert rate(**other) == 1e-5
    assert rate(**other, critic="shared") == pytest.approx(1e-4)
    assert rate(**other, lora_rank=4) == pytest.approx(1e-4)

    def beta(**flags):
        return dpo.resolve(dpo.Args(**other, **flags)).beta

    assert [beta(loss=loss) for loss in ("dpo", "hinge", "ipo", "simpo")] == [0.1, 0.1, 1.0, 2.0]


# --- prompts, templates, rewards ---


def test_system_message_and_template_reach_the_prompts_of_a_file(tmp_path):
    tokenizer = make_tokenizer(template=TEMPLATE)
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "w5"}])
    args = SimpleNamespace(system="", chat=True, max_prompt_tokens=99, eval_rows=0)

    def ids(**flags):
        given = SimpleNamespace(**{**vars(args), **flags})
        [(found, _)] = common.load_prompts(path, "--data", tokenizer, given, "")
        return found

    assert ids() == [10, 5, 11]
    assert ids(system="w6") == [12, 6, 10, 5, 11]
    assert ids(chat=False) == [5]

    pair = [{"prompt": "w5", "chosen": "w7", "rejected": "w8"}]

    def pairs(**flags):
        given = SimpleNamespace(**{**vars(args), "max_tokens": 99, **flags})
        return dpo.encode_preferences(pair, tokenizer, given, "--data")

    assert pairs() == [([10, 5, 11], [7, 1], [8, 1])]
    assert pairs(system="w6")[0][0] == [12, 6, 10, 5, 11]
    assert pairs(chat=False)[0][0] == [5]


def test_no_demonstration_is_left_out_by_the_number_of_held_out_rows(tmp_path):
    rows = [{"prompt": f"{i}=", "answer": f"{i}"} for i in range(6)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = common.load_tokenizer(reinforce.TINY / "model")
    args = SimpleNamespace(system="", chat=True, max_prompt_tokens=99, eval_rows=2)
    for flag, count in (("--data", 6), ("--demos", 6), ("--eval_data", 2)):
        assert len(common.load_prompts(path, flag, tokenizer, args, "")) == count


@pytest.mark.parametrize("script", ROLLOUTS, ids=named)
@pytest.mark.parametrize("share", [False, True])
def test_a_rollout_shares_prompts_only_where_that_was_tried(script, share, monkeypatch):
    tokenizer = make_tokenizer()

    def drawn(model, tokenizer, prompts, *, n, **settings):
        rows = [ids for ids in prompts for _ in range(n)]
        return common.as_samples(rows, [[5, 1]] * len(rows), tokenizer, CPU)

    monkeypatch.setattr(common, "sample", drawn)
    reward = SimpleNamespace(seconds=0.0)
    reward.score = lambda samples, records: {"reward": [0.0, 1.0] * (len(records) // 2)}
    args = script.Args(prompts_per_step=2, samples_per_prompt=4)
    prompts = [([7, 8], {"prompt": "w7 w8"}), ([9], {"prompt": "w9"})]
    given = (None, tokenizer, prompts, reward, share, args, CPU, 1, common.Meter())
    samples, *_ = script.rollout(*given)
    assert samples.rows_per_prompt == (4 if share else 1)


@pytest.mark.parametrize("script", ROLLOUTS, ids=named)
def test_sample_rows_reaches_every_sample_and_changes_no_number(script, tmp_path, monkeypatch):
    honest = common.sample
    found = []

    def watch(*given, **named):
        found.append(named["max_rows"])
        return honest(*given, **named)

    monkeypatch.setattr(common, "sample", watch)
    more = {"eval_data": str(script.TINY / "sort_test.jsonl"), "eval_rows": 4}
    if script is grpo:
        more["eval_samples"] = 2
    logged = []
    for rows in (None, 2):
        found.clear()
        logged.append(run(script, tmp_path / f"{rows}", sample_rows=rows, **more))
        assert found == [rows] * (5 if script is grpo else 3)  # before, in the rollout, after
    whole, parts = logged
    names = {name for line in whole for name in line if not name.startswith(("time/", "memory"))}
    for name in names - {"tokens_per_second"}:
        values = [[line[name] for line in lines if name in line] for lines in (whole, parts)]
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_the_template_gets_its_arguments(script, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(common, "load_tokenizer", stop_with(found))
    args = script.resolve(flags_of(script, tmp_path, template_args='{"a": 1}'))
    with pytest.raises(Seen):
        script.load_task(args, CPU)
    assert found[0][0] == (args.model, '{"a": 1}')


def test_best_of_n_has_no_true_reward_that_no_answer_can_get(tmp_path, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "3=", "answer": "Lima"}])
    more = {"policy": str(reinforce.TINY / "model"), "eval_prompts": prompts, "reward": "number"}
    args = reward_model.resolve(flags_of(reward_model, tmp_path, **more))
    with pytest.raises(SystemExit):
        reward_model.load_best_of(args, common.load_tokenizer(args.policy, args.template_args), CPU)
    assert "Lima" in capsys.readouterr().err


@pytest.mark.parametrize("script", [dpo, reward_model], ids=named)
def test_a_prompt_that_is_said_twice_may_have_other_keys_and_null_is_no_prompt(script, tmp_path):
    def side(text):
        asked = {"role": "user", "content": "w5", "name": None}
        return [asked, {"role": "assistant", "content": text}]

    rows = [
        {"prompt": "w5", "chosen": side("w6"), "rejected": side("w7")},
        {"prompt": None, "question": "w5", "chosen": "w6", "rejected": "w7"},
    ]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    for record in script.read_pairs(path, "--data"):
        found = [record[name] for name in ("prompt", "chosen", "rejected")]
        assert found == ["w5", "w6", "w7"]
    for wrong in ("w4", 5, ["w5"], [{"role": "user"}], {"role": "user", "content": "w5"}):
        rows[0]["prompt"] = wrong
        with pytest.raises(SystemExit):
            script.read_pairs(write_rows(tmp_path / "pairs.jsonl", rows), "--data")


def test_a_system_message_in_a_field_of_its_own_is_not_lost_in_silence(tmp_path, capsys):
    common.say_once.cache_clear()
    rows = [{"system": "w9", "question": "w5", "chosen": "w6", "rejected": "w7"}] * 2
    dpo.read_pairs(write_rows(tmp_path / "pairs.jsonl", rows), "--data")
    said = capsys.readouterr().out
    assert said.count('"system" in a row is not read') == 1


def test_an_answer_that_the_template_refuses_is_an_error_in_one_sentence(capsys):
    strict = TEMPLATE.replace("{% for m in messages %}", STRICT)
    tokenizer = make_tokenizer(template=strict)
    talk = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    with pytest.raises(SystemExit):
        common.encode_completion(tokenizer, "w7", True, talk)
    assert "turns, please" in capsys.readouterr().err


@pytest.mark.parametrize("script", ROLLOUTS, ids=named)
def test_held_out_answers_that_the_rule_cannot_judge_are_an_error(script, tmp_path, capsys):
    good = write_rows(tmp_path / "good.jsonl", [{"prompt": "52=", "answer": "25"}])
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "3=", "answer": "Lima"}])
    args = flags_of(script, tmp_path, data=good, eval_data=bad, reward="number")
    with pytest.raises(SystemExit):
        script.load_task(script.resolve(args), CPU)
    assert "Lima" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS, ids=named)
def test_a_reward_model_limits_the_length_by_the_longest_prompt_also_a_held_out_one(
    script, tmp_path
):
    prompts = write_rows(tmp_path / "short.jsonl", [{"prompt": "1="}, {"prompt": "2="}])
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "54321="}])
    more = {"reward": judge(tmp_path, 12), "max_new_tokens": 20}
    if script in ROLLOUTS:
        more |= {"data": prompts, "eval_data": long}
    else:
        more["eval_prompts"] = long
    if script is reward_model:
        more["policy"] = str(reinforce.TINY / "model")
    args = script.resolve(flags_of(script, tmp_path, **more))
    loaded = script.load_task(args, CPU)
    if script is reward_model:
        loaded = script.load_best_of(loaded[0], loaded[1], CPU)
    assert loaded[0].max_new_tokens == 12 - 6 - 1 - 1 + 1


def test_a_reward_model_that_fails_loses_no_step(tmp_path, monkeypatch):
    """As with a function: the steps before are saved, and an evaluation may be left out."""

    def broken(*given):
        raise common.Stop("not finite")

    monkeypatch.setattr(common, "score_texts", broken)
    monkeypatch.setattr(common, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(common, "load_scalar", lambda *given, **settings: None)
    reward = common.load_reward(str(tmp_path), grpo.RULES, CPU)
    with pytest.raises(common.Unscored):
        reward.score(SimpleNamespace(texts=["5"]), [{"prompt": "5"}])


def test_an_error_of_many_lines_names_the_prompt_all_the_same(tmp_path):
    """A run that ends says the first line of an error."""
    (tmp_path / "my.py").write_text(
        "def score(completion, row):\n    raise ValueError('a\\nb\\nc')\n"
    )
    reward = common.load_reward(f"{tmp_path / 'my.py'}:score", {"exact": None}, CPU)
    mask = torch.ones(1, 1, dtype=torch.bool)
    samples = SimpleNamespace(texts=["said"], mask=mask, finished=mask[:, 0])
    with pytest.raises(common.Unscored) as ended:
        reward.score(samples, [{"prompt": "asked"}])
    words = common.first_line(ended.value)
    assert "(ValueError: a b c)" in words and "'asked'" in words and "'said'" in words


# --- models and what is saved ---


def test_a_reward_model_is_saved_with_a_pad_that_is_no_end(tmp_path):
    """If EOS were pad, whoever loads the folder would score the token before it."""
    family("llama").save_pretrained(tmp_path / "start")
    make_tokenizer(pad=None).save_pretrained(tmp_path / "start")
    rows = [{"prompt": f"w{i}", "chosen": "w5 w6", "rejected": "w7"} for i in range(8, 16)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    run(reward_model, tmp_path, model=str(tmp_path / "start"), data=data, unit_scale=False)
    saved = common.load_tokenizer(tmp_path / "run" / "model")
    assert saved.pad_token_id != saved.eos_token_id
    model = common.load_scalar(tmp_path / "run" / "model", CPU, saved, frozen=True)
    assert model.config.pad_token_id == saved.pad_token_id
    texts = [[5, 6, saved.eos_token_id], [5, 6, 7, 8, saved.eos_token_id]]
    alone = [common.score_ids(model, saved, [text], CPU)[0] for text in texts]
    assert common.score_ids(model, saved, texts, CPU) == pytest.approx(alone, abs=1e-6)
    states = model.base_model(torch.tensor([texts[0]])).last_hidden_state
    at_the_end = common.scalar_head(model)(states)[0, -1, 0].item()
    assert alone[0] == pytest.approx(at_the_end, abs=1e-6)


def test_a_head_that_is_not_known_is_refused_in_a_reference_of_dpo(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(common, "check_head", found.append)
    run(dpo, tmp_path, reference=str(reinforce.TINY / "model"))
    assert len(found) == 2 and found[0] is not found[1], "the policy and the reference"


def test_the_best_model_is_that_of_the_reward_if_there_are_both(tmp_path):
    assert common.BEST == ("eval/reward", "eval/accuracy")
    lines = [
        {"step": 0, "eval/reward": 0.5, "eval/accuracy": 0.5},
        {"step": 1, "eval/reward": 0.4, "eval/accuracy": 0.9},
    ]
    write_rows(tmp_path / "metrics.jsonl", lines)
    name, scores, _ = common.scores_so_far(tmp_path)
    assert name == "eval/reward" and scores == [(0, 0.5), (1, 0.4)]


def test_only_attention_with_a_mask_of_torchs_kind_is_captured(monkeypatch):
    """Eager attention adds the mask to the scores: one of true and false would forbid nothing."""
    monkeypatch.setattr(common, "CAPTURE_ON", ("cpu",))
    model = family("llama")
    cache = SimpleNamespace(layers=[])
    assert common.can_capture(model, cache)
    model.set_attn_implementation("eager")
    assert not common.can_capture(model, cache)


# --- ppo ---


@pytest.mark.parametrize("which", [0, 1], ids=["policy", "critic"])
def test_a_gradient_of_one_model_that_is_not_finite_stops_both(which, tmp_path, monkeypatch):
    honest = common.clip_gradients
    calls = []

    def clip_gradients(model, limit):
        calls.append(honest(model, limit))
        return float("nan") if len(calls) % 2 == (which + 1) % 2 else calls[-1]

    stepped = []
    monkeypatch.setattr(common, "clip_gradients", clip_gradients)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *given: stepped.append(1))
    with pytest.raises(SystemExit, match="gradient is"):
        run(ppo, tmp_path)
    assert len(calls) == 2 and not stepped


def test_the_kl_stop_is_in_nats_of_a_completion_also_with_several_for_a_prompt(
    tmp_path, monkeypatch
):
    found = []
    honest = ppo.add_gradients

    def add_gradients(*given, **named):
        found.append(honest(*given, **named).item())
        return torch.tensor(found[-1])

    monkeypatch.setattr(ppo, "add_gradients", add_gradients)
    monkeypatch.setattr(ppo, "k3", lambda old, logprobs: torch.ones_like(logprobs))
    more = {"samples_per_prompt": 3, "tokens_per_micro_batch": 10**6, "minibatches": 2}
    log = run(ppo, tmp_path, **more)
    tokens = log[-1]["length"]  # one nat a token
    assert sum(found) / len(found) == pytest.approx(tokens, rel=1e-5)


def test_a_warm_up_that_does_not_end_before_the_run_is_noted(tmp_path, capsys):
    run(ppo, tmp_path, steps=3, critic_warmup=2, warmup=1, out=str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "--critic_warmup and --warmup would end at step 3, the run at step 3" in said


# --- signals ---


def test_a_signal_ends_the_evaluation_of_prompts_in_dpo(tmp_path, monkeypatch):
    asked = []
    honest = common.until_stopped

    def until_stopped(starts, world, stop_asked):
        if stop_asked is None:  # the reference scores pairs: what it has scored is kept
            return honest(starts, world, stop_asked)
        asked.append(stop_asked)
        raise Seen

    monkeypatch.setattr(common, "until_stopped", until_stopped)
    path = write_rows(tmp_path / "held_out.jsonl", [{"prompt": "52=", "answer": "25"}])
    with pytest.raises(Seen):
        run(dpo, tmp_path, eval_prompts=path)
    assert len(asked) == 1 and callable(asked[0])


def test_every_script_hands_the_models_beside_the_policy_to_the_line_about_memory(
    tmp_path, monkeypatch
):
    found = []
    monkeypatch.setattr(common, "begin_log", stop_with(found))
    reward = judge(tmp_path, 64)
    names = list(inspect.signature(HONEST_BEGIN).parameters)
    for script in ROLLOUTS:
        for spec, count in (("exact", 0), (reward, 1)):
            found.clear()
            with pytest.raises(Seen):
                run(script, tmp_path, reward=spec, out=str(tmp_path / f"{script.__name__}{count}"))
            given, named = found[0]
            frozen = (dict(zip(names, given)) | named)["frozen"]
            assert [path for path in frozen if path == reward] == count * [reward], "beside others"
    model = str(reinforce.TINY / "model")
    for steps, wanted in ((2, [model, reward]), (0, [model, reward, reward])):
        found.clear()
        flags = {"model": model if steps else reward, "policy": model, "steps": steps}
        flags["out"] = str(tmp_path / f"reward_model{steps}")
        rows = write_rows(tmp_path / "held_out.jsonl", [{"prompt": "52=", "answer": "25"}])
        with pytest.raises(Seen):
            run(reward_model, tmp_path, reward=reward, eval_prompts=rows, **flags)
        given, named = found[0]
        frozen = (dict(zip(names, given)) | named)["frozen"]
        assert [path for path in frozen if path] == wanted, "--policy, --model if frozen, --reward"
