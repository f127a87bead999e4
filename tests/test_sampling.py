"""Sampling: what is drawn comes from the model's own distribution, and its log-probabilities are those of a plain
forward, for every family, however rows are padded, ended and dropped."""

import functools
import inspect
import itertools

import pytest
import torch
from conftest import FAMILIES, ROOT, WORDS, family, make_tokenizer
from torch.multiprocessing.reductions import StorageWeakRef

import common
from common import draw, sample

PROMPTS = [[7, 12, 3], [5, 9, 11, 30, 31, 14, 8, 40, 41, 17, 22], [6], [33, 21, 9, 4, 18, 27]]
STOPS = [1, 5, 9, 20]


def plain_logprobs(model, s, row, temperature):
    """One row, without padding, mask, positions or cache: the plainest forward there is."""
    prompt = s.prompt_ids[row][s.prompt_mask[row]]
    completion = s.ids[row][s.mask[row]]
    with torch.no_grad():
        logits = model(torch.cat([prompt, completion])[None]).logits[0].float()
    logprobs = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, completion[:, None])[:, 0]


def stops_for(model, tokenizer):
    """Two stop tokens (besides EOS) with which some rows end early and some are cut, whatever the family likes to say."""
    ids = sample(
        model, tokenizer, PROMPTS, n=3, max_new_tokens=24, temperature=0.7, seed=1
    ).ids.tolist()
    for stops in itertools.combinations(range(3, WORDS), 2):
        lengths = [
            min([t + 1 for t, i in enumerate(row) if i in (1, *stops)], default=24) for row in ids
        ]
        if min(lengths) < 12 and sum(n == 24 for n in lengths) > 1 and len(set(lengths)) > 3:
            return [1, *stops]
    raise AssertionError("no such pair")


def worst(model, s, temperature):
    return max((plain_logprobs(model, s, r, temperature) - s.logprobs[r][s.mask[r]]).abs().max().item() for r in range(len(s.ids)))  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_logprobs_equal_those_of_a_plain_forward(name, pad_is_eos):
    """Field notes: left padding wants explicit positions (OpenRLHF 217, trl 469); pad == EOS (trl 1623); several EOS
    ids (trl 7039); a sliding window shorter than the text; temperature in the log-probability (trl 3029)."""
    model, tokenizer = family(name), make_tokenizer(pad="<eos>" if pad_is_eos else "<pad>")
    model.generation_config.eos_token_id = stops_for(model, tokenizer)
    s = sample(model, tokenizer, PROMPTS, n=3, max_new_tokens=24, temperature=0.7, seed=1)
    lengths = s.mask.sum(1)
    assert lengths.min() < 12 and lengths.max() == 24, (
        "the test wants rows that end early and rows that are cut"
    )
    assert worst(model, s, 0.7) < (1e-3 if name == "mamba" else 1e-4)


def broken(model, **wrong):
    """The model with one of its inputs changed behind the sampler's back."""
    forward = model.forward

    @functools.wraps(forward)
    def call(**inputs):
        for key, change in wrong.items():
            if inputs.get(key) is not None:
                inputs[key] = change(inputs[key])
        return forward(**inputs)

    model.forward = call
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_mask_would_be_noticed(name):
    if name == "mamba":
        pytest.skip("a recurrent model reads no mask while decoding")
    model = family(name)
    broken(model, attention_mask=torch.ones_like)  # padding is attended to
    s = sample(model, make_tokenizer(), PROMPTS, n=3, max_new_tokens=12, temperature=0.7, seed=1)
    del model.forward
    assert worst(model, s, 0.7) > 1e-2


@pytest.mark.parametrize(
    "name", [n for n in FAMILIES if n not in ("mamba", "bloom")]
)  # those know no positions
def test_a_wrong_position_would_be_noticed(name):
    model = family(name)
    broken(
        model, position_ids=lambda p: p + 1 if p.shape[1] == 1 else p
    )  # off by one from the second token on
    s = sample(model, make_tokenizer(), PROMPTS, n=3, max_new_tokens=12, temperature=0.7, seed=1)
    del model.forward
    assert worst(model, s, 0.7) > 1e-2


def without_a_graph(monkeypatch):
    """Captured decoding on the CPU: the same static tensors, masks and places in the cache. Returns
    the (rows, columns) of each captured step and the number of calls, as they come."""
    steps = []
    calls = []

    class Counted(common.CapturedStep):
        def __init__(self, *given):
            super().__init__(*given)
            steps.append((len(self.token), self.length))

        def __call__(self, *given):
            calls.append(steps[-1])
            return super().__call__(*given)

        def compute(self):
            # what a graph would have frozen is of no use to the forward
            with monkeypatch.context() as patch:
                patch.setattr(common.RoomyLayer, "get_seq_length", lambda *_: 3)
                return super().compute()

    monkeypatch.setattr(common, "CapturedStep", Counted)
    monkeypatch.setattr(common, "CAPTURE_ON", ("cpu",))
    monkeypatch.setattr(common, "CAPTURE_ABOVE", 3)
    monkeypatch.setattr(common, "CAPTURE_COLUMNS", 16)
    monkeypatch.setattr(common, "NOT_CAPTURED", set())
    return steps, calls


NOT_CAPTURED = ["mistral", "gemma2", "gemma3_text", "bloom", "mamba"]  # windows, ALiBi, states


@pytest.mark.parametrize("name", FAMILIES)
def test_captured_steps_have_the_log_probabilities_of_a_plain_forward(name, monkeypatch):
    model, tokenizer = family(name), make_tokenizer()
    model.generation_config.eos_token_id = stops_for(model, tokenizer)
    settings = {"n": 3, "max_new_tokens": 24, "temperature": 0.7, "seed": 1}
    eager = sample(model, tokenizer, PROMPTS, **settings)
    steps, calls = without_a_graph(monkeypatch)
    captured = sample(model, tokenizer, PROMPTS, **settings)
    assert torch.equal(eager.ids, captured.ids)
    assert worst(model, captured, 0.7) < (1e-3 if name == "mamba" else 1e-4)
    assert (name in NOT_CAPTURED) == (not calls)
    if calls:  # a step whose columns are full is followed by one with more
        assert {columns for _, columns in steps} == {16, 32}
        # for the two tokens after column 31 no new step is worth it
        assert len(calls) == 21


def test_captured_steps_are_made_anew_when_half_of_the_rows_have_finished(monkeypatch, tokenizer):
    model = family("llama")
    model.generation_config.eos_token_id = stops_for(model, tokenizer)
    steps, calls = without_a_graph(monkeypatch)
    rows = []
    for seed in range(5):
        steps.clear()
        captured = sample(model, tokenizer, PROMPTS, n=8, max_new_tokens=40, seed=seed)
        assert worst(model, captured, 1.0) < 1e-4
        rows.append([count for count, _ in steps])
        for before, after in itertools.pairwise(rows[-1]):
            assert after == before or after <= before / 2
    assert any(len(set(counts)) > 2 for counts in rows), rows
    monkeypatch.setattr(common, "CAPTURE_ABOVE", 40)
    calls.clear()
    sample(model, tokenizer, PROMPTS, n=8, max_new_tokens=40, seed=0)
    assert not calls


def test_a_forward_that_counts_its_positions_itself_is_not_captured(monkeypatch, tokenizer):
    """A graph would take the first token's position for ever (Bart, Whisper)."""
    model = family("llama")
    steps, _ = without_a_graph(monkeypatch)
    forward = type(model).forward

    def counts(self, input_ids, attention_mask=None, use_cache=None, **cache):
        named = {"attention_mask": attention_mask, "use_cache": use_cache, **cache}
        return forward(self, input_ids=input_ids, **named)

    name = common.cache_argument(model)
    arguments = ["self", "input_ids", "attention_mask", "use_cache", name]
    kinds = [inspect.Parameter(a, inspect.Parameter.POSITIONAL_OR_KEYWORD) for a in arguments]
    counts.__signature__ = inspect.Signature(kinds)
    monkeypatch.setattr(type(model), "forward", counts)
    s = sample(model, tokenizer, [[7, 12, 3], [5, 9, 8]], n=3, max_new_tokens=24, seed=1)
    assert not steps and s.ids.shape[1] > 4
    monkeypatch.setattr(type(model), "forward", forward)
    assert worst(model, s, 1.0) < 1e-4
    sample(model, tokenizer, [[7, 12, 3], [5, 9, 8]], n=3, max_new_tokens=24, seed=1)
    assert steps


def test_a_forward_that_cannot_be_captured_is_computed_eagerly(monkeypatch, tokenizer, capsys):
    model = family("llama")
    settings = {"n": 3, "max_new_tokens": 24, "seed": 1}
    eager = sample(model, tokenizer, PROMPTS, **settings)
    steps, calls = without_a_graph(monkeypatch)
    tried = []

    def refuse(self):
        tried.append(self)
        raise RuntimeError("it waits for the GPU")

    monkeypatch.setattr(common.CapturedStep, "__init__", lambda self, *given: refuse(self))
    common.say_once.cache_clear()
    for _ in range(2):
        again = sample(model, tokenizer, PROMPTS, **settings)
        assert torch.equal(eager.logprobs, again.logprobs)
    assert len(tried) == 1 and not calls, "it is tried once for a class of models"
    told = capsys.readouterr().out
    assert told.count("sampled without a CUDA graph (it waits for the GPU)") == 1


def test_draw_follows_softmax_by_a_chi_square_test():
    """300 words, more than one block of 256, with very unequal probabilities."""
    torch.manual_seed(0)
    logits, n = torch.randn(300) * 2, 200_000
    p = logits.double().softmax(-1)
    tokens, logprobs = draw(logits.expand(n, -1), torch.rand(n, 1, dtype=torch.float64))
    expected, seen = p * n, torch.bincount(tokens, minlength=300).double()
    chi2 = ((seen - expected) ** 2 / expected).sum().item()
    assert chi2 < 299 + 5 * (2 * 299) ** 0.5  # 5 sigma above its mean
    torch.testing.assert_close(logprobs, p.log()[tokens].float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("words", [3, 255, 256, 257, 1000])
def test_draw_is_the_inverse_of_the_cumulative_sum(words):
    """Against the textbook's one-level inverse CDF, at u = 0, just below 1, and on a grid between."""
    torch.manual_seed(words)
    logits = torch.randn(words) * 3
    logits[0] = logits[-1] = -float("inf")  # neither end can be drawn
    u = torch.cat(
        [
            torch.tensor([0.0, 1 - 2**-53]).double(),
            torch.linspace(0.001, 0.999, 500, dtype=torch.float64),
        ]
    )
    tokens, _ = draw(logits.expand(len(u), -1), u[:, None])
    wanted = torch.searchsorted(logits.double().softmax(-1).cumsum(-1), u, right=True).clamp(
        1, words - 2
    )
    assert (
        tokens != wanted
    ).float().mean() < 0.01  # a float32 exp against a float64 one, at the very edges
    assert (tokens - wanted).abs().max() <= 1


@pytest.mark.parametrize("words", [3, 256, 257, 1000])
def test_no_word_of_probability_0_is_drawn_at_either_end_of_the_numbers(words):
    """At 0 the first word that has a chance, just below 1 one that has: whole blocks may have none."""
    ends = torch.tensor([[0.0], [1 - 2.0**-52], [1 - 2.0**-53]], dtype=torch.float64)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(words, generator=generator) * 3
        first, last = sorted(torch.randint(words, (2,), generator=generator).tolist())
        logits[:first] = logits[last + 1 :] = -float("inf")
        tokens, logprobs = draw(logits.expand(3, -1), ends)
        assert tokens[0] == first and logprobs.isfinite().all()


def test_what_is_sampled_follows_the_model(tokenizer):
    """The first two tokens of 20,000 completions against the exact distribution of pairs, by chi-square."""
    model = family("llama", vocab_size=6)
    n = 20_000
    s = sample(model, tokenizer, [[3, 4]], n=n, max_new_tokens=2, temperature=1.3, seed=0)
    with torch.no_grad():
        first = (model(torch.tensor([[3, 4]])).logits[0, -1] / 1.3).softmax(-1)
        after = (model(torch.tensor([[3, 4, a] for a in range(6)])).logits[:, -1] / 1.3).softmax(-1)
    p = first[:, None] * after
    p[1] = torch.tensor([first[1], 0, 0, 0, 0, 0])  # token 1 ends the completion
    second = torch.where(s.mask[:, 1], s.ids[:, 1], 0)
    seen = torch.bincount(s.ids[:, 0] * 6 + second, minlength=36).double()
    expected = p.double().flatten() * n
    used = expected > 5
    chi2 = ((seen - expected) ** 2 / expected)[used].sum().item()
    assert chi2 < used.sum() + 5 * (2 * used.sum()) ** 0.5


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_greedy_equals_argmax_and_reports_temperature_1(name, tokenizer):
    model = family(name)
    s = sample(model, tokenizer, PROMPTS, max_new_tokens=10, temperature=0)
    for row in range(len(PROMPTS)):
        text = PROMPTS[row]
        for token in s.ids[row][s.mask[row]].tolist():
            with torch.no_grad():
                assert model(torch.tensor([text])).logits[0, -1].argmax().item() == token
            text = [*text, token]
    assert worst(model, s, 1.0) < 1e-4


def test_equal_seeds_give_equal_samples_and_others_do_not(tokenizer):
    model = family("llama")
    a, b, c = (sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=8, seed=s) for s in (5, 5, 6))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.logprobs, b.logprobs)
    assert a.ids.shape != c.ids.shape or not torch.equal(a.ids, c.ids)
    torch.manual_seed(3)
    d = sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=8)
    e = sample(model, tokenizer, PROMPTS, n=2, max_new_tokens=8)
    assert d.ids.shape != e.ids.shape or not torch.equal(d.ids, e.ids), (
        "without a seed two calls must differ"
    )


def test_what_a_row_draws_does_not_depend_on_which_rows_were_dropped(monkeypatch, tokenizer):
    model = family("llama")
    model.generation_config.eos_token_id = STOPS
    a = sample(model, tokenizer, PROMPTS, n=8, max_new_tokens=16, seed=2)
    monkeypatch.setattr(
        common.RoomyLayer, "reorder_cache", _spy := _Spy(common.RoomyLayer.reorder_cache)
    )
    b = sample(
        model, tokenizer, [p for p in PROMPTS for _ in range(8)], max_new_tokens=16, seed=2
    )  # no shared prompt
    assert torch.equal(a.ids, b.ids) and (a.logprobs - b.logprobs).abs().max() < 1e-5
    assert _spy.calls > 2, "rows were never dropped"


def test_dropping_rows_holds_one_buffer_twice_and_not_the_whole_cache(monkeypatch, tokenizer):
    """Views of the filled part kept every old buffer alive until the next token, so two caches were held at each
    drop. `alive` counts the buffers in memory at the moment when one more is filled."""
    model = family("llama")  # two layers: four buffers
    model.generation_config.eos_token_id = STOPS
    update, select, known, alive = common.RoomyLayer.update, torch.index_select, set(), []

    def seen(tensor):
        known.add(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    def spied_update(layer, *args, **kwargs):
        result = update(layer, *args, **kwargs)
        for buffer in layer.buffers:
            seen(buffer)
        return result

    def spied_select(old, dim, rows, out):
        select(seen(old), dim, rows, out=seen(out))
        alive.append(sum(not buffer.expired() for buffer in known))

    monkeypatch.setattr(common.RoomyLayer, "update", spied_update)
    monkeypatch.setattr(torch, "index_select", spied_select)
    sample(model, tokenizer, PROMPTS, n=8, max_new_tokens=16, seed=2)
    assert len(alive) > 3 * 4, "rows were never dropped"
    assert max(alive) == 5


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_in_slices_give_the_samples_of_all_prompts_at_once(name, monkeypatch, tokenizer):
    """All prompts in one forward hold as many activations as they have tokens. The slices' caches must come together
    in order, for every kind of cache: full, sliding window, recurrent."""
    model, prefills = family(name), []
    model.generation_config.eos_token_id = stops_for(model, tokenizer)
    forward = model.forward

    @functools.wraps(forward)
    def spied(**inputs):
        if inputs["input_ids"].shape[1] > 1:
            prefills.append(len(inputs["input_ids"]))
        return forward(**inputs)

    model.forward = spied
    prompts = [*PROMPTS, [8, 15]]
    whole = sample(model, tokenizer, prompts, n=3, max_new_tokens=24, temperature=0.7, seed=1)
    monkeypatch.setattr(
        common, "PREFILL_TOKENS", 2 * 11 + 10
    )  # room for two rows of the longest prompt
    slices = sample(model, tokenizer, prompts, n=3, max_new_tokens=24, temperature=0.7, seed=1)
    assert prefills == [5, 2, 2, 1]
    assert torch.equal(whole.ids, slices.ids) and torch.equal(whole.mask, slices.mask)
    torch.testing.assert_close(
        whole.logprobs, slices.logprobs, atol=1e-5 if name != "mamba" else 1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "rows, sizes", [(1, [3, 3, 3, 3]), (6, [6, 6]), (11, [9, 3]), (100, [12]), (None, [12])]
)
def test_completions_drawn_in_parts_are_those_drawn_at_once(rows, sizes, monkeypatch, tokenizer):
    model = family("llama")
    settings = {"n": 3, "max_new_tokens": 24, "temperature": 0.7, "seed": 1}
    whole = sample(model, tokenizer, PROMPTS, **settings)
    honest = common.decode
    seen = []

    def watch(model, pick, cache, logits, *rest):
        seen.append(len(logits))
        return honest(model, pick, cache, logits, *rest)

    monkeypatch.setattr(common, "decode", watch)
    parts = sample(model, tokenizer, PROMPTS, max_rows=rows, **settings)
    assert seen == sizes
    assert whole.texts == parts.texts
    for name in ("prompt_ids", "prompt_mask", "ids", "mask", "finished"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name
    torch.testing.assert_close(parts.logprobs, whole.logprobs)


def test_a_prompt_longer_than_a_slice_is_a_slice_of_its_own(monkeypatch, tokenizer):
    model = family("llama")
    whole = sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=1)
    monkeypatch.setattr(common, "PREFILL_TOKENS", 5)
    assert torch.equal(sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=1).ids, whole.ids)


class _Spy:
    """Counts the calls of a method and passes them on."""

    def __init__(self, method):
        self.method, self.calls = method, 0

    def __get__(self, obj, owner):
        def call(*args):
            self.calls += 1
            return self.method(obj, *args)

        return call


def test_mask_covers_the_stop_token_and_nothing_after_it():
    """With pad == EOS, comparing ids with pad would hide the very token that ends (trl 4970, 1623, 3091)."""
    model, tokenizer = family("llama"), make_tokenizer(pad="<eos>")
    model.generation_config.eos_token_id = STOPS
    s = sample(model, tokenizer, PROMPTS, n=16, max_new_tokens=12, seed=0)
    assert s.finished.any() and not s.finished.all()
    for ids, mask, logprobs, finished, text in zip(s.ids, s.mask, s.logprobs, s.finished, s.texts):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any(), "the mask is a prefix"
        stops = torch.isin(ids[:length], torch.tensor(STOPS))
        assert not stops[:-1].any() and stops[-1] == finished
        assert finished or length == 12
        assert (logprobs[:length] < 0).all() and (logprobs[length:] == 0).all()
        words = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(3, WORDS))]
        assert text.split() == [
            words[i] for i in ids[: length - int(finished)].tolist() if i != 1
        ]  # <eos> is special


def test_rows_are_grouped_by_prompt(tokenizer):
    s = sample(family("llama"), tokenizer, PROMPTS, n=3, max_new_tokens=2, seed=0)
    for i, prompt in enumerate(PROMPTS):
        for j in range(3):
            assert s.prompt_ids[3 * i + j][s.prompt_mask[3 * i + j]].tolist() == prompt
    assert (s.prompt_mask.long().diff(dim=1) >= 0).all(), "prompts are padded on the left"


def test_some_of_the_rows_are_those_and_no_longer_come_in_groups_of_one_prompt(tokenizer):
    s = sample(family("llama"), tokenizer, PROMPTS, n=3, max_new_tokens=6, seed=0)
    s.rows_per_prompt = 3
    some = s.take(torch.tensor([7, 0, 4]))
    assert (s.rows_per_prompt, some.rows_per_prompt) == (3, 1)
    assert some.texts == [s.texts[7], s.texts[0], s.texts[4]]
    for name in ("prompt_ids", "prompt_mask", "ids", "mask", "logprobs", "finished"):
        of_all = getattr(s, name)
        assert torch.equal(getattr(some, name), torch.stack([of_all[7], of_all[0], of_all[4]]))


def test_text_prompts_are_tokenised_with_one_bos():
    """Double BOS (trl 1400, 3328); missing BOS for plain strings (trl 3520)."""
    tokenizer = make_tokenizer(bos="<bos>")
    s = sample(family("llama"), tokenizer, ["w7 w8", "<bos> w7 w8"], max_new_tokens=1, seed=0)
    assert s.prompt_ids.tolist() == [[2, 7, 8], [2, 7, 8]]


def test_new_weights_are_used_at_once(tokenizer):
    """A sampler that keeps anything of the old weights between calls is off-policy without knowing it."""
    model = family("llama")
    sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert worst(model, sample(model, tokenizer, PROMPTS, max_new_tokens=8, seed=0), 1.0) < 1e-4


def test_mode_checkpointing_and_generation_config_are_as_before(tokenizer):
    """generate with checkpointing loses the cache (transformers 36051); here it is off while sampling, and on again."""
    model = family("llama").train()
    model = common.prepare(
        model, common.World(0, 1, torch.device("cpu"), torch.float32), gradient_checkpointing=True
    )
    model.model.norm.eval()  # a part that somebody froze stays frozen
    model.generation_config.update(
        do_sample=True, top_k=1, top_p=0.1, repetition_penalty=3.0, temperature=0.1
    )
    config = model.generation_config.to_dict()
    s = sample(model, tokenizer, PROMPTS, n=8, max_new_tokens=8, seed=0)
    assert model.training and model.model.layers[0].training and not model.model.norm.training
    assert (
        model.model.layers[0].gradient_checkpointing and model.generation_config.to_dict() == config
    )
    assert not s.logprobs.requires_grad
    assert worst(model.eval(), s, 1.0) < 1e-4
    assert len({tuple(r) for r in s.ids[:8].tolist()}) > 4, (
        "top_k=1 of the generation config must not act"
    )


def test_a_failure_inside_leaves_the_training_mode_alone(tokenizer):
    model = family("llama").train()
    model.forward = functools.wraps(model.forward)(lambda **inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert model.training


def test_ids_outside_the_tokenizer_are_no_accident(tokenizer):
    """Vocabularies are often padded beyond the tokenizer's (Qwen): such a token decodes to nothing."""
    s = sample(
        family("llama", vocab_size=WORDS + 16), tokenizer, PROMPTS, n=16, max_new_tokens=8, seed=0
    )
    assert (s.ids[s.mask] >= WORDS).any() and all(isinstance(t, str) for t in s.texts)


def test_logits_that_are_nan_do_not_crash_the_draw():
    """On a GPU an index out of range kills the process without a word; the update's check says it in words."""
    token, logprob = draw(torch.full((3, 300), float("nan")), torch.rand(3, 1, dtype=torch.float64))
    assert (token < 300).all() and logprob.isnan().all()


def test_a_model_whose_cache_would_be_ignored_is_refused(tokenizer):
    with pytest.raises(common.Stop, match="takes none of transformers' caches"):
        sample(family("rwkv", attention_hidden_size=32), tokenizer, [[3, 4]], max_new_tokens=2)


def test_an_empty_prompt_is_refused(tokenizer):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(family("llama"), tokenizer, [[3], []], max_new_tokens=2)


def test_the_bench_asks_sample_as_it_is(monkeypatch):
    """Its tokenizer is a stand-in, and has to have what `sample` wants of one."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "bench"))
    from sampling import Ids

    s = sample(family("llama"), Ids(), [[5, 6], [7, 8, 9]], n=2, max_new_tokens=4, seed=0)
    assert s.ids.shape[0] == 4 and s.texts == [""] * 4
