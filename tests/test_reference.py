"""--reference in reinforce.py, ppo.py and grpo.py: another model in the KL penalty, and with --reward
none, in reinforce.py, the teacher of a distillation."""

import importlib
import json
import types
from unittest import mock

import pytest
import torch
from conftest import family, make_tokenizer
from processes import run
from test_bfloat16 import MODEL, check_equal, lose_last_step, result
from test_bfloat16 import data as data
from test_bfloat16 import one_thread as one_thread
from test_bfloat16 import train as train_briefly
from test_processes import train_on_given_samples

import common

SCRIPTS = ("reinforce", "ppo", "grpo")
DISTIL = {"reward": "none", "gamma": 0.0, "beta": 1.0}


def train(name, out, data, **changes):
    if name == "grpo":
        changes = {"ref_update_every": 0, **changes}
    train_briefly(name, out, data, **{"dtype": "float32", "samples_per_prompt": 2, **changes})


def save_with_the_tokens_of_the_bundled_model(model, folder):
    model.save_pretrained(folder)
    common.load_tokenizer(MODEL).save_pretrained(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The bundled model with noise on its weights."""
    folder = tmp_path_factory.mktemp("teacher")
    model = common.load_policy(MODEL, common.World(0, 1, torch.device("cpu"), torch.float32))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5 * p.std() * torch.randn(p.shape))
    save_with_the_tokens_of_the_bundled_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def mamba(tmp_path_factory):
    """A reference of another family and size, whose cache has no keys and values."""
    folder = tmp_path_factory.mktemp("mamba")
    size = common.read_config(MODEL).vocab_size
    save_with_the_tokens_of_the_bundled_model(family("mamba", vocab_size=size), folder)
    return folder


def plain_logprob(model, prompt, ids):
    logprobs = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids)[:, None]).sum().item()


def kl_of_plain_forwards(samples, reference):
    """k1 of whole completions, by one forward of each row in each of the two models."""
    policy = common.load(common.AutoModelForCausalLM, MODEL)[0].eval()
    other = common.load(common.AutoModelForCausalLM, reference)[0].eval()
    kl = []
    for i in range(len(samples.ids)):
        prompt = samples.prompt_ids[i][samples.prompt_mask[i]].tolist()
        ids = samples.ids[i][samples.mask[i]].tolist()
        kl.append(plain_logprob(policy, prompt, ids) - plain_logprob(other, prompt, ids))
    return sum(kl) / len(kl)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_reference_may_be_of_any_family_and_size_also_beside_adapters(
    name, lora_rank, mamba, data, tmp_path
):
    drawn = []

    def sample(*given, **settings):
        drawn.append(honest(*given, **settings))
        return drawn[-1]

    honest = common.sample
    flags = {"reference": str(mamba), "steps": 1, "lora_rank": lora_rank, "eval_data": ""}
    with mock.patch.object(common, "sample", sample):
        train(name, tmp_path / "run", data, **flags)
    log, _ = result(tmp_path / "run")
    assert len(drawn) == 1
    assert log[1]["kl/ref"] == pytest.approx(kl_of_plain_forwards(drawn[0], mamba), rel=1e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_reference_is_loaded_in_the_computing_dtype_and_its_head_is_checked(
    name, teacher, data, tmp_path
):
    kept = []

    def load(*given):
        kept.append(honest(*given))
        return kept[-1]

    honest = common.load_reference
    logs = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        with (
            mock.patch.object(common, "load_reference", load),
            mock.patch.object(common, "check_head") as check,
        ):
            train(name, out, data, reference=str(teacher), dtype=dtype, steps=1)
            honest(MODEL, common.start("cpu", dtype))  # to draw best-of-N from: not checked
        paths = [call.args[0].name_or_path for call in check.call_args_list]
        assert paths == [str(MODEL), str(teacher)]
        logs.append(result(out)[0][1]["kl/ref"])
        assert {p.dtype for p in kept[-1].parameters()} == {getattr(torch, dtype)}
        assert not any(p.requires_grad for p in kept[-1].parameters())
    # few samples, and in bfloat16 some are others
    assert all(kl > 0.1 for kl in logs), logs


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}, {"dtype": "bfloat16"}])
def test_the_model_itself_by_name_is_the_default_reference(flags, data, tmp_path):
    """With adapters no second model is loaded then."""
    with mock.patch.object(common, "load", wraps=common.load) as load:
        train("reinforce", tmp_path / "run", data, reference=str(MODEL), **flags)
    log, _ = result(tmp_path / "run")
    assert log[1]["kl/ref"] == 0 and log[2]["kl/ref"] != 0
    assert load.call_count == (1 if "lora_rank" in flags else 2)


class Loading(Exception):
    """The first model is about to be loaded."""


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "flags, held",
    [
        ({"reference": "mamba"}, True),
        ({"reference": "mamba", "lora_rank": 4}, True),
        ({"reference": "mamba", "steps": 0}, False),
        ({}, True),
        ({"lora_rank": 4}, False),
        ({"beta": 0.0}, False),
    ],
)
def test_the_reference_is_in_the_memory_that_is_said(name, flags, held, mamba, data, tmp_path):
    """By its own size, once, and beside adapters as well; not if it is the model without them."""
    counted = []

    def lasting_memory(*given, **named):
        counted.append(honest(*given, **named))
        return counted[-1]

    honest = common.lasting_memory
    if "reference" in flags:
        flags = flags | {"reference": str(mamba)}
    with (
        mock.patch.object(common, "lasting_memory", lasting_memory),
        mock.patch.object(common, "load_policy", side_effect=Loading),
        pytest.raises(Loading),
    ):
        train(name, tmp_path / "run", data, **flags)
    learning = 2 if name == "ppo" and flags.get("steps") != 0 else 1
    args = types.SimpleNamespace(lora_alpha=32.0, lora_rank=flags.get("lora_rank", 0))
    world = common.World(0, 1, torch.device("cpu"), torch.float32)
    wanted = honest(MODEL, world, learning, 0, args)[1]
    if held:
        wanted += honest(flags.get("reference", MODEL), world, 0, 1)[1]
    assert sum(needed for _, needed in counted) == pytest.approx(wanted)


def test_a_distillation_resumes_bit_for_bit_and_with_no_other_reference(
    teacher, mamba, data, tmp_path, capsys
):
    flags = DISTIL | {"reference": str(teacher)}
    train("reinforce", tmp_path / "a", data, **flags)
    train("reinforce", tmp_path / "b", data, **flags)
    lose_last_step(tmp_path / "b")
    for other in (str(MODEL), str(mamba)):
        with pytest.raises(SystemExit):
            train("reinforce", tmp_path / "b", data, resume=True, **flags | {"reference": other})
        said = capsys.readouterr().err
        assert f"--reference is {other}, but" in said and str(teacher) in said
    train("reinforce", tmp_path / "b", data, resume=True, **flags)
    check_equal(result(tmp_path / "a"), result(tmp_path / "b"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_reward_scores_are_0_and_right_answers_are_counted_where_there_are_answers(
    name, teacher, data, tmp_path, capsys
):
    """Training prompts have no answers here. All scores are equal, and no warning complains of it."""
    (tmp_path / "sort_train.jsonl").write_text('{"prompt": "52="}\n{"prompt": "9310="}\n')
    (tmp_path / "sort_test.jsonl").write_text((data / "sort_test.jsonl").read_text())
    flags = {"reward": "none", "reference": str(teacher), "learning_rate": 1e-4}
    train(name, tmp_path / "run", tmp_path, **flags)
    log, _ = result(tmp_path / "run")
    assert [row.get("reward") for row in log[1:]] == [0, 0, 0] and log[1]["grad_norm"] > 0
    # a score that is 0 in any case is not logged
    assert "eval/reward" not in log[0] and 0 < log[0]["eval/exact"] < 1
    said = capsys.readouterr().out
    assert "no completion was right" not in said and "score alike" not in said


def test_two_processes_distil_as_one_does(teacher, tmp_path):
    rows = [{"prompt": f"{'9241736'[: 3 + i % 5]}="} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = DISTIL | {"reference": str(teacher), "data": str(tmp_path / "d.jsonl"), "eval_data": ""}
    flags |= {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2, "warmup": 2}
    flags |= {"learning_rate": 2e-4, "tokens_per_micro_batch": 60}
    train_on_given_samples({"reinforce": flags}, tmp_path / "1")
    run(train_on_given_samples, 2, {"reinforce": flags}, tmp_path / "2")
    (one, weights), (two, others) = (result(tmp_path / n / "reinforce") for n in "12")
    for a, b in zip(one[1:], two[1:], strict=True):
        assert a["kl/ref"] != 0 and b["kl/ref"] == pytest.approx(a["kl/ref"], rel=1e-4)
    for key, weight in weights["policy"].items():
        assert (weight - others["policy"][key]).abs().max() < 1e-5, key


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    "flags, words",
    [
        ({"beta": 0.0}, "--reference: only the KL penalty uses it, so it needs a --beta above 0"),
        ({"reference": "", "reward": "none", "beta": 0.0}, "--reward none"),
        ({"reference": "{}/words"}, "has other tokens than --model"),
        ({"reference": "{}/nowhere"}, "no such folder"),
        ({"reference": "{}/judge"}, "this is a reward model, no language model"),
        ({"reference": "{}/short"}, "and the model's context 4"),
        ({"ref_update_every": 2}, "--ref_update_every would replace the --reference"),
    ],
)
def test_a_reference_that_cannot_be_used_is_one_sentence_and_no_folder(
    name, flags, words, teacher, data, tmp_path, capsys
):
    if "ref_update_every" in flags and name != "grpo":
        pytest.skip("a flag of grpo.py")
    model = family("llama")
    for folder in ("words", "judge", "short"):
        if folder == "short":
            size = common.read_config(MODEL).vocab_size
            model = family("llama", vocab_size=size, max_position_embeddings=4)
        model.save_pretrained(tmp_path / folder)
        tokens = make_tokenizer() if folder == "words" else common.load_tokenizer(MODEL)
        tokens.save_pretrained(tmp_path / folder)
    config = json.loads((tmp_path / "judge" / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "judge" / "config.json").write_text(json.dumps(config))
    flags = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in flags.items()}
    module = importlib.import_module(name)
    task = {"data": f"{data}/sort_train.jsonl", "eval_data": "", "device": "cpu", "beta": 0.1}
    task |= {"reference": str(teacher), "out": str(tmp_path / "run")}
    with (
        mock.patch.object(common, "load_policy", side_effect=AssertionError),
        pytest.raises(SystemExit) as stopped,
    ):
        module.train(module.Args(**task | flags))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and words in lines[0]
    assert not (tmp_path / "run").exists()
