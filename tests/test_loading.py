"""Loading: text to ids, models without dropout, heads, optimizer, and a run's folder that nothing can spoil."""

import ast
import collections
import dataclasses
import errno
import importlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass, make_dataclass

import pytest
import torch
import transformers
from conftest import FAMILIES, ROOT, WORDS, family, make_tokenizer

import common
from common import (
    World,
    encode,
    encode_completion,
    encode_prompt,
    load_policy,
    load_reference,
    load_scalar,
)

CPU = World(0, 1, torch.device("cpu"), torch.float32)
TEMPLATE = "<bos>{% for m in messages %} {{ m['role'][0] == 'u' and 'w10' or 'w11' }} {{ m['content'] }} <eos>{% endfor %} w12"


def says(capsys, *parts):
    """The one line of an error, which names the flag or file and what to do."""
    line = capsys.readouterr().err
    assert (
        line.startswith("error: ") and line.count("\n") == 1 and all(str(p) in line for p in parts)
    ), line


# --- text to ids ---


def metaspace(scheme):
    """A tokenizer that puts a space before every text (always), or before the first (first)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<pad>", "<eos>", "\u2581", "\u2581a", "a", "b", ":", "\n", "<u>", "<t>"]
    core = Tokenizer(models.Unigram([(piece, -1.0 - i / 10) for i, piece in enumerate(pieces)], 0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<u>", "<t>"]})
    return tokenizer


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_a_given_answer_has_the_ids_of_the_whole_text_even_if_the_tokenizer_adds_a_space(scheme):
    """Otherwise demonstrations teach a space, as Llama-2's and Mistral's tokenizers write one.
    After raw text a policy may draw it."""
    tokenizer = metaspace(scheme)
    space = tokenizer.convert_tokens_to_ids("\u2581a")
    plain = tokenizer.convert_tokens_to_ids("a")
    assert tokenizer("ab", add_special_tokens=False).input_ids[0] == space
    eos = tokenizer.eos_token_id
    drawn = [space, tokenizer.convert_tokens_to_ids("b")]
    assert common.to_text(tokenizer, [*drawn, eos]) == "ab", "the space is not in the text"
    assert encode_completion(tokenizer, "ab", prompt="b:") == [*drawn, eos], "after raw text it is"
    asked = encode(tokenizer, "b:")
    assert common.encode_answer(tokenizer, "b:", "ab") == [*asked, *drawn, eos]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<u>' if m['role'] == 'user' else '<t>\n' }}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<t>\n' }}{% endif %}"
    )
    asked = encode_prompt(tokenizer, "b:")
    assert encode_completion(tokenizer, "ab", True, "b:")[0] == plain
    assert asked + encode_completion(tokenizer, "ab", True, "b:") == [
        *common.encode_answer(tokenizer, "b:", "ab"),
        eos,
    ]


def test_an_answer_whose_first_token_would_reach_into_the_prompt_is_tokenized_alone():
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "ab": 4}
    core = Tokenizer(models.BPE(words, [("a", "b")]))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>"
    )
    assert tokenizer("ab").input_ids == [4]
    assert common.encode_after(tokenizer, "a", "b") == [3]
    words = [("<unk>", 0.0), ("a", -1.0)]  # three unknown characters in a row become one
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(words, 0))
    )
    assert common.encode_after(tokenizer, "a?", "??") == [0]
    assert common.encode_after(tokenizer, "a?", "") == []


def test_a_raw_prompt_ends_where_its_text_ends_even_if_the_tokenizer_adds_an_end():
    from tokenizers import processors

    tokenizer = make_tokenizer()
    core = tokenizer.backend_tokenizer
    core.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    assert tokenizer("w5 w6").input_ids == [5, 6, 1]
    assert encode(tokenizer, "w5 w6") == [5, 6]
    assert encode(tokenizer, "w5 <eos>") == encode(make_tokenizer(), "w5 <eos>") == [5, 1]
    assert encode(make_tokenizer(bos="<eos>"), "") == [1], "an empty prompt is a BOS, as in OPT"


def test_a_tokenizer_without_a_chat_template_is_not_taken_if_there_is_another(folder, monkeypatch):
    """With mistral_common installed transformers takes that library's tokenizer, without one."""
    honest = common.AutoTokenizer.from_pretrained
    MistralCommonBackend = type("MistralCommonBackend", (), {})
    asked = []

    def from_pretrained(path, mistral_format=None, **settings):
        asked.append(mistral_format)
        if mistral_format is None:
            return MistralCommonBackend()
        return honest(path, **settings)

    monkeypatch.setattr(common.AutoTokenizer, "from_pretrained", from_pretrained)
    assert common.load_tokenizer(folder).eos_token_id is not None
    assert asked == [False]


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path):
    """Editors on Windows write one."""
    (tmp_path / "data.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "5="}\n')
    assert common.read_json(tmp_path / "data.jsonl", "--data") == [(1, {"prompt": "5="})]


@pytest.mark.parametrize("key", ["prompt", "question", "chosen", "rejected"])
def test_a_message_in_parts_of_text_is_one_text(key, tmp_path):
    parts = [{"type": "text", "text": "5"}, {"type": "text", "text": "2="}]
    parts.append({"type": "text", "text": None})
    rows = [{key: [{"role": "user", "content": parts}], "more": [{"content": parts}]}]
    (tmp_path / "data.jsonl").write_text(json.dumps(rows[0]))
    [(_, row)] = common.read_json(tmp_path / "data.jsonl", "--data")
    assert row == rows[0] | {key: [{"role": "user", "content": "52="}]}


def test_a_rendered_template_has_one_bos_and_its_own_ends_only():
    tokenizer = make_tokenizer(bos="<bos>", template=TEMPLATE)
    assert encode_prompt(tokenizer, "w5") == [2, 10, 5, 1, 12]
    assert encode_prompt(tokenizer, "w5", system="w6") == [2, 11, 6, 1, 10, 5, 1, 12]
    assert encode_prompt(tokenizer, [{"role": "user", "content": "w5"}]) == [2, 10, 5, 1, 12]
    talk = [{"role": "system", "content": "w7"}, {"role": "user", "content": "w5"}]
    assert encode_prompt(tokenizer, talk, system="w6") == [2, 11, 7, 1, 10, 5, 1, 12], (
        "a row's own system message stays"
    )
    talk = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    assert encode_prompt(tokenizer, talk) == [2, 10, 5, 1, 11, 6, 1, 12], "a new turn begins"


def test_raw_text_gets_what_the_tokenizer_puts_before_it():
    tokenizer = make_tokenizer(bos="<bos>", template=TEMPLATE)
    assert encode_prompt(tokenizer, "w5", chat=False) == [2, 5]
    assert encode(tokenizer, "<bos> w5") == [2, 5]
    assert encode(make_tokenizer(), "w5") == [5]


def test_a_completion_ends_with_eos_and_begins_with_nothing_extra():
    assert encode_completion(make_tokenizer(bos="<bos>"), "w5 w6") == [5, 6, 1]


GEMMA = "{% for m in messages %}<start> {{ m.role }} {{ m.content }} <end> w4 {% endfor %}{% if add_generation_prompt %}<start> w12{% endif %}"


def test_the_line_to_try_asks_as_the_model_was_trained():
    args = Namespace(chat=True, system="w9", max_new_tokens=5)

    def asked(tokenizer, prompt):
        line = common.line_to_try(ROOT, tokenizer, prompt, args)
        call = ast.parse(line).body[0].value.args[0]
        return ast.literal_eval(call.args[0])

    raw, chat = make_tokenizer(), make_tokenizer(template=TEMPLATE)
    system, user = {"role": "system", "content": "w9"}, {"role": "user", "content": "w5"}
    assert asked(chat, "w5") == [system, user] == asked(chat, [user])
    assert asked(raw, "w5") == asked(raw, "w9\nw5") == "w9\nw5"
    args.system = ""
    assert asked(chat, "w5") == [user] and asked(raw, "w5") == "w5"
    args.chat = False
    assert asked(chat, "w5") == "w5" and asked(chat, "w5" * 200) == "your prompt"


def test_in_a_chat_an_answer_ends_as_the_template_ends_a_turn():
    """Gemma's and Phi's turns do not end with their EOS; a model taught to say EOS would never have seen it there."""
    tokenizer = make_tokenizer(template=GEMMA)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<end>"]})
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert end > 40 and encode_completion(tokenizer, "w5", True) == [5, end]
    assert encode_completion(tokenizer, "w5") == [5, 1], "raw text ends with EOS"
    assert encode_completion(tokenizer, "w5 <eos>") == [5, 1], "and once, where it does already"
    assert common.stop_ids(family("llama"), tokenizer) == [1, end], "and the sampler knows it"
    tokenizer.chat_template = GEMMA.replace(" <end>", " w7 <end>")
    assert common.turn_end(tokenizer) == 1, "w7 is no end, and after it none is looked for"
    named = {"default": GEMMA, "tool_use": TEMPLATE}  # several templates, as some models have them
    tokenizer.chat_template = named
    assert common.stop_ids(family("llama"), tokenizer) == [1, end]
    for template in (
        TEMPLATE,
        TEMPLATE.replace("<eos>", "w4"),
        "<bos> said",
        "{{ raise_exception('no') }}",
        None,
    ):
        tokenizer = make_tokenizer(bos="<bos>", template=template)
        assert encode_completion(tokenizer, "w5", True) == [5, 1] and common.stop_ids(
            family("llama"), tokenizer
        ) == [1]


THINKING = """{% for m in messages %}<start> {{ m.role }} \
{% if m.role == 'assistant' %}{% if '</think>' in m.content %}{{ m.content.replace('</think>', ' </think> ') }}\
{% else %}<think> </think> {{ m.content }}{% endif %}{% else %}{{ m.content }}{% endif %} <eos> \
{% endfor %}{% if add_generation_prompt %}<start> assistant \
{% if enable_thinking is defined and not enable_thinking %}<think> </think> {% endif %}{% endif %}"""


def thinker(tmp_path, template_args=""):
    """A tokenizer as thinking models have them: a given answer is written after an empty thought."""
    tokenizer = make_tokenizer(template=THINKING)
    tokenizer.add_tokens(["<start>", "<think>", "</think>"])
    family("llama", vocab_size=60).save_pretrained(tmp_path / "thinker")
    tokenizer.save_pretrained(tmp_path / "thinker")
    return common.load_tokenizer(tmp_path / "thinker", template_args)


@pytest.mark.parametrize("given, thoughts", [("", 1), ("true", 1), ("false", 0)])
def test_prompt_and_given_answer_are_what_the_template_writes_of_both(given, thoughts, tmp_path):
    """An answer from a file must be the sequence that a reward model reads. With thinking off the
    empty thought is part of the prompt; otherwise the answer begins with it."""
    tokenizer = thinker(tmp_path, f'{{"enable_thinking": {given}}}' if given else "")
    thought = tokenizer("<think> </think>").input_ids
    talk = [{"role": "system", "content": "w7"}, {"role": "user", "content": "w8"}]
    for prompt, system in (("w8", ""), ("w8", "w7"), (talk, "")):
        for answer in ("w5 w6", "w5", " w6 ", "", "<think> w9 </think> w5"):
            asked = encode_prompt(tokenizer, prompt, system)
            answered = encode_completion(tokenizer, answer, True, prompt, system)
            whole = common.encode_answer(tokenizer, common.messages(prompt, system), answer)
            own = "<think>" in answer
            if not (
                own and thoughts == 0
            ):  # thinking is off, and the answer thinks: no template writes that
                assert asked + answered == whole, (prompt, answer)
            assert answered[:2].count(thought[0]) == (own or thoughts)


def test_an_answer_without_a_thought_in_its_template_is_what_it_was(tmp_path, capsys):
    plain = make_tokenizer(template=GEMMA.replace("<start> w12", "<start> assistant "))
    for answer in ("w5", " w6 ", "", "<start> w5"):
        assert encode_completion(plain, answer, True, "w8") == encode_completion(
            plain, answer, True
        )
    assert "note" not in capsys.readouterr().out
    common.say_once.cache_clear()
    odd = make_tokenizer(bos="<bos>", template=TEMPLATE)  # writes w12 after an answer, too
    assert encode_completion(odd, "w5", True, "w8") == [5, 1]
    assert "the chat template cannot place given answers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, words",
    [
        ("{enable", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"tokenize": true}', "does not know tokenize"),
        ('{"enable_thinkin_": false}', "does not know enable_thinkin_"),
        ('{"thinking": false}', "does not know thinking"),  # a part of a name that it knows
    ],
)
def test_arguments_of_the_template_that_are_none_get_a_sentence(given, words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        thinker(tmp_path, given)
    says(capsys, "--template_args", words)


DATED = "<bos> {{ strftime_now('w%d') }} {% set y = strftime_now(\"w%m\") %}{{ y }} {{ messages[0].content }}"


def test_templates_that_print_the_date_print_the_same_one_in_all_runs(tmp_path, monkeypatch):
    """With today's, dpo.py's --resume failed the next day, and the other scripts went on with other
    prompts."""
    family("llama").save_pretrained(tmp_path / "m")
    make_tokenizer(template=DATED).save_pretrained(tmp_path / "m")
    monkeypatch.setattr(common, "DATE", common.DATE.replace(month=11, day=12))
    tokenizer = common.load_tokenizer(tmp_path / "m")
    assert encode_prompt(tokenizer, "w5") == make_tokenizer()("<bos> w12 w11 w5").input_ids


def test_a_saved_model_knows_what_ends_its_answers(tmp_path):
    tokenizer = make_tokenizer(template=GEMMA)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<end>"]})
    family("llama", vocab_size=60).save_pretrained(tmp_path / "m")
    common.save_model(load_policy(tmp_path / "m", CPU), tokenizer, tmp_path / "saved", CPU)
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id
    assert ends == [1, tokenizer.convert_tokens_to_ids("<end>")]


def test_messages_without_a_template_are_a_mistake(capsys):
    with pytest.raises(SystemExit, match="2"):
        encode_prompt(make_tokenizer(), [{"role": "user", "content": "w5"}])
    says(capsys, "no chat template")


def test_prompts_as_long_as_may_be_are_kept_and_longer_ones_left_out_and_counted(tmp_path, capsys):
    rows = [{"prompt": words, "answer": "1"} for words in ("w5 w6", "w5 w6 w7 w8", "w5 w6 w7", " ")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = Namespace(system="", chat=True, max_prompt_tokens=3)
    kept = common.load_prompts(tmp_path / "rows.jsonl", "--data", make_tokenizer(), args, "x")
    assert kept == [([5, 6], rows[0]), ([5, 6, 7], rows[2])]
    assert capsys.readouterr().out == ("--data: 2 of 4 prompts left out (--max_prompt_tokens 3)\n")


@pytest.mark.parametrize("listed, wanted", [(None, [1]), (5, [1, 5]), ([7, 1, 5], [1, 5, 7])])
def test_the_stop_set_is_the_union(listed, wanted):
    """Phi's runs looked 97 % cut off because one of its EOS ids was not known (trl 7039)."""
    model = family("llama")
    model.generation_config.eos_token_id = listed
    assert common.stop_ids(model, make_tokenizer()) == wanted


def test_eos_ends_a_text_where_the_template_and_the_generation_config_name_other_ends():
    model, tokenizer = family("llama"), make_tokenizer(template=GEMMA)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<end>"]})
    model.generation_config.eos_token_id = [7]
    assert common.stop_ids(model, tokenizer) == [1, 7, tokenizer.convert_tokens_to_ids("<end>")]


def test_a_tokenizer_without_pad_gets_eos_for_it(tmp_path, capsys):
    for name, tokenizer in (
        ("a", make_tokenizer(pad=None)),
        ("b", make_tokenizer(pad="<beyond the vocabulary>")),
    ):
        family("llama").save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        assert common.load_tokenizer(tmp_path / name).pad_token_id == 1
    make_tokenizer(pad=None, eos=None).save_pretrained(tmp_path / "a")
    with pytest.raises(SystemExit):
        common.load_tokenizer(tmp_path / "a")
    says(capsys, "no EOS token")


# --- models ---


@pytest.fixture
def folder(tmp_path):
    family("llama").save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    "name",
    ["gpt2", "llama", "qwen2", "falcon", "gpt_neox", "bloom", "opt", "phi3", "granite", "mixtral"],
)
def test_dropout_is_off_in_training_and_kept_in_the_saved_config(name, tmp_path):
    """KL in the thousands at step 1 (trl 3500). Each family has its own names for it, and its own places to apply it."""
    config = family(name).config
    drops = {
        k: 0.5
        for k, v in vars(config).items()
        if isinstance(v, float) and ("drop" in k or "jitter" in k)
    }
    assert drops or name in ("gpt_neox",), "this family has a dropout to test with"
    family(name, **drops).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = load_policy(tmp_path, CPU)
    ids = torch.randint(3, 48, (2, 12))
    assert model.training
    out = [model(input_ids=ids).logits for _ in range(2)]
    assert torch.equal(*out) and torch.equal(out[0], model.eval()(input_ids=ids).logits)
    common.save_model(model, make_tokenizer(), tmp_path / "saved", CPU)
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert all(getattr(saved, k) == 0.5 for k in drops)


def test_what_is_trained_is_what_the_saved_model_computes(tmp_path):
    """PhiMoE's router has a margin that is called a jitter and acts in evaluation, too. In training mode it
    draws experts at random; with a margin of 0 it would take them for sure, and be another function."""
    family("phimoe", router_jitter_noise=0.4, input_jitter_noise=0.4).save_pretrained(tmp_path)
    policy, plain = (
        load_policy(tmp_path, CPU),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(),
    )
    ids = torch.arange(3, 27).view(2, 12)
    common.sample(
        policy, make_tokenizer(), [[5]], max_new_tokens=2
    )  # which leaves every module's mode as it was
    for _ in range(2):
        assert torch.equal(policy(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_no_part_of_a_config_keeps_its_noise(tmp_path):
    """DBRX keeps dropout and jitter in configs of its own inside the config."""
    settings = {"attn_config": {"attn_pdrop": 0.3}, "ffn_config": {"moe_jitter_eps": 0.3}}
    transformers.AutoConfig.for_model("dbrx", resid_pdrop=0.3, **settings).save_pretrained(tmp_path)
    config = common.read_config(tmp_path)
    assert (
        config.resid_pdrop,
        config.attn_config.attn_pdrop,
        config.ffn_config.moe_jitter_eps,
    ) == (0, 0, 0)


def test_a_saved_model_is_an_ordinary_folder(folder, tmp_path):
    """The original generation config comes along untouched (transformers 48016), the tokenizer too."""
    settings = transformers.GenerationConfig.from_pretrained(folder)
    settings.update(do_sample=True, top_p=0.8, eos_token_id=[1, 9])
    settings.save_pretrained(folder)
    policy = load_policy(folder, CPU)
    common.sample(policy, make_tokenizer(), [[5]], max_new_tokens=3)
    with torch.no_grad():
        policy.lm_head.weight.add_(1.0)
    for _ in range(2):  # a second save takes the first one's place
        common.save_model(policy, common.load_tokenizer(folder), tmp_path / "out", CPU)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.dtype == torch.float32
    for (k, a), b in zip(policy.state_dict().items(), plain.state_dict().values()):
        assert torch.equal(a, b), k
    was, now = settings.to_dict(), plain.generation_config.to_dict()
    assert {k: v for k, v in was.items() if k != "transformers_version"} == {
        k: v for k, v in now.items() if k != "transformers_version"
    }
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("w7").input_ids == [7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"], "nothing is left beside it"


@pytest.mark.parametrize(
    "template", [None, GEMMA]
)  # with the second, the saved settings have one more end
def test_a_temperature_without_do_sample_does_not_stop_a_model_from_being_saved(
    template, folder, tmp_path
):
    """Llama-2's and Vicuna's folders have it, and save_pretrained refuses to write it: a run failed after its last
    step, and again with --resume."""
    settings = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    tokenizer = make_tokenizer(template=template)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<start>", "<end>"]} if template else {}
    )
    policy = load_policy(folder, CPU)
    before = policy.generation_config.to_dict()
    common.save_model(policy, tokenizer, tmp_path / "out", CPU)
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ends = [1, tokenizer.convert_tokens_to_ids("<end>")] if template else 1
    assert saved.pop("transformers_version") and saved == settings | {"eos_token_id": ends}
    assert policy.generation_config.to_dict() == before
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out"
        ).generation_config.temperature
        == 0.9
    )


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_whatever_cannot_be_written_is_a_sentence_and_leaves_no_half_folder(
    part, folder, tmp_path, monkeypatch
):
    policy, tokenizer = load_policy(folder, CPU), make_tokenizer()
    broken = tokenizer if part == "tokenizer" else policy.config
    monkeypatch.setattr(type(broken), "save_pretrained", lambda *_, **__: 1 / 0)
    if part == "config":  # transformers writes it, too, and before
        monkeypatch.setattr(policy, "save_pretrained", lambda path, **_: path.mkdir())
    with pytest.raises(common.Stop, match="out could not be written"):
        common.save_model(policy, tokenizer, tmp_path / "out", CPU)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_the_policy_learns_in_float32_whatever_the_file_holds(folder):
    """transformers 5 loads the checkpoint's dtype by default (trl 4770)."""
    family("llama").bfloat16().save_pretrained(folder)
    assert {p.dtype for p in load_policy(folder, CPU).parameters()} == {torch.float32}
    reference = load_reference(folder, CPU)
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointing_gives_the_same_gradient_and_is_really_on(name, tmp_path):
    family(name).save_pretrained(tmp_path)
    ids, grads, kept = torch.randint(3, 48, (2, 12)), [], []
    for on in (False, True):
        model, count = load_policy(tmp_path, CPU, gradient_checkpointing=on), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, c=count: c.append(x.numel()) or x, lambda x: x
        ):
            loss = model(input_ids=ids, use_cache=False).logits.square().mean()
        kept.append(sum(count))
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*grads))
    assert kept[1] < 0.6 * kept[0]


SCALAR = [f for f in FAMILIES if f not in ("mamba", "olmo2", "granite")]


@pytest.mark.parametrize("name", SCALAR)
def test_a_scalar_head_for_every_family_that_has_a_classifier(name, tmp_path):
    """Its values are hooked out of the head for every token; a row's score is the value at its last real token."""
    family(name).save_pretrained(tmp_path)
    critic = load_scalar(tmp_path, CPU, make_tokenizer(), head_std=0)
    values = []
    common.scalar_head(critic).register_forward_hook(lambda m, i, out: values.append(out))
    ids = torch.tensor([[7, 8, 9, 0, 0], [7, 8, 9, 10, 11]])
    assert critic(input_ids=ids, attention_mask=(ids > 0).long()).logits.abs().max() == 0
    assert values[0].shape == (2, 5, 1) and values[0].abs().max() == 0
    reward = load_scalar(tmp_path, CPU, make_tokenizer(), head_std=1.0)
    common.scalar_head(reward).register_forward_hook(lambda m, i, out: values.append(out))
    scores = reward(input_ids=ids, attention_mask=(ids > 0).long()).logits[:, 0]
    torch.testing.assert_close(scores, values[1][torch.arange(2), torch.tensor([2, 4]), 0])
    alone = reward(input_ids=ids[:1, :3]).logits[0, 0]
    assert abs(scores[0] - alone) < 1e-5 and abs(scores[0]) > 1e-3
    assert reward.config.problem_type == "regression" and reward.config.num_labels == 1


@pytest.mark.parametrize("head_std", [0.0, 0.5])
def test_a_new_heads_bias_is_0_and_its_weights_have_the_spread_asked_for(head_std, tmp_path):
    """A folder's own head is forgotten, and a bias that is drawn would shift every score."""
    config = transformers.BertConfig(
        vocab_size=48,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=1,
    )
    model = transformers.BertForSequenceClassification(config)
    torch.nn.init.constant_(model.classifier.bias, 3.0)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    head = common.scalar_head(load_scalar(tmp_path, CPU, make_tokenizer(), head_std))
    assert head.weight.shape == (1, 64) and head.bias.item() == 0
    assert head.weight.std().item() == pytest.approx(head_std, rel=0.3)
    head = common.scalar_head(load_scalar(tmp_path, CPU, make_tokenizer()))
    torch.testing.assert_close(head.weight, model.classifier.weight)
    assert head.bias.item() == 3.0, "without a spread the folder's head stays"


def test_a_scalar_model_comes_back_with_the_same_scores(folder, tmp_path):
    """The reward head was lost on save (trl 1379)."""
    reward = load_scalar(folder, CPU, make_tokenizer(), head_std=1.0)
    common.save_model(reward, make_tokenizer(), tmp_path / "rm", CPU)
    again = load_scalar(tmp_path / "rm", CPU, make_tokenizer())
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", dtype=torch.float32
    )
    ids = torch.tensor([[7, 8, 9]])
    assert (
        reward(input_ids=ids).logits.item()
        == again(input_ids=ids).logits.item()
        == plain(input_ids=ids).logits.item()
    )


def test_a_causal_model_is_no_reward_model(folder, capsys):
    """Its head would be random, and every score noise."""
    with pytest.raises(SystemExit):
        load_scalar(folder, CPU, make_tokenizer())
    says(capsys, "no reward model", "score.weight")


@pytest.mark.parametrize(
    "name, settings",
    [
        ("falcon_h1", {"lm_head_multiplier": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
    ],
)
def test_a_head_that_is_not_understood_is_refused(name, settings, tmp_path, capsys):
    family(name, **settings).save_pretrained(tmp_path)
    if name == "falcon_h1":
        with pytest.raises(SystemExit):
            load_policy(tmp_path, CPU)
        says(capsys, "falcon_h1", "logits")
    else:
        load_policy(tmp_path, CPU)


UNKNOWN = {
    "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    "model_type": "unheard_of",
}
KNOWN = {
    "auto_map": {
        name: "code.Model"
        for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification")
    }
}
WORDS_BY_CODE = {"auto_map": {"AutoTokenizer": ["code.Words", None]}, "tokenizer_class": "Words"}


@pytest.mark.parametrize(
    "file, lines",
    [("config.json", UNKNOWN), ("config.json", KNOWN), ("tokenizer_config.json", WORDS_BY_CODE)],
)
def test_no_code_of_a_folder_is_run_though_the_user_would_say_yes(
    file, lines, folder, tmp_path, monkeypatch, capsys
):
    """transformers asks on the terminal, unless it is told, and "y" runs what the folder brings."""
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr("sys.stdin", answers)
    written = tmp_path / "the code was run"
    (folder / "code.py").write_text(f"open({str(written)!r}, 'w')\n")
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | lines))
    steps = [
        lambda: common.load_tokenizer(folder),
        lambda: common.lasting_memory(folder, CPU),
        lambda: load_policy(folder, CPU),
        lambda: load_scalar(folder, CPU, make_tokenizer(), head_std=0),
    ]
    for step in steps:
        try:
            step()  # transformers has classes of its own for the second folder and for the third's model
        except SystemExit:
            says(capsys, folder, "could be loaded")
        assert not written.exists() and answers.tell() == 0, "the user was asked"


def test_two_runs_started_at_once_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exists = type(tmp_path).exists
    monkeypatch.setattr(
        type(tmp_path), "exists", lambda p: False if "runs" in str(p) else exists(p)
    )  # both looked before
    assert common.open_run(Flags(), "x", CPU) != common.open_run(Flags(), "x", CPU)


def test_a_family_without_a_classifier_gets_a_sentence(tmp_path, capsys):
    family("mamba").save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        load_scalar(tmp_path, CPU, make_tokenizer(), head_std=0)
    says(capsys, "no sequence classifier", "mamba")


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: p.write_text("x"), lambda p: None])
def test_a_model_folder_that_is_none(make, tmp_path, capsys):
    make(tmp_path / "x")
    with pytest.raises(SystemExit, match="2"):
        common.read_config(tmp_path / "x")
    says(capsys, tmp_path / "x", "model")


# --- the self-check of shared prompts, where FSDP2 computes ---


def whole_gradient(model):
    """Of a small batch, whole; with what the model computed."""
    ids = torch.arange(3, 27).view(2, 12)
    logprobs = (
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().log_softmax(-1)
    )
    logprobs[..., 5].sum().backward()
    return {
        k: common.whole(p.grad).clone() for k, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 5], [2, 7, 9], [1]])
def test_the_states_of_a_shared_prompt_are_those_of_a_prompt_for_each_row(rows):
    """Also for a part of a group, and in the columns that these rows need."""
    model, prompts = family("llama"), [[5, 6, 7], [8], [9, 10, 11, 12]]
    samples = common.sample(model, make_tokenizer(), prompts, n=4, max_new_tokens=7, seed=1)
    plain, ids, mask = common.completion_states(
        model, dataclasses.replace(samples, rows_per_prompt=1), rows
    )
    shared, *same = common.completion_states(
        model, dataclasses.replace(samples, rows_per_prompt=4), rows
    )
    assert torch.equal(ids, same[0]) and torch.equal(mask, same[1]) and mask.any(0).all()
    torch.testing.assert_close(plain[mask], shared[mask], atol=1e-5, rtol=1e-5)
    whole = torch.cat([samples.prompt_ids[rows], ids], 1)
    seen = torch.cat([samples.prompt_mask[rows], mask], 1)
    P = samples.prompt_ids.shape[1]
    wanted = common.hidden_states(model, whole, seen)[:, P - 1 : -1]
    torch.testing.assert_close(plain[mask], wanted[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next", "olmo_hybrid"])
def test_a_cache_that_ends_a_pass_in_the_middle_turns_sharing_off_and_leaves_no_trace(
    name, bfloat16, tmp_path
):
    """Their linear attention overwrites what backward needs, and says so when half of the gradient is there."""
    if not hasattr(common.FSDPModule, "reset_iter_state"):
        pytest.skip("this torch cannot begin anew after half a pass; the run ends with a sentence")
    family(name).save_pretrained(tmp_path)
    tried, fresh = load_policy(tmp_path, bfloat16), load_policy(tmp_path, bfloat16)
    assert not common.prompts_can_be_shared(tried, bfloat16, False)
    assert all(p.grad is None for p in common.at_rest(tried).parameters())
    for _ in range(2):  # the second adds to the first
        a, b = whole_gradient(tried), whole_gradient(fresh)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].any() for k in a)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name, why",
    [("xglm", "mixed dtype"), ("zamba2", "shared with a parameter"), ("minimax", "dtype")],
)
def test_an_error_that_is_none_of_sharing_is_said_as_what_it_is(
    name, why, checkpointing, bfloat16, tmp_path
):
    family(name).save_pretrained(tmp_path)
    model = load_policy(tmp_path, bfloat16)
    with pytest.raises(
        common.Stop,
        match=f"^the family '{name}' cannot be trained in bfloat16 .*{why}.*--dtype float32",
    ):
        common.prompts_can_be_shared(model, bfloat16, checkpointing)


def test_a_family_with_a_cache_of_its_own_gets_a_sentence(tmp_path):
    with pytest.raises(common.Stop, match="^MiniMaxForCausalLM cannot be sampled from .*cache"):
        common.sample(family("minimax"), make_tokenizer(), [[5, 6]], max_new_tokens=2)


def test_a_reference_computes_as_the_policy_does_to_the_last_bit(bfloat16, tmp_path):
    """Falcon-H1 scales by a float32 buffer: rounded in the reference alone, it made a KL of 0.02 in step 1."""
    family("falcon_h1", ssm_multipliers=[0.35, 0.71, 1.3, 0.9, 1.1]).save_pretrained(tmp_path)
    policy, reference = load_policy(tmp_path, bfloat16), load_reference(tmp_path, bfloat16)
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}, (
        "half the memory of the policy's"
    )
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        a, b = (
            m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            for m in (policy, reference)
        )
    assert torch.equal(a, b)


def remembered(model):
    """How many forwards FSDP2 keeps in mind for a backward."""
    return len(model._get_fsdp_state()._comm_ctx.post_forward_order)


@pytest.mark.parametrize("forward", ["logprobs", "scores", "sample", "pairs"])
def test_a_model_that_never_learns_keeps_nothing_of_its_forwards(forward, bfloat16, folder):
    """FSDP2 notes the blocks of each forward, and keeps the root's whole weights, until a backward ends."""
    import dpo
    import grpo

    if not hasattr(common.FSDPModule, "reset_iter_state"):
        pytest.skip("this torch has no public way to forget them")
    reference, tokenizer = load_reference(folder, bfloat16), make_tokenizer()
    samples = common.as_samples([[5, 6], [7]], [[8, 9, 1], [10, 1]], tokenizer, bfloat16)
    scorer = load_scalar(folder, bfloat16, tokenizer, head_std=0.1)
    call = {
        "logprobs": lambda: grpo.rollout_logprobs(reference, samples, [[[0], [1]]], 1.0),
        "scores": lambda: common.score_ids(scorer, tokenizer, [[5, 6], [7]], bfloat16),
        "sample": lambda: common.sample(reference, tokenizer, [[5, 6]], max_new_tokens=3),
        "pairs": lambda: dpo.score_pairs(
            reference,
            tokenizer,
            [([5, 6], [8, 9, 1], [10, 1])],
            False,
            Namespace(tokens_per_micro_batch=99),
            bfloat16,
        ),
    }[forward]
    model = scorer if forward == "scores" else reference
    for _ in range(10):
        call()
    assert remembered(model) == 0
    assert all(isinstance(p, common.DTensor) for p in model.parameters()), (
        "the root's weights are shards again"
    )


def test_one_process_does_not_divide_its_gradient_by_1(bfloat16, folder):
    """A division copies the whole gradient of a block; one process has nothing to sum or to average."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Divisions(TorchDispatchMode):
        sizes = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.div:
                self.sizes = (*self.sizes, args[0].numel())
            return function(*args, **(kwargs or {}))

    sharded, plain = load_policy(folder, bfloat16), load_policy(folder, CPU)
    block = sum(p.numel() for p in plain.model.layers[0].parameters())
    with Divisions() as seen:
        gradient = whole_gradient(sharded)
    assert block not in seen.sizes
    for name, value in whole_gradient(plain).items():
        assert (gradient[name] - value).norm() < 0.1 * value.norm(), name


# --- memory ---


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parameter_count_is_exact_without_loading(name, tmp_path):
    model = family(name)
    model.config.save_pretrained(tmp_path)
    assert common.lasting_memory(tmp_path, CPU)[0] == sum(p.numel() for p in model.parameters())


def test_memory_counts_what_lasts(folder):
    """4 bytes each for weight and gradient, 8 for Adam; a second learning model doubles that; a
    frozen one has no more than its weights; N processes share it."""
    n = sum(p.numel() for p in family("llama").parameters())
    assert common.lasting_memory(folder, CPU) == (n, 16 * n)
    assert common.lasting_memory(folder, CPU, learning=2, frozen=1) == (n, 36 * n)
    half = World(0, 4, CPU.device, torch.bfloat16)
    assert common.lasting_memory(folder, half, frozen=2) == (n, 5 * n)
    assert common.memory_used(CPU) > 2**20


def test_memory_counts_a_reward_model_with_its_own_head(tmp_path):
    """It is counted by its own size, and a classifier has no head of a language model. Some
    families are classifiers only."""
    config = family("qwen2", tie_word_embeddings=False).config
    wanted = {}
    for name, auto in (
        ("policy", transformers.AutoModelForCausalLM),
        ("judge", transformers.AutoModelForSequenceClassification),
    ):
        model = auto.from_config(config)
        model.save_pretrained(tmp_path / name)
        wanted[name] = sum(p.numel() for p in model.parameters())
        assert common.lasting_memory(tmp_path / name, CPU)[0] == wanted[name]
    assert wanted["judge"] < wanted["policy"]
    distil = transformers.DistilBertConfig(vocab_size=64, dim=16, n_heads=2, n_layers=1)
    for name in ("DistilBertForSequenceClassification", "DistilBertForRewardModel"):
        distil.architectures = [name]
        distil.save_pretrained(tmp_path / "distil")
        assert common.lasting_memory(tmp_path / "distil", CPU)[0] > 0


def introduced(folder, tmp_path, flags=None, **changes):
    args = Namespace(model=str(folder), steps=3, resume=False, out="x")
    args.learning_rate = 1e-6
    args.warmup = 0
    args.lora_rank = 0
    vars(args).update(flags or {})
    writer, bar = common.begin_log(tmp_path, args, CPU, make_tokenizer(), [5, 6], 0, **changes)
    writer.close()
    bar.close()


def test_a_run_that_cannot_fit_is_warned_of_before_anything_is_loaded(
    folder, tmp_path, capsys, monkeypatch
):
    introduced(folder, tmp_path)
    said = capsys.readouterr().out
    assert "warning" not in said and "'w5 w6'" in said and "3 steps, learning rate 1e-06" in said
    n = sum(p.numel() for p in family("llama").parameters())
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1}.get(name, 32 * n))
    introduced(folder, tmp_path, learning=2)
    assert "warning" not in capsys.readouterr().out, "just enough"
    introduced(folder, tmp_path, learning=2, frozen=["", str(folder)])
    assert "warning: this does not fit" in capsys.readouterr().out


def test_with_adapters_only_the_policys_own_reference_is_no_second_model(
    folder, tmp_path, monkeypatch
):
    """reward_model.py loads its --policy also if it is the folder of --model."""
    counted = []
    honest = common.lasting_memory
    monkeypatch.setattr(
        common,
        "lasting_memory",
        lambda *given, **named: counted.append(1) or honest(*given, **named),
    )
    adapters = {"lora_rank": 4, "lora_alpha": 8.0}
    for flags, changes, count in (
        (adapters, {"reference": str(folder)}, 1),
        ({}, {"reference": str(folder)}, 2),
        (adapters, {"frozen": [str(folder)]}, 2),
    ):
        counted.clear()
        introduced(folder, tmp_path, flags, **changes)
        assert len(counted) == count


def test_running_out_of_memory_names_the_flags_that_help(tmp_path):
    """Held-out completions are as long as --max_new_tokens, in scripts without a rollout, too."""
    for flags, words in (
        ({"max_new_tokens": 9}, "lower --max_new_tokens in a new run (sampling)"),
        ({"max_new_tokens": 9, "sample_rows": None}, "lower --sample_rows, or --max_new_tokens in"),
    ):
        args = Namespace(steps=0, out="o", **flags)
        with pytest.raises(SystemExit) as stopped, common.short_errors(tmp_path, args, None):
            raise torch.OutOfMemoryError("no more")
        assert "--tokens_per_micro_batch" in str(stopped.value.code) and words in str(
            stopped.value.code
        )


# --- optimizer ---


def test_schedules_rise_and_fall_as_said():
    def rates(**kw):
        return [common.learning_rate_at(s, 10, 1.0, **kw) for s in range(1, 11)]

    assert rates() == [1.0] * 10
    assert rates(warmup=3)[:4] == [0.25, 0.5, 0.75, 1.0] and rates(warmup=3)[4:] == [1.0] * 6
    torch.testing.assert_close(rates(schedule="linear"), [1 - i / 10 for i in range(10)])
    torch.testing.assert_close(rates(schedule="cosine")[5], 0.5)
    assert all(0 < r <= 1 for kind in ("linear", "cosine") for r in rates(schedule=kind, warmup=2))


def test_the_optimizer_is_adamw_with_short_memories_and_no_decay():
    """Two steps with numbers of its own; a weight that is frozen is none of its business."""
    layer = torch.nn.Linear(2, 2, bias=True)
    layer.bias.requires_grad_(False)
    optimizer = common.make_optimizer(layer, 0.01)
    [group] = optimizer.param_groups
    assert len(group["params"]) == 1 and group["params"][0] is layer.weight
    wanted = layer.weight.detach().double().clone()
    first, second = torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
    for step in (1, 2):
        gradient = torch.tensor([[1.0, -2.0], [3.0, 0.5]]) * (-0.3) ** step
        layer.weight.grad = gradient.clone()
        optimizer.step()
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        way = (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        wanted -= 0.01 * way
    torch.testing.assert_close(layer.weight.double(), wanted, atol=1e-6, rtol=1e-5)


def test_a_run_begins_with_its_own_seed():
    """A new scalar head is drawn from it."""
    drawn = []
    for seed in (3, 3, 4):
        common.start("cpu", seed=seed)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] != drawn[2]


def test_clipping_equals_torchs_and_reports_what_is_not_finite():
    a, b = family("llama"), family("llama")
    for model in (a, b):
        model(input_ids=torch.arange(3, 12)[None]).logits.square().sum().backward()
    norm = common.clip_gradients(a, 0.5)
    assert abs(norm - torch.nn.utils.clip_grad_norm_(b.parameters(), 0.5).item()) < 1e-3 * norm
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-8)
    small = {k: p.grad.clone() for k, p in a.named_parameters()}
    common.clip_gradients(a, 1.0)
    assert all(torch.equal(p.grad, small[k]) for k, p in a.named_parameters()), (
        "a small gradient is left alone"
    )
    a.model.norm.weight.grad[0] = float("inf")
    assert not math.isfinite(common.clip_gradients(a, 0.5)), "the scripts do not step on it"


# --- a run ---


@dataclass
class Flags:
    out: str = ""
    resume: bool = False
    steps: int = 10
    save_every: int = 5
    learning_rate: float = 0.1
    schedule: str = "linear"
    warmup: int = 0
    critic_warmup: int = 0


def test_runs_are_numbered_and_named_ones_never_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = [str(common.open_run(Flags(), "x", CPU)) for _ in range(3)]
    assert names == ["runs/x", "runs/x-2", "runs/x-3"]
    common.open_run(Flags(out="mine"), "x", CPU)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        common.open_run(Flags(out="mine"), "x", CPU)
    says(capsys, "mine", "--resume")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "flags, script, parts",
    [
        (Flags(out="mine", resume=True, learning_rate=0.2), "x", ["--learning_rate", "0.2", "0.1"]),
        (Flags(out="mine", resume=True), "y", ["x.py", "y.py"]),
        (Flags(out="other", resume=True), "x", ["other", "holds no run"]),
        (Flags(resume=True), "x", ["--out"]),
    ],
)
def test_resuming_with_another_flag_is_an_error_that_names_it(
    flags, script, parts, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    common.open_run(Flags(out="mine"), "x", CPU)
    (tmp_path / "mine" / "checkpoint").mkdir()
    (tmp_path / "mine" / "checkpoint" / "000005.pt").touch()
    before = (tmp_path / "mine" / "args.json").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        common.open_run(flags, script, CPU)
    says(capsys, *parts)
    assert (tmp_path / "mine" / "args.json").read_bytes() == before


def test_a_run_that_has_no_checkpoint_yet_may_begin_again_with_other_flags(tmp_path, monkeypatch):
    """A reward that failed in the first step is mended, or another is named: there is nothing yet to be true to."""
    monkeypatch.chdir(tmp_path)
    common.open_run(Flags(out="mine"), "x", CPU)
    common.open_run(Flags(out="mine", resume=True, learning_rate=0.2), "x", CPU)
    assert json.loads((tmp_path / "mine" / "args.json").read_text())["learning_rate"] == 0.2


@pytest.mark.parametrize("script", ["reinforce", "ppo", "grpo", "dpo", "reward_model"])
def test_a_resumed_run_may_change_few_flags_and_no_others(script, tmp_path, capsys):
    """Each flag of each script is given another value; all others are refused, as README says."""
    flags = vars(importlib.import_module(script).Args()) | {"out": str(tmp_path), "steps": 9}
    flags["learning_rate"] = 0.1
    common.open_run(make_dataclass("F", flags)(**flags), script, CPU)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "000005.pt").touch()
    accepted = set()
    for name, value in flags.items():
        if name in ("out", "resume"):
            continue
        other = "other"
        if isinstance(value, bool):
            other = not value
        elif value is None or isinstance(value, (int, float)):
            other = (value or 0) + 1
        changed = flags | {"resume": True, name: other}
        before = (tmp_path / "args.json").read_text()
        try:
            common.open_run(make_dataclass("F", changed)(**changed), script, CPU)
            accepted.add(name)
        except SystemExit:
            assert f"--{name} is" in capsys.readouterr().err
        (tmp_path / "args.json").write_text(before)
    may = "steps eval_every save_every keep keep_best tokens_per_micro_batch gradient_checkpointing"
    assert accepted == {*may.split(), "sample_rows", "unit_scale"} & set(flags)


GIVEN = {  # one flag of each kind: a tuple, a switch that is off, a number, a text
    "reward_model": ["--best_of", "1", "3", "--no_unit_scale"],
    "dpo": ["--no_chat", "--beta", "0.3"],
}


@pytest.mark.parametrize("script", ["reinforce", "ppo", "grpo", "dpo", "reward_model"])
def test_a_resumed_run_takes_the_flags_that_are_not_given_from_its_folder(
    script, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)

    def read(*words):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
        return common.read_flags(module.Args, module.__doc__)

    words = [*GIVEN.get(script, ["--no_chat"]), "--learning_rate", "3e-5", "--dtype", "float32"]
    began = module.resolve(read("--out", "run", *words))
    common.open_run(began, script, CPU)
    same = dataclasses.replace(began, resume=True)
    assert read("--resume", "--out", "run") == same == module.resolve(same)
    changed = {"steps": 7, "learning_rate": 1e-4, "chat": True}  # `open_run` refuses some of them
    words = ["--steps", "7", "--learning_rate", "1e-4", "--chat"]
    assert read("--resume", "--out", "run", *words) == dataclasses.replace(same, **changed)
    assert read("--out", "run") == module.Args(out="run")
    # an older version had one flag less
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    less = {name: value for name, value in saved.items() if name != "warmup"}
    (tmp_path / "run" / "args.json").write_text(json.dumps(less))
    assert read("--resume", "--out", "run") == same
    # another script's flags are not taken
    (tmp_path / "run" / "args.json").write_text(json.dumps(saved | {"script": "other"}))
    assert read("--resume", "--out", "run") == module.Args(out="run", resume=True)


def test_a_longer_run_is_told_what_becomes_of_its_learning_rate(tmp_path, capsys):
    common.open_run(Flags(out=str(tmp_path)), "x", CPU)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "000005.pt").touch()
    for flags in (Flags(), Flags(steps=5), Flags(schedule="constant", steps=20)):
        was = json.loads((tmp_path / "args.json").read_text())
        was |= {"schedule": flags.schedule, "steps": 10}
        (tmp_path / "args.json").write_text(json.dumps(was))
        common.open_run(dataclasses.replace(flags, out=str(tmp_path), resume=True), "x", CPU)
        assert "note" not in capsys.readouterr().out
    (tmp_path / "args.json").write_text(json.dumps(was | {"schedule": "linear"}))
    common.open_run(Flags(out=str(tmp_path), resume=True, steps=20), "x", CPU)
    said = capsys.readouterr().out
    assert "--steps was 10: " in said and "was about 0.06, and goes on at about 0.075" in said


def test_steps_may_change_on_resumption(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common.open_run(Flags(out="mine"), "x", CPU)
    assert (
        common.open_run(Flags(out="mine", resume=True, steps=20, save_every=1), "x", CPU).name
        == "mine"
    )
    assert json.loads((tmp_path / "mine" / "args.json").read_text())["steps"] == 20


def two_steps(model, optimizer):
    for _ in range(2):
        loss = model(input_ids=torch.arange(3, 20)[None]).logits.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_checkpoint_restores_weights_and_moments_bit_for_bit(folder, tmp_path):
    def fresh():
        model = load_policy(folder, CPU)
        return {"policy": model}, {"policy": common.make_optimizer(model, 0.01)}

    models, optimizers = fresh()
    two_steps(models["policy"], optimizers["policy"])
    common.save_checkpoint(tmp_path, CPU, 2, models, optimizers)
    two_steps(models["policy"], optimizers["policy"])
    state = common.read_checkpoint(tmp_path)
    others, their_optimizers = fresh()
    common.load_checkpoint(state, others, their_optimizers)
    two_steps(others["policy"], their_optimizers["policy"])
    assert state["step"] == 2
    for a, b in zip(models["policy"].parameters(), others["policy"].parameters()):
        assert torch.equal(a, b)


def test_a_crash_while_saving_leaves_the_older_checkpoint_whole(folder, tmp_path, monkeypatch):
    model = load_policy(folder, CPU)
    common.save_checkpoint(tmp_path, CPU, 1, {"policy": model}, {})

    def full_disk(*args):
        args[1].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        common.save_checkpoint(tmp_path, CPU, 2, {"policy": model}, {})
    assert common.read_checkpoint(tmp_path)["step"] == 1


FULL_DISK = """
import os, resource, sys
import torch, transformers
import common, grpo

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def limit_before(owner, name, size, when=lambda *given: True):
    honest = getattr(owner, name)
    def limited(*given, **named):
        if when(*given):
            limit(size())
        return honest(*given, **named)
    setattr(owner, name, limited)

def largest(pattern):
    return max(path.stat().st_size for path in run.glob(pattern))

second = lambda out, other, step, *rest: step == 2
everywhere = {
    "checkpoint": (common, "save_checkpoint", lambda: 100_000, second),
    "metrics": (common, "log", lambda: largest("metrics.jsonl") + 10, second),
    "tensorboard": (common, "log", lambda: largest("tensorboard/*") + 10, second),
    "model": (common, "save_model", lambda: 100_000),
    "tokenizer": (transformers.PreTrainedTokenizerBase, "save_pretrained", lambda: 10),
    "start": (common, "begin_log", lambda: 10),
}
for where, how in everywhere.items():
    os.write(2, f"== {where}\\n".encode())
    if os.fork():  # one import of torch for all
        os.wait()
        continue
    run = common.Path(sys.argv[1]) / where
    limit_before(*how)
    few = dict(steps=2, save_every=1, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=4)
    grpo.train(grpo.Args(**few, eval_data="", device="cpu", out=str(run)))
    raise SystemExit
"""


def test_a_disk_that_is_really_full_is_a_sentence_and_the_last_checkpoint_stays(tmp_path):
    """The kernel refuses to make files longer (RLIMIT_FSIZE). torch.save turns that into a
    RuntimeError, safetensors and the tokenizers have errors of their own, and TensorBoard writes
    in a thread: none of them may end in a traceback."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, timeout=300)
    parts = [part.partition("\n") for part in done.stderr.decode().split("== ")[1:]]
    told = {where: said.strip() for where, _, said in parts}
    wanted = {  # where the disk is full: the step of the last checkpoint, and what the sentence names
        "checkpoint": (1, "000002.pt"),
        "metrics": (1, "File too large"),
        "tensorboard": (1, "File too large"),
        "model": (2, "model could not be written"),
        "tokenizer": (2, "model could not be written"),
    }
    for where, (step, words) in wanted.items():
        said = told[where]
        assert "Traceback" not in said, (where, said)
        problem, command = said.splitlines()[-2:]
        assert problem.startswith("error: ") and words in problem, said
        assert "File too large" in problem and "--resume" in command, said
        assert common.read_checkpoint(tmp_path / where)["step"] == step
        assert not list((tmp_path / where).rglob("*.tmp")), "half a file would be in the way"
    assert told["start"] == f"error: --out {tmp_path}/start: cannot write there (File too large)"


def test_a_checkpoint_cut_short_or_of_another_model_gets_a_sentence(folder, tmp_path, capsys):
    common.save_checkpoint(tmp_path, CPU, 1, {"policy": family("llama", hidden_size=64)}, {})
    with pytest.raises(SystemExit):
        common.load_checkpoint(
            common.read_checkpoint(tmp_path), {"policy": load_policy(folder, CPU)}, {}
        )
    says(capsys, "another model")
    path = tmp_path / "checkpoint" / "000001.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        common.read_checkpoint(tmp_path)
    says(capsys, "cut short")
    assert common.read_checkpoint(tmp_path / "nothing") is None


def test_a_log_is_cut_to_its_checkpoint(tmp_path):
    log = tmp_path / "metrics.jsonl"
    lines = [
        json.dumps({"step": s, "text": "a\u2028b"}, ensure_ascii=False) + "\n" for s in range(8)
    ]
    log.write_text("".join(lines) + '{"step": 8, "rew', encoding="utf-8")
    common.cut_log(log, 5)
    assert [
        json.loads(line)["step"] for line in log.read_text(encoding="utf-8").split("\n")[:-1]
    ] == list(range(6))
    common.cut_log(tmp_path / "none", 5)


def test_a_log_without_a_checkpoint_begins_anew(tmp_path):
    """Scores of step 0, too, are taken again, and would stand there twice."""
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0, "eval/exact": 0.5}\n{"step": 1, "loss": 0.1}\n')
    common.cut_log(log, 0)
    assert log.read_text() == ""


def test_signals_ask_for_an_end_and_a_second_ctrl_c_makes_one():
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        asked = common.catch_signals(1)
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def test_checkpoints_are_in_the_order_of_their_steps_and_torn_ones_go(folder, tmp_path):
    model = load_policy(folder, CPU)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "000007.pt.tmp").write_bytes(b"of a process that was killed")
    for step in (999_999, 1_000_000):
        common.save_checkpoint(tmp_path, CPU, step, {"policy": model}, {}, 1)
    assert [p.name for p in (tmp_path / "checkpoint").iterdir()] == ["1000000.pt"]
    assert common.read_checkpoint(tmp_path)["step"] == 1_000_000


def test_there_is_no_rate_before_the_first_step():
    assert [common.learning_rate_at(s, 9, 1.0, "linear", w) for s in (-3, 0) for w in (0, 5)] == [
        0,
        0,
        0,
        0,
    ]


@pytest.mark.parametrize("steps", [0, 5])
def test_only_a_run_with_steps_is_told_how_to_go_on(steps, tmp_path, monkeypatch):
    import types

    monkeypatch.setattr(sys, "argv", ["grpo.py", "--beta", "0.1"])
    with (
        pytest.raises(SystemExit) as stopped,
        common.short_errors(tmp_path, types.SimpleNamespace(steps=steps, out="o"), None),
    ):
        raise common.Stop("no more")
    assert str(stopped.value.code).startswith("error: no more") and (
        f": python grpo.py --resume --out {tmp_path}" in str(stopped.value.code)
    ) == bool(steps)


def test_where_there_are_no_steps_to_finish_the_first_signal_ends_the_run(tmp_path):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        common.catch_signals(0)
        with (
            pytest.raises(SystemExit, match="^stopped at once$"),
            common.short_errors(tmp_path, Namespace(steps=0, out="x"), None),
        ):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def test_a_reward_can_end_a_process_that_it_has_started(capfd):
    """Its usual limit of time. A forked process has the run's handler, and would go on for ever."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        asked = common.catch_signals(1)
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.3)
        os.kill(child.pid, signal.SIGINT)  # Ctrl-C reaches it, too: the step is finished first
        time.sleep(0.3)
        assert child.is_alive()
        child.terminate()
        child.join(10)
        assert child.exitcode == -signal.SIGTERM
        assert not asked()
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.3)
        for _ in range(2):  # a second Ctrl-C stops at once, and the run waits for the child's end
            assert child.is_alive()
            os.kill(child.pid, signal.SIGINT)
            time.sleep(0.3)
        child.join(10)
        assert child.exitcode == 1
        assert "stopping" not in capfd.readouterr().err, "only the run itself says that"
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)


def test_a_template_that_wants_a_text_in_every_answer_is_no_error(capsys):
    """Mistral's do. An empty answer is an end, and room for an answer is measured with one."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not m['content'] %}"
        "{{ raise_exception('a text, please') }}{% endif %}"
        "{{ 'w10 ' if m['role'] == 'user' else 'w11 ' }}{{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}w11 {% endif %}"
    )
    tokenizer = make_tokenizer(template=template)
    assert common.encode_answer(tokenizer, "w5", "w6") == [10, 5, 11, 6, 1]
    assert common.encode_answer(tokenizer, "w5", "") == [10, 5, 11, 1]
    assert encode_prompt(tokenizer, "w5") == [10, 5, 11]
    assert encode_completion(tokenizer, "", True, "w5") == [1]
    plain = make_tokenizer(template=template.replace("raise_exception('a text, please')", "'w9 '"))
    assert common.encode_answer(plain, "w5", "") == [10, 5, 9, 11, 1], "of others nothing changes"


def composite(name):
    """A tiny checkpoint of a model that sees and reads, as the hub has them."""
    text = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text |= {"num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
    text |= {"max_position_embeddings": 128, "eos_token_id": 1, "pad_token_id": 0}
    text |= {"attention_dropout": 0.1}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "depth": 1}
    if name == "qwen3_5":
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
        text |= {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
        text["layer_types"] = ["linear_attention", "full_attention"]
        vision |= {"out_hidden_size": 32}
    else:
        text |= {"sliding_window": 8, "query_pre_attn_scalar": 8}
    config = transformers.AutoConfig.for_model(name, text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config)


def test_the_text_model_of_a_larger_one_is_trained_and_written(tmp_path):
    """Its name_or_path was "" (Qwen3.5's checkpoints), so the last save failed."""
    composite("qwen3_5").save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    args = Namespace(lora_rank=2, lora_alpha=4.0)
    for adapters in (None, args):
        model = load_policy(tmp_path / "m", CPU, args=adapters)
        assert model.config.attention_dropout == 0
        tokenizer = common.load_tokenizer(tmp_path / "m")
        common.save_model(model, tokenizer, tmp_path / "out", CPU)
        saved = transformers.AutoConfig.from_pretrained(tmp_path / "out")
        assert saved.get_text_config().attention_dropout == 0.1
        again = load_policy(tmp_path / "out", CPU)
        ids = torch.tensor([[5, 6, 7, 8]])
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert isinstance(load_reference(tmp_path / "m", CPU, model), common.Switched)
    known = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert known["base_model_name_or_path"] == str(tmp_path / "m")


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5"])
def test_a_critic_is_made_from_a_model_that_has_its_pad_in_the_config_of_its_text(name, tmp_path):
    composite(name).save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    written.pop("pad_token_id", None)
    (tmp_path / "m" / "config.json").write_text(json.dumps(written))
    tokenizer = common.load_tokenizer(tmp_path / "m")
    model = load_scalar(tmp_path / "m", CPU, tokenizer, 0.0)
    assert model.config.get_text_config().pad_token_id == 0


def test_a_run_stays_where_positions_are_computed_in_one_way():
    """Phi-3's 128k models change all of them at 4,096: what is in a cache would not fit then."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope |= {"original_max_position_embeddings": 16, "rope_theta": 1e4}
    short = {"original_max_position_embeddings": 16}
    settings = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 128}
    long = transformers.AutoConfig.for_model("phi3", rope_parameters=rope, **short, **settings)
    plain = transformers.AutoConfig.for_model("phi3", **settings)
    assert common.context_of(long) == common.context_of(plain, long) == 16
    assert common.context_of(plain) == 128


def test_the_mixers_of_mamba_take_the_way_that_knows_the_padding():
    """In training mode its fused kernel, on a GPU, takes no mask."""
    model = common.prepare(family("mamba"), CPU)
    mixers = [module for module in model.modules() if hasattr(module, "A_log")]
    assert mixers and not any(module.training for module in mixers) and model.training
    with common.evaluating(model):
        pass
    assert not any(module.training for module in mixers) and model.training


def test_a_link_to_nowhere_in_the_place_of_runs_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink(tmp_path / "gone", tmp_path / "runs")
    args = make_dataclass("Args", [("out", str, ""), ("resume", bool, False)])()
    with pytest.raises(SystemExit):
        common.open_run(args, "grpo", CPU)
    says(capsys, "runs", "cannot write there")


def test_a_reward_may_change_what_it_is_given(tmp_path):
    (tmp_path / "my.py").write_text(
        "def score(completion, row):\n"
        "    row['prompt'].append({'role': 'assistant', 'content': completion})\n"
        "    return len(row['prompt'])\n"
    )
    reward = common.load_reward(f"{tmp_path / 'my.py'}:score", {"exact": None}, CPU)
    row = {"prompt": [{"role": "user", "content": "5"}]}
    mask = torch.ones(2, 1, dtype=torch.bool)
    samples = Namespace(texts=["a", "b"], mask=mask, finished=mask[:, 0])
    assert reward.score(samples, [row, row])["reward"] == [2, 2] and len(row["prompt"]) == 1


@pytest.fixture
def quiet():
    """Signals as they were, afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_terminal_that_is_gone_asks_for_an_end_and_its_second_signal_for_no_more(quiet):
    """The shell and the kernel may both send SIGHUP; a Ctrl-C after it still stops at once."""
    asked = common.catch_signals(1)
    os.kill(os.getpid(), signal.SIGHUP)
    assert asked()
    os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_under_nohup_the_terminal_may_go(quiet):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    asked = common.catch_signals(1)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not asked() and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


IN_A_TERMINAL = """
import sys, time
import common, grpo
honest = common.save_checkpoint
def slow(out, world, step, *rest):
    honest(out, world, step, *rest)
    if step == 1:
        print("ready", flush=True)
        time.sleep(2)
common.save_checkpoint = slow
few = dict(steps=9, save_every=1, prompts_per_step=2, samples_per_prompt=2, max_new_tokens=4)
grpo.train(grpo.Args(**few, eval_data="", device="cpu", out=sys.argv[1]))
"""


def test_a_run_whose_terminal_is_closed_finishes_its_step_and_saves(tmp_path):
    """Each write to the lost terminal (the progress bar, a line) fails; that must not end the run."""
    import pty

    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, "-c", IN_A_TERMINAL, str(tmp_path / "run")])
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 10_000)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1, "as after any signal: ended, not killed"
    assert common.read_checkpoint(tmp_path / "run")["step"] == 2
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [0, 1, 2]


HOLD = """
import sys, time, torch, common
from test_loading import CPU, Flags
common.open_run(Flags(out=sys.argv[1]), "x", CPU)
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_in_which_another_process_works_is_left_alone_until_it_ends(tmp_path, capsys):
    """Two --resume of one run, or a new run that begins in the same moment, would write into each
    other's files. A killed run's lock is free again."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        written = (tmp_path / "run" / "args.json").read_bytes()
        with pytest.raises(SystemExit, match="2"):
            common.open_run(Flags(out=str(tmp_path / "run"), resume=True, steps=20), "x", CPU)
        says(capsys, "--out", "another process is at work in it")
        assert (tmp_path / "run" / "args.json").read_bytes() == written
        # a new run that looks a moment before args.json is written finds the folder empty
        (tmp_path / "run" / "args.json").unlink()
        with pytest.raises(SystemExit, match="2"):
            common.open_run(Flags(out=str(tmp_path / "run")), "x", CPU)
        says(capsys, "another process is at work in it")
    finally:
        other.kill()
        other.wait()
    out = common.open_run(Flags(out=str(tmp_path / "run")), "x", CPU)
    assert out in common.HELD
    with pytest.raises(SystemExit), common.short_errors(out, Namespace(steps=1, out="x"), None):
        raise common.Stop("its end")
    assert out not in common.HELD


def test_without_locks_in_the_file_system_a_run_goes_on(tmp_path, monkeypatch):
    def no_locks(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(common.fcntl, "lockf", no_locks)
    assert common.open_run(Flags(out=str(tmp_path / "run")), "x", CPU) == tmp_path / "run"


def test_the_first_signal_says_that_it_was_heard_and_is_kept_for_later(quiet, capfd):
    asked = common.catch_signals(5)
    assert not asked()
    os.kill(os.getpid(), signal.SIGINT)
    assert asked() and "a second signal stops at once" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


# --- a step's numbers, advice, and when a run saves ---


def test_a_meter_has_the_mean_over_all_elements_that_are_on_the_mask():
    meter = common.Meter()
    ids = torch.tensor([[1.0, 2.0, float("nan")], [4.0, float("inf"), 5.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    meter.mean("a", ids, mask)
    meter.mean("a", torch.tensor([[9]]), torch.tensor([[True]]))
    meter.mean("b", torch.tensor(3.0))
    meter.mean("b", torch.tensor([False, True]))
    meter.mean("none", ids, mask & False)
    meter.mean("spread", torch.tensor([[1.0, 3.0]]), torch.tensor([[True]]))
    assert meter.result(CPU) == {"a": 4.0, "b": 4 / 3, "spread": 2.0}
    assert common.Meter().result(CPU) == {}


def test_a_meter_adds_in_float64_and_without_a_gradient():
    meter = common.Meter()
    x = torch.full((3,), 1.0, requires_grad=True)
    meter.mean("x", x * 2**24)
    meter.mean("x", x[:1])
    [total] = meter.means.values()
    assert total.tolist() == [3 * 2**24 + 1, 4, 3 * 2**48 + 1] and not total.requires_grad


def test_advice_of_all_methods_is_given_once_and_only_where_it_helps(monkeypatch):
    said, words = collections.Counter(), []
    monkeypatch.setattr(common.tqdm, "write", words.append)
    calm = {"truncated": 0.5, "reward": 0.1, "equal_groups": 0.8, "ratio/first": 0.0}
    calm |= {"entropy": 0.5, "kl/ref": 99.0, "value/explained": -1.0, "fall / interval": 1.0}
    calm |= {"length / first length": 2.9}
    exact, number = (Namespace(reward=name, reference="") for name in ("exact", "number"))
    common.advise(calm, exact, said)
    for _ in range(9):
        common.advise(calm | {"reward": 0.0}, number, said)
    common.advise({}, exact, said)
    # a teacher may be far away, and without a reward all scores are equal
    teacher = Namespace(reward="none", reference="TEACHER")
    sure = {"entropy": 0.001}  # as a teacher may be, and right answers are
    common.advise(
        calm | {"reward": 0.0, "equal_groups": 1.0, "kl/ref": 300.0} | sure, teacher, said
    )
    demos = Namespace(reward="exact", reference="", demos="answers.jsonl")
    common.advise(calm | sure, demos, said)
    assert not words
    loud = {"truncated": 0.6, "reward": 0.0, "equal_groups": 0.9, "ratio/first": 0.1}
    loud |= {"entropy": 0.001, "kl/ref": -101.0, "value/explained": -1.1, "fall / interval": 1.1}
    loud |= {"length / first length": 0.3}
    for number, (name, value) in enumerate(loud.items()):
        lasting = name in ("reward", "length / first length")
        for bad_steps in (2, 1) if lasting else ():  # one batch, or two, may be chance
            for _ in range(bad_steps):
                common.advise(calm | {name: value}, exact, said)
            common.advise(calm, exact, said)
        assert len(words) == number
        for _ in range(4):
            common.advise(calm | {name: value}, exact, said)
        assert len(words) == number + 1 and f"({name} {value:.3g})" in words[-1]
    assert len(words) == 9
    said.clear()
    for _ in range(3):
        common.advise({"length / first length": 3.1}, exact, said)
    assert len(words) == 10


def test_a_pipe_that_is_gone_ends_no_run(tmp_path, monkeypatch):
    """Ctrl-C ends `| tee`, too; the run has still to save."""

    def gone(message):
        raise BrokenPipeError

    monkeypatch.setattr(common.tqdm, "write", gone)
    writer = common.Writer(tmp_path / "tensorboard")
    common.log(tmp_path, writer, 0, {"eval/exact": 1.0})
    common.log(tmp_path, writer, 1, {"reward": 1.0})
    exact = Namespace(reward="exact", reference="")
    common.advise({"truncated": 1.0}, exact, collections.Counter())
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_log_without_a_progress_bar_has_a_line_a_minute(tmp_path, monkeypatch):
    clock, words = [100.0], []
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(common.tqdm, "write", words.append)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    writer = common.Writer(tmp_path / "tensorboard")
    for step, now in enumerate((100.0, 159.0, 161.0, 170.0), 1):
        clock[0] = now
        common.log(tmp_path, writer, step, {"reward": step / 10, "loss": 1.0, "length": 3.0})
    assert words == ["step 1: reward 0.1, loss 1, length 3", "step 3: reward 0.3, loss 1, length 3"]
    clock[0] = 300.0
    story = {"tokens_per_second": 1234.0, "kl/ref": 0.25, "entropy": 0.5, "truncated": 0.125}
    common.log(tmp_path, writer, 9, story | {"reward": 0.5, "grad_norm": 1.0})
    said = "reward 0.5, truncated 0.125, entropy 0.5, kl/ref 0.25, tokens_per_second 1.23e+03"
    assert words[2] == f"step 9: {said}"


@pytest.mark.parametrize("seconds, said", [(30.0, ["about 48 minutes left"]), (0.5, [])])
def test_the_time_left_is_said_once_and_counts_steps_only(seconds, said, tmp_path, monkeypatch):
    """Of 100 steps 97 are left after the third; the first evaluation took an hour."""
    clock, words = [0.0], []
    monkeypatch.setattr(common.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(common.tqdm, "write", words.append)
    writer = common.Writer(tmp_path / "tensorboard", Namespace(reward="number"))
    bar = common.tqdm(total=100, file=io.StringIO())
    bar._time = lambda: clock[0]
    bar.start_t = bar.last_print_t = 0.0
    writer.bar = bar
    clock[0] = 3600.0
    common.log(tmp_path, writer, 0, {"eval/reward": 0.5})
    for step in range(1, 6):
        clock[0] += seconds
        common.log(tmp_path, writer, step, {"reward": 0.5, "tokens_per_second": 9.0})
    assert [line for line in words if "left" in line] == [
        f"{line} if steps go on like this" for line in said
    ]
    assert bar.n == 5 and bar.format_dict["elapsed"] == pytest.approx(5 * seconds)


def warnings_of(tmp_path, monkeypatch, lines):
    """What a run is warned of that logs these numbers, beginning with those of step 0. A run that is
    resumed begins with a new writer."""
    words = []
    monkeypatch.setattr(common.tqdm, "write", words.append)
    writer = common.Writer(tmp_path / "tensorboard", Namespace(reward="number"))
    steps = len(common.read_log(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
    for step, metrics in enumerate(lines, steps):
        common.log(tmp_path, writer, step, metrics)
    return [line for line in words if line.startswith("warning")]


def test_lengths_are_compared_with_those_of_step_1_also_in_a_resumed_run(tmp_path, monkeypatch):
    def steps(*lengths):
        return [{"length": length, "time/reward": 0.1} for length in lengths]

    given = [{"length": length} for length in (30.0, 9.0, 9.0, 9.0)]  # answers, not completions
    assert not warnings_of(tmp_path, monkeypatch, given)
    (tmp_path / "metrics.jsonl").unlink()
    lengths = steps(30.0, 12.0, 9.0, 9.0)
    assert not warnings_of(tmp_path, monkeypatch, [{"eval/reward": 0.5}, *lengths])
    [warning] = warnings_of(tmp_path, monkeypatch, steps(9.0, 9.0, 9.0, 9.0))
    assert "much shorter or longer" in warning and "0.3)" in warning


def test_a_held_out_score_is_compared_with_the_best_by_its_own_interval(tmp_path, monkeypatch):
    """That of 50 right ones of 100 is 0.19 wide."""

    def share(right):
        return {"eval/reward": common.Mean(right, 100, right), "eval/exact": 0.0}

    for best, count in ((69, 0), (75, 1)):
        folder = tmp_path / str(best)
        folder.mkdir()
        found = warnings_of(folder, monkeypatch, [share(20), share(best), share(50), share(50)])
        assert len(found) == count and all("below its best" in line for line in found)


@pytest.mark.parametrize(
    "step, asked, saves, ends",
    [(1, False, False, False), (2, False, True, False), (5, False, True, False)]
    + [(1, True, True, True), (2, True, True, True), (5, True, True, False)],
)
def test_a_checkpoint_is_saved_when_it_is_due(step, asked, saves, ends, tmp_path, monkeypatch):
    """Every 2 of 5 steps, after the last, and after a signal, which only then ends the run."""
    saved = []
    monkeypatch.setattr(common, "save_checkpoint", lambda *given: saved.append(given))
    args = Namespace(save_every=2, steps=5, keep=3)
    given = (tmp_path, args, CPU, step, {"m": 1}, {"m": 2})
    try:
        common.save_if_due(*given, lambda: asked)
        assert not ends
    except common.Ended as end:
        assert ends and f"after step {step} of 5" in str(end)
    assert saved == [(tmp_path, CPU, step, {"m": 1}, {"m": 2}, 3)] * saves


def test_sharing_is_tried_once_a_model_and_only_where_rows_to_train_have_a_prompt_in_common(
    monkeypatch,
):
    """A trial makes gradients of the whole model: not in a run that only evaluates."""
    tried = []

    def trial(model, world, gradient_checkpointing):
        tried.append((model, gradient_checkpointing))
        return model != "cannot"

    def asked(*models, n=2, steps=3, reference=""):
        tried.clear()
        args = Namespace(samples_per_prompt=n, steps=steps, gradient_checkpointing="as said")
        args.reference = reference
        return common.can_share_prompts(models, args, CPU), [model for model, _ in tried]

    monkeypatch.setattr(common, "prompts_can_be_shared", trial)
    assert asked("policy", "critic") == (True, ["policy", "critic"])
    assert asked("policy", "policy") == (True, ["policy"]) and tried == [("policy", "as said")]
    assert not asked("policy", "cannot")[0] and not asked("cannot", "policy")[0]
    assert asked("policy", n=1) == asked("policy", steps=0) == (False, [])
    assert asked("policy", reference="a family with another cache") == (False, [])


def test_folded_seeds_differ_and_repeat():
    seeds = {common.seed_from(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert (
        len(seeds) == 1000
        and common.seed_from(1, 2, 3) in seeds
        and all(0 <= s < 2**63 for s in seeds)
    )


@pytest.mark.parametrize("size", [1, 2])
def test_on_gpus_each_process_takes_its_own_and_computes_in_bfloat16(size, monkeypatch):
    """Where there is no GPU: the device, the backend and what NCCL is told."""
    chosen, made, rounded, cudnn = [], [], [], []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", rounded.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    monkeypatch.setattr(common.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        common.dist, "init_process_group", lambda *a, **settings: made.append((a, settings))
    )
    for name, value in {"RANK": size - 1, "LOCAL_RANK": size - 1, "WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, str(value))
    world, device = common.start(), torch.device("cuda", size - 1)
    assert (
        world == World(size - 1, size, device, torch.bfloat16)
        and chosen == [device]
        and common.is_sharded(world)
    )
    (backend,), settings = made[0]
    assert backend == "nccl" and settings["timeout"].total_seconds() == 3600
    if size == 1:
        assert settings["world_size"] == 1 and settings["rank"] == 0 and "store" in settings
    else:
        assert settings["device_id"] == device and "store" not in settings
    assert rounded == ["high"]
    assert common.start(dtype="float32").dtype == torch.float32
    assert rounded == ["high", "highest"], "float32 that was asked for is not rounded to TF32"
    assert common.start("cpu").device.type == "cpu" and len(rounded) == 2
    assert cudnn == [False, False], "cuDNN's attention is compiled anew for each shape"


@pytest.mark.parametrize("call", [1, 2, 3])
def test_memory_that_runs_out_in_the_self_check_is_no_reason_to_compute_prompts_anew(
    call, folder, monkeypatch
):
    """The plain forward, the prompts' or the completions': `short_errors` says which flags help."""
    model, calls, honest = load_policy(folder, CPU), [], common.hidden_states

    def full(*a):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError
        return honest(*a)

    monkeypatch.setattr(common, "hidden_states", full)
    with pytest.raises(torch.OutOfMemoryError):
        common.prompts_can_be_shared(model, CPU, False)


def test_after_backward_nothing_of_a_prompts_pass_is_held_by_the_loss(folder):
    """A script keeps the loss until the next micro-batch's, through whose forward the keys would stay alive."""
    import weakref

    model = load_policy(folder, CPU)
    ids = torch.tensor([[5, 6, 7]])
    last, cache = common.prompt_states(model, ids, ids > 0)
    held = [weakref.ref(t) for t in last.grad_fn.tensors]
    loss = (
        last.sum() + sum(layer.keys.sum() + layer.values.sum() for layer in cache.layers)
    ).square()
    loss.backward()
    del last, cache
    assert len(held) > 2 and not any(t() is not None for t in held)
    assert all(p.grad is not None for n, p in model.named_parameters() if "layers" in n), (
        "and the gradient has passed"
    )


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gemma2"])
def test_positions_become_angles_without_tf32(name, tmp_path, monkeypatch):
    """On a GPU in bfloat16 TF32 is on, for the head. It cannot hold the position 2049."""
    model, said = family(name), []
    rotary = next(m for m in model.modules() if "Rotary" in type(m).__name__)
    forward = rotary.forward

    def watched(*given, **named):
        said.append(("angles", torch.get_float32_matmul_precision()))
        return forward(*given, **named)

    monkeypatch.setattr(rotary, "forward", watched)
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(
        lambda *given: said.append(("head", torch.get_float32_matmul_precision()))
    )
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        common.keep_angles_exact(model)
        model(input_ids=torch.tensor([[1, 2, 3]]))
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(said) == {("angles", "highest"), ("head", "high")}


def test_a_gpu_in_bfloat16_keeps_angles_exact_and_in_float32_has_no_tf32_to_keep_off(monkeypatch):
    class Asked(Exception):
        pass

    def ask(model):
        raise Asked

    def no_mesh(*given):
        raise FileNotFoundError

    monkeypatch.setattr(common, "keep_angles_exact", ask)
    monkeypatch.setattr(common.dist.device_mesh, "init_device_mesh", no_mesh)
    for device, dtype, error in (
        ("cuda", torch.bfloat16, Asked),
        ("cuda", torch.float32, FileNotFoundError),
        ("cpu", torch.bfloat16, FileNotFoundError),
    ):
        with pytest.raises(error):
            common.shard(family("llama"), World(0, 1, torch.device(device), dtype))


# --- What users were seen to give ---


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, capsys):
    """transformers makes an empty one for it, which knows no word or calls every word unknown."""
    for name in ("qwen2", "gemma"):
        folder = tmp_path / name
        family(name).save_pretrained(folder)
        with pytest.raises(SystemExit):
            common.load_tokenizer(folder)
        assert "the folder has no tokenizer" in capsys.readouterr().err


def test_a_cut_file_of_weights_is_one_sentence(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1"
    )
    with pytest.raises(SystemExit):
        common.load_policy(tmp_path / "cut", CPU)
    assert "no such model could be loaded (" in capsys.readouterr().err


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch):
    def gone(message):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(common.tqdm, "write", gone)
    common.say("nobody reads this")


def test_a_message_that_begins_with_an_empty_line_has_a_first_line():
    assert common.first_line(ImportError("\nneeds a library\nso do this")) == "needs a library"
    assert common.first_line(ValueError()) == "ValueError"


def test_the_context_of_a_family_that_counts_positions_from_its_padding_is_shorter():
    config = transformers.RobertaConfig(max_position_embeddings=66, pad_token_id=1)
    assert common.context_of(config) == 64


def test_a_copy_of_a_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    for name in ("000004", "000004_backup", "000004_1", "000012"):
        (tmp_path / "checkpoint" / f"{name}.pt").touch()
    assert [path.stem for path in common.checkpoints(tmp_path)] == ["000004", "000012"]


def test_a_file_that_ends_in_exit_is_no_reward(tmp_path, capsys):
    (tmp_path / "ends.py").write_text("def f(completion, row):\n    return 1.0\nexit(0)\n")
    with pytest.raises(SystemExit) as stopped:
        common.load_function(f"{tmp_path}/ends.py:f", "--reward")
    assert stopped.value.code and "cannot be imported" in capsys.readouterr().err


def test_processes_that_a_reward_starts_find_its_functions(tmp_path, monkeypatch):
    """They import its module by name. The name of another module is not taken."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    for stem, name in (("my_own_reward", "my_own_reward"), ("json", "reward_json")):
        (tmp_path / f"{stem}.py").write_text("def f(completion, row):\n    return 1.0\n")
        function = common.load_function(f"{tmp_path}/{stem}.py:f", "--reward")
        assert function.__module__ == name and sys.modules[name].f is function
    assert importlib.util.find_spec("my_own_reward").origin == f"{tmp_path}/my_own_reward.py"
    assert sys.modules["json"] is json


def test_a_reward_that_is_infinite_in_float32_is_refused_with_its_prompt():
    score = common.checked(lambda completion, row: 1e39, "r.py:f", CPU)
    mask = torch.ones(1, 1, dtype=torch.bool)
    samples = common.Samples(None, None, mask, mask, None, mask[0], ["text"])
    with pytest.raises(common.Stop, match="(?s)returned 1e.39.*prompt"):
        score(samples, [{"prompt": "52="}])


def test_a_run_whose_model_is_written_early_can_still_go_on_to_its_end(tmp_path, capsys):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "000040.pt").touch()
    planned = {"script": "grpo", **dataclasses.asdict(Flags(str(tmp_path), True, 100))}
    for steps, kept in ((40, 100), (100, 100), (60, 60), (40, 60)):
        (tmp_path / "args.json").write_text(json.dumps(planned))
        common.open_run(Flags(str(tmp_path), True, steps), "grpo", CPU)
        planned = json.loads((tmp_path / "args.json").read_text())
        assert planned["steps"] == kept
        common.HELD.clear()
    assert capsys.readouterr().out.count("--steps was") == 1, "of 60 steps in place of 100"


def test_a_changed_end_is_told_with_the_rate_of_the_policy_after_the_critics_warmup(
    tmp_path, capsys
):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "000060.pt").touch()
    planned = {"script": "ppo", **dataclasses.asdict(Flags(str(tmp_path), True, 100))}
    (tmp_path / "args.json").write_text(json.dumps(planned | {"critic_warmup": 50}))
    common.folder_to_resume(Flags(str(tmp_path), True, 200, critic_warmup=50), "ppo")
    said = capsys.readouterr().out
    before = common.learning_rate_at(10, 50, 0.1, "linear", 0)
    after = common.learning_rate_at(11, 150, 0.1, "linear", 0)
    assert f"it was about {before:.2g}, and goes on at about {after:.2g}" in said
