"""What the five scripts share: loading (models, and whatever else a run begins and goes on with), and sampling. No
algorithm lives here.

Read an algorithm's script first; come here to see how a model is prepared or how a completion is drawn. In order:
processes and seeds; flags, files and functions that the user gives; text to ids; models; memory; optimizer; a run's
folder, checkpoint and end; then `sample`.

Shapes: B rows, P prompt columns, C completion columns, V vocabulary. Prompts are padded on the left, so that every
completion starts in the same column; completions are padded on the right.
"""

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
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

# -- Processes, device, precision, seeds -----------------------------------------------------------------------------


def say(message):
    """A line on the console, once and not for each process."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message)


say_once = functools.lru_cache(say)


def fail(message):
    """A mistake of the user's: one sentence on stderr, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@dataclass(frozen=True)
class World:
    """Where this process runs: its rank among `size` processes, its device, and the dtype that computes."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype


def start(device="auto", dtype="auto", seed=0):
    """Joins the other processes (torchrun sets RANK and WORLD_SIZE) and picks device and precision.

    On a CPU everything is float32 by default. On a GPU, and on a CPU with --dtype bfloat16, the
    weights that compute are bfloat16 and the weights that learn are float32: a bfloat16 weight of
    1.0 cannot even move by the 1e-6 that a step at learning rate 1e-6 makes.
    """
    if device not in ("auto", "cpu", "cuda"):
        fail(f"--device {device}: choose auto, cpu or cuda")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch finds no GPU here; use --device cpu, or install a torch built for CUDA")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtypes["auto"] = torch.bfloat16 if device == "cuda" else torch.float32
    if dtype not in dtypes:
        fail(f"--dtype {dtype}: choose auto, float32 or bfloat16")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if where.index >= torch.cuda.device_count():
            fail(f"process {where.index} finds only {torch.cuda.device_count()} GPUs here: lower --nproc_per_node")
        torch.cuda.set_device(where)
    world = World(rank, size, where, dtypes[dtype])
    if not dist.is_initialized() and is_sharded(world):
        # FSDP2 (see `shard`) wants a process group, even if it holds this process alone
        settings = {"timeout": datetime.timedelta(hours=1)}
        if size == 1:
            settings |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        elif device == "cuda":
            settings["device_id"] = where  # else a barrier has to guess it, and warns
        dist.init_process_group("nccl" if device == "cuda" else "gloo", **settings)
    torch.manual_seed(seed)
    transformers_logging.disable_progress_bar()  # ours is the only one; theirs are many and short
    transformers_logging.set_verbosity_error()
    return world


def is_sharded(world):
    """Whether FSDP2 holds the weights (see `shard`). A lone CPU process that computes in float32 has no use for it."""
    return world.size > 1 or world.device.type == "cuda" or world.dtype != torch.float32


ORDER, DRAW, CUT, PASS, AGAIN, EVAL = range(6)  # what a random choice is for: no two of them share a seed


def fold(*numbers):
    """One seed out of several numbers (seed, step, rank, ...). Every random choice of a run is drawn from such a seed
    and never from a generator that lives on, so a resumed run has no generator's state to restore."""
    digest = hashlib.sha256(repr(tuple(int(n) for n in numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def all_sum(world, *numbers):
    """The sums over all processes, as a list of floats, added in float64."""
    total = torch.tensor([float(x) for x in numbers], dtype=torch.float64, device=world.device)
    if world.size > 1:
        dist.all_reduce(total)
    return total.tolist()


def all_gather(world, tensor):
    """The tensors of all processes, of one shape, joined along the first dimension in the order of their ranks."""
    if world.size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


# -- What the user gives: flags, files, functions ----------------------------------------------------------------------


def check_flags(args):
    """Refuses numbers that no script could work with; what else a flag must not be, its script says."""
    names = vars(args).keys()
    counts = (
        "prompts_per_step samples_per_prompt pairs_per_step max_tokens max_prompt_tokens max_new_tokens epochs minibatches "
        "tokens_per_micro_batch sample_rows eval_every save_every keep"
    )
    for name in [n for n in counts.split() if n in names]:
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: must be 1 or more")
    for name, value in vars(args).items():  # rates, weights, numbers of steps; nan is refused as well
        if type(value) in (int, float) and name not in ("max_grad_norm", "simpo_margin") and not value >= 0:
            fail(f"--{name} {value}: must be 0 or more")
    if not args.max_grad_norm > 0:
        fail(f"--max_grad_norm {args.max_grad_norm}: must be above 0; inf scales nothing down")
    if "temperature" in names and not args.temperature:
        fail("--temperature must be above 0: a greedy policy tries nothing new, and its samples are all the same")
    if args.template_args:
        check_template_args(args.template_args)
    if args.resume and not args.steps:
        fail("--steps 0 evaluates a model; for what a run has made, leave out --resume and give its folder, --model RUN/model")


def check_template_args(text):
    """--template_args is a JSON object; what transformers itself takes is not for a template."""
    try:
        values = json.loads(text)
    except ValueError as error:
        fail(f"--template_args {text}: not JSON ({error})")
    if not isinstance(values, dict):
        fail(f'--template_args {text}: not an object like {{"enable_thinking": false}}')
    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    for name in values:
        if name == "messages" or name in taken and name not in ("tools", "documents"):
            fail(f"--template_args {text}: {name} is not for the template; common.py decides it")


def read_json(path, flag):
    """[(line number, value), ...] of a JSON-lines file; a mistake is named with its line."""
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        fail(f"{flag} {path}: {error.strerror}")
    except UnicodeDecodeError:
        fail(f"{flag} {path}: not a text file in UTF-8")
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > 10_000_000:
            fail(f"{flag} {path}, line {number}: {len(line) / 1e6:.0f} million characters in one line")
        try:
            values += [(number, json.loads(line))] if line.strip() else []
        except ValueError as error:
            array = "; this looks like one array: give each object a line of its own" if text.lstrip().startswith("[") else ""
            fail(f"{flag} {path}, line {number}: not JSON ({error}){array}")
    return values or fail(f"{flag} {path}: no rows in it")


def load_function(spec, flag):
    """The function that FILE.py:function names."""
    file, _, name = spec.partition(":")
    if not Path(file).is_file():
        fail(f"{flag} {spec}: no such file {file}")
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(f"reward_{Path(file).stem}", file))
    try:
        sys.modules[module.__name__] = module  # as an import does: dataclasses in the file look themselves up there
        module.__spec__.loader.exec_module(module)
    except Exception as error:
        fail(f"{flag} {spec}: {file} cannot be imported ({type(error).__name__}: {error})")
    if not callable(getattr(module, name, None)):
        fail(f"{flag} {spec}: {file} has no function {name!r}; write {flag} {file}:function")
    return getattr(module, name)


# -- Tokenizer: pad, stop set, chat template -------------------------------------------------------------------------


BEGAN = datetime.datetime.now().isoformat(timespec="seconds")


def first_date(args):
    """When the run began. A resumed run finds it in its args.json."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if args.resume:
            return json.loads((Path(args.out) / "args.json").read_text())["began"]
    return BEGAN


def began(args, world):
    """`first_date` of the first process, on all of them. Some chat templates print the date:
    without this, a run that is resumed the next day would go on with other prompts."""
    answer = [first_date(args)]
    if world.size > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def load_tokenizer(path, template_args="", date=None):
    """A tokenizer that has a pad token: its own, or else EOS. Pad may equal EOS here, because masks are made of lengths in
    this project. One that compares ids with the pad id hides the real EOS, too, and the model never learns to stop."""
    try:
        # without trust_remote_code=False, here and wherever a folder is read, transformers asks on the terminal
        # whether to run code from the folder
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        read_config(path)  # where there is no model at all, it says so better
        fail(f"{path}: no tokenizer could be loaded ({str(error).splitlines()[0]})")
    words = read_config(path).get_text_config().vocab_size
    if tokenizer.vocab_size > words:
        fail(f"{path}: its tokenizer has {tokenizer.vocab_size} tokens and its model {words}; they do not belong together")
    if tokenizer.eos_token_id is None:
        fail(f"{path}: its tokenizer has no EOS token, so no completion could end; set eos_token")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= words:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.template_args = json.loads(template_args or "{}")
    tokenizer.date = date and datetime.datetime.fromisoformat(date)
    for name in tokenizer.template_args:
        if not tokenizer.chat_template:
            fail(f"--template_args: the tokenizer of {path} has no chat template")
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            fail(f"--template_args: the chat template of {path} does not know {name}")
    return tokenizer


def render(tokenizer, talk, **settings):
    """Chat messages as the tokenizer's chat template writes them, given --template_args, with the
    date on which the run began. Templates ask for the date by `strftime_now`; transformers 5.24
    gives a template no function but its own, so the calls are replaced by their result."""
    date = getattr(tokenizer, "date", None)
    template = tokenizer.get_chat_template()
    if date:
        call = r"strftime_now\(\s*(?:\"([^\"]*)\"|'([^']*)')\s*\)"
        template = re.sub(call, lambda m: json.dumps(date.strftime(m[1] or m[2] or "")), template)
    given = getattr(tokenizer, "template_args", {})
    return tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False, **given, **settings)


def own_pad(tokenizer):
    """A pad token that ends no text, for sequence classifiers: transformers' score the last id that is not pad, and where pad
    is EOS that is the token before the end. One that the vocabulary has, or else a new one."""
    end = tokenizer.convert_ids_to_tokens(turn_end(tokenizer, str(tokenizer.chat_template)))
    taken = (tokenizer.eos_token, tokenizer.bos_token, end)
    names = [t.content for t in tokenizer.added_tokens_decoder.values() if "pad" in t.content.lower()]
    spare = [name for name in (*names, tokenizer.unk_token) if name and name not in taken]
    if tokenizer.pad_token in taken:
        tokenizer.add_special_tokens({"pad_token": spare[0] if spare else "<|pad|>"})


def stop_ids(model, tokenizer):
    """All ids that end a completion: the tokenizer's EOS, those of the generation config, and the template's end of a turn.
    A chat model often has two (end of turn, end of text); knowing only one makes good answers look cut off."""
    config = getattr(model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    listed = listed if isinstance(listed, (list, tuple)) else [listed]
    return sorted(
        {i for i in (*listed, tokenizer.eos_token_id, turn_end(tokenizer, str(tokenizer.chat_template))) if i is not None}
    )


@functools.lru_cache
def around_answer(tokenizer, template):
    """What the chat template (here as a text, to remember by) writes around an answer that it is
    given: between its generation prompt and the answer (thinking models: an empty thought; None if
    its generation prompt does not begin such a text), and what ends the turn."""
    question = messages("question")
    try:
        start = render(tokenizer, question, add_generation_prompt=True)
        whole = render(tokenizer, [*question, {"role": "assistant", "content": "an answer"}])
    except Exception:  # there is no template, or it wants more than these two
        return "", ""
    before, found, after = whole.rpartition("an answer")
    if not found:
        return "", ""
    return before[len(start) :] if before.startswith(start) else None, after


@functools.lru_cache
def turn_end(tokenizer, template):
    """The id that ends an answer: the special token that the chat template (here as a text, to remember by) writes after
    it (that of Gemma or Phi is not their EOS), or else EOS."""
    after = around_answer(tokenizer, template)[1]
    first = tokenizer(after, add_special_tokens=False).input_ids[:1]
    special = first and first[0] in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[first[0]].special
    return first[0] if special else tokenizer.eos_token_id


def encode(tokenizer, text):
    """Raw text to ids, with whatever the tokenizer puts before a text (Gemma and Llama want their BOS), but not twice:
    a text that starts with BOS already, as rendered templates do, gets no second one."""
    doubled = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not doubled).input_ids


def messages(prompt, system=""):
    """A prompt as chat messages; the system message goes before those that have none."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if system and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *prompt]
    return prompt


def encode_prompt(tokenizer, prompt, system="", chat=True):
    """A prompt to ids. A list of chat messages goes through the chat template; a string becomes a user message (after
    the system message, if there is one) when there is a template and `chat` is on, and is raw text otherwise."""
    if isinstance(prompt, str):
        if not (chat and tokenizer.chat_template):
            return encode(tokenizer, f"{system}\n{prompt}" if system else prompt)
    elif not tokenizer.chat_template:
        fail("a prompt is a list of chat messages, but the tokenizer has no chat template; give it as text")
    try:
        text = render(tokenizer, messages(prompt, system), add_generation_prompt=True)
    except Exception as error:  # some templates know no system message, or want user and assistant to take turns
        fail(f"the chat template refuses the prompt {str(prompt):.200}: {error}")
    # the template has written every special token itself; letting the tokenizer add its own would double the BOS
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_completion(tokenizer, text, chat=False, prompt=None, system=""):
    """A given answer (a demonstration, one side of a pair) to ids, ended by EOS, or, in a chat, by what ends a turn: an
    answer without its end teaches the model never to stop. Prompt and answer are tokenised apart and their ids joined,
    because the sampler joins ids too: at the seam, tokenise(a) + tokenise(b) is not tokenise(a + b)."""
    end = turn_end(tokenizer, str(tokenizer.chat_template)) if chat else tokenizer.eos_token_id
    if chat and tokenizer.chat_template and prompt is not None:
        text = opening(tokenizer, prompt, text, system) + text
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ids if ids[-1:] == [end] else [*ids, end]


def opening(tokenizer, prompt, answer, system):
    """What the chat template writes between its generation prompt and a given answer. Templates of
    thinking models write an empty thought there. A reward model reads it (`encode_answer`), and a
    model that is asked to think learns it with the answer."""
    before, after = around_answer(tokenizer, str(tokenizer.chat_template))
    if before is None:
        say_once(
            "note: the chat template does not write its generation prompt before an answer that it is "
            "given; given answers follow the generation prompt as they are"
        )
    if not before:
        return ""
    talk = messages(prompt, system)
    start = render(tokenizer, talk, add_generation_prompt=True)
    whole = render(tokenizer, [*talk, {"role": "assistant", "content": answer}])
    between = whole.removeprefix(start).removesuffix(after)
    for written in (answer, answer.strip()):  # many templates strip what they are given
        if between.endswith(written):
            return between[: len(between) - len(written)]
    return ""  # the template writes this answer otherwise: it has a thought of its own


def encode_answer(tokenizer, prompt, completion):
    """A whole conversation as a reward model reads it -> ids: rendered by its template, or else prompt and completion,
    ended by EOS."""
    talk = messages(prompt)
    if tokenizer.chat_template:
        try:
            text = render(tokenizer, [*talk, {"role": "assistant", "content": completion}])
        except Exception as error:  # some templates know no system message, or want user and assistant to take turns
            fail(f"the reward model's chat template refuses the prompt {str(prompt):.200}: {error}")
        return tokenizer(text, add_special_tokens=False).input_ids
    if any(not isinstance(m["content"], str) for m in talk):
        fail(f"a message's content is no text, and the tokenizer has no chat template to render it: {str(prompt):.200}")
    return encode(tokenizer, "\n".join(m["content"] for m in talk)) + encode_completion(tokenizer, completion)


# -- Models ----------------------------------------------------------------------------------------------------------


def read_config(path, **changes):
    """A model's config with every dropout at 0. Dropout makes two forwards of one text differ: the first ratio is
    then not 1, and the KL to a reference of the same weights not 0 but in the thousands."""
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            meant = f"; did you mean {path}/model?" if (Path(path) / "model").is_dir() else ""
            fail(f"{path}: this folder has no config.json, so it holds no model{meant}")
    elif Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        fail(f"{path}: no such model folder (and a model's name on a hub looks like owner/name)")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **changes)
    except (OSError, ValueError, ImportError, KeyError) as error:
        fail(f"{path}: no model could be loaded ({str(error).splitlines()[0]})")
    parts = [config]
    for part in parts:
        for name, value in vars(part).items():
            if isinstance(value, PreTrainedConfig):
                parts.append(value)
            # PhiMoE's is no noise but a margin, and acts in evaluation, too; see `prepare`
            margin = part.model_type == "phimoe" and name == "router_jitter_noise"
            if isinstance(value, float) and ("drop" in name or "jitter" in name) and not margin:
                setattr(part, name, 0.0)
    return config


def load(auto, path, dtype, **changes):
    """from_pretrained, the careful way: the dtype is always given (the default is the file's, and a policy left in
    bfloat16 learns nothing at small rates), weights come from safetensors only, and no code from the hub is run. A weight that
    the folder lacks would be drawn at random, and trained in silence: only a scalar head may be new. Returns the model and the
    names of what is new."""
    settings = {"config": read_config(path, **changes), "dtype": dtype, "use_safetensors": True, "trust_remote_code": False}
    try:
        model, info = auto.from_pretrained(path, **settings, output_loading_info=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        fail(f"{path}: no model could be loaded ({str(error).splitlines()[0]})")
    # what `save_model` writes: the config as it came, with its dropout, so that others find what they know
    model.config_to_save = AutoConfig.from_pretrained(path, trust_remote_code=False, **changes)
    may_lack = set(scalar_head(model).parameters()) if auto is AutoModelForSequenceClassification else set()
    weights = dict(model.named_parameters())
    missing = sorted(info["missing_keys"])
    lacking = [k for k in missing if k in weights and weights[k] not in may_lack]
    if lacking:
        fail(f"{path}: the folder has no weights for {len(lacking)} parts of the model, among them {lacking[0]}")
    return model, missing


def shard(model, world):
    """Hands the model to FSDP2, unless a lone CPU process computes in float32, which keeps it as it is.

    FSDP2 keeps each weight as a float32 shard (the master that AdamW steps) and, for the time of a forward or
    backward, makes the whole weight in `world.dtype`. So one mechanism serves one GPU and many, and policy, rollout
    and reference all compute with the same bfloat16 numbers: KL and log-ratio start at exactly 0 (given the same batches).
    """
    if not is_sharded(world):
        return model
    mesh = dist.device_mesh.init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=world.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = set(model._no_split_modules or ())
    # inner blocks before outer ones, the root last: each takes the weights that no other has taken
    units = [m for m in reversed(list(model.modules())) if type(m).__name__ in blocks and m is not model]
    if not units:  # the root alone would never learn of the backward pass, see `hidden_states`
        only = "it trains in one CPU process and in float32 only"
        fail(f"{type(model).__name__} names no blocks (_no_split_modules) to shard by: {only}")
    for unit in [*units, model]:
        try:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        except (ValueError, NotImplementedError) as error:  # weights without a dimension, or not contiguous
            fail(f"{type(model).__name__} cannot be sharded ({error}): it trains in one CPU process and in float32 only")
        if world.size > 1:  # one process has nothing to sum, and dividing by 1.0 would copy each gradient
            # FSDP2 averages gradients over the processes. Our losses are divided by counts over *all* processes already,
            # so the gradient of the whole batch is the sum; an average would be too small by the factor world.size.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    return model


def cache_argument(model):
    """The name under which this model's forward takes a cache, or None: transformers 5.24 calls it `cache`; before, it was
    `past_key_values`, and `cache_params` in Mamba."""
    names = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in names), None)


def is_recurrent(cache):
    """Whether no layer of this cache keeps keys and values (Mamba): nothing to attend to, so no mask while decoding."""
    return not any(isinstance(layer, DynamicLayer) for layer in cache.layers)


def hidden_states(model, ids, mask, cache=None):
    """What a model's head reads, [B, T, width], by an ordinary forward. A causal model's head is shown one position instead of
    all: logits of every position, [B, T, V], are what runs out of memory first. With a cache, `ids` go on from what is in
    it, `mask` covers both, and the gradient flows back into the cache."""
    caught, vocabulary = [], model.get_output_embeddings()

    def catch(head, inputs):
        caught.append(inputs[0])
        return inputs if vocabulary is None else (inputs[0][:, -1:],)

    inputs = {"position_ids": (mask.long().cumsum(1) - 1).clamp_(min=0)[:, -ids.shape[1] :]}
    if "position_ids" not in inspect.signature(model.forward).parameters:
        inputs = {}
    if cache is not None:
        inputs[cache_argument(model)] = cache
    hook = (scalar_head(model) if vocabulary is None else vocabulary).register_forward_pre_hook(catch)
    try:
        model(input_ids=ids, attention_mask=mask.long(), use_cache=cache is not None, **inputs)
    finally:
        hook.remove()
    return caught[0]


class CutGraph(torch.autograd.Function):
    """Cuts the graph between a prompt's forward and the forwards of its completions. Backward goes
    through the completions first, and from here, by a backward of its own, through the prompt. In
    one graph autograd would hold each weight's whole gradient of the completions until that of the
    prompt arrives: twice the memory of all gradients, where this adds each to `.grad` at once."""

    @staticmethod
    def forward(ctx, anchor, tensors):
        # in a list autograd does not see the prompt's tensors; the anchor is what it sees instead
        ctx.tensors = tensors
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        # gradients of what nobody has used are zeros, so that FSDP2 learns of the last block's pass
        torch.autograd.backward(ctx.tensors, gradients)
        ctx.tensors = None  # the loss may live on through the next forward, and this with it
        return None, None


def prompt_states(model, ids, mask):
    """The state at the last token of each prompt, [B, 1, width], and the cache from which
    completions go on, as `hidden_states` takes it. The gradient flows back through both."""
    cache = DynamicCache(config=model.config)
    last = hidden_states(model, ids, mask, cache)[:, -1:]
    if not last.requires_grad:
        return last, cache
    # keys and values are attributes of a layer; recurrent states may be in a dictionary
    places = []
    for layer in cache.layers:
        for holder in (vars(layer), *(x for x in vars(layer).values() if isinstance(x, dict))):
            for name, value in holder.items():
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    places.append((holder, name))
    anchor = last.new_zeros((), requires_grad=True)
    tensors = [last] + [holder[name] for holder, name in places]
    last, *states = CutGraph.apply(anchor, tensors)
    for (holder, name), state in zip(places, states, strict=True):
        holder[name] = state
    return last, cache


def logits_of(model, hidden):
    """The head on some positions, with what some families do after it in the model's own dtype; float32 comes last. Under
    FSDP2 the head has its whole weights here, because the root keeps them from its forward until the backward is over."""
    logits, config = model.get_output_embeddings()(hidden), model.config.get_text_config()
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
    return logits.float()


@torch.no_grad()
def check_head(model):
    """Whether `logits_of` knows all that this family does between its last state and its logits. If not, another
    distribution than the sampled one would be trained, and no ratio or KL would show it."""
    ids = torch.tensor([[1, 2, 3]], device=model.device)
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    if not torch.allclose(own, logits_of(model, hidden_states(model, ids, ids > 0)), atol=1e-3, rtol=1e-3):
        fail(
            f"the family {model.config.model_type!r} changes its logits after the head in a way that common.logits_of does not know"
        )


def prompts_can_be_shared(model, world, gradient_checkpointing):
    """Whether a prompt that is computed once, its cache repeated for its completions, leads to the states and the gradient
    of prompts computed again for each: tried on made-up ids, two prompts of two completions each.

    Attention does. A layer whose cache drops the gradient does not, and transformers drops the whole cache, with wrong
    results, where it checkpoints gradients. In bfloat16 rounding alone sets the two apart by per cents, so only what is
    worse than a tenth is found there.

    A family that cannot be trained at all stops the run here, with a sentence."""
    P, owner = 16, torch.tensor([0, 0, 1, 1], device=world.device)
    many = min(model.config.get_text_config().vocab_size, 1000)
    ids = torch.randint(many, (4, 24), generator=torch.Generator().manual_seed(0)).to(world.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    ids[:, :P], mask[2:, :5], mask[1, -2:] = ids[owner * 2, :P], False, False  # lengths differ, on both sides

    def norm(tensors):
        size = torch.nn.utils.get_total_norm(tensors)
        return (size.full_tensor() if isinstance(size, DTensor) else size).item()

    try:
        plain = hidden_states(model, ids, mask)[:, P - 1 :][mask[:, P - 1 :]].float()  # [tokens, width]
        weight = torch.linspace(-1, 1, plain.shape[1], device=world.device)
        (plain * weight).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no error of sharing: training would end in it, too
        family, precision = model.config.model_type, str(world.dtype)[6:]
        advice = "" if world.dtype == torch.float32 else "; --dtype float32 may work"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        message = f"the family {family!r} cannot be trained in {precision} ({reason}){advice}"
        raise Stop(message) from error
    size = norm([p.grad for p in model.parameters() if p.grad is not None])
    without_cache = not cache_argument(model) or is_recurrent(DynamicCache(config=model.config))
    if gradient_checkpointing or without_cache:
        model.zero_grad()
        return False
    try:
        start, cache = prompt_states(model, ids[::2, :P], mask[::2, :P])
        cache.reorder_cache(owner)
        shared = torch.cat([start[owner], hidden_states(model, ids[:, P:], mask, cache)], 1)
        shared = shared[mask[:, P - 1 :]].float()
        (shared * -weight).sum().backward()  # on top of the other gradient: what is left is how far they are apart
        far = [norm([p.grad for p in model.parameters() if p.grad is not None]) / size, norm([plain - shared]) / norm([plain])]
        same = all(x < (1e-3 if world.dtype == torch.float32 else 0.1) for x in far)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family's cache may say to this use of it
        same = False
        if isinstance(model, FSDPModule):
            # In the middle of a pass FSDP2 would never reduce a gradient again. The first
            # zero_grad takes what whole weights have got so far, which the reset leaves there.
            if not hasattr(model, "reset_iter_state"):  # torch below 2.13
                message = f"prompts cannot be shared with this family ({error})"
                raise Stop(f"{message}; add --gradient_checkpointing, or use torch 2.13") from error
            model.zero_grad()
            model.reset_iter_state()
    model.zero_grad()
    same = all_sum(world, same)[0] == world.size
    if not same:
        say("note: this family's cache does not serve the training forward, so a prompt is computed anew for each text")
    return same


def context_of(*configs):
    """How many tokens the models of these configs can read: the least of them, or a very large number."""
    return min(getattr(c.get_text_config(), "max_position_embeddings", None) or 2**31 for c in configs)


def fit_context(args, longest, *configs):
    """The flags, with --max_new_tokens lowered to what the context of these models has room for after the longest prompt;
    one place is left for the EOS that a reward model reads after a completion that was cut."""
    context = context_of(*configs) - 1
    if longest >= context:
        half = f"--max_prompt_tokens {context // 2} would leave such prompts out"
        fail(f"a prompt of {longest} tokens fills the model's context of {context + 1} (one is kept for the end); {half}")
    if longest + args.max_new_tokens > context:
        why = f"the model's context is {context + 1}, and the longest prompt has {longest}"
        half = f"; --max_prompt_tokens {context // 2} would leave such prompts out" if longest > context // 2 else ""
        say(f"--max_new_tokens {args.max_new_tokens} is lowered to {context - longest}: {why}{half}")
    return dataclasses.replace(args, max_new_tokens=min(args.max_new_tokens, context - longest))


def fit_reward_model(args, tokenizer, prompts):
    """The flags, with --max_new_tokens lowered to what the reward model (--reward FOLDER) can read
    after the longest prompt, as its own template writes it. If its tokens are not the policy's,
    the length of an answer is not known before; `score_ids` cuts what is too long."""
    reader = load_tokenizer(args.reward)
    context = context_of(scalar_config(args.reward))
    longest = max(len(encode_answer(reader, row["prompt"], "")) for _, row in prompts)
    room = context - longest
    why = f"--reward {args.reward} reads {context} tokens, and the longest prompt has {longest} there"
    if room < 1:
        fail(f"{why}; a smaller --max_prompt_tokens would leave such prompts out")
    if room >= args.max_new_tokens:
        return args
    if not tokenizer.get_vocab().items() <= reader.get_vocab().items():
        say(f"note: {why}; of a text that is longer with its answer, the beginning will be cut off")
        return args
    say(f"--max_new_tokens {args.max_new_tokens} is lowered to {room}: {why}")
    return dataclasses.replace(args, max_new_tokens=room)


def policy_config(path):
    """The config of a language model; a reward model is refused, whose head would be a new one that knows no word."""
    config = read_config(path)
    if any("SequenceClassification" in name for name in config.architectures or ()):
        fail(f"{path}: this is a reward model (a sequence classifier) and no language model; it can be a --reward")
    return config


def load_policy(path, world, gradient_checkpointing=False):
    """The model that learns: float32 masters, in training mode."""
    model, _ = load(AutoModelForCausalLM, path, torch.float32)
    check_head(model.eval())
    return prepare(model, world, gradient_checkpointing)


def prepare(model, world, gradient_checkpointing=False):
    """Training mode, checkpointing if asked for, and shards."""
    model.train()
    for module in model.modules():
        if hasattr(module, "router_jitter_noise"):
            module.eval()  # in training mode PhiMoE's router draws the experts at random
    if gradient_checkpointing:  # under two names: transformers 5.17 has only the older, 5.23 warns about it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return shard(model, world)


def freeze(model, world):
    """A model that never learns: weights in the computing dtype, shards, evaluation mode. The weights
    alone are cast, one by one. `from_pretrained` in bfloat16 rounds the buffers, too (Falcon-H1 has
    some), which the policy keeps in float32, and the KL to the reference would not start at 0."""
    for weight in model.parameters():
        weight.requires_grad_(False)
        weight.data = weight.data.to(world.dtype)
    return shard(model.eval(), world)


def load_reference(path, world):
    """A frozen model, for a KL penalty to hold on to or to draw best-of-N from."""
    reference, _ = load(AutoModelForCausalLM, path, torch.float32)
    return freeze(reference, world)


def scalar_config(path):
    """The config of a model that can have one number for a head; what cannot is refused before anything is loaded."""
    config = read_config(path)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        fail(f"{path}: transformers has no sequence classifier for the family {config.model_type!r}; choose another")
    if any("SequenceClassification" in name for name in config.architectures or ()) and config.num_labels != 1:
        fail(f"{path}: this classifier has {config.num_labels} labels; a reward model has one")
    return config


def load_scalar(path, world, tokenizer, head_std=None, gradient_checkpointing=False, frozen=False):
    """A model with one number for a head: a critic or a reward model, of the families that transformers has a sequence
    classifier for. `head_std` starts the head anew: 0 for a critic (its first guess is 0, not noise), 1/sqrt(d + 1)
    for a reward model; None takes the head that the folder has. A frozen one has its weights in the computing dtype.

    transformers scores the last id that is not `config.pad_token_id`; unset, it scores padding. It is set here.
    """
    scalar_config(path)
    model, missing = load(AutoModelForSequenceClassification, path, torch.float32, num_labels=1)
    if head_std is None and missing:
        fail(f"{path}: this is no reward model with one score: it has no weights for {', '.join(missing)}")
    if head_std is not None:
        with torch.no_grad():
            for p in scalar_head(model).parameters():
                p.normal_(0.0, head_std if p.ndim > 1 else 0.0)
    if frozen and model.config.pad_token_id is None:
        own_pad(tokenizer)  # then transformers read a text's last id
    elif frozen and 0 <= model.config.pad_token_id < len(tokenizer):
        tokenizer.pad_token_id = model.config.pad_token_id  # whose model it is says what pads
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # `own_pad` has made a token
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.config_to_save.get_text_config().vocab_size = len(tokenizer)
    for config in (model.config, model.config_to_save):
        config.get_text_config().pad_token_id = config.pad_token_id = tokenizer.pad_token_id
        config.problem_type = "regression"
        config.architectures = [type(model).__name__]
    if frozen:
        return freeze(model, world)
    return prepare(model, world, gradient_checkpointing)


def scalar_head(model):
    """The head of a sequence classifier (most families call it `score`): the one child beside the trunk with weights.
    Called on all positions by the model's forward, so a hook on it sees a value for every token."""
    heads = [m for name, m in model.named_children() if name != model.base_model_prefix and list(m.parameters())]
    return heads[-1]


def checked(reward):
    """A reward for one completion as one for many, which ends the run when it raises or gives no finite number: one NaN
    among the rewards makes every weight NaN within a step."""

    def score(completion, row):
        try:
            value = reward(completion, row)
        except Exception as error:
            # the last line of the user's own file, which may have called a library that raised
            frames = traceback.extract_tb(error.__traceback__)[1:]
            lines = [f.lineno for f in frames if f.filename == frames[0].filename]
            where = f" in {Path(frames[0].filename).name}, line {lines[-1]}" if lines else ""
            wrong = f"an error{where} ({type(error).__name__}: {error}),"
        else:
            with contextlib.suppress(Exception):  # whatever kind of thing was given
                if math.isfinite(float(value)) and not isinstance(value, str):
                    return float(value)
            wrong = f"{value!r:.100}, no finite number,"
        raise Stop(f"--reward gave {wrong} for prompt {row['prompt']!r:.300} and completion {completion!r:.300}")

    return lambda completions, rows: [score(c, r) for c, r in zip(completions, rows)]


def together(reward, world):
    """A reward that fails in one process stops all of them; otherwise the others would wait for it in their next sum."""

    def scores(completions, rows):
        values = None
        problem = None
        try:
            values = reward(completions, rows)
        except Stop as error:
            problem = str(error)
        problems = [problem] * world.size
        if world.size > 1:
            dist.all_gather_object(problems, problem)
        for problem in problems:
            if problem is not None:
                raise Stop(problem)
        return values

    return scores


def load_scorer(path, world, date=None):
    """A reward model as a function from completions and their rows to scores. It reads text
    through its own tokenizer and template, because its ids need not be the policy's;
    --template_args are for the policy's template."""
    tokenizer = load_tokenizer(path, date=date)
    model = load_scalar(path, world, tokenizer, frozen=True)
    return lambda completions, rows: score_texts(model, tokenizer, completions, rows, world)


def score_texts(model, tokenizer, completions, rows, world):
    """The reward model's scores of completions, a list of floats."""
    return score_ids(model, tokenizer, [encode_answer(tokenizer, row["prompt"], c) for c, row in zip(completions, rows)], world)


@torch.no_grad()
def score_ids(model, tokenizer, texts, world):
    """The scores of texts as ids, by the model's own forward: as transformers' pipeline reads any classifier, ours or not."""
    limit = context_of(model.config)
    sizes = torch.tensor([[len(texts), max(map(len, texts))]], device=world.device)
    most, longest = all_gather(world, sizes).amax(0).tolist()  # over all processes
    if longest > limit:  # known only now; a run that stopped here could not go on with other flags
        say_once(f"warning: the reward model reads {limit} tokens; of longer texts it reads the end")
        texts = [text[-limit:] for text in texts]
        longest = limit
    values = []
    size = max(1, min(64, 32_768 // longest))
    for i in range(0, most, size):  # as often on every process: sharded weights are gathered by all or by none
        part = texts[i : i + size] or texts[:1]
        s = as_samples([[] for _ in part], part, tokenizer, world)
        values += model(input_ids=s.ids, attention_mask=s.mask.long(), use_cache=False).logits[:, 0].float().tolist()
    forget_forwards(model)
    if all_sum(world, not all(map(math.isfinite, values)))[0]:  # asked of all, so that all stop
        raise Stop("the reward model gave a score that is not finite")
    return values[: len(texts)]


def at_rest(model):
    """The model with every weight a shard. After a forward FSDP2's root holds whole weights for a while; what is written
    to those is lost."""
    for unit in (m for m in model.modules() if isinstance(m, FSDPModule)):
        unit.reshard()
    return model


def forget_forwards(model):
    """For forwards that no backward follows. FSDP2 keeps the root's whole weights and the order of its
    blocks for the backward; in a model that never learns, the first stay and the second grows."""
    at_rest(model)
    started = isinstance(model, FSDPModule) and model._get_fsdp_state()._is_root is not None  # it had a forward
    if started and hasattr(model, "reset_iter_state"):  # FSDP2 of torch 2.13; before, the order stays
        model.reset_iter_state()


@torch.no_grad()
def copy_weights(source, target):
    """The weights of one model into another of the same shape, perhaps of another dtype."""
    for a, b in zip(at_rest(source).parameters(), at_rest(target).parameters()):
        b.copy_(a)


def whole(value, keep=True):
    """A tensor with all its shards, on the CPU, however it was distributed; what is not a tensor comes back as it is.
    Every process must take part in this; those that do not `keep` the result get None, and copy nothing."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not keep:
        return None
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def save_model(model, tokenizer, folder, world):
    """Writes an ordinary Hugging Face folder: what transformers, vLLM and llama.cpp's converter read. The weights are
    written in the dtype that computed, so they give the scores that were measured."""
    state = {}
    for name, value in tensors(model):  # a head tied to the embedding is one weight, written once
        value = whole(value, keep=world.rank == 0)
        if world.rank == 0:
            state[name] = value.to(world.dtype) if value.is_floating_point() else value
    if world.rank == 0:
        folder = Path(folder)
        temporary = folder.with_name(folder.name + ".tmp")
        generation = getattr(model, "generation_config", None)
        ends = stop_ids(model, tokenizer)
        config = copy.deepcopy(model.config_to_save)
        config.dtype = world.dtype
        try:
            # save_pretrained refuses to write a temperature without do_sample, which Llama-2's folder has. So it is
            # shown no generation config, and the model's own is written below without that check.
            model.generation_config = GenerationConfig()
            model.save_pretrained(temporary, state_dict=state, safe_serialization=True)
            if model.get_output_embeddings() is not None:
                settings = copy.deepcopy(generation)
                # whoever samples from the model must know every id that ends an answer
                settings.eos_token_id = ends if len(ends) > 1 else ends[0]
                settings.to_json_file(temporary / "generation_config.json", keys_to_pop=["compile_config"])
            config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            replace(temporary, folder)
        except Exception as error:  # a full disk has many names here
            shutil.rmtree(temporary, ignore_errors=True)
            raise Stop(f"{folder} could not be written ({error})") from error
        finally:
            model.generation_config = generation
    if world.size > 1:
        dist.barrier()


# -- Memory and the optimizer ---------------------


def lasting_memory(path, world, learning=1, frozen=0):
    """A model's parameters, exact from its config alone, and the bytes that a process holds
    for good: a float32 weight, its gradient and two moments, or a frozen model's weight."""
    with torch.device("meta"):  # takes no memory
        model = AutoModelForCausalLM.from_config(read_config(path), trust_remote_code=False)
    count = sum(p.numel() for p in model.parameters())
    frozen_bytes = torch.finfo(world.dtype).bits // 8
    return count, count * (16 * learning + frozen_bytes * frozen) / world.size


def memory_used(world):
    """The peak so far in bytes: torch's allocator on a GPU, the process on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def make_optimizer(model, learning_rate):
    """AdamW as RL for language models usually has it, on float32 shards."""
    weights = [p for p in at_rest(model).parameters() if p.requires_grad]
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "fused": True}
    return torch.optim.AdamW(weights, lr=learning_rate, **settings)


def learning_rate_at(step, steps, peak, schedule="constant", warmup=0):
    """The rate of step 1, 2, ..., steps: a linear rise over `warmup` steps, then
    constant, or down to 0 after the last step, in a line or half a cosine. It
    depends on the step alone, so a resumed run has no scheduler to restore."""
    if step <= warmup:
        return peak * max(step, 0) / (warmup + 1)
    done = (step - warmup - 1) / max(steps - warmup, 1)
    if schedule == "linear":
        return peak * (1.0 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * done))
    return peak


def clip_gradients(model, max_norm):
    """Scales the whole gradient down to `max_norm`; returns the norm it had. The
    caller must not step if that is not finite: Adam's moments never recover."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return whole(norm).item()


# -- A run's folder -------------------------------

MAY_DIFFER = (  # flags that --resume may change
    "steps eval_every save_every keep tokens_per_micro_batch gradient_checkpointing "
    "sample_rows resume out"
).split()


def open_run(args, script, world):
    """The run's folder: a new one, or with --resume that of an earlier run."""
    answer = [None]
    if world.rank == 0:  # alone, before the others can see what it makes
        try:
            out = folder_to_resume(args, script) if args.resume else new_folder(args, script)
            lock(out)
            known = {"script": script, "began": first_date(args), **dataclasses.asdict(args)}
            write(out / "args.json", json.dumps(known, indent=1) + "\n")
        except OSError as error:
            fail(f"--out {args.out or 'runs'}: cannot write there ({error.strerror})")
        answer = [str(out)]
    if world.size > 1:
        dist.broadcast_object_list(answer)
    return Path(answer[0])


def new_folder(args, script):
    """--out if no run is in it; without --out runs/SCRIPT, runs/SCRIPT-2, ..."""
    if args.out:
        out = Path(args.out)
        if out.exists() and not is_free(out):
            fail(f"--out {out}: not an empty folder; --resume goes on with a run that is in it")
        out.mkdir(parents=True, exist_ok=True)
        return out
    for number in itertools.count(1):
        out = Path("runs", script if number == 1 else f"{script}-{number}")
        with contextlib.suppress(FileExistsError):  # also if made a moment ago
            out.mkdir(parents=True)
            return out


def is_free(out):
    """A run that was killed at its start leaves .tmp and .lock files only."""
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
    if before.get("steps", args.steps) != args.steps:
        print(f"note: --steps was {before['steps']}; the learning rate's schedule changes with it")
    return out


HELD = {}  # the open lock file of each run's folder


def lock(out):
    """Two runs in one folder would overwrite each other's files. The kernel frees the lock
    when the process ends or is killed. Not flock, which child processes inherit."""
    if out in HELD:
        return  # closing a second file would free the lock
    HELD[out] = open(out / "run.lock", "a")
    try:
        fcntl.lockf(HELD[out], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        HELD.pop(out).close()
        fail(f"--out {out}: another process is at work in it; wait for its end")
    except OSError:
        pass  # a file system without locks


def write(path, data):
    """Writes a text or a dict of tensors, whole or not at all: beside the file first."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(data, dict):
                torch.save(data, file)
            else:
                file.write(data.encode())
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


# -- Checkpoints ----------------------------------


def checkpoints(out):
    """The files of a run's finished checkpoints, the oldest first."""
    return sorted((Path(out) / "checkpoint").glob("[0-9]*.pt"), key=lambda p: int(p.stem))


def tensors(model):
    """[(name, tensor)] of the weights and of the buffers that are saved. Unlike in
    state_dict, a head that is tied to the embedding comes once."""
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
        state["models"][name] = gather(tensors(model))
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


def save_if_due(out, args, world, step, models, optimizers, stop_asked):
    """A checkpoint every --save_every steps, after the last step and after a signal. All
    processes are asked, because a signal may reach only one."""
    stopping = all_sum(world, stop_asked())[0] > 0
    last = step == args.steps
    if step % args.save_every == 0 or last or stopping:
        save_checkpoint(out, world, step, models, optimizers, args.keep)
    if stopping and not last:
        raise Ended(f"stopped by a signal after step {step} of {args.steps}, which is saved")


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
        reason = str(error).splitlines()[0]
        fail(f"{path}: this checkpoint cannot be read ({reason}); it may have been cut short")


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
        for key, p in tensors(model):
            if key not in saved or saved[key].shape != p.shape:
                fail(f"--resume: the checkpoint is of another model (see {key})")
            p.data.copy_(like(saved[key], p))
        if name in optimizers:
            weights = optimizers[name].param_groups[0]["params"]
            for i, moments in state["optimizers"][name].items():
                p = weights[i]
                optimizers[name].state[p] = {k: like(v, p) for k, v in moments.items()}


# -- The order of the data ------------------------


def rows_of_step(count, step, rows, world, seed):
    """This process's share of a step's row numbers. The data is one endless sequence of
    shuffled copies. Step and rank alone give the place in it, so a resumed run neither
    skips nor repeats a row."""
    mine = rows // world.size
    start = (step - 1) * rows + world.rank * mine
    return [nth_row(count, start + i, seed) for i in range(mine)]


def nth_row(count, i, seed):
    """Element i of the endless sequence of shuffled copies of range(count)."""
    return shuffled(count, fold(seed, i // count, ORDER))[i % count]


@functools.lru_cache(maxsize=2)
def shuffled(count, seed):
    return random.Random(seed).sample(range(count), count)


# -- Log and console ------------------------------


class Meter:
    """A step's means over all processes. Sums stay on the device until `means` reads them:
    a number read in the loop would make the CPU wait for the GPU."""

    def __init__(self):
        self.totals = {}  # name: [sum, count]

    def add(self, name, values, mask=None):
        """Adds a tensor's elements, or those on the mask."""
        values = values.detach().double()
        mask = torch.ones_like(values) if mask is None else mask.expand_as(values)
        mask = mask.bool()
        # where, not a product: nan off the mask times 0 is nan
        pair = torch.stack([torch.where(mask, values, 0.0).sum(), mask.sum()])
        self.totals[name] = self.totals.get(name, 0.0) + pair

    def means(self, world):
        """{name: mean} of the names that have elements. Every process must have added
        the same names in the same order."""
        if not self.totals:
            return {}
        totals = torch.cat([pair.to(world.device) for pair in self.totals.values()])
        sums = all_sum(world, *totals.tolist())
        pairs = zip(self.totals, sums[::2], sums[1::2])
        return {name: total / count for name, total, count in pairs if count}


class Writer(SummaryWriter):
    quiet_until = 0.0  # when a console without a progress bar gets its next line


def introduce(out, args, world, tokenizer, ids, done_steps, learning=1, frozen=0):
    """Prints the model, its memory and the first text before anything is loaded
    -> (writer, bar), or (None, None) but on the first process."""
    if world.rank > 0:
        return None, None
    count, needed = lasting_memory(args.model, world, learning, frozen)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if world.device.type == "cuda":
        there = torch.cuda.get_device_properties(world.device).total_memory
    where = f"{world.size} x {world.device.type} in {str(world.dtype)[6:]}"
    print(f"{args.model}: {count / 1e6:.1f}M parameters on {where}")
    what = "for weights, gradients and moments; activations come on top"
    print(f"memory: {needed / 2**30:.1f} GiB of {there / 2**30:.1f} {what}")
    if needed > there:
        print("warning: this does not fit; use more processes or a smaller model")
    print(f"first text, as the model sees it: {tokenizer.decode(ids)!r}")
    going_on = f", going on after step {done_steps} of {args.steps}" if args.resume else ""
    print(f"writing to {out}{going_on}\n")
    threading.excepthook = quiet_threads
    try:
        cut_log(out / "metrics.jsonl", done_steps)
        cut_log(out / "samples.jsonl", done_steps)
        writer = Writer(out / "tensorboard", purge_step=done_steps + 1 if done_steps else 0)
        writer.flush()
    except OSError as error:
        fail(f"--out {out}: cannot write there ({error.strerror})")
    # disable=None: no bar in a log file, where each step would be a line
    return writer, tqdm(total=args.steps, initial=done_steps, desc=out.name, disable=None)


def quiet_threads(hook):
    """TensorBoard's thread fails with the OSError that `log` raises: no traceback of it."""
    if not issubclass(hook.exc_type, OSError):
        threading.__excepthook__(hook)


def cut_log(path, step):
    """Drops what a resumed run writes again: the steps after its checkpoint (all if it has
    none), what follows the last step, and a line that a crash cut short."""
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


def tell(message):
    """Prints, but lets a broken pipe pass: Ctrl-C also ends `| tee`, and the run has to save."""
    with contextlib.suppress(BrokenPipeError):
        tqdm.write(message)


def log(out, writer, step, metrics, texts=()):
    """A step's numbers to metrics.jsonl, TensorBoard and the console; completions to
    samples.jsonl. Does nothing without a writer."""
    if writer is None:
        return
    for name, rows in (("metrics.jsonl", [metrics]), ("samples.jsonl", texts)):
        for row in rows:
            with open(out / name, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    writer.flush()
    scores = [f"{name[5:]} {x:.3f}" for name, x in metrics.items() if name.startswith("eval/")]
    if scores:
        tell(f"step {step}: held-out {', '.join(scores)}")
    elif not sys.stderr.isatty() and time.monotonic() > writer.quiet_until:  # a line a minute
        names = ("reward", "accuracy", "loss", "kl/ref", "tokens_per_second")
        shown = [f"{name} {metrics[name]:.3g}" for name in names if name in metrics]
        if shown:
            writer.quiet_until = time.monotonic() + 60
            tell(f"step {step}: {', '.join(shown)}")


def advise(metrics, args, said):
    """Warns, once each, of what a person watching should know. said: what has been."""
    value = metrics.get
    advice = {
        "truncated": (
            value("truncated", 0) > 0.5,
            "most completions are cut off: raise --max_new_tokens (or lower --max_prompt_tokens, "
            "if prompts fill the context), or ask for shorter answers with --system",
        ),
        "reward": (
            value("reward") == 0 and args.reward == "exact",
            "no completion was right: `exact` wants the answer and nothing else; "
            "--reward number takes a text's last number",
        ),
        "equal_groups": (
            value("equal_groups", 0) > 0.8,
            "most prompts' samples score alike, which teaches little: "
            "use prompts of middling difficulty, or raise --samples_per_prompt",
        ),
        "ratio/first": (
            value("ratio/first", 0) > 1e-3,
            "the first ratio is not 1: the model's forward is not deterministic",
        ),
        "entropy": (
            value("entropy", 1) < 0.01,
            "the policy tries nothing new: lower --learning_rate or raise --beta",
        ),
        "kl/ref": (
            abs(value("kl/ref", 0)) > 100,
            "KL to the reference runs away: raise --beta or lower --learning_rate",
        ),
        "value/explained": (
            value("value/explained", 0) < -1,
            "the critic is worse than a constant: lower --critic_learning_rate, "
            "or let it learn alone first with --critic_warmup",
        ),
    }
    for name, (sounds, words) in advice.items():
        if sounds and name not in said:
            said.add(name)
            tell(f"warning: {words} ({name} {metrics[name]:.3g})")


def conclude(out, args, writer, bar, use):
    """The first and the last held-out scores, and `use`, a line of Python to go on with."""
    if writer is None:
        return
    bar.close()
    writer.close()
    scores = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            scores.setdefault(name, []).append(value)
    for name, values in scores.items():
        if name.startswith("eval/"):
            last = f" -> {values[-1]:.3f}" if args.steps else ""
            print(f"held-out {name[5:]}: {values[0]:.3f}{last}")
    if args.steps:
        print(f"\nto use the model:\n\n  from transformers import pipeline\n  {use}")


def usage(out, tokenizer, prompt, args):
    """The line of Python that samples from the model that a run has made."""
    prompt = prompt if prompt and len(str(prompt)) < 200 else "your prompt"
    if tokenizer.chat_template and args.chat:
        prompt = messages(prompt)
    pipe = f'pipeline("text-generation", "{out / "model"}")'
    return f"print({pipe}({prompt!r}, max_new_tokens={args.max_new_tokens}))"


# -- The end of a run -----------------------------


class Stop(Exception):
    """A run cannot go on. All processes raise it, and the first one says it."""


class Ended(Stop):
    """A signal asked for the end, and what was done is saved."""


@contextlib.contextmanager
def guarded(out, args, bar):
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
        first = int(os.environ.get("RANK", 0)) == 0
        alone = isinstance(error, (OSError, torch.OutOfMemoryError))
        raise SystemExit(last_words(error, out, args) if first or alone else 1) from error
    finally:
        if out in HELD:
            HELD.pop(out).close()


def last_words(error, out, args):
    """What went wrong, and the command that goes on."""
    words = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, KeyboardInterrupt):
        words = "stopped at once"
    elif not isinstance(error, Ended):
        words = f"error: {words}"
    if isinstance(error, torch.OutOfMemoryError):
        words += "; lower --tokens_per_micro_batch or add --gradient_checkpointing"
        names = ("sample_rows", "prompts_per_step", "max_new_tokens")
        flags = [f"--{name}" for name in names if hasattr(args, name)]
        words += f" (training), or lower {' or '.join(flags)} in a new run (sampling)"
    if not args.steps:
        return words
    command = [word for word in sys.argv if word != "--resume"]
    if not args.out:
        command += ["--out", str(out)]
    launcher = "torchrun ..." if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "python"
    where = "go on from the last checkpoint"
    if not checkpoints(out):
        where = "no checkpoint was written yet; begin from the start"
    return f"{words}\n{where} with: {launcher} {shlex.join([*command, '--resume'])}"


def catch_signals(steps):
    """SIGTERM (a cluster takes its machine back), SIGINT (Ctrl-C) and SIGHUP (the terminal is
    gone) set a flag: the loop finishes its step, saves and stops. A second SIGTERM or SIGINT
    stops at once, as does the first if there are no steps. Returns a function: has one come?"""
    caught = []
    message = b"\nstopping at the next safe place, and saving; a second signal stops at once\n"
    if int(os.environ.get("RANK", 0)) > 0:
        message = b""

    def handler(number, frame):
        if caught and number == signal.SIGHUP:
            return  # the shell and the kernel may both send one
        if caught or not steps:
            raise KeyboardInterrupt
        caught.append(number)
        for stream, text in ((1, b""), (2, message)):
            try:
                os.write(stream, text)  # not print, which the signal may have interrupted
            except OSError:  # no terminal: the next line would end the run before it saves
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, handler)
    return lambda: bool(caught)


# ======================================== SAMPLING ================================================

PREFILL_TOKENS = 8192  # of prompts in one forward, with padding; more only holds more memory


@dataclass
class Samples:
    """n completions of each prompt; row i * n + j is sample j of prompt i."""

    prompt_ids: torch.Tensor  # [B, P] padded on the left
    prompt_mask: torch.Tensor  # [B, P] true on the prompt
    ids: torch.Tensor  # [B, C] padded on the right
    mask: torch.Tensor  # [B, C] true on what the policy chose, the stop token included
    logprobs: torch.Tensor  # [B, C] of softmax(logits / temperature); 0 off the mask
    finished: torch.Tensor  # [B] false if cut at max_new_tokens, without a stop token
    texts: list  # [B] without stop and special tokens
    group: int = 1  # this many consecutive rows have one prompt, which training computes once


def pad_rows(rows, pad, device, side):
    """Lists of ids, padded to one length -> ids, mask [rows, length]."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    ids = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence(mask, batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def to_text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def as_samples(prompts, completions, tokenizer, world, group=1):
    """Given completions as ids (demonstrations, pairs) in the shape of samples."""
    pad = tokenizer.pad_token_id
    prompt_ids, prompt_mask = pad_rows(prompts, pad, world.device, "left")
    ids, mask = pad_rows(completions, pad, world.device, "right")
    logprobs = torch.zeros(ids.shape, device=world.device)
    texts = [to_text(tokenizer, completion) for completion in completions]
    return Samples(prompt_ids, prompt_mask, ids, mask, logprobs, mask.any(1), texts, group)


def rows_at_once(held_out, max_new_tokens, rows=1):
    """How many completions of held-out prompts [(ids, row), ...] are drawn at once: a
    rollout's `rows`, or 8192 tokens if that is more; at most 256 rows."""
    longest = max((len(ids) for ids, _ in held_out), default=0) + max_new_tokens
    return max(1, min(256, max(rows, 8192 // longest)))


@torch.no_grad()
def sample(model, tokenizer, prompts, *, n=1, max_new_tokens, temperature=1.0, seed=None):
    """n completions of every prompt (a rendered text or a list of ids), each token drawn from
    softmax(logits / temperature). Equal seeds give equal samples.

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
    owner = torch.arange(len(prompts), device=device).repeat_interleave(n)  # [B] a row's prompt
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def pick(logits, rows):
        # one number for every row, finished or not: what a row draws depends on no other
        u = torch.rand(len(owner), 1, dtype=torch.float64, device=device, generator=generator)
        return choose(logits, temperature, u[rows])

    with evaluating(model), whole_weights(model):
        forward = cached_forward(model)
        cache, logits = prefill(model, forward, prompt_ids, prompt_mask)
        logits = logits[owner]
        prompt_ids = prompt_ids[owner]
        prompt_mask = prompt_mask[owner]
        copy_rows(cache, owner, prompt_ids.shape[1] + max_new_tokens)
        drawn = decode(forward, pick, cache, logits, prompt_mask, max_new_tokens, stops)
    ids, logprobs, length, finished = drawn
    C = int(length.max())
    # from lengths: ids != pad would lose the EOS where pad is EOS
    mask = torch.arange(C, device=device) < length[:, None]
    ids = ids[:, :C].masked_fill(~mask, pad)
    logprobs = logprobs[:, :C].masked_fill(~mask, 0.0)
    ends = (length - finished.long()).tolist()  # the stop token is no part of the text
    texts = [to_text(tokenizer, row[:end]) for row, end in zip(ids.tolist(), ends)]
    return Samples(prompt_ids, prompt_mask, ids, mask, logprobs, finished, texts, n)


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
    """Gathers a sharded model's weights once, and not for every token.

    FSDP2's hooks on the blocks have nothing to gather then, and take the CPU's time at every
    token: they are put aside. The root's stay, which make its streams in a first forward."""
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    blocks = [m for m in units if m is not model]
    hooks = [(m._forward_pre_hooks, m._forward_hooks) for m in blocks]
    try:
        for unit in units:
            unit.unshard()
        for block in blocks:
            block._forward_pre_hooks = {}
            block._forward_hooks = {}
        yield
    finally:
        for block, own in zip(blocks, hooks):
            block._forward_pre_hooks, block._forward_hooks = own
        if units:
            forget_forwards(model)


def cached_forward(model):
    """The model's forward as (cache, ids, mask, positions) -> the last logits [rows, V]."""
    takes = inspect.signature(model.forward).parameters
    cache_name = cache_argument(model)
    if cache_name is None:
        raise ValueError(f"{type(model).__name__} takes none of transformers' caches")

    def forward(cache, ids, mask, positions):
        inputs = {cache_name: cache}
        if "position_ids" in takes:
            inputs["position_ids"] = positions
        if "logits_to_keep" in takes:
            inputs["logits_to_keep"] = 1
        return model(input_ids=ids, attention_mask=mask, use_cache=True, **inputs).logits[:, -1]

    return forward


def prefill(model, forward, prompt_ids, prompt_mask):
    """Computes every prompt once, in slices -> their cache and next tokens' logits."""
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
    """A layer's keys and values in room made once. The stock layer copies its whole cache at
    every token. The model reads views of the filled part."""

    def __init__(self, stock, rows, room):
        super().__init__()
        self.is_initialized = True
        self.room = room
        self.filled = stock.keys.shape[2]
        self.buffers = [stock.keys, stock.values]  # [B, heads, room, d] each, once copied
        stock.keys = stock.values = None
        self.reorder_cache(rows)

    def update(self, keys, values, *args, **kwargs):
        begin = self.filled
        self.filled += keys.shape[2]
        self.buffers[0][:, :, begin : self.filled] = keys
        self.buffers[1][:, :, begin : self.filled] = values
        self.keys, self.values = (buffer[:, :, : self.filled] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self):
        return self.filled

    def reorder_cache(self, rows):
        # Views keep a whole buffer alive. Without them each old buffer is freed once it is
        # copied, so this takes room for one buffer more and not for a second cache.
        self.keys = self.values = None
        for i in range(len(self.buffers)):
            old = self.buffers[i]
            self.buffers[i] = old.new_empty(len(rows), old.shape[1], self.room, old.shape[3])
            new = self.buffers[i][:, :, : self.filled]
            torch.index_select(old[:, :, : self.filled], 0, rows, out=new)


def decode(forward, pick, cache, logits, prompt_mask, max_new_tokens, stops):
    """Draws token by token and drops finished rows -> ids, logprobs [B, max_new_tokens], of no
    meaning from a row's end on, length [B], finished [B]."""
    B, P = prompt_mask.shape
    device = logits.device
    ids = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    length = torch.full((B,), max_new_tokens, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    recurrent = is_recurrent(cache)  # takes no mask
    # of the rows in the batch: their numbers, what they attend to, their next position
    rows = torch.arange(B, device=device)
    seen = F.pad(prompt_mask.long(), (0, max_new_tokens), value=1)  # [rows, P + C]
    position = prompt_mask.sum(1, keepdim=True)
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
        if left <= 0.9 * len(rows):  # a tenth has finished: worth a copy of the others' cache
            kept = running.nonzero()[:, 0]
            cache.reorder_cache(kept)
            rows = rows[kept]
            token = token[kept]
            seen = seen[kept]
            position = position[kept]
        mask = None if recurrent else seen[:, : P + t + 1]
        logits = forward(cache, token[:, None], mask, position + t)
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
    vocabulary, then inside the block that u falls into. In float64: a float32 sum over 150,000
    tokens is wrong in its fourth digit. torch.multinomial draws a random number for each
    entry of the vocabulary, where this takes one a row."""
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
    share = 1 + (target - total.gather(1, which)) / mass.gather(1, which)
    share = share.clamp_(0, 1 - 1e-12)
    inside = p.gather(1, which[:, :, None].expand(-1, -1, block))[:, 0]
    inside = inside.double().cumsum(-1)  # [B, block]
    token = which * block + torch.searchsorted(inside, share * inside[:, -1:], right=True)
    token = token.clamp_(max=logits.shape[1] - 1)  # only NaN comes here; the update will say so
    logprob = (logits.gather(1, token) - top)[:, 0] - total[:, -1].log().float()
    return token[:, 0], logprob
