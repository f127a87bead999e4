"""What the five scripts share: loading, sampling, and a run's bookkeeping. No algorithm lives here.

LOADING
    Processes and seeds    say, fail, Stop, World, start, seed_from, all_sum, all_gather
    The user's input       read_flags, check_flags, read_json
    Text to token ids      load_tokenizer, encode_prompt, encode_completion, load_prompts
    Configs                read_config, context_of, limit_to_context, limit_to_reward_model
    Models                 load_policy, load_reference, load_scalar, shard, save_model
    Adapters (LoRA)        add_adapters, add_critic_adapters, Switched, merge_adapter
    Rewards                load_reward, rules_that_fit, load_function, stop_together, score_texts
SAMPLING
    Completions            Samples, sample, as_samples, rows_at_once, until_stopped, scores_if_due
    One token on a GPU     CapturedStep
    States and logits      completion_states, hidden_states, logits_of, can_share_prompts
A RUN
    Memory and optimizer   make_optimizer, learning_rate_at, sum_gradients, clip_gradients
    Folder                 open_run, write, replace
    Checkpoints            tensors, save_if_due, save_best, take_up, load_checkpoint
    The order of the data  rows_of_step
    Log and console        begin_log, Mean, Meter, log, conclude
    The end                short_errors, catch_signals

Shapes: B rows, P prompt columns, C completion columns, V vocabulary. Prompts are padded on the
left, so all completions start in the same column; completions are padded on the right.
"""

import collections
import contextlib
import copy
import dataclasses
import datetime
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from safetensors.torch import save
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

# ============================================ LOADING =============================================

# -- Processes and seeds ---------------------------------------------------------------------------


def say(message):
    """Prints a line on the first process only. If nobody can read it, the run goes on: Ctrl-C also
    ends the tee of `| tee`, and a terminal can be closed."""
    if int(os.environ.get("RANK", 0)) == 0:
        with contextlib.suppress(OSError):
            tqdm.write(message)


say_once = functools.lru_cache(say)  # a message that was printed is not printed again


def fail(message):
    """Ends the run after a mistake of the user's: one sentence, exit status 2."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(10)  # torchrun ends this process if the first one has said the same
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def first_line(error):
    """An exception's message without the paragraphs that libraries add."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Stop(Exception):
    """A run cannot go on. All processes raise it, and the first one says it."""


class Unscored(Stop):
    """The reward failed, and all processes know. Rewards come before the updates of a step, so
    no update is half done, and what was learnt may be saved."""


class Ended(Stop):
    """A signal asked for the end. It ends the run only after a save, or before the first step."""


@dataclass(frozen=True)
class World:
    """One process among `size`: its rank, its device, the dtype in which it computes."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype


def start(device="auto", dtype="auto", seed=0):
    """Chooses device and dtype and joins the other processes, which torchrun has started."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no GPU; use --device cpu, or install torch for CUDA")
    place = torch.device(device)
    if device == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
        # For Float32Head, which multiplies numbers that were rounded to bfloat16: TF32 holds all
        # of these. It does not hold every float32 number.
        torch.set_float32_matmul_precision("high" if dtype == "bfloat16" else "highest")
        # cuDNN's attention is compiled anew for each shape, and most micro-batches have their own
        torch.backends.cuda.enable_cudnn_sdp(False)
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    world = World(rank, size, place, getattr(torch, dtype))
    if is_sharded(world) and not dist.is_initialized():
        settings = {"timeout": datetime.timedelta(hours=1)}
        if size == 1:  # FSDP2 needs a process group even for one process
            settings |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        elif device == "cuda":
            settings["device_id"] = place  # otherwise barriers guess it and warn
        dist.init_process_group("nccl" if device == "cuda" else "gloo", **settings)
    torch.manual_seed(seed)  # so that all processes draw the same new head, where a model has one
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    return world


def is_sharded(world):
    """Whether FSDP2 holds the weights: not in one CPU process in float32."""
    return world.size > 1 or world.device.type == "cuda" or world.dtype != torch.float32


# What a random number is for, so that no two purposes share a seed: the order of the data,
# sampling, the cut into mini-batches, the order of an epoch, samples of held-out prompts.
ORDER, DRAW, CUT, PASS, EVAL = range(5)


def seed_from(*numbers):
    """One seed made of several numbers. The random choices of a step are drawn from seeds made of
    numbers such as --seed, step and rank, so a resumed run has no generator state to restore."""
    digest = hashlib.sha256(repr(tuple(int(n) for n in numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # below 2^63


def all_sum(world, *numbers):
    """The sums over all processes, a list of floats, added in float64."""
    floats = [float(x) for x in numbers]
    total = torch.tensor(floats, dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(total)
    return total.tolist()


def all_gather(world, tensor):
    """Tensors of one shape from all processes, joined along dimension 0 by rank."""
    if world.size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_objects(world, thing):
    """[thing of the first process, of the second, ...]"""
    things = [thing] * world.size
    if world.size > 1:
        dist.all_gather_object(things, thing)
    return things


# -- The user's input ------------------------------------------------------------------------------


def read_flags(Args, doc):
    """The flags of the command line, an Args. With --resume those not given are the run's: its
    args.json has them as they were resolved."""
    read = functools.partial(
        tyro.cli, Args, description=doc.partition("\n")[0], use_underscores=True
    )
    args = read()
    path = Path(args.out) / "args.json"
    if not (args.resume and args.out and path.is_file()):
        return args
    saved = json.loads(path.read_text())
    if saved["script"] != Path(sys.argv[0]).stem:
        return args  # `open_run` refuses it
    names = [field.name for field in dataclasses.fields(Args) if field.name in saved]
    values = [saved[name] for name in names]
    values = [tuple(value) if isinstance(value, list) else value for value in values]
    return read(default=Args(**dict(zip(names, values))))


COUNTS = """prompts_per_step samples_per_prompt pairs_per_step max_tokens max_prompt_tokens
max_new_tokens epochs minibatches tokens_per_micro_batch sample_rows save_every keep""".split()


def check_flags(args):
    """Refuses flags that no script can work with."""
    for name, value in vars(args).items():
        if type(value) not in (int, float) or name == "simpo_margin":
            continue
        if name in ("temperature", "max_grad_norm", "lora_alpha") and not value > 0:
            fail(f"--{name} {value}: must be above 0")
        least = 1 if name in COUNTS else 0
        if not value >= least:  # also true of nan
            fail(f"--{name} {value}: must be {least} or more")
    if getattr(args, "reference", "") and not args.beta:
        fail("--reference: only the KL penalty uses it, so it needs a --beta above 0")
    demos = getattr(args, "demos", "")
    if getattr(args, "reward", "") == "none" and not (getattr(args, "beta", 1) or demos):
        fail("--reward none: only the KL penalty teaches then, so it needs a --beta above 0")
    # grpo.py, ppo.py, and reinforce.py without --demos
    draws_to_learn = args.steps and hasattr(args, "prompts_per_step") and not demos
    if draws_to_learn and args.reward == "none" and not args.reference:
        fail("--reward none: without a --reference, the teacher, there is nothing to learn")
    if args.resume and not args.steps:
        fail("--steps 0 evaluates a model: give --model RUN/model instead of --resume")
    if not args.steps and not args.eval_every:
        fail("--steps 0 evaluates only, and --eval_every 0 turns that off")
    if args.steps and not (args.data or demos):
        why = "the bundled data is for the bundled model, and used only if no file is named"
        fail(f"--model {args.model} needs --data: {why}")
    held_out = [name for name in ("eval_data", "eval_prompts") if hasattr(args, name)]
    if not args.steps and not any(getattr(args, name) for name in held_out):
        fail(f"--steps 0 evaluates; name a file by --{' or --'.join(held_out)}")
    if getattr(args, "lora_rank", 0):
        empty_model(args.model, args)  # stops if this rank does not suit the model


def conversion(path, kind, flag, change=""):
    """For an error: a line of Python that converts a file, or a data set of the hub."""
    source = f'"{kind}", data_files="{path}"' if kind else f'"{path}"'
    split = "train"  # a single file has no other
    if not kind and flag.startswith("--eval"):
        split = "test"
    rows = f'load_dataset({source})["{split}"]{change}'
    return f'convert it: from datasets import load_dataset; {rows}.to_json("{flag[2:]}.jsonl")'


def join_parts(record, where):
    """Gives each message one text in the place of a list of texts."""
    talks = [record.get(key) for key in ("prompt", "question", "chosen", "rejected")]
    for message in itertools.chain(*[talk for talk in talks if isinstance(talk, list)]):
        parts = message.get("content") if isinstance(message, dict) else None
        if isinstance(parts, list):
            for part in parts:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                if kind != "text":
                    fail(f"{where}: a message has a part of type {kind!r}; only 'text' is read")
            texts = [part.get("text") for part in parts]
            message["content"] = "".join(str(text) for text in texts if text is not None)


def read_json(path, flag):
    """[(line number, value), ...] of a JSON-lines file."""
    kind = Path(path).suffix.lower()[1:]
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # with or without a BOM
    except (OSError, UnicodeDecodeError) as error:
        why = f"cannot be read ({getattr(error, 'strerror', None) or f'not UTF-8: {error}'})"
        is_parquet = kind == "parquet" and Path(path).exists()
        may_be_on_the_hub = not kind and not Path(path).exists()
        if is_parquet or may_be_on_the_hub:
            why += f"; if this is a {kind or 'hub'} data set, {conversion(path, kind, flag)}"
        fail(f"{flag} {path}: {why}")
    if text.lstrip().startswith("["):
        fail(f"{flag} {path}, line 1: an array, not an object; {conversion(path, 'json', flag)}")
    values = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() also cuts at U+2028
        try:
            if line.strip():
                value = json.loads(line)
                # half of a surrogate pair ("\ud83d" alone) is valid JSON, but no UTF-8
                if "\\ud" in line.lower():
                    json.dumps(value, ensure_ascii=False).encode()
                values.append((number, value))
        except ValueError as error:
            how = conversion(path, kind, flag) if kind == "csv" else "write one object a line"
            fail(f"{flag} {path}, line {number}: not JSON ({error}); {how}")
    if not values:
        fail(f"{flag} {path}: no rows in it")
    for number, value in values:
        if isinstance(value, dict):
            join_parts(value, f"{flag} {path}, line {number}")
            if value.get("system"):
                how = 'it can be the first message of "prompt"'
                say_once(f'note: {flag} {path}: "system" in a row is not read; {how}')
    return values


# -- Text to token ids -----------------------------------------------------------------------------


# Chat templates that print today's date print this one, if they name its format in the call of
# strftime_now: a run that is resumed on another day must not go on with other prompts.
DATE = datetime.datetime(2026, 1, 1)


def load_tokenizer(path, template_args=""):
    """A tokenizer with a pad token: its own, or EOS. All masks are made from lengths: `ids != pad`
    would hide EOS where it is pad, and the model would never learn to stop."""
    vocab_size = read_config(path).get_text_config().vocab_size
    with loading(path):
        # without trust_remote_code=False transformers asks the user whether to run code;
        # mistral_common's tokenizer, where it is installed, has no chat template
        settings = {"trust_remote_code": False, "mistral_format": False}
        tokenizer = AutoTokenizer.from_pretrained(path, **settings)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        fail(f"{path}: the folder has no tokenizer")  # transformers has made an empty one
    if tokenizer.vocab_size > vocab_size:
        fail(f"{path}: tokenizer and model do not belong together: it has more tokens")
    if tokenizer.eos_token_id is None:
        fail(f"{path}: its tokenizer has no EOS token, so no completion could end")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocab_size:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        tokenizer.template_args = dict(json.loads(template_args or "{}"))
    except (ValueError, TypeError):
        fail(f"--template_args {template_args}: not a JSON object")
    for name in tokenizer.template_args:
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            fail(f"--template_args: the chat template of {path} does not know {name}")
    return tokenizer


def render(tokenizer, talk, **settings):
    """Chat messages as the chat template writes them, with `DATE` as today's."""
    call = r"strftime_now\(\s*(['\"])(.*?)\1\s*\)"
    template = tokenizer.get_chat_template()
    template = re.sub(call, lambda found: json.dumps(DATE.strftime(found[2])), template)
    settings = {**getattr(tokenizer, "template_args", {}), **settings}
    return tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False, **settings)


@functools.lru_cache
def text_after_answer(tokenizer, template):
    """What the chat template writes after an answer. `template` is only the cache's key."""
    talk = [*messages("question"), {"role": "assistant", "content": "an answer"}]
    try:
        _, found, after = render(tokenizer, talk).rpartition("an answer")
    except Exception:  # there is no template, or it wants other messages
        return ""
    return after if found else ""


def turn_end(tokenizer):
    """The special token that the chat template writes right after an answer (Gemma's is not EOS),
    or else EOS."""
    after = text_after_answer(tokenizer, str(tokenizer.chat_template))
    ids = tokenizer(after, add_special_tokens=False).input_ids
    added = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    return ids[0] if added and added.special else tokenizer.eos_token_id


def stop_ids(model, tokenizer):
    """All ids that end a completion. Without one of them good answers would look cut off."""
    listed = model.generation_config.eos_token_id
    if not isinstance(listed, list):
        listed = [listed]
    return sorted({*listed, tokenizer.eos_token_id, turn_end(tokenizer)} - {None})


def own_pad(tokenizer):
    """Gives a classifier's tokenizer a pad token that ends no text: one that it has, or a new
    one. transformers scores the last id that is not pad: if EOS were pad, it would score the token
    before EOS."""
    end = tokenizer.convert_ids_to_tokens(turn_end(tokenizer))
    taken = (tokenizer.eos_token, tokenizer.bos_token, end, None)  # None: it has none
    if tokenizer.pad_token in taken:
        known = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        spare = [token for token in known if "pad" in token.lower()]
        spare = [token for token in [*spare, tokenizer.unk_token] if token not in taken]
        tokenizer.add_special_tokens({"pad_token": [*spare, "<|pad|>"][0]})


def encode(tokenizer, text):
    """Raw text to ids. BOS comes first if the tokenizer adds one and the text has none yet. An EOS
    that the tokenizer adds to a text is removed."""
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not has_bos).input_ids
    # compared with `alone`: the text may itself end with EOS, and some models' BOS is their EOS
    alone = tokenizer(text, add_special_tokens=False).input_ids
    ended = [*alone, tokenizer.eos_token_id]
    return ids[:-1] if alone and ids[-len(ended) :] == ended else ids


def messages(prompt, system=""):
    """A prompt as chat messages, after `system` if it has no system message of its own."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    return prompt


def same_talk(talk, other):
    """Whether both lists of messages have the same roles and texts. Other keys do not count."""
    said = [(message["role"], message["content"]) for message in talk]
    return said == [(message["role"], message["content"]) for message in other]


def can_render(tokenizer, talk):
    try:
        render(tokenizer, talk)
    except Exception:  # each template raises its own
        return False
    return True


def render_or_fail(tokenizer, talk, **settings):
    """`render`, but an error ends the run with one sentence."""
    try:
        return render(tokenizer, talk, **settings)
    except Exception as error:  # some templates want no system message, or strict turns
        why = f"no chat template to render it, or the template refuses it ({first_line(error)})"
        fail(f"prompt {str(talk):.200}: {why}")


def encode_chat(tokenizer, talk, **settings):
    text = render_or_fail(tokenizer, talk, **settings)
    # a template that wants BOS has written it
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_prompt(tokenizer, prompt, system="", chat=True):
    """A prompt to ids, through the chat template. A string is raw text if there is no template
    or `chat` is off."""
    if isinstance(prompt, str) and not (chat and tokenizer.chat_template):
        return encode(tokenizer, f"{system}\n{prompt}" if system else prompt)
    return encode_chat(tokenizer, messages(prompt, system), add_generation_prompt=True)


def encode_completion(tokenizer, text, chat=False, prompt=None, system=""):
    """A given answer (a demonstration, one side of a pair) to ids. Without its end it would teach
    the model never to stop. After a raw prompt it is tokenized alone: a sampled completion, too, is
    ids after the prompt's ids, and no token spans both."""
    end = turn_end(tokenizer) if chat else tokenizer.eos_token_id
    before = ""
    if chat and tokenizer.chat_template and prompt is not None:
        talk = messages(prompt, system)
        before = render_or_fail(tokenizer, talk, add_generation_prompt=True)
        text = written_answer(tokenizer, talk, before, text)
    ids = encode_after(tokenizer, before, text)
    return ids if ids[-1:] == [end] else [*ids, end]


def encode_after(tokenizer, before, text):
    """The ids of `text` where it follows `before`. Some tokenizers put a space before every text:
    tokenized alone, an answer would begin with a space that the chat template does not write."""
    first = tokenizer(before, add_special_tokens=False).input_ids
    both = tokenizer(before + text, add_special_tokens=False).input_ids
    rest = both[len(first) :]
    if rest and both[: len(first)] == first:
        return rest
    # a token spans both texts (in a sampled answer none does), or `text` is empty
    return tokenizer(text, add_special_tokens=False).input_ids


def written_answer(tokenizer, talk, before, answer):
    """What the chat template writes after `before`, its generation prompt, for this answer. In
    thinking models it begins with an empty thought. (A policy that is sampled writes its own
    thought.)"""
    talk = [*talk, {"role": "assistant", "content": answer}]
    if not answer and not can_render(tokenizer, talk):  # Mistral's refuse an empty answer
        return answer
    whole = render_or_fail(tokenizer, talk)
    if not whole.startswith(before):
        say_once("note: the chat template cannot place given answers; they follow the prompt as is")
        return answer
    after = text_after_answer(tokenizer, str(tokenizer.chat_template))
    written = whole.removeprefix(before).removesuffix(after)
    # some templates drop an answer's own thought
    return written if written.strip().endswith(answer.strip()) else answer


def encode_answer(tokenizer, prompt, completion):
    """A whole conversation to ids, as a reward model reads it."""
    talk = messages(prompt)
    texts = [message["content"] for message in talk]
    if tokenizer.chat_template or not all(isinstance(text, str) for text in texts):
        whole = [*talk, {"role": "assistant", "content": completion}]
        if not completion and not can_render(tokenizer, whole):  # Mistral's refuse an empty answer
            return [*encode_chat(tokenizer, talk, add_generation_prompt=True), turn_end(tokenizer)]
        return encode_chat(tokenizer, whole)
    return encode(tokenizer, "\n".join(texts)) + encode_completion(tokenizer, completion)


def is_prompt(value):
    """Whether a text, or a list of chat messages."""
    if isinstance(value, str):
        return bool(value)
    if not isinstance(value, list) or not value:
        return False
    for message in value:
        if not isinstance(message, dict) or "role" not in message:
            return False
        if not isinstance(message.get("content"), (str, list)):
            return False
    return True


def keys_of(record):
    """For an error: the keys of a line."""
    keys = [key for key, value in record.items() if value is not None]
    return f"it has {', '.join(keys) or 'no keys'}"


def how_to_convert(record, path, flag):
    """For an error: how to convert lines of two common forms."""
    if "instruction" in record:
        prompt = 'row["instruction"] + "\\n" + (row.get("input") or "")'
        answer = 'row["output"]'
    elif "messages" in record:
        prompt = 'row["messages"][:-1]'
        answer = 'row["messages"][-1]["content"]'
    else:
        return ""
    change = f'.map(lambda row: {{"prompt": {prompt}, "answer": {answer}}})'
    return f"; {conversion(path, 'json', flag, change)}"


def has_answer(record):
    return isinstance(record.get("answer"), (str, int, float))


def load_prompts(path, flag, tokenizer, args, answer_flag):
    """[(token ids of the prompt, its line of the file as a dict), ...]. Prompts that are too long,
    or have no tokens, are left out, and counted."""
    kept = []
    left_out = 0
    lines = read_json(path, flag) if path else []
    for line, record in lines:
        where = f"{flag} {path}, line {line}"
        record = record if isinstance(record, dict) else {}
        record = {**record, "prompt": record.get("prompt") or record.get("question")}
        if not is_prompt(record["prompt"]):
            needs = 'needs a "prompt" (or "question"), a text or a list of messages'
            fail(f"{where}: {needs}; {keys_of(record)}{how_to_convert(record, path, flag)}")
        ids = encode_prompt(tokenizer, record["prompt"], args.system, args.chat)
        if not 0 < len(ids) <= args.max_prompt_tokens:
            left_out += 1
        elif answer_flag and not has_answer(record):
            prompt = f"the prompt is {record['prompt']!r:.100}"
            fail(f'{where}: {answer_flag} needs an "answer", a text or a number; {prompt}')
        else:
            kept.append((ids, record))
    if left_out:
        limit = f"--max_prompt_tokens {args.max_prompt_tokens}"
        say(f"{flag}: {left_out} of {left_out + len(kept)} prompts left out ({limit})")
        if not kept:
            fail(f"{flag}: no prompt is left ({limit})")
    return kept if flag in ("--data", "--demos") else some_rows(kept, args.eval_rows)


def some_rows(rows, count):
    """`count` of the held-out rows (0: all), in their order; the same ones in every run."""
    if not 0 < count < len(rows):
        return rows
    chosen = random.Random(0).sample(range(len(rows)), count)
    return [rows[i] for i in sorted(chosen)]


# -- Configs ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def loading(path):
    """Turns transformers' errors, and those of its libraries, into one sentence."""
    try:
        yield
    except Exception as error:
        fail(f"{path}: no such model could be loaded ({first_line(error)})")


def read_config(path, **changes):
    """A model's config with every dropout at 0. With dropout the ratio would not start at 1, nor
    the KL at 0."""
    folder = Path(path)
    if str(path).startswith(("/", ".", "~")) and not folder.is_dir():
        fail(f"{path}: no such folder")
    is_model = (folder / "config.json").is_file()
    if not is_model and (folder / "model" / "config.json").is_file():
        fail(f"{path}: the model of this run is in {folder / 'model'}")
    with loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **changes)
    set_noise(config)
    return config


def set_noise(config, source=None):
    """Sets every dropout and jitter to 0, or as in another config."""
    for name, value in list(vars(config).items()):
        wanted = getattr(source, name, None)
        # PhiMoE's router_jitter_noise is no noise but a threshold, in evaluation too. (Its
        # router draws at random besides; `prepare` turns that off.)
        is_threshold = config.model_type == "phimoe" and name == "router_jitter_noise"
        if isinstance(value, PreTrainedConfig):
            set_noise(value, wanted)
        elif isinstance(value, float) and ("drop" in name or "jitter" in name) and not is_threshold:
            setattr(config, name, wanted or 0.0)


def policy_config(path):
    config = read_config(path)
    if "SequenceClassification" in str(config.architectures):
        fail(f"{path}: this is a reward model, no language model")
    return config


def reference_config(args, tokenizer):
    """The config of --reference, which must have the tokens of --model; without it, that of
    --model."""
    config = policy_config(args.reference or args.model)
    if args.reference and load_tokenizer(args.reference).get_vocab() != tokenizer.get_vocab():
        fail(f"--reference {args.reference}: has other tokens than --model {args.model}")
    return config


def scalar_config(path):
    """The config of a model that can have one number for a head."""
    config = read_config(path)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        family = config.model_type
        fail(f"{path}: transformers has no sequence classifier for the family {family!r}")
    if "SequenceClassification" in str(config.architectures) and config.num_labels != 1:
        fail(f"{path}: this classifier has {config.num_labels} labels; a reward model has one")
    return config


def context_of(*configs):
    """How many tokens all models of these configs can read."""
    room = []
    for config in configs:
        text = config.get_text_config()
        room.append(getattr(text, "max_position_embeddings", None) or 2**31)
        if re.search("roberta|camembert|longformer", text.model_type):
            room[-1] -= text.pad_token_id + 1  # the first token's position
        rope = getattr(text, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            # longer texts use other rotary frequencies, which do not fit the keys cached before
            room.append(rope["original_max_position_embeddings"])
    return min(room)


def limit_to_context(args, longest, *configs):
    """The flags, with --max_new_tokens lowered to what fits after the longest prompt. One place
    stays free: in best-of-N one of the configs is a reward model's, which reads an EOS after a
    completion that was cut."""
    context = context_of(*configs)
    why = f"the longest prompt has {longest} tokens, and the model's context {context}"
    return lower_max_new_tokens(args, context - longest - 1, why)


def limit_to_reward_model(args, tokenizer, prompts):
    """Lowers --max_new_tokens further, to the reward model's context, if both have the same tokens.
    With other tokens an answer's length is not known before; `score_ids` cuts what is too long."""
    reader = load_tokenizer(args.reward)
    context = context_of(scalar_config(args.reward))
    longest = max(len(encode_answer(reader, row["prompt"], "")) for _, row in prompts)
    room = context - longest
    why = f"--reward {args.reward} reads {context} tokens, and the longest prompt has {longest}"
    same_tokens = tokenizer.get_vocab().items() <= reader.get_vocab().items()
    if 0 < room < args.max_new_tokens and not same_tokens:
        say(f"note: {why}; of longer texts it reads the first token and the end")
        return args
    return lower_max_new_tokens(args, room, why)


def lower_max_new_tokens(args, room, why):
    if room < 1:
        fail(f"{why}; a smaller --max_prompt_tokens leaves such prompts out")
    if room >= args.max_new_tokens:
        return args
    say(f"--max_new_tokens {args.max_new_tokens} is lowered to {room}: {why}")
    return dataclasses.replace(args, max_new_tokens=room)


# -- Models ----------------------------------------------------------------------------------------


def load(auto, path, **changes):
    """from_pretrained -> the model and the names of its new weights. Always in float32: at small
    learning rates a step is too small to move a bfloat16 weight."""
    settings = {"config": read_config(path, **changes), "dtype": torch.float32}
    settings |= {"trust_remote_code": False, "use_safetensors": True}
    with loading(path):
        model, info = auto.from_pretrained(path, output_loading_info=True, **settings)
    # name_or_path is "" where transformers has taken the text part of a multimodal model
    model.name_or_path = str(path)
    missing = sorted(info["missing_keys"])
    weights = dict(model.named_parameters())
    if auto is AutoModelForSequenceClassification:  # its head may be new: only the rest counts
        weights = dict(model.base_model.named_parameters(model.base_model_prefix))
    lacking = [name for name in missing if name in weights]
    if lacking:  # transformers has drawn them at random
        fail(f"{path}: the folder has no weights for {len(lacking)} parts, such as {lacking[0]}")
    return model, missing


def empty_model(path, args=None):
    """A model without numbers: what its config alone tells. args: flags, for `add_adapters`."""
    with loading(path), torch.device("meta"):
        config = read_config(path)
        auto = AutoModelForCausalLM
        is_named = "SequenceClassification" in str(config.architectures)
        if is_named or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            auto = AutoModelForSequenceClassification
        model = auto.from_config(config, trust_remote_code=False)
        return add_adapters(model, args, torch.float32)


def load_policy(path, world, gradient_checkpointing=False, args=None):
    """The model that learns: float32 weights, in training mode. args: flags, for `add_adapters`."""
    model, _ = load(AutoModelForCausalLM, path)
    check_head(model)
    widen_head(model.get_output_embeddings(), world)
    return prepare(add_adapters(model, args, world.dtype), world, gradient_checkpointing)


def load_reference(path, world, policy=None):
    """A frozen model, for a KL penalty or to draw best-of-N from. A policy of the same path with
    adapters is its own reference, with the adapters off: no second model is loaded."""
    if hasattr(policy, "lora") and str(path) == str(policy.name_or_path):
        return Switched(policy, None)
    model, _ = load(AutoModelForCausalLM, path)
    if policy is not None:  # then log-probabilities are asked for, not only samples
        check_head(model)
    widen_head(model.get_output_embeddings(), world)
    return freeze(model, world)


def load_scalar(
    path, world, tokenizer, head_std=None, gradient_checkpointing=False, frozen=False, args=None
):
    """A model whose head gives one number. args: as in `load_policy`.

        a critic                   head_std=0.0      a new head, whose first guess is 0
        a reward model to train    head_std or None  a new head drawn with this std, or the folder's
        a reward model that scores frozen=True       the folder's head

    If the model scores, the tokenizer is its own, and may get another pad token here. (A script
    that trains a reward model has called `own_pad` before.)"""
    scalar_config(path)
    model, missing = load(AutoModelForSequenceClassification, path, num_labels=1)
    if head_std is None and missing:
        fail(f"{path}: this is no reward model with one score: it has no {', '.join(missing)}")
    if head_std is not None:
        for p in scalar_head(model).parameters():
            torch.nn.init.normal_(p, 0.0, head_std if p.ndim > 1 else 0.0)
    widen_head(scalar_head(model), world)  # in bfloat16 different scores would round to one
    config = model.config
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    if frozen and pad is not None and 0 <= pad < len(tokenizer):
        tokenizer.pad_token_id = pad
    elif frozen:
        own_pad(tokenizer)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # own_pad made a token
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    # transformers scores the last id that is not this one, so it must not be None
    config.pad_token_id = tokenizer.pad_token_id
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.problem_type = "regression"
    if frozen:
        return freeze(model, world)
    return prepare(add_adapters(model, args, world.dtype), world, gradient_checkpointing)


def scalar_head(model):
    """A sequence classifier's head, mostly named `score`. transformers calls it on all positions,
    so `hidden_states` can catch them."""
    children = [m for name, m in model.named_children() if name != model.base_model_prefix]
    return [child for child in children if list(child.parameters())][-1]


class Float32Head(torch.nn.Linear):
    """A head that computes in float32 from bfloat16 weights and states. A logit of 20 in bfloat16
    is off by up to 0.06, and sampler and trainer err differently."""

    wide_weight = None  # set while sampling; otherwise made at each call

    def forward(self, states):
        weight = self.weight.float() if self.wide_weight is None else self.wide_weight
        bias = None if self.bias is None else self.bias.float()
        return F.linear(states.float(), weight, bias)


def widen_head(head, world):
    if world.dtype != torch.float32 and type(head) is torch.nn.Linear:
        head.__class__ = Float32Head  # the weight stays, and with it the tie to the embedding


def prepare(model, world, gradient_checkpointing=False):
    """A model that learns: training mode, checkpointing if asked for, shards."""
    model.train()
    for module in model.modules():
        # in training mode PhiMoE's router draws experts at random, and Mamba's mixers (those with
        # A_log) use a fused kernel that ignores padding
        if hasattr(module, "router_jitter_noise") or hasattr(module, "A_log"):
            module.eval()
    if gradient_checkpointing:  # transformers 5.17 has only the older name, 5.23 warns about it
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        settings = {"use_reentrant": False}
        if hasattr(model, "lora"):
            # for each forward two contexts (of class `Switched`), one for itself and one for its
            # repetition in backward, both with the adapters that are active at that forward
            settings["context_fn"] = lambda: [Switched(model, model.lora.active) for _ in range(2)]
        enable(settings)
    return shard(model, world)


def freeze(model, world):
    """A model that never learns, its weights in the computing dtype. Its buffers stay float32, as
    in the policy: otherwise the KL would not start at 0."""
    for weight in model.parameters():
        weight.requires_grad_(False)
        weight.data = weight.data.to(world.dtype)
    return shard(model.eval(), world)


def shard(model, world):
    """Hands the model to FSDP2, which moves it to the device and keeps a shard of each weight. The
    shard is stepped in float32; the whole weight, in `world.dtype`, computes. So policy, sampler
    and reference have the same weights, and the KL starts at exactly 0."""
    if not is_sharded(world):
        return model
    if world.device.type == "cuda" and world.dtype == torch.bfloat16:
        keep_angles_exact(model)
    mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
    precision = MixedPrecisionPolicy(world.dtype, torch.float32, cast_forward_inputs=False)
    blocks = blocks_of(model)
    if not blocks:  # without a block inside the root FSDP2 would miss the backward pass
        name = type(model).__name__
        fail(f"{name} names no blocks to shard: it trains in one CPU process in float32 only")
    left_alone = set()
    if world.size == 1 and hasattr(model, "lora"):
        # with one process a frozen weight is whole already; FSDP2 would copy it at each use
        model.to(world.device)  # fully_shard does not move what it ignores
        left_alone = {p for p in model.parameters() if not p.requires_grad}
    # inner blocks first, the root last: each takes the weights that no other has taken
    for unit in [*reversed(blocks), model]:
        fully_shard(unit, mesh=mesh, mp_policy=precision, ignored_params=left_alone)
        if world.size > 1:
            # FSDP2 averages over the processes. Our losses are divided by counts over all
            # processes already, so the right gradient is the sum. (With one process both are
            # the same, and FSDP2 would multiply a copy of each gradient by 1.)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    return model


def keep_angles_exact(model):
    """Turns off TF32, which `start` allows, where positions become angles. In transformers 5.17
    most families do this by a float32 matrix product. TF32 would round both factors: the
    frequencies, and positions above 2048."""

    def set_precision(name):
        return lambda *given: torch.set_float32_matmul_precision(name)

    for module in model.modules():
        if "Rotary" in type(module).__name__:
            module.register_forward_pre_hook(set_precision("highest"))
            module.register_forward_hook(set_precision("high"))


def blocks_of(model):
    """The layers of a transformer, an outer one before those inside it."""
    names = model._no_split_modules or ()
    return [m for m in model.modules() if type(m).__name__ in names and m is not model]


def at_rest(model):
    """The model with every weight a shard. After a forward FSDP2's root holds whole weights, and
    what is written to those is lost."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()
    return model


def forget_forwards(model):
    """After forwards without backward: FSDP2 would keep the root's whole weights, and a list of
    blocks that grows with every forward."""
    at_rest(model)
    if hasattr(model, "reset_iter_state"):  # from torch 2.13 on
        if model._get_fsdp_state()._is_root is not None:  # the model has had a forward
            model.reset_iter_state()


@torch.no_grad()
def copy_weights(source, target):
    """Copies the weights of one model into another, perhaps of another dtype."""
    for a, b in zip(at_rest(source).parameters(), at_rest(target).parameters()):
        b.copy_(a)


def whole(value, keep=True):
    """A tensor with all its shards, on the CPU, or any other value. Every process must call this;
    those that do not `keep` the result get None."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not keep:
        return None
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def save_model(model, tokenizer, folder, world, note=None):
    """Writes a Hugging Face folder: the weights in the computing dtype, and a `note`. Buffers and
    adapters stay float32: with a rounded buffer GLM's router would choose other experts."""
    weights = {name for name, _ in model.named_parameters()}
    state = {}
    for name, value in tensors(model):
        value = whole(value, keep=world.rank == 0)
        if world.rank == 0:
            to_round = name in weights and ".lora_" not in name
            state[name] = value.to(world.dtype) if to_round else value

    def write_on_the_first():
        if world.rank == 0:
            write_model(model, tokenizer, Path(folder), state, world.dtype, note)

    stop_together(write_on_the_first, world)()  # if it fails, all processes raise


def write_model(model, tokenizer, folder, state, dtype, note=None):
    temporary = folder.with_name(folder.name + ".tmp")
    adapter = folder.with_name("best_adapter" if folder.name == "best" else "adapter")
    temporary_adapter = adapter.with_name(adapter.name + ".tmp")
    generation = getattr(model, "generation_config", None)
    try:
        if hasattr(model, "lora"):
            temporary_adapter.mkdir(exist_ok=True)
            adapter_files = merge_adapter(model, state)  # changes `state`, too
            for name, content in adapter_files.items():
                write(temporary_adapter / name, content)
        # save_pretrained refuses some generation configs (Llama-2's): hide it, write it later
        model.generation_config = GenerationConfig()
        model.save_pretrained(temporary, state_dict=state)
        model.generation_config = generation
        if model.get_output_embeddings() is not None:
            settings = copy.deepcopy(generation)
            ends = stop_ids(model, tokenizer)  # whoever samples must know all of them
            settings.eos_token_id = ends if len(ends) > 1 else ends[0]
            path = temporary / "generation_config.json"
            settings.to_json_file(path, keys_to_pop=["compile_config"])
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        source = AutoConfig.from_pretrained(model.name_or_path, trust_remote_code=False)
        if type(source) is not type(config):  # the source is multimodal, this is its text model
            source = source.get_text_config()
        set_noise(config, source)  # the dropout that the model came with
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if note:
            write(temporary / "score.json", json.dumps(note) + "\n")
        replace(temporary, folder)
        if hasattr(model, "lora"):  # right after it: the adapter is of this model
            replace(temporary_adapter, adapter)
    except Exception as error:  # each library has its own exception for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary_adapter, ignore_errors=True)
        raise Stop(f"{folder} could not be written ({error})") from error
    finally:
        model.generation_config = generation


# -- Adapters (LoRA) -------------------------------------------------------------------------------


def add_pair(layer, lora, name):
    """Makes a linear layer give W x + (alpha / R) B A x while the pair of this name is active ->
    A [R, in] and B [out, R]. They learn, in float32; W is frozen, in the computing dtype. B starts
    at 0, so the model starts as it was."""
    A = torch.nn.Linear(layer.in_features, lora.rank, bias=False)
    B = torch.nn.Linear(lora.rank, layer.out_features, bias=False)
    torch.nn.init.zeros_(B.weight)

    def add(layer, inputs, y):
        if lora.active == name:
            (x,) = inputs
            Ax = F.linear(x, A.weight.to(x.dtype))
            y = y + lora.alpha / lora.rank * F.linear(Ax, B.weight.to(x.dtype))
        return y

    layer.register_forward_hook(add)
    return A, B


def add_adapters(model, args, dtype):
    """With --lora_rank: freezes the model, but not a reward model's head, and gives every nn.Linear
    in its blocks a pair of adapters -> the model."""
    if not getattr(args, "lora_rank", 0):
        return model
    head = [] if model.get_output_embeddings() else scalar_head(model).parameters()
    for weight in set(model.parameters()) - set(head):
        weight.requires_grad_(False)
        weight.data = weight.data.to(dtype)
    inside = list(torch.nn.ModuleList(blocks_of(model)).modules())  # blocks in blocks come once
    linear = [m for m in inside if type(m) is torch.nn.Linear]
    uses = collections.Counter(m.weight for m in linear)
    layers = [m for m in linear if uses[m.weight] == 1]  # Zamba2: pairs on one weight cannot merge
    rest = [m for m in inside if any(p.ndim > 1 for p in m.parameters(recurse=False))]
    rest = ", ".join(sorted({type(m).__name__ for m in rest if m not in layers}))
    if not layers:
        fail(f"--lora_rank: this model has no nn.Linear in its blocks, but {rest or 'no blocks'}")
    if args.lora_rank > max(min(layer.weight.shape) for layer in layers):
        fail(f"--lora_rank {args.lora_rank}: above the width of all layers that it would adapt")
    if rest:
        say_once(f"note: only nn.Linear has adapters; these stay as they are: {rest}")
    model.lora = types.SimpleNamespace(layers=layers, rank=args.lora_rank, alpha=args.lora_alpha)
    model.lora.active = "own"
    for layer in layers:
        layer.lora_A, layer.lora_B = add_pair(layer, model.lora, "own")
    return model


def add_critic_adapters(policy, head):
    """A second pair on every layer -> (pairs and head, which learn; the policy with these pairs).
    They are no weights of the policy: FSDP does not sum their gradients."""
    critic = torch.nn.ModuleList([head])
    for layer in policy.lora.layers:
        critic.extend(add_pair(layer, policy.lora, "critic"))
    return critic.to(head.weight.device), Switched(policy, "critic")


@dataclass(eq=False)
class Switched:
    """A model with other adapters, or with none: called like a model of its own, or used in a
    `with` (not in another `with` of the same object). Not to sample from: `decode` calls the
    model's own `forward`, which switches nothing."""

    adapted: torch.nn.Module
    active: str | None

    def __enter__(self):
        self.before = self.adapted.lora.active
        self.adapted.lora.active = self.active

    def __exit__(self, *error):
        self.adapted.lora.active = self.before

    def __call__(self, **inputs):
        with self:
            return self.adapted(**inputs)

    def __getattr__(self, name):
        return getattr(self.adapted, name)


def merge_adapter(model, state):
    """Merges the adapters into `state`: B A is added in float32, and the sum rounded once
    -> {file name: content} of what peft loads on top of --model."""
    learned = {f"base_model.model.{k}": state[k] for k, _ in tensors(model, for_checkpoint=True)}
    names = [name for name, m in model.named_modules() if m in model.lora.layers]
    for name in names:
        W = state[f"{name}.weight"]
        BA = state.pop(f"{name}.lora_B.weight") @ state.pop(f"{name}.lora_A.weight")
        state[f"{name}.weight"] = (W + model.lora.alpha / model.lora.rank * BA).to(W.dtype)
    config = {"peft_type": "LORA", "target_modules": names, "r": model.lora.rank}
    config |= {"lora_alpha": model.lora.alpha, "base_model_name_or_path": model.name_or_path}
    config["task_type"] = "CAUSAL_LM" if model.get_output_embeddings() else "SEQ_CLS"
    weights = save(learned, {"format": "pt"})
    return {
        "adapter_model.safetensors": weights,
        "adapter_config.json": json.dumps(config, indent=1),
    }


# -- Rewards ---------------------------------------------------------------------------------------


@dataclass
class Reward:
    """A loaded --reward."""

    # (samples, their lines of the data) -> {"reward": B floats}. If the user's function returns a
    # dict, also {"reward/NAME": B floats} for each of its other numbers.
    function: Callable
    rule: Callable  # for `check_answers`, and grpo.py's --eval_samples
    rules: dict  # {name: rule}, for eval/NAME
    answer_flag: str = ""  # the flag to name if a line lacks an answer; "": answers are optional
    is_model: bool = False
    seconds: float = 0.0  # that the last `score` took

    def score(self, samples, records):
        began = time.monotonic()
        scores = self.function(samples, records)
        self.seconds = time.monotonic() - began
        return scores


def load_reward(spec, rules, world):
    """--reward: the name of a rule, none, FILE.py:function, or a reward model. rules: those of
    the scripts, {"exact": .., "number": ..}. A rule as --reward judges eval/exact, even if it is
    `number`. With another reward each of the rules that `rules_that_fit` leaves has an eval/NAME.
    """
    first = next(iter(rules))
    if spec in rules:
        rule = rules[spec]
        return Reward(checked(rule, spec, world), rule, {first: rule}, f"--reward {spec}")
    if spec == "none":
        return Reward(checked(lambda completion, row: 0.0, spec, world), rules[first], rules)
    if spec.partition(":")[0].endswith(".py"):
        score = checked(load_function(spec, "--reward"), spec, world)
        return Reward(score, rules[first], rules)
    if "/" not in spec and not Path(spec).exists():  # no hub name and no folder
        names = ", ".join([*rules, "none"])
        fail(f"--reward {spec}: choose {names}, FILE.py:function, or a reward model's folder")
    tokenizer = load_tokenizer(spec)
    model = load_scalar(spec, world, tokenizer, frozen=True)

    def score(samples, records):
        return {"reward": score_texts(model, tokenizer, samples.texts, records, world)}

    return Reward(stop_together(score, world, Unscored), rules[first], rules, is_model=True)


def rules_that_fit(reward, held_out):
    """The rules for eval/NAME: those that call every held-out answer right. `number` is one if
    every answer has a number."""
    fitting = dict(reward.rules)
    for _, record in held_out:
        for name, rule in reward.rules.items():
            if has_answer(record) and not rule(str(record["answer"]), record):
                fitting.pop(name, None)
    return fitting


def check_answers(reward, prompts):
    """A rule as --reward is of use only where it calls a row's own answer right."""
    for _, record in prompts:
        if reward.answer_flag and not reward.rule(str(record["answer"]), record):
            answer = f"the answer {record['answer']!r:.60} of prompt {record['prompt']!r:.100}"
            fail(f"{reward.answer_flag}: even {answer} is wrong by this rule")


def load_function(spec, flag):
    """The function that FILE.py:function names."""
    file, _, name = spec.partition(":")
    if not name:
        fail(f"{flag} {spec}: name the function, too: {spec}:FUNCTION")
    if not Path(file).is_file():
        fail(f"{flag} {spec}: no such file {Path(file).absolute()}")
    path = Path(file).resolve()
    sys.path.append(str(path.parent))  # it may import a file beside it
    module_name = f"reward_{path.stem}"
    if path.stem not in sys.modules and "." not in path.stem:
        found = importlib.util.find_spec(path.stem)
        if found is not None and found.origin == str(path):
            module_name = path.stem  # processes that it starts can import it by this name
    info = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(info)
    sys.modules[info.name] = module  # dataclasses in the file look themselves up there
    try:
        info.loader.exec_module(module)
        return getattr(module, name)
    except (Exception, SystemExit) as error:
        why = f"cannot be imported or has no function {name!r}"
        fail(f"{flag} {spec}: {file} {why} ({type(error).__name__}: {error})")


def checked(function, spec, world):
    """A reward function as `Reward.function`. It gets one completion after the other, or, if its
    first parameter is named `completions`, all of them at once. A value that is not a finite number
    ends the run: later only a gradient of NaN would tell of it, and not of the prompt."""
    name = spec.rpartition(":")[2]
    forms = (f"def {name}(completion, row): ...", f"def {name}(completions, rows): ...")
    names = parameters_of(function, spec, " or ".join(forms))
    takes_all = names[0] == "completions"
    wanted = f'a finite number or a dict of them with "reward" ({forms[0]})'
    if takes_all:
        wanted = f'a list of finite numbers or of dicts with "reward" ({forms[1]})'

    def call(where, completion, row, info):
        extra = {"info": info} if "info" in names else {}
        try:
            value = function(completion, row, **extra)
            if takes_all:
                value = [] if isinstance(value, (dict, set)) else list(value)
            return value
        except (Exception, SystemExit) as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
            what = f"gave an error{place_of(error)} ({words:.500})"
            raise Stop(f"--reward {spec} {what}, {where}") from error

    def parts_of(value, where):
        parts = value if isinstance(value, dict) else {"reward": value}
        parts = {str(name): to_float(number) for name, number in parts.items()}
        largest = torch.finfo(torch.float32).max
        if "reward" not in parts or not all(abs(x) <= largest for x in parts.values()):
            raise Stop(f"--reward {spec} must return {wanted}, returned {value!r:.100}, {where}")
        return parts

    def score(samples, rows):
        drawn = zip(samples.mask.sum(1).tolist(), samples.finished.tolist(), strict=True)
        infos = [types.SimpleNamespace(tokens=n, finished=finished) for n, finished in drawn]
        scores = []
        if takes_all:
            where = f"for {len(rows)} completions"
            copies = [copy.deepcopy(row) for row in rows]  # it may change what it is given
            values = call(where, list(samples.texts), copies, infos)
            if len(values) != len(rows):
                what = f"must return {wanted}, returned {len(values)} values"
                raise Stop(f"--reward {spec} {what}, {where}")
        for i, (text, row) in enumerate(zip(samples.texts, rows, strict=True)):
            where = f"for prompt {row['prompt']!r:.300} and completion {text!r:.300}"
            value = values[i] if takes_all else call(where, text, copy.deepcopy(row), infos[i])
            scores.append(parts_of(value, where))
        return scores

    together = stop_together(score, world, Unscored)
    return lambda samples, rows: lists_by_name(together(samples, rows), spec, world)


def lists_by_name(scores, spec, world):
    """The dicts that a reward function has returned as one dict of lists."""
    # the log adds up what has equal names, over completions and processes
    sets = gather_objects(world, {", ".join(sorted(parts)) for parts in scores})
    different = sorted(set().union(*sets))  # the names of a dict, joined; more than one is wrong
    if len(different) > 1:
        what = "must return a dict with the same names for all completions, returned"
        raise Unscored(f"--reward {spec} {what} ({') and ('.join(different)})")
    lists = {"reward": [parts["reward"] for parts in scores]}
    for name in sorted(scores[0].keys() - {"reward"}):
        lists[f"reward/{name}"] = [parts[name] for parts in scores]
    return lists


def parameters_of(function, spec, wanted):
    """The names of a reward function's parameters. Refuses one that cannot be called."""
    try:
        signature = inspect.signature(function)
        names = list(signature.parameters)
        extra = {"info": None} if "info" in names else {}
        signature.bind("completion", {}, **extra)
    except (TypeError, ValueError) as error:
        fail(f"--reward {spec} must be {wanted} (a third parameter is named info; {error})")
    return names


def to_float(value):
    """nan for what is no number."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except Exception:  # each library has its own
        return math.nan


def place_of(error):
    entry = error.__traceback__.tb_next  # in the user's function; None if the call itself failed
    if entry is None:
        return ""
    return f" in {Path(entry.tb_frame.f_code.co_filename).name}, line {entry.tb_lineno}"


def stop_together(function, world, kind=Stop):
    """The function, but a `Stop` in one process is raised in all, as a `kind`: the others would
    wait for it."""

    def together(*inputs):
        result = None
        problem = None
        try:
            result = function(*inputs)
        except Stop as error:
            problem = str(error)
        for words in gather_objects(world, problem):
            if words is not None:
                raise kind(words)
        return result

    return together


def score_texts(model, tokenizer, completions, rows, world):
    """A reward model's scores of completions. It reads texts (with the prompt, without --system),
    so its ids need not be the policy's."""
    texts = [encode_answer(tokenizer, row["prompt"], c) for c, row in zip(completions, rows)]
    return score_ids(model, tokenizer, texts, world)


@torch.no_grad()
def score_ids(model, tokenizer, texts, world):
    """The scores of texts, given as ids, by the model's own forward."""
    limit = context_of(model.config)
    sizes = torch.tensor([[len(texts), max(map(len, texts))]], device=world.device)
    most, longest = all_gather(world, sizes).amax(0).tolist()  # over all processes
    if longest > limit:
        say_once(
            f"warning: --reward reads {limit} tokens, of longer texts the first token and the end"
        )
        # with the first token, from which some families read the score
        texts = [t if len(t) <= limit else [t[0], *t[1 - limit :]] for t in texts]
    values = []
    size = max(1, min(64, 32_768 // min(longest, limit)))
    # as many rounds on every process: sharded weights are gathered by all or by none
    for i in range(0, most, size):
        part = texts[i : i + size] or texts[:1]
        ids, mask = pad_rows(part, tokenizer.pad_token_id, world.device, "right")
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        values += logits[:, 0].float().tolist()
    forget_forwards(model)
    if all_sum(world, not all(map(math.isfinite, values)))[0]:
        raise Stop("the reward model gave a score that is not finite")
    return values[: len(texts)]


# ============================================ SAMPLING ============================================

# -- Completions -----------------------------------------------------------------------------------


PREFILL_TOKENS = 8192  # of prompts in one forward, with padding; more only holds more memory


@dataclass
class Samples:
    """n completions of each prompt; row i * n + j is sample j of prompt i."""

    prompt_ids: torch.Tensor  # [B, P] padded on the left
    prompt_mask: torch.Tensor  # [B, P] true on the prompt
    ids: torch.Tensor  # [B, C] padded on the right
    mask: torch.Tensor  # [B, C] true on what the policy chose, the stop token included
    # [B, C] of softmax(logits / temperature), at temperature 0 of softmax(logits); 0 off the mask
    logprobs: torch.Tensor
    finished: torch.Tensor  # [B] false if cut at max_new_tokens; true for completions of a file
    texts: list  # [B] without stop and special tokens
    # with n here, training computes a prompt once for its n rows; set it only where
    # `can_share_prompts` or `prompts_can_be_shared` says so
    rows_per_prompt: int = 1

    def take(self, rows):
        """Some of the rows, by a tensor of their numbers."""
        taken = {k: v[rows] for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        texts = [self.texts[row] for row in rows.tolist()]
        return dataclasses.replace(self, texts=texts, rows_per_prompt=1, **taken)


def pad_rows(rows, pad, device, side):
    """Lists of ids, padded to one length -> ids, mask [rows, length]."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    ids = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence(mask, batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def to_text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def as_samples(prompts, completions, tokenizer, world, rows_per_prompt=1):
    """Given completions as ids (demonstrations, pairs) in the shape of samples."""
    pad = tokenizer.pad_token_id
    prompt_ids, prompt_mask = pad_rows(prompts, pad, world.device, "left")
    ids, mask = pad_rows(completions, pad, world.device, "right")
    logprobs = torch.zeros(ids.shape, device=world.device)
    texts = [to_text(tokenizer, completion) for completion in completions]
    finished = torch.ones(len(ids), dtype=torch.bool, device=world.device)
    rows = (prompt_ids, prompt_mask, ids, mask, logprobs, finished, texts)
    return Samples(*rows, rows_per_prompt)


def rows_at_once(held_out, max_new_tokens, rows=1):
    """How many completions of held-out prompts [(ids, row), ...] are drawn at once: `rows`, or as
    many as make 8192 tokens if that is more; at most 256."""
    longest = max((len(ids) for ids, _ in held_out), default=0) + max_new_tokens
    return max(1, min(256, max(rows, 8192 // longest)))


def until_stopped(parts, world, stop_asked=None):
    """Yields the parts of an evaluation, under a progress bar. After a signal it raises `Ended`.
    Every process must have equally many parts: they ask each other around each one."""

    def end_if_asked():
        if stop_asked is not None and all_sum(world, stop_asked())[0]:
            raise Ended("stopped by a signal during the evaluation")

    hidden = None if world.rank == 0 else True  # None: shown in a terminal
    for part in tqdm(parts, desc="scoring", leave=False, disable=hidden):
        end_if_asked()
        yield part
        end_if_asked()  # also after the last one: the next step could take long


def scores_if_due(step, args, held_out_scores):
    """What held_out_scores() says before the first step, every --eval_every steps (0: never) and
    after the last; else {}. A signal or a reward that fails ends the evaluation, without scores,
    so that the step can be saved."""
    if not args.eval_every or (step % args.eval_every and step < args.steps):
        return {}
    try:
        scores = held_out_scores()
    except (Ended, Unscored) as error:
        if step == 0:
            raise  # nothing is there to be saved
        why = "a signal came" if isinstance(error, Ended) else error
        say(f"the held-out scores of step {step} are left out: {why}")
        return {}
    if args.reward == "none":
        scores.pop("eval/reward", None)  # 0 in any case
    return scores


@torch.no_grad()
def sample(
    model, tokenizer, prompts, *, n=1, max_new_tokens, temperature=1.0, seed=None, max_rows=None
):
    """n completions of every prompt (raw text, or ids from `encode_prompt`), each token drawn from
    softmax(logits / temperature). Equal seeds give equal samples. At most `max_rows` completions
    are drawn at once (None: all), or those of one prompt, to bound the memory of the cache.

    No top-k, top-p or repetition penalty, whatever the generation config says: they draw from
    another distribution than the one whose gradient, ratio and KL are computed.

    Compared with `generate`: a prompt is computed once for its n samples, finished rows leave
    the batch, and the cache is not copied at every token."""
    device = next(model.parameters()).device
    prompts = [encode(tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    if [] in prompts:
        raise ValueError(f"prompt {prompts.index([])} is empty: there is nothing to continue")
    pad = tokenizer.pad_token_id
    stops = torch.tensor(stop_ids(model, tokenizer), device=device)
    prompt_ids, prompt_mask = pad_rows(prompts, pad, device, "left")
    B = len(prompts) * n
    at_once = max(1, max_rows // n) if max_rows else len(prompts)  # prompts

    def draw_from(first):
        """The completions of some prompts, from number `first` on."""
        ids = prompt_ids[first : first + at_once]
        mask = prompt_mask[first : first + at_once]
        # With a seed, each part starts the generator anew, and draws a number for each of the B
        # rows, whether it is in this part or not, finished or not: what a row draws depends on
        # no other.
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)

        def pick(logits, row_numbers):
            u = torch.rand(B, 1, dtype=torch.float64, device=device, generator=generator)
            return choose(logits, temperature, u[first * n + row_numbers])

        cache, logits = prefill(model, ids, mask)
        owner = torch.arange(len(ids), device=device).repeat_interleave(n)  # a row's prompt
        copy_rows(cache, owner, ids.shape[1] + max_new_tokens)
        return decode(model, pick, cache, logits[owner], mask[owner], max_new_tokens, stops)

    with evaluating(model), whole_weights(model):
        parts = [draw_from(first) for first in range(0, len(prompts), at_once)]
    ids, logprobs, length, finished = [torch.cat(tensors) for tensors in zip(*parts)]
    prompt_ids = prompt_ids.repeat_interleave(n, 0)
    prompt_mask = prompt_mask.repeat_interleave(n, 0)
    C = int(length.max())
    # from lengths: ids != pad would lose the EOS where pad is EOS
    mask = torch.arange(C, device=device) < length[:, None]
    ids = ids[:, :C].masked_fill(~mask, pad)
    logprobs = logprobs[:, :C].masked_fill(~mask, 0.0)
    ends = (length - finished.long()).tolist()  # the stop token is no part of the text
    texts = [to_text(tokenizer, row[:end]) for row, end in zip(ids.tolist(), ends)]
    return Samples(prompt_ids, prompt_mask, ids, mask, logprobs, finished, texts)


@contextlib.contextmanager
def evaluating(model):
    """Evaluation mode: no dropout, and no gradient checkpointing, which drops the cache."""
    was_training = [module.training for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in zip(model.modules(), was_training):
            module.training = mode


@contextlib.contextmanager
def whole_weights(model):
    """Gathers a sharded model's weights once, and not for every token. Also makes the head's
    float32 copy once.

    FSDP2's hooks on the blocks would free the weights after each token and gather them again: they
    are put aside. The root keeps its hooks, because in the first forward FSDP2 sets itself up by
    them. `prefill` makes this forward, by calling the model; `decode` calls model.forward, which
    runs no hooks."""
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    blocks = [m for m in units if m is not model]
    hooks = [(m._forward_pre_hooks, m._forward_hooks) for m in blocks]
    head = model.get_output_embeddings()
    try:
        for unit in units:
            unit.unshard()
        if isinstance(head, Float32Head):
            head.wide_weight = head.weight.float()
        for block in blocks:
            block._forward_pre_hooks = {}
            block._forward_hooks = {}
        yield
    finally:
        for block, own in zip(blocks, hooks):
            block._forward_pre_hooks, block._forward_hooks = own
        if isinstance(head, Float32Head):
            head.wide_weight = None
        if units:
            forget_forwards(model)


def cached_forward(model, call):
    """The model's forward as (cache, ids, mask, positions) -> the last logits [rows, V]. call: the
    model, or its `forward`, which leaves out the root's hooks."""
    takes = inspect.signature(model.forward).parameters
    cache_name = cache_argument(model)
    if cache_name is None:
        why = "its forward takes none of transformers' caches"
        raise Stop(f"{type(model).__name__} cannot be sampled from ({why})")

    def forward(cache, ids, mask, positions):
        inputs = {cache_name: cache}
        if "position_ids" in takes:
            inputs["position_ids"] = positions
        if "logits_to_keep" in takes:
            inputs["logits_to_keep"] = 1
        return call(input_ids=ids, attention_mask=mask, use_cache=True, **inputs).logits[:, -1]

    return forward


def prefill(model, prompt_ids, prompt_mask):
    """Computes every prompt once, in slices -> their cache and next tokens' logits."""
    forward = cached_forward(model, model)
    caches = []
    logits = []
    size = max(1, PREFILL_TOKENS // prompt_ids.shape[1])
    for ids, mask in zip(prompt_ids.split(size), prompt_mask.split(size)):
        caches.append(DynamicCache(config=model.config))
        positions = (mask.cumsum(1) - 1).clamp_(min=0)  # padding does not count
        try:
            last = forward(caches[-1], ids, mask.long(), positions)
        except ValueError as error:  # MiniMax wants a cache of its own
            raise Stop(f"{type(model).__name__} cannot be sampled from ({error})") from error
        logits.append(last.clone())  # a view would keep the logits of all positions
    return join_caches(caches), torch.cat(logits)


def join_caches(caches):
    """One cache out of those of a batch's slices. What belongs to the rows is in tensors, or
    dicts of tensors, whose first dimension is the row; the rest is equal in all slices, because
    all are padded to one length."""
    if len(caches) == 1:
        return caches[0]

    def join(parts):
        if isinstance(parts[0], torch.Tensor) and parts[0].ndim > 1:
            return torch.cat(parts)
        if not isinstance(parts[0], dict):
            return parts[0]
        joined = {}
        for key in parts[0]:
            joined[key] = join([part[key] for part in parts])
        return joined

    for layers in zip(*(cache.layers for cache in caches)):
        for name in list(vars(layers[0])):
            # popped, so that no more than one tensor is held twice
            setattr(layers[0], name, join([vars(layer).pop(name) for layer in layers]))
    return caches[0]


def copy_rows(cache, owner, room):
    """Makes a prompt's cache that of each of its completions, with room for all tokens."""
    for i, layer in enumerate(cache.layers):
        # a layer that reads another's keys has none
        if type(layer) is DynamicLayer and layer.keys is not None:
            cache.layers[i] = RoomyLayer(layer, owner, room)
        else:
            layer.reorder_cache(owner)


class RoomyLayer(DynamicLayer):
    """A layer's keys and values in buffers of their final size. The stock layer copies its whole
    cache at every token. The model reads views of the filled part."""

    captured = None  # set while a `CapturedStep` computes

    def __init__(self, stock, rows, room):
        super().__init__()
        self.is_initialized = True
        self.room = 64 * math.ceil(room / 64)  # attention wants multiples of 8
        self.filled = stock.keys.shape[2]
        self.buffers = [stock.keys, stock.values]  # [B, heads, room, d] each, once copied
        stock.keys = stock.values = None
        self.reorder_cache(rows)

    def update(self, keys, values, *args, **kwargs):
        if self.captured is not None:
            for buffer, new in zip(self.buffers, (keys, values)):
                buffer.index_copy_(2, self.captured.column, new)
            return tuple(buffer[:, :, : self.captured.length] for buffer in self.buffers)
        begin = self.filled
        self.filled += keys.shape[2]
        self.buffers[0][:, :, begin : self.filled] = keys
        self.buffers[1][:, :, begin : self.filled] = values
        self.keys, self.values = (buffer[:, :, : self.filled] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self):
        return self.filled

    def reorder_cache(self, rows):
        # The views go first, so that each old buffer is freed once it is copied. This takes room
        # for one buffer more, and not for a second cache.
        self.keys = self.values = None
        for i in range(len(self.buffers)):
            old = self.buffers[i]
            # zeros: a masked column has weight 0, and 0 times nan would be nan
            self.buffers[i] = old.new_zeros(len(rows), old.shape[1], self.room, old.shape[3])
            new = self.buffers[i][:, :, : self.filled]
            torch.index_select(old[:, :, : self.filled], 0, rows, out=new)


def decode(model, pick, cache, logits, prompt_mask, max_new_tokens, stops):
    """Draws token by token and drops finished rows -> ids, logprobs [B, max_new_tokens],
    meaningless after a row's end, length [B], finished [B]."""
    forward = cached_forward(model, model.forward)  # see `whole_weights`
    captured = None
    B, P = prompt_mask.shape
    device = logits.device
    ids = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    length = torch.full((B,), max_new_tokens, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    recurrent = is_recurrent(cache)
    # of the rows in the batch: their numbers, the columns they may see, their prompt's length
    rows = torch.arange(B, device=device)
    seen = F.pad(prompt_mask.long(), (0, max_new_tokens), value=1)  # [rows, P + C]
    prompt_length = prompt_mask.sum(1, keepdim=True)
    for t in range(max_new_tokens):
        token, logprob = pick(logits, rows)
        ids[rows, t] = token
        logprobs[rows, t] = logprob
        ended = torch.isin(token, stops) & ~finished[rows]
        length[rows] = torch.where(ended, t + 1, length[rows])
        finished[rows] |= ended
        running = ~finished[rows]
        left = int(running.sum())
        if left == 0 or t + 1 == max_new_tokens:
            break
        # Dropping finished rows copies the others' cache. Done when a tenth has finished, or half
        # if it also costs a new capture.
        if left <= (0.9 if captured is None else 0.5) * len(rows):
            captured = None
            kept = running.nonzero()[:, 0]
            cache.reorder_cache(kept)
            rows = rows[kept]
            token = token[kept]
            seen = seen[kept]
            prompt_length = prompt_length[kept]
        if captured is not None and P + t == captured.length:
            captured = None  # its columns are full
        if captured is None and max_new_tokens - t > CAPTURE_ABOVE and can_capture(model, cache):
            captured = capture(model, forward, cache, seen, prompt_length - P, P + t)
        if captured is not None:
            logits = captured(token, P + t)
        else:  # none can be made, or too few tokens are left
            mask = None if recurrent else seen[:, : P + t + 1]
            logits = forward(cache, token[:, None], mask, prompt_length + t)
    return ids, logprobs, length, finished


def choose(logits, temperature, u):
    """The next token of every row and its log-probability. At temperature 0: the likeliest
    one, with its log-probability at temperature 1."""
    if temperature > 0:
        return draw(logits.float() / temperature, u)
    token = logits.argmax(-1, keepdim=True)
    return token[:, 0], logits.float().log_softmax(-1).gather(1, token)[:, 0]


def draw(logits, u, block=256):
    """One token a row from softmax(logits [B, V]) by inverse CDF, and its log-probability.
    u [B, 1]: uniform in [0, 1), float64.

    The token is the first whose cumulative probability exceeds u, summed over blocks of the
    vocabulary, then inside the block that u falls into. Running sums are float64: 150,000 float32
    numbers, added one by one, can be off by 1e-5, and many tokens have less. torch.multinomial
    draws a random number for each entry of the vocabulary, where this takes one a row."""
    logits = logits.float()
    top = logits.amax(-1, keepdim=True)
    p = F.pad((logits - top).exp(), (0, -logits.shape[1] % block))
    p = p.view(len(logits), -1, block)  # [B, blocks, block]
    mass = p.sum(-1).double()  # [B, blocks]
    total = mass.cumsum(-1)
    # strictly below the total, here and in the block: no token of probability 0 is drawn
    target = u * (1 - 1e-12) * total[:, -1:]
    which = torch.searchsorted(total, target, right=True)  # [B, 1] the block
    which = which.clamp_(max=total.shape[1] - 1)
    # how far target lies into its block, as a share of the block's mass (total is the sum up to
    # the block's end)
    share = 1 + (target - total.gather(1, which)) / mass.gather(1, which)
    share = share.clamp_(0, 1 - 1e-12)
    inside = p.gather(1, which[:, :, None].expand(-1, -1, block))[:, 0]
    inside = inside.double().cumsum(-1)  # [B, block]
    token = which * block + torch.searchsorted(inside, share * inside[:, -1:], right=True)
    token = token.clamp_(max=logits.shape[1] - 1)  # acts only on NaN; the update will say so
    logprob = (logits.gather(1, token) - top)[:, 0] - total[:, -1].log().float()
    return token[:, 0], logprob


# -- One token on a GPU ----------------------------------------------------------------------------


CAPTURE_ON = ("cuda",)  # tests add the CPU, where the same forward runs without a graph
CAPTURE_ABOVE = 32  # tokens to come; a capture takes as long as a few eager tokens
# attention reads the cache up to a multiple of this: the filled part, and a little more
CAPTURE_COLUMNS = 256
NOT_CAPTURED = set()  # classes of models whose capture has failed


def can_capture(model, cache):
    """Whether a mask and positions are all that a forward needs to know of the tokens before. They
    are not with sliding windows, recurrent states or attention other than torch's. Where a forward
    takes no positions, a graph would repeat those with which it was captured."""
    return (
        next(model.parameters()).device.type in CAPTURE_ON
        and type(model) not in NOT_CAPTURED
        and model.config._attn_implementation == "sdpa"
        and "position_ids" in inspect.signature(model.forward).parameters
        and all(type(layer) is RoomyLayer for layer in cache.layers)
    )


def capture(model, *given):
    """A `CapturedStep`, or None if the model's forward cannot be captured."""
    try:
        return CapturedStep(*given)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        NOT_CAPTURED.add(type(model))
        name = type(model).__name__
        say_once(f"note: {name} is sampled without a CUDA graph ({first_line(error)})")
        return None


@functools.lru_cache
def capture_stream():
    """The default stream cannot be captured. One for all captures: a matrix library holds 32 MiB
    for each stream that it has seen."""
    return torch.cuda.Stream()


@contextlib.contextmanager
def no_waits():
    """Inside, an operation that waits for the GPU is an error."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


class CapturedStep:
    """The forward of one token a row, recorded as a CUDA graph and replayed for the next tokens.

    An eager forward launches some hundred kernels one by one, and the GPU waits for the CPU between
    them; a replay launches all at once. But a graph has fixed addresses and shapes. So the token
    and its column in the cache are tensors that are written before each replay, attention always
    reads the first `length` columns, and a mask hides those that are not filled yet. When all
    are full, or rows are dropped, a new step is captured. No step outlives its rollout: the next
    one gathers the weights anew, elsewhere."""

    def __init__(self, forward, cache, seen, offset, column):
        columns = CAPTURE_COLUMNS * (column // CAPTURE_COLUMNS + 1)
        self.length = min(columns, cache.layers[0].room)
        self.forward = forward
        self.cache = cache
        self.seen = F.pad(seen.bool(), (0, self.length))[:, : self.length]  # [rows, length]
        self.offset = offset  # [rows, 1] position - column: minus the padding on the left
        self.token = torch.zeros_like(offset)
        self.column = torch.full((1,), column, device=seen.device)
        self.graph = None
        if seen.device.type == "cuda":
            self.record()

    def record(self):
        stream = capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            # Libraries make their workspaces now, which a capture cannot; an operation that waits
            # would break it. The first replay overwrites the keys and values that this computes.
            with torch.cuda.stream(stream), no_waits():
                self.compute()
            # thread_local: NCCL's own thread may go on. Entering torch.cuda.graph also frees the
            # memory of graphs that are gone.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.logits = self.compute()
        finally:  # also after a failure: what was queued must not write later
            torch.cuda.current_stream().wait_stream(stream)
        self.graph = graph

    def compute(self):
        columns = torch.arange(self.length, device=self.column.device)
        mask = self.seen & (columns <= self.column)
        layers = self.cache.layers
        try:
            for layer in layers:
                layer.captured = self
            position = self.offset + self.column
            return self.forward(self.cache, self.token, mask[:, None, None], position)
        finally:
            for layer in layers:
                layer.captured = None

    def __call__(self, token, column):
        """The logits after these tokens [rows], in a tensor that the next call overwrites."""
        self.token.copy_(token[:, None])
        self.column.fill_(column)
        if self.graph is None:
            self.logits = self.compute()
        else:
            self.graph.replay()
        for layer in self.cache.layers:
            layer.filled = column + 1
        return self.logits


# -- States and logits -----------------------------------------------------------------------------


def cache_argument(model):
    """The name under which the model's forward takes a cache, or None."""
    # `cache` from transformers 5.24 on; before, `past_key_values`, in Mamba `cache_params`
    for name in ("cache", "past_key_values", "cache_params"):
        if name in inspect.signature(model.forward).parameters:
            return name
    return None


def is_recurrent(cache):
    """Whether no layer keeps keys and values (Mamba): then decoding takes no mask."""
    return not any(isinstance(layer, DynamicLayer) for layer in cache.layers)


def hidden_states(model, ids, mask, cache=None):
    """What the model's head reads, [B, T, width]. With a cache, `ids` go on from what is in it,
    `mask` covers both, and the gradient flows back into the cache."""
    vocabulary = model.get_output_embeddings()
    head = scalar_head(model) if vocabulary is None else vocabulary
    caught = []

    def catch(head, inputs):
        caught.append(inputs[0])
        # the head then computes the last position only: [B, T, V] would fill the memory
        return inputs if vocabulary is None else (inputs[0][:, -1:],)

    inputs = {"attention_mask": mask.long(), "use_cache": cache is not None}
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = (mask.long().cumsum(1) - 1).clamp_(min=0)
        inputs["position_ids"] = positions[:, -ids.shape[1] :]
    if cache is not None:
        inputs[cache_argument(model)] = cache
    hook = head.register_forward_pre_hook(catch)
    try:
        model(input_ids=ids, **inputs)
    finally:
        hook.remove()
    return caught[0]


class CutGraph(torch.autograd.Function):
    """Cuts the graph between a prompt and its completions, so that there are two backward passes.
    In a single one, autograd would hold the gradients of the weights that come from the
    completions until those from the prompt are there: twice the memory."""

    @staticmethod
    def forward(ctx, anchor, tensors):
        # autograd does not look into lists; a scalar that requires grad, the anchor, makes it
        # call `backward`
        ctx.tensors = tensors
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        # autograd gives zeros for outputs that were not used, so FSDP2 sees a backward of
        # every block
        torch.autograd.backward(ctx.tensors, gradients)
        ctx.tensors = None  # the loss lives on through the next forward and would keep them
        return None, None


def prompt_states(model, ids, mask):
    """The state at each prompt's last token, [B, 1, width], and the cache from which the
    completions go on. The gradient flows back through both."""
    cache = DynamicCache(config=model.config)
    last = hidden_states(model, ids, mask, cache)[:, -1:]
    if not last.requires_grad:
        return last, cache
    places = []
    for layer in cache.layers:
        # keys and values are attributes of a layer; recurrent states may be in a dict
        dicts = [x for x in vars(layer).values() if isinstance(x, dict)]
        for holder in [vars(layer), *dicts]:
            for name, value in holder.items():
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    places.append((holder, name))
    tensors = [last] + [holder[name] for holder, name in places]
    last, *states = CutGraph.apply(last.new_zeros((), requires_grad=True), tensors)
    for (holder, name), state in zip(places, states, strict=True):
        holder[name] = state
    return last, cache


def completion_states(model, samples, rows):
    """The states that predict the completion tokens of some rows -> (states [b, C, width], ids
    [b, C], mask [b, C]), without columns in which none of these rows has a token.

    A state predicts the next token, so they begin at the last prompt token. With rows_per_prompt
    above 1, a shared prompt is computed once, and its keys and values are repeated for its rows.
    """
    P = int(samples.prompt_mask[rows].sum(1).max())
    C = int(samples.mask[rows].sum(1).max())
    ids = samples.ids[rows, :C]
    mask = samples.mask[rows, :C]
    if samples.rows_per_prompt == 1:
        all_ids = torch.cat([samples.prompt_ids[rows, -P:], ids[:, :-1]], 1)
        all_mask = torch.cat([samples.prompt_mask[rows, -P:], mask[:, :-1]], 1)
        return hidden_states(model, all_ids, all_mask)[:, P - 1 :], ids, mask
    groups = torch.tensor(rows, device=ids.device) // samples.rows_per_prompt
    groups, owner = groups.unique(return_inverse=True)  # owner [b]: each row's prompt
    # each group's first row has its prompt
    prompt_ids = samples.prompt_ids[groups * samples.rows_per_prompt, -P:]
    prompt_mask = samples.prompt_mask[groups * samples.rows_per_prompt, -P:]
    start, cache = prompt_states(model, prompt_ids, prompt_mask)  # [prompts, 1, width]
    cache.reorder_cache(owner)
    # At least one column, also if C is 1 and none is needed (it is cut off below): all processes
    # must have equally many forwards.
    T = max(C - 1, 1)
    seen = torch.cat([prompt_mask[owner], mask[:, :T]], 1)
    states = hidden_states(model, ids[:, :T], seen, cache)
    return torch.cat([start[owner], states], 1)[:, :C], ids, mask


def logits_of(model, hidden):
    """The head on some states, scaled or capped as the family does it, in float32. Under FSDP2 only
    after a forward, while the root has its whole weights."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits.float()


@torch.no_grad()
def check_head(model):
    """Stops if `logits_of` gives other logits than the model: training would use another
    distribution than sampling, and nothing would show it."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    ours = logits_of(model, hidden_states(model, ids, ids > 0))
    if not torch.allclose(own.float(), ours, atol=1e-3, rtol=1e-3):
        family = model.config.model_type
        fail(f"the family {family!r} changes its logits in a way that logits_of does not know")


def prompts_can_be_shared(model, world, gradient_checkpointing):
    """Whether sharing prompts gives the right states and gradient, tried on made-up ids. Sharing
    fails where a cache drops the gradient, and with gradient checkpointing, where transformers
    drops the cache. On a GPU it is slower: an H200 trained 0.5B and 1.5B models at 0.6 to 1.0 of
    the speed that it has without sharing (four completions, as long as their prompt). A family
    that cannot be trained at all stops here."""
    samples = made_up_samples(model, world.device)
    rows = [0, 1, 2, 3]
    same = False
    plain_norm = None  # of the gradient without sharing; None: not even that could be computed
    try:
        states, _, mask = completion_states(model, samples, rows)
        plain = states[mask].float()  # [tokens, width]
        weight = torch.linspace(-1, 1, plain.shape[1], device=world.device)
        (plain * weight).sum().backward()
        plain_norm = gradient_norm(model)
        cached = cache_argument(model) and not is_recurrent(DynamicCache(config=model.config))
        if cached and not gradient_checkpointing and world.device.type != "cuda":
            samples.rows_per_prompt = 2
            shared = completion_states(model, samples, rows)[0][mask].float()
            # added with the opposite sign: what is left in .grad is the difference of both ways
            (shared * -weight).sum().backward()
            off = (plain - shared).norm() / plain.norm()
            # in bfloat16 rounding alone makes a difference of some percent
            limit = 1e-3 if world.dtype == torch.float32 else 0.1
            same = gradient_norm(model) < limit * plain_norm and off.item() < limit
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family's cache says to this use
        sharded = isinstance(model, FSDPModule)
        # torch below 2.13 cannot take FSDP2 out of the middle of a pass
        can_go_on = hasattr(model, "reset_iter_state") or not sharded
        if plain_norm is None or not can_go_on:
            dtype = str(world.dtype).removeprefix("torch.")
            why = f"cannot be trained in {dtype} ({first_line(error)})"
            advice = "--dtype float32 or --gradient_checkpointing may work"
            raise Stop(f"the family {model.config.model_type!r} {why}; {advice}") from error
        model.zero_grad()  # before the reset, which would keep the gradients of gathered weights
        if sharded:  # left in the middle of a pass, FSDP2 would never reduce a gradient again
            model.reset_iter_state()
    model.zero_grad()
    same = all_sum(world, same)[0] == world.size
    if not same and not gradient_checkpointing and world.device.type != "cuda":
        say("note: this family's cache cannot be trained through: prompts are computed anew")
    return same


def can_share_prompts(models, args, world):
    """Whether training computes a prompt once for its completions, in each of these models. Not
    with --reference: it may be of a family whose cache differs, and no trial is made with it."""
    if args.samples_per_prompt == 1 or not args.steps or args.reference:
        return False
    checkpointing = args.gradient_checkpointing
    # dict.fromkeys: a model that comes twice is asked once, and all processes ask in one order
    different = list(dict.fromkeys(getattr(model, "adapted", model) for model in models))
    return all(prompts_can_be_shared(model, world, checkpointing) for model in different)


def made_up_samples(model, device):
    """Two prompts of two completions, with unequal lengths on both sides."""
    words = min(model.config.get_text_config().vocab_size, 1000)
    ids = torch.randint(words, (4, 24), generator=torch.Generator().manual_seed(0)).to(device)
    ids[1::2, :16] = ids[::2, :16]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2:, :5] = False
    mask[1, -2:] = False
    return Samples(ids[:, :16], mask[:, :16], ids[:, 16:], mask[:, 16:], None, None, None)


def gradient_norm(model):
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return whole(torch.nn.utils.get_total_norm(gradients)).item()


# ============================================= A RUN ==============================================

# -- Memory and optimizer --------------------------------------------------------------------------


def lasting_memory(path, world, learning=1, frozen=0, args=None):
    """A model's parameters, from its config alone, and the bytes that a process holds for good: for
    each of `learning` models of this size four float32 numbers a parameter (weight, gradient, two
    moments), for each of `frozen` ones a weight. With adapters, all learning models share one
    frozen model."""
    model = empty_model(path, args)
    count = sum(p.numel() for p in model.parameters())
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if learned < count:
        count -= learned
        frozen += int(learning > 0)
        say(f"--lora_rank {args.lora_rank}: {learned / 1e6:.2f}M parameters learn")
    frozen_bytes = torch.finfo(world.dtype).bits // 8
    return count, (16 * learning * learned + frozen_bytes * frozen * count) / world.size


def memory_used(world):
    """The peak so far in bytes: torch's allocator on a GPU, the process on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_optimizer(model, learning_rate):
    """AdamW on float32 shards. Its second beta, 0.95, forgets sooner than the usual 0.999."""
    weights = [p for p in at_rest(model).parameters() if p.requires_grad]
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "fused": True}
    return torch.optim.AdamW(weights, lr=learning_rate, **settings)


def learning_rate_at(step, steps, peak, schedule="constant", warmup=0):
    """The rate of step 1, 2, ..., steps: a linear rise over `warmup` steps, then
    constant, or down to 0 after the last step, in a line or half a cosine. It
    depends on the step alone, so a resumed run has no scheduler to restore."""
    if step <= warmup:
        return peak * max(step, 0) / (warmup + 1)  # step 0 or below: this model does not learn yet
    done = (step - warmup - 1) / max(steps - warmup, 1)
    if schedule == "linear":
        return peak * (1.0 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    return peak


def sum_gradients(model):
    """Sums over several processes the gradients of a model that is not sharded."""
    for p in model.parameters():
        if p.grad is None:  # adapters that texts do not reach, such as an image encoder's
            p.grad = torch.zeros_like(p)
        dist.all_reduce(p.grad)


def clip_gradients(model, max_norm):
    """Scales the whole gradient down to `max_norm`; returns the norm it had. The
    caller must not step if that is not finite: Adam's moments never recover."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return whole(norm).item()


# -- Folder ----------------------------------------------------------------------------------------


MAY_DIFFER = (  # flags that --resume may change
    "steps eval_every save_every keep keep_best tokens_per_micro_batch gradient_checkpointing "
    "sample_rows unit_scale resume out"
).split()


def open_run(args, script, world):
    """The run's folder: a new one, or with --resume that of an earlier run."""
    answer = [None]
    if world.rank == 0:  # alone, before the others can see what it makes
        try:
            out = folder_to_resume(args, script) if args.resume else new_folder(args, script)
            lock(out)
            known = {"script": script, **dataclasses.asdict(args)}
            if args.resume and checkpoints(out) and int(checkpoints(out)[-1].stem) == args.steps:
                # All steps up to --steps are made, and only the model is to be written. args.json
                # keeps the larger number of before, so that the run can go on to its end.
                known["steps"] = json.loads((out / "args.json").read_text())["steps"]
            write(out / "args.json", json.dumps(known, indent=1) + "\n")
        except OSError as error:
            fail(f"--out {args.out or 'runs'}: cannot write there ({error.strerror})")
        answer = [str(out)]
    if world.size > 1:
        dist.broadcast_object_list(answer)
    return Path(answer[0])


def new_folder(args, script):
    """--out if it is empty; without --out runs/SCRIPT, runs/SCRIPT-2, ..."""
    if args.out:
        out = Path(args.out)
        if out.exists() and not is_free(out):
            fail(f"--out {out}: not an empty folder; --resume goes on with a run that is in it")
        out.mkdir(parents=True, exist_ok=True)
        return out
    Path("runs").mkdir(exist_ok=True)  # a link to nowhere of this name is an error
    for number in itertools.count(1):
        out = Path("runs", script if number == 1 else f"{script}-{number}")
        with contextlib.suppress(FileExistsError):  # taken, perhaps a moment ago by another run
            out.mkdir()
            return out


def is_free(out):
    """Whether nothing is in it but .tmp and .lock files: a run killed at its start leaves those."""
    return out.is_dir() and all(path.suffix in (".tmp", ".lock") for path in out.iterdir())


def folder_to_resume(args, script):
    """--out, if it holds a run of this script with the same flags."""
    out = Path(args.out)
    if not args.out:
        fail("--resume: name the run's folder by --out")
    if not (out / "args.json").is_file():
        fail(f"--resume: --out {out} holds no run")
    before = json.loads((out / "args.json").read_text())
    if before["script"] != script:
        fail(f"--resume: {out} is a run of {before['script']}.py, not of {script}.py")
    if not checkpoints(out):
        return out  # no step is saved, so every flag may change
    flags = json.loads(json.dumps(dataclasses.asdict(args)))  # tuples become lists, as in the file
    for name, value in flags.items():
        was = before.get(name, value)
        if name not in MAY_DIFFER and was != value:
            fail(f"--resume: --{name} is {value}, but the run in {out} was started with {was}")
    made = int(checkpoints(out)[-1].stem)
    if args.steps < made:
        fail(f"--resume: --steps {args.steps}, and the run in {out} has made {made}")
    was = before.get("steps", args.steps)
    if args.steps not in (was, made) and args.schedule != "constant":
        shape = (args.learning_rate, args.schedule, args.warmup)
        start = getattr(args, "critic_warmup", 0)  # the policy's schedule begins after it
        last = learning_rate_at(made - start, was - start, *shape)
        rate = learning_rate_at(made + 1 - start, args.steps - start, *shape)
        changed = f"it was about {last:.2g}, and goes on at about {rate:.2g}"
        print(f"note: --steps was {was}: the learning rate falls to 0 at the new end; {changed}")
    return out


HELD = {}  # the open lock file of each run's folder


def lock(out):
    """Two runs in one folder would overwrite each other's files. The kernel frees the lock
    when the process ends or is killed. Not flock, which child processes inherit."""
    if out in HELD:
        return  # opening it again and closing that handle would free the lock
    HELD[out] = open(out / "run.lock", "a")
    try:
        fcntl.lockf(HELD[out], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        HELD.pop(out).close()
        fail(f"--out {out}: another process is at work in it; wait for its end")
    except OSError:
        pass  # a file system without locks


def write(path, data):
    """Writes a text, bytes or a dict of tensors, whole or not at all: to a file beside it, then
    renamed."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(data, dict):
                torch.save(data, file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # on a full disk torch.save raises a RuntimeError whose context is the OSError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)  # half a file would keep the disk full


def replace(temporary, folder):
    """Puts a finished folder in the place of an older one."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# -- Checkpoints -----------------------------------------------------------------------------------


def checkpoints(out):
    """The files of a run's finished checkpoints, the oldest first."""
    paths = (Path(out) / "checkpoint").glob("*.pt")
    return sorted((p for p in paths if p.stem.isdigit()), key=lambda p: int(p.stem))


def tensors(model, for_checkpoint=False):
    """[(name, tensor)] of the weights and of the buffers that are saved. Unlike in
    state_dict, a head that is tied to the embedding comes once."""
    if for_checkpoint and hasattr(model, "lora"):  # only what learns
        return [(name, p) for name, p in at_rest(model).named_parameters() if p.requires_grad]
    saved = at_rest(model).state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    return [*model.named_parameters(), *buffers]


def save_checkpoint(out, world, step, models, optimizers, keep=1):
    """All that a run needs to go on, in one file. Weights and moments are whole float32
    tensors, so another number of processes can resume. The last `keep` files stay."""

    def gather(values):
        return {name: whole(value, keep=world.rank == 0) for name, value in values}

    state = {"step": step, "world": world.size, "models": {}, "optimizers": {}}
    for name, model in models.items():
        state["models"][name] = gather(tensors(model, for_checkpoint=True))
        moments = optimizers[name].state_dict()["state"] if name in optimizers else {}
        state["optimizers"][name] = {i: gather(m.items()) for i, m in moments.items()}
    if world.rank == 0:
        folder = out / "checkpoint"
        folder.mkdir(exist_ok=True)
        write(folder / f"{step:06d}.pt", state)
        for old in [*folder.glob("*.tmp"), *checkpoints(out)[:-keep]]:  # .tmp: of a killed process
            old.unlink()
    if world.size > 1:
        dist.barrier()


UNSAVED = []  # a function that saves the last step made, if --save_every has passed it over


def save_if_due(out, args, world, step, models, optimizers, stop_asked):
    """A checkpoint every --save_every steps, after the last step and after a signal. All
    processes are asked, because a signal may reach only one. A step that is not saved here is
    saved by `short_errors` if the next one's reward fails."""
    UNSAVED.clear()
    stopping = all_sum(world, stop_asked())[0] > 0
    last = step == args.steps
    if step % args.save_every == 0 or last or stopping:
        save_checkpoint(out, world, step, models, optimizers, args.keep)
    else:
        given = (out, world, step, models, optimizers, args.keep)
        UNSAVED.append(functools.partial(save_checkpoint, *given))
    if stopping and not last:
        raise Ended(f"stopped by a signal after step {step} of {args.steps}, which is saved")


BEST = ("eval/reward", "eval/accuracy")  # the first that is logged says which model is the best


def scores_so_far(out):
    """-> the name of the score that compares models, [(step, score)] of metrics.jsonl, and
    [(step, score)] of best/, one or none. After a crash best/ may be ahead of the checkpoint."""
    rows = read_log(out)
    name = next((name for name in BEST if any(name in row for row in rows)), None)
    scores = [(row["step"], row[name]) for row in rows if name in row]
    kept = []
    if (out / "best" / "score.json").is_file():
        note = json.loads((out / "best" / "score.json").read_text())
        if name in note:
            kept = [(note["step"], note[name])]
    return name, scores, kept


def save_best(out, args, world, step, metrics, model, tokenizer):
    """Writes the model to best/ if its held-out score is above all earlier ones, that before
    training included."""
    name = next((name for name in BEST if name in metrics), None)
    if name is None or not args.keep_best:
        return
    is_best = False
    if world.rank == 0:
        _, scores, kept = scores_so_far(out)
        earlier = [score for at, score in scores if at != step]
        earlier += [score for _, score in kept]
        is_best = metrics[name] > max(earlier, default=-math.inf)
    if all_sum(world, is_best)[0]:
        note = {"step": step, name: metrics[name]}
        try:
            save_model(model, tokenizer, out / "best", world, note)
        except Stop as error:  # of all processes; the checkpoint may still find room
            say(f"warning: {error}; the run goes on without it (--no_keep_best: none is kept)")


def take_up(out, args, world):
    """The newest checkpoint if the run is resumed, or None. A process that does not see
    it (its disk is not shared) would begin at step 1, and spoil the next checkpoint."""
    state = read_checkpoint(out) if args.resume else None
    agree(out, world, state["step"] if state else 0, "the last checkpoint is of step")
    return state


def read_checkpoint(out):
    """A run's newest checkpoint, its tensors left on the disk until used, or None."""
    if not checkpoints(out):
        return None
    path = checkpoints(out)[-1]
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        why = f"({first_line(error)}); it may have been cut short: delete it to go on without it"
        fail(f"{path}: this checkpoint cannot be read {why}")


def agree(out, world, number, what):
    """Stops if the processes do not find the same number in the run's folder."""
    numbers = all_gather(world, torch.tensor([number], device=world.device)).tolist()
    if len(set(numbers)) > 1:
        if world.rank > 0:
            raise SystemExit(2)  # the first process says it
        where = "put --out on a disk that all processes share"
        fail(f"--out {out}: {what} {numbers}, in the order of the processes; {where}")


def load_checkpoint(state, models, optimizers):
    """Copies a checkpoint into models and optimizers, each process its own shards."""

    def like(value, p):
        if not isinstance(p, DTensor) or value.ndim == 0:  # Adam's count of steps has no shards
            return value.to(p.device, copy=True)
        value = value.to(p.device)
        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)

    for name, model in models.items():
        saved = state["models"][name]
        for key, p in tensors(model, for_checkpoint=True):
            if key not in saved or saved[key].shape != p.shape:
                fail(f"--resume: the checkpoint is of another model (see {key})")
            p.data.copy_(like(saved[key], p))
        if name in optimizers:
            weights = optimizers[name].param_groups[0]["params"]
            for i, moments in state["optimizers"][name].items():
                p = weights[i]
                optimizers[name].state[p] = {k: like(v, p) for k, v in moments.items()}


# -- The order of the data -------------------------------------------------------------------------


def rows_of_step(count, step, rows, world, seed):
    """This process's share of a step's row numbers. The data is one endless sequence of
    shuffled copies. Step and rank alone give the place in it, so a resumed run neither
    skips nor repeats a row. `rows` must be a multiple of the processes."""
    mine = rows // world.size
    start = (step - 1) * rows + world.rank * mine
    return [nth_row(count, start + i, seed) for i in range(mine)]


def nth_row(count, i, seed):
    """Element i of the endless sequence of shuffled copies of range(count)."""
    return shuffled(count, seed_from(seed, i // count, ORDER))[i % count]


def say_passes(drawn, count, what):
    """Says how often a run goes through its data, if it has any."""
    if drawn and count:
        say(f"{drawn} {what} will be drawn from {count}, {drawn / count:.1f} passes")


@functools.lru_cache(maxsize=2)
def shuffled(count, seed):
    return random.Random(seed).sample(range(count), count)


# -- Log and console -------------------------------------------------------------------------------


class Mean(float):
    """The mean of `count` values, a plain number that also has a 95 % interval, `low` to `high`."""

    def __new__(cls, total, count, squares):
        middle = total / count
        mean = super().__new__(cls, middle)
        mean.count = int(count)
        variance = max(squares / count - middle**2, 0.0)
        # zeros and ones: Wilson's interval, which stays between them
        if squares == total:
            shrink = 1 + 1.96**2 / count
            middle = (middle + 1.96**2 / (2 * count)) / shrink
            half = 1.96 * math.sqrt(variance / count + (1.96 / (2 * count)) ** 2) / shrink
            mean.low = max(middle - half, 0.0)
        else:  # 1.96 standard errors; one value alone has none
            half = 1.96 * math.sqrt(variance / (count - 1)) if count > 1 else math.inf
            mean.low = middle - half
        mean.high = middle + half
        return mean


def mean_of(values):
    """The `Mean` of a tensor's elements, where every process has all of them."""
    values = values.double()
    return Mean(values.sum().item(), values.numel(), values.square().sum().item())


class Meter:
    """What a step logs, over its micro-batches and all processes. Everything stays on the device
    until `result` reads it: a number read in the loop would make the CPU wait for the GPU."""

    def __init__(self):
        self.means = {}  # name: [sum, count, sum of squares]
        self.totals = {}
        self.maxima = {}
        self.completions = []  # held-out ones, for eval_samples.jsonl

    def mean(self, name, values, mask=None):
        """For a mean over a tensor's elements, or those on the mask."""
        values = values.detach().double()
        mask = torch.ones_like(values) if mask is None else mask.expand_as(values)
        mask = mask.bool()
        # where, not a product: nan off the mask times 0 is nan
        values = torch.where(mask, values, 0.0)
        sums = torch.stack([values.sum(), mask.sum(), values.square().sum()])
        self.means[name] = self.means.get(name, 0.0) + sums

    def sum(self, name, value):
        self.totals[name] = self.totals.get(name, 0.0) + value.detach().double()

    def max(self, name, values):
        largest = values.detach().max().double()
        self.maxima[name] = torch.maximum(self.maxima.get(name, largest), largest)

    def result(self, world):
        """{name: number}. A mean is a `Mean`; without elements it is left out. Every process must
        have used the same names in the same order."""
        sums = []
        for triple in self.means.values():
            sums += triple.tolist()
        for value in self.totals.values():
            sums.append(value.item())
        sums = all_sum(world, *sums)
        result = {}
        for i, name in enumerate(self.means):
            if sums[3 * i + 1]:
                result[name] = Mean(*sums[3 * i : 3 * i + 3])
        for name, value in zip(self.totals, sums[3 * len(self.means) :]):
            result[name] = value
        for name, largest in self.maxima.items():
            result[name] = all_gather(world, largest.view(1).to(world.device)).max().item()
        if self.completions:
            result["eval_samples"] = self.completions
        return result


class Writer(SummaryWriter):
    """TensorBoard's writer, and what the console needs to know from one step to the next."""

    def __init__(self, folder, args=None, **settings):
        super().__init__(folder, **settings)
        self.args = args
        self.bar = None
        self.step_ends = []  # when steps of this process ended, in seconds
        self.bad_steps = collections.Counter()  # in a row, by what `advise` looks at
        self.first_length = None  # of completions, in tokens
        self.quiet_until = 0.0  # when a console without a progress bar gets its next line
        self.held_out = {}  # the numbers of the last step that has held-out scores


AT_A_GLANCE = {  # TensorBoard's tab "Custom Scalars"
    "held out": "eval/reward eval/exact eval/number eval/accuracy",
    "in training": "reward accuracy",
    "distance": "kl/ref kl/old",
    "completions": "length truncated",
    "variety": "entropy equal_groups",
}


def begin_log(out, args, world, tokenizer, ids, done_steps, learning=1, frozen=(), reference=""):
    """Prints the model, its memory and the first text before a model is loaded, and drops from the
    logs what a resumed run makes again -> (writer, bar) on the first process, (None, None) on the
    others. learning: the number of models that learn. frozen, reference: paths of others that stay
    loaded; with adapters the policy can be its own reference."""
    if world.rank > 0:
        return None, None
    count, needed = lasting_memory(args.model, world, learning, 0, args)
    is_own = reference == args.model and args.lora_rank
    for path in filter(None, [*frozen, "" if is_own else reference]):
        needed += lasting_memory(path, world, learning=0, frozen=1)[1]
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if world.device.type == "cuda":
        there = torch.cuda.get_device_properties(world.device).total_memory
    where = f"{world.size} x {world.device.type} in {str(world.dtype)[6:]}"
    print(f"{args.model}: {count / 1e6:.1f}M parameters on {where}")
    what = "for weights, gradients and moments; activations come on top"
    print(f"memory: {needed / 2**30:.2f} GiB of {there / 2**30:.1f} {what}")
    if needed > there:
        print("warning: this does not fit; use more processes or a smaller model")
    if args.steps:
        print(f"{args.steps} steps, learning rate {args.learning_rate:g} at its peak")
        before_peak = args.warmup + getattr(args, "critic_warmup", 0)
        if before_peak >= args.steps:
            flags = "--warmup" if before_peak == args.warmup else "--critic_warmup and --warmup"
            why = f"{flags} would end at step {before_peak}, the run at step {args.steps}"
            print(f"note: the learning rate does not reach its peak: {why}")
    shown = ids if len(ids) < 40 else [*ids[:30], "...", *ids[-8:]]
    print(f"first text, as the model sees it: {tokenizer.decode(ids)!r}\n  as ids: {shown}")
    going_on = f", going on after step {done_steps} of {args.steps}" if args.resume else ""
    print(f"writing to {out}{going_on}\n")
    threading.excepthook = quiet_threads
    try:
        cut_log(out / "metrics.jsonl", done_steps)
        cut_log(out / "samples.jsonl", done_steps)
        cut_log(out / "eval_samples.jsonl", done_steps)
        if not done_steps:  # of a run that begins anew
            shutil.rmtree(out / "best", ignore_errors=True)
            shutil.rmtree(out / "best_adapter", ignore_errors=True)
        writer = Writer(out / "tensorboard", args, purge_step=done_steps + 1 if done_steps else 0)
        charts = {}
        for title, names in AT_A_GLANCE.items():  # regular expressions: $ leaves out reward/NAME
            charts[title] = ["Multiline", [f"{name}$" for name in names.split()]]
        writer.add_custom_scalars({"the run at a glance": charts})
        writer.add_text("args", f"```\n{json.dumps(vars(args), indent=1)}\n```")
        writer.flush()
    except OSError as error:
        fail(f"--out {out}: cannot write there ({error.strerror})")
    # disable=None: no bar in a log file, where each step would be a line
    writer.bar = tqdm(total=args.steps, initial=done_steps, desc=out.name, disable=None)
    return writer, writer.bar


def quiet_threads(hook):
    """TensorBoard's thread fails with the OSError that `log` raises: no traceback of it."""
    if not issubclass(hook.exc_type, OSError):
        threading.__excepthook__(hook)


def cut_log(path, step):
    """Drops what a resumed run writes again: the steps after its checkpoint (all if it has
    none), rows that are written once at the end, and a line that a crash cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            at_the_end = any(name.startswith(("best_of/", "scale/")) for name in row)
            if step and row["step"] <= step and not at_the_end:
                kept.append(line + "\n")
    write(path, "".join(kept))


def read_log(out):
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def log(out, writer, step, metrics, texts=()):
    """A step's numbers to metrics.jsonl, TensorBoard and the console, with what `advise` has to
    say; completions to samples.jsonl, and held-out ones to eval_samples.jsonl (at step 0 all of
    this process's, later eight). Does nothing without a writer."""
    if writer is None:
        return
    held_out = metrics.pop("eval_samples", [])
    if step:
        held_out = held_out[:8]
    samples = {"samples": texts, "eval_samples": held_out}
    for name, rows in {"metrics": [metrics], **samples}.items():
        if not rows:
            continue
        with open(out / f"{name}.jsonl", "a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    for name, rows in samples.items():
        lines = [f"`{t['reward']:.3f}` {t['prompt']!r} -> {t['completion']!r}" for t in rows[:8]]
        if lines:
            writer.add_text(name, "\n\n".join(lines), step)
    writer.flush()
    scores = [f"{name[5:]} {x:.3f}" for name, x in metrics.items() if name.startswith("eval/")]
    watched = dict(metrics)
    if scores:
        writer.held_out = metrics
        watched |= fall_from_best(out, metrics)
        say(f"step {step}: held-out {', '.join(scores)}")
    elif not sys.stderr.isatty() and time.monotonic() > writer.quiet_until:  # a line a minute
        names = "reward accuracy loss length truncated entropy kl/ref tokens_per_second".split()
        shown = [f"{name} {metrics[name]:.3g}" for name in names if name in metrics]
        if shown:
            writer.quiet_until = time.monotonic() + 60
            say(f"step {step}: {', '.join(shown)}")
    if "length" in metrics and "time/reward" in metrics:  # of completions that were drawn
        if writer.first_length is None:
            writer.first_length = next(r["length"] for r in read_log(out) if "length" in r)
        watched["length / first length"] = metrics["length"] / writer.first_length
    advise(watched, writer.args, writer.bad_steps)
    if writer.bar is not None:
        show_progress(writer, step, metrics)


def fall_from_best(out, metrics):
    """How far a held-out score is below the best so far, in widths of its interval."""
    name, scores, _ = scores_so_far(out)
    mean = metrics.get(name)
    if not isinstance(mean, Mean):
        return {}
    best = max(score for _, score in scores)
    return {"fall / interval": (best - mean) / max(mean.high - mean.low, 1e-9)}


STEPS_IN_A_ROW = {"reward": 3, "length / first length": 3}  # before a warning; else 1
ADVICE = {  # metric: (when to warn, what to say)
    "truncated": (
        lambda value, args: value > 0.5,
        "most completions are cut off: raise --max_new_tokens (or lower --max_prompt_tokens, if "
        "prompts fill the context), or ask for shorter answers with --system",
    ),
    "reward": (
        lambda value, args: value == 0 and args.reward == "exact",
        "no completion was right: `exact` wants the answer and nothing else; --reward number takes "
        "a text's last number",
    ),
    "equal_groups": (
        lambda value, args: value > 0.8 and args.reward != "none",
        "most prompts' samples score alike, which teaches little: use prompts of middling "
        "difficulty, or raise --samples_per_prompt",
    ),
    "ratio/first": (  # the first ratio's distance from 1
        lambda value, args: value > 1e-3,
        "the first ratio is not 1: the model's forward is not deterministic",
    ),
    "entropy": (
        lambda value, args: (
            value < 0.01 and args.reward != "none" and not getattr(args, "demos", "")
        ),
        "the policy tries nothing new: lower --learning_rate or raise --beta",
    ),
    "kl/ref": (
        lambda value, args: abs(value) > 100 and not args.reference,  # which may be far away
        "KL to the reference runs away: raise --beta or lower --learning_rate",
    ),
    "length / first length": (
        lambda value, args: not 1 / 3 < value < 3 and args.reward != "none",
        "completions are much shorter or longer than at first: see in samples.jsonl what pays",
    ),
    "fall / interval": (
        lambda value, args: value > 1,
        "a held-out score is below its best by more than its 95 % interval is wide: lower "
        "--learning_rate, make fewer steps, or take the best model",
    ),
    "value/explained": (
        lambda value, args: value < -1,
        "the critic is worse than a constant: lower --critic_learning_rate, or let it learn alone "
        "first with --critic_warmup",
    ),
}


def advise(metrics, args, bad_steps):
    """Warns, once each, of what a person watching should know. bad_steps: a Counter by name."""
    for name, (is_bad, words) in ADVICE.items():
        needed = STEPS_IN_A_ROW.get(name, 1)
        if name not in metrics or bad_steps[name] == needed:
            continue  # not logged, or warned of
        bad_steps[name] = bad_steps[name] + 1 if is_bad(metrics[name], args) else 0
        if bad_steps[name] == needed:
            say(f"warning: {words} ({name} {metrics[name]:.3g})")


def show_progress(writer, step, metrics):
    """Moves the progress bar; after three steps says once how long the others will take."""
    bar = writer.bar
    if step == 0:
        bar.unpause()  # its time left is that of steps, not of the first evaluation
    if "tokens_per_second" in metrics:
        names = ("reward", "kl/ref") if "reward" in metrics else ("loss", "accuracy")
        shown = [f"{name} {metrics[name]:.3f}" for name in names if name in metrics]
        bar.set_postfix_str(f"{', '.join(shown)}, {metrics['tokens_per_second']:,.0f} tokens/s")
        writer.step_ends.append(time.monotonic())
        if len(writer.step_ends) == 3:
            seconds_a_step = (writer.step_ends[2] - writer.step_ends[0]) / 2
            minutes = seconds_a_step * (bar.total - step) / 60
            if minutes >= 1:
                say(f"about {minutes:.0f} minutes left if steps go on like this")
    bar.update(step - bar.n)


def examples(samples, scores, records, rows, tokenizer=None):
    """Some rows for samples.jsonl. The prompt is that of the data; with a tokenizer, `input` is
    what the model has read."""
    shown = []
    for i in rows:
        shown.append({"prompt": records[i]["prompt"], "completion": samples.texts[i]})
        if tokenizer:
            ids = samples.prompt_ids[i][samples.prompt_mask[i]]
            shown[-1]["input"] = tokenizer.decode(ids)
        for name, values in scores.items():
            shown[-1][name] = float(f"{values[i]:.6g}")  # a float32's 0.20000000298 is 0.2
        if has_answer(records[i]):
            shown[-1]["answer"] = records[i]["answer"]
    return shown


def conclude(out, args, writer, bar, use):
    """The first and the last held-out scores, and `use`, a line of Python to go on with."""
    if writer is None:
        return
    bar.close()
    writer.close()
    scores = {}
    for row in read_log(out):
        for name, value in row.items():
            scores.setdefault(name, []).append((row["step"], value))
    for name, values in scores.items():
        if name.startswith("eval/"):
            step, value = values[-1]
            last = f" -> {value:.3f}" if args.steps else ""
            if step < args.steps:  # a signal came after it, or the last evaluation failed
                last += f" at step {step}"
            mean = writer.held_out.get(name)
            if isinstance(mean, Mean) and mean.high > mean.low and mean.count > 1:
                last += f" ({mean.count} rows, 95 % interval {mean.low:.3f} to {mean.high:.3f})"
            print(f"held-out {name[5:]}: {values[0][1]:.3f}{last}")
    is_scored = any(name.startswith(("eval/", "best_of/", "held_out/")) for name in scores)
    if args.eval_every and not is_scored:
        print("nothing was held out: --eval_data gives a score of prompts that are not trained on")
    compared, curve, kept = scores_so_far(out)
    if args.steps and curve:
        best_step, best = max(curve + kept, key=lambda pair: pair[1])
        if best > curve[-1][1]:
            where = f", kept in {out / 'best'}" if (best_step, best) in kept else ""
            print(f"best held-out {compared[5:]}: {best:.3f} at step {best_step}{where}")
    print(f"\nto see the curves:\n\n  tensorboard --logdir {shlex.quote(str(out))}")
    if args.steps:
        print(f"\nto use the model, in Python:\n\n  from transformers import pipeline\n  {use}")


def line_to_try(out, tokenizer, prompt, args):
    """The line of Python that samples from the model that a run has made."""
    prompt = prompt if prompt and len(str(prompt)) < 200 else "your prompt"
    if not isinstance(prompt, str) or (tokenizer.chat_template and args.chat):
        prompt = messages(prompt, args.system)
    elif not prompt.startswith(args.system):  # dpo.py's begins with it
        prompt = f"{args.system}\n{prompt}"
    pipe = f'pipeline("text-generation", "{out / "model"}")'
    return f"print({pipe}({prompt!r}, max_new_tokens={args.max_new_tokens}))"


# -- The end ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def short_errors(out, args, bar):
    """A run that cannot go on ends with a sentence and the command that resumes it, exit
    status 1. The last checkpoint is whole: only a finished one replaces it."""
    try:
        yield
        if dist.is_initialized():
            if dist.get_world_size() > 1:
                dist.barrier()
            dist.destroy_process_group()
    except (Stop, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        if bar is not None:
            bar.close()
        if isinstance(error, Unscored) and UNSAVED:
            with contextlib.suppress(OSError):  # no room: an older checkpoint is there, or none
                UNSAVED.pop()()
        # the first process speaks; another one only of an error that may have hit it alone
        speaks = int(os.environ.get("RANK", 0)) == 0
        speaks = speaks or isinstance(error, (OSError, torch.OutOfMemoryError))
        raise SystemExit(last_words(error, out, args) if speaks else 1) from error
    finally:
        UNSAVED.clear()
        if out in HELD:
            HELD.pop(out).close()


def last_words(error, out, args):
    words = first_line(error)
    if isinstance(error, KeyboardInterrupt):
        words = "stopped at once"
    elif not isinstance(error, Ended):
        words = f"error: {words}"
    if isinstance(error, torch.OutOfMemoryError):
        words += "; lower --tokens_per_micro_batch or add --gradient_checkpointing (training)"
        can_sample_less = hasattr(args, "sample_rows")
        flags = "--sample_rows, or " if can_sample_less else ""
        words += f", or lower {flags}--max_new_tokens in a new run (sampling)"
    if not args.steps:
        return words
    command = [sys.argv[0], "--resume", "--out", str(out)]
    launcher = "python"
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        launcher = "torchrun ..."  # several nodes need more than is known here
        if processes == os.environ.get("LOCAL_WORLD_SIZE"):
            launcher = f"torchrun --nproc_per_node {processes}"
    where = "go on from the last checkpoint"
    if not checkpoints(out):
        where = "no checkpoint was written yet; start again in this folder"
    return f"{words}\n{where} with: {launcher} {shlex.join(command)}"


def catch_signals(steps):
    """SIGTERM (a cluster takes its machine back), SIGINT (Ctrl-C) and SIGHUP (the terminal is
    gone) set a flag: the loop finishes its step, saves and stops. A second SIGTERM or SIGINT
    stops at once, as does the first if there are no steps. Returns a function that says whether one
    has come."""
    caught = []
    main_process = os.getpid()
    message = b"\nstopping at the next safe place, and saving; a second signal stops at once\n"
    if int(os.environ.get("RANK", 0)) > 0:
        message = b""

    def handler(number, frame):
        is_forked = os.getpid() != main_process  # a process that a reward function has started
        if is_forked and number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)  # the reward function can end it
            os.kill(os.getpid(), number)
        if caught and number == signal.SIGHUP:
            return  # the shell and the kernel may both send one
        if caught or not steps:
            raise KeyboardInterrupt
        caught.append(number)
        if is_forked:
            return  # it goes on, because the main process still needs it to finish the step
        for stream, text in ((1, b""), (2, message)):  # an empty write tests the terminal
            try:
                os.write(stream, text)  # not print, which the signal may have interrupted
            except OSError:  # no terminal: the next print would end the run before it saves
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, handler)
    return lambda: bool(caught)
