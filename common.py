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
import errno
import fcntl
import functools
import hashlib
import importlib.util
import inspect
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
        values = problem = None
        try:
            values = reward(completions, rows)
        except Stop as error:
            problem = error
            problem.own = True  # said by this process, whichever it is
        if all_sum(world, problem is not None)[0]:
            raise problem or Stop("the reward failed in another process")
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
        s = given([[] for _ in part], part, tokenizer, world)
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


# -- Memory: will it fit? --------------------------------------------------------------------------------------------


def memory_needed(path, world, train_tokens, *, frozen=0, learning=1, sample_rows=0, sample_tokens=0, checkpointing=False):
    """The bytes one process will hold at its peak, by what they are for, and the model's number of parameters, from its config
    alone. An estimate: exact for weights, gradients and optimizer, a rule of thumb for activations (measured within 25 %
    on a 135M Llama on CPU).

    `train_tokens` go through one forward and backward; `learning` models have gradients and Adam's two moments (the
    policy, a separate critic), `frozen` ones only weights (the reference, a reward model); `sample_rows` completions
    of `sample_tokens` tokens, prompt included, are drawn at once.
    """
    config = read_config(path)
    with torch.device("meta"):  # a model without memory: its count is exact
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    count = sum(p.numel() for p in model.parameters())
    text = config.get_text_config()
    layers, width, heads = text.num_hidden_layers, text.hidden_size, getattr(text, "num_attention_heads", 1)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width
    if getattr(text, "num_experts_per_tok", None):
        inner = text.num_experts_per_tok * (getattr(text, "moe_intermediate_size", None) or inner)
    head = getattr(text, "head_dim", None) or width // heads
    shared_heads = getattr(text, "num_key_value_heads", None) or heads
    cache = 2 * layers * shared_heads * head  # keys and values of a token
    if shared_heads < heads:  # under a mask, attention repeats those of one layer for every head
        cache += 2 * heads * head
    b = torch.finfo(world.dtype).bits // 8
    # Kept for backward in each layer and token: about 14 vectors of the model's width (norms, q, k, v, attention and
    # what it is made of, residuals) and 4 of the MLP's. With checkpointing, one vector a layer, and for the one layer
    # that is computed again and gone back through, about five times what it would keep.
    in_layer = (14 * width + 4 * inner) * b
    kept = layers * width * b + 5 * in_layer if checkpointing else layers * in_layer
    gathered = count * b if is_sharded(world) else 0  # whole weights: all of them to sample, a layer's to train
    # without gradient a layer's vectors live one layer long: about 4 of the model's width and 3 of the MLP's
    prefill = min(max(PREFILL_TOKENS, sample_tokens), sample_rows * sample_tokens) * (4 * width + 3 * inner) * b
    needed = {
        "weights": (learning * 4 * count + frozen * b * count) / world.size,
        "gradients": learning * 4 * count / world.size,
        "optimizer": learning * 8 * count / world.size,
        "training": train_tokens * (kept + 2 * width * b) + 12 * min(train_tokens, 1024) * text.vocab_size + gathered / layers,
        "sampling": sample_rows * (sample_tokens * cache * b + 12 * text.vocab_size) + prefill + gathered,
        # every process loads the whole float32 model before it keeps its shard; a GPU is given the shards only
        "loading": 4 * count * (1 - 1 / world.size) if world.device.type == "cpu" else 0,
        # what Python and the libraries take before anything is loaded counts on a CPU, where it is the same memory
        "program": 0.4 * 2**30 if world.device.type == "cpu" else 0.5 * 2**30,
    }
    lasting = needed["weights"] + needed["optimizer"] + needed["program"]
    # training and sampling take turns; the rest stays, but the optimizer comes after loading
    peak = lasting + max(needed["training"] + needed["gradients"], needed["sampling"])
    peak = max(peak, needed["program"] + needed["weights"] + needed["loading"])
    return needed | {"peak": peak, "parameters": count}


def memory_there(world):
    """The bytes of this GPU, or of this machine."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_used(world):
    """The peak so far, in bytes: of torch's allocator on a GPU, of the process on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- Optimizer -------------------------------------------------------------------------------------------------------


def make_optimizer(model, learning_rate):
    """AdamW as RL for language models is usually run: short memories (0.9, 0.95), no weight decay. It steps float32
    weights, each process its own shard; `fused` makes it one kernel."""
    weights = [p for p in at_rest(model).parameters() if p.requires_grad]
    return torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)


def learning_rate_at(step, steps, peak, schedule="constant", warmup=0):
    """The rate of step 1, 2, ..., steps (0 before them): a linear rise over `warmup` steps, then constant, or down to 0
    after the last step in a line or half a cosine. A function of the step alone, so there is no scheduler to save."""
    if step <= warmup:
        return peak * max(step, 0) / (warmup + 1)
    done = (step - warmup - 1) / max(steps - warmup, 1)
    return peak * {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]


def clip_gradients(model, max_norm):
    """Scales the whole gradient to at most `max_norm`; returns the norm it had, over all shards. A norm that is not
    finite is returned as it is and nothing is scaled: the caller must not step on it (Adam's moments never recover)."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm.item()


# -- A run: its folder, its checkpoint, its end ----------------------------------------------------------------------

# between a run and its resumption
MAY_DIFFER = "steps eval_every save_every keep tokens_per_micro_batch gradient_checkpointing sample_rows resume out".split()


def open_run(args, script, world):
    """The run's folder, made or found. A folder that holds a run is never overwritten: `--resume` goes on with it, and
    only with the flags it was started with (a run that changes its batch size half-way is no longer one run)."""
    flags, answer = json.loads(json.dumps(dataclasses.asdict(args))), [None]  # as they will be read: tuples are lists
    if world.rank == 0:  # decides alone, before the others could see what it makes
        out, number = Path(args.out or f"runs/{script}"), 1
        if args.resume:
            if not args.out:
                fail("--resume: name the run's folder by --out")
            if not (out / "args.json").is_file():
                fail(f"--resume: --out {out} holds no run")
            before = json.loads((out / "args.json").read_text())
            if before["script"] != script:
                fail(f"--resume: {out} is a run of {before['script']}.py, not of {script}.py")
            for name, value in flags.items() if checkpoints(out) else ():  # before the first there is nothing to be true to
                if name not in MAY_DIFFER and before.get(name, value) != value:
                    fail(f"--resume: --{name} is {value}, but the run in {out} was started with {before[name]}")
            at = int(checkpoints(out)[-1].stem) if checkpoints(out) else 0
            if args.steps < at:
                fail(f"--resume: --steps {args.steps}, and the run in {out} has made {at}")
            if before.get("steps", args.steps) != args.steps:
                print(f"note: --steps was {before['steps']} and is {args.steps}; the learning rate's schedule changes with it")
        elif args.out and out.exists() and not is_free(out):
            fail(
                f"--out {out}: not an empty folder; add --resume to go on with the run in it, delete it, or choose another name"
            )
        try:
            while True:
                try:
                    out.mkdir(parents=True, exist_ok=bool(args.out))
                    break
                except FileExistsError:  # also when another run took the name a moment ago
                    number += 1
                    out = Path(f"runs/{script}-{number}")
            lock(out)
            known = {"script": script, "began": first_date(args), **flags}
            write(out / "args.json", json.dumps(known, indent=1) + "\n")
        except OSError as error:
            fail(f"--out {out}: cannot write there ({error.strerror})")
        answer = [str(out)]
    if world.size > 1:
        dist.broadcast_object_list(answer)
    return Path(answer[0])


def is_free(out):
    """Whether an empty folder, or one in which a run was killed before it had written anything."""
    return out.is_dir() and all(p.suffix in (".tmp", ".lock") for p in out.iterdir())


HELD = {}  # the locks of this process, by the run's folder


def lock(out):
    """Keeps the run's folder for this process: two runs in one folder would overwrite each other's
    files. The kernel frees the lock when the process ends, also when it is killed. lockf and not
    flock: children of a fork inherit the latter, and may outlive the run."""
    if out.resolve() in HELD:
        return
    file = open(out / "run.lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            fail(f"--out {out}: another process is at work in it; wait for its end")
        # a file system without locks: go on without
    HELD[out.resolve()] = file


def write(path, data):
    """Writes a file whole or not at all: beside it first, to the disk, then renamed over it."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(data, file) if isinstance(data, dict) else file.write(data.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # on a full disk torch.save raises a RuntimeError about its own format
        # the OSError is its context
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)  # on a full disk half a file is in the way


def replace(temporary, folder):
    """Puts a finished folder in the place of an older one, which stays beside it as `.old` until the new one stands."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints(out):
    """The files of a run's finished checkpoints, the oldest first."""
    return sorted((Path(out) / "checkpoint").glob("[0-9]*.pt"), key=lambda p: int(p.stem))


def save_checkpoint(out, world, step, models, optimizers, keep=1):
    """Everything a run needs to go on, in one file, so that one rename makes it a checkpoint: weights and moments
    in float32, whole, so that another number of processes can take them up. The last `keep` of them stay."""

    def plain(value):
        return whole(value, keep=world.rank == 0)

    state = {"step": step, "world": world.size, "models": {}, "optimizers": {}}
    for name, model in models.items():
        # named_parameters, not state_dict: a head that is tied to the embedding is one weight, written once
        state["models"][name] = {k: plain(v) for k, v in tensors(model)}
        moments = optimizers[name].state_dict()["state"] if name in optimizers else {}
        state["optimizers"][name] = {i: {k: plain(v) for k, v in s.items()} for i, s in moments.items()}
    if world.rank == 0:
        (out / "checkpoint").mkdir(exist_ok=True)
        for torn in (out / "checkpoint").glob("*.tmp"):  # of a process that was killed
            torn.unlink()
        write(out / "checkpoint" / f"{step:06d}.pt", state)
        for old in checkpoints(out)[:-keep]:
            old.unlink()
    if world.size > 1:
        dist.barrier()


def tensors(model):
    """A model's weights by name, and those buffers that a checkpoint keeps."""
    saved = set(at_rest(model).state_dict().keys())
    return [*model.named_parameters(), *((k, b) for k, b in model.named_buffers() if k in saved)]


def read_checkpoint(out):
    """The newest checkpoint of a run as a dict, its tensors left on the disk until they are copied, or None."""
    *older, path = checkpoints(out) or [None]
    if path is None:
        return None
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        before = f"; without it --resume goes on from {older[-1]}" if older else ""
        fail(f"{path}: this checkpoint cannot be read ({str(error).splitlines()[0]}); it may have been cut short{before}")


def take_up(out, args, world):
    """Where a run is resumed: its newest checkpoint, or None. A process that does not see it (its
    disk is not shared, or the shared disk shows it an old listing) would begin at step 1 while the
    others go on, and the mixed weights would replace the good checkpoint."""
    state = read_checkpoint(out) if args.resume else None
    agree(out, world, state["step"] if state else 0, "the last checkpoint is of step")
    return state


def agree(out, world, number, what):
    """Stops if the processes do not find the same number in the run's folder."""
    numbers = all_gather(world, torch.tensor([number], device=world.device)).tolist()
    for rank, theirs in enumerate(numbers):
        if theirs != numbers[0]:
            if world.rank:
                raise SystemExit(2)  # the first process says it
            seen = f"{what} {numbers[0]} to process 0 and {theirs} to process {rank}"
            fail(f"--out {out}: {seen}; put --out on a disk that all processes share")


def load_checkpoint(state, models, optimizers):
    """Puts a checkpoint's weights and moments into models and optimizers, each process its own shards."""

    def like(value, p):
        """As p is distributed: a moment has its weight's shape and takes its shards; Adam's count of steps is whole."""
        if not isinstance(p, DTensor) or value.ndim == 0:
            return value.to(p.device, copy=True)
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)

    for name, model in models.items():
        saved = state["models"][name]
        with torch.no_grad():
            for k, p in tensors(model):
                if k not in saved or saved[k].shape != p.shape:
                    fail(f"--resume: the checkpoint is of another model ({k} is missing or has another shape)")
                p.copy_(like(saved[k], p))
        if name in optimizers:
            weights = [p for group in optimizers[name].param_groups for p in group["params"]]
            for i, moments in state["optimizers"][name].items():
                optimizers[name].state[weights[i]] = {k: like(v, weights[i]) for k, v in moments.items()}


def cut_log(path, step):
    """Drops what a log (a JSON object a line, each with its `step`) says of steps after the checkpoint: the resumed run
    will write them again, and a reader must not see them twice. A last line that a crash cut short goes too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            if row["step"] <= step and not any(k.startswith(("best_of/", "scale/")) for k in row):  # those come after the end
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write(path, "".join(kept))


def picked(count, step, rows, world, seed):
    """This process's part of the `rows` row numbers of a step. The data is one endless sequence of shuffled copies: step and rank
    alone say which come next, so a resumed run neither skips nor repeats any."""
    mine = rows // world.size
    return [pick(count, (step - 1) * rows + world.rank * mine + i, seed) for i in range(mine)]


def pick(count, i, seed):
    """Element i of the endless sequence of shuffled copies of range(count)."""
    return shuffled(count, fold(seed, i // count, ORDER))[i % count]


@functools.lru_cache(maxsize=2)
def shuffled(count, seed):
    return random.Random(seed).sample(range(count), count)


def introduce(out, args, world, tokenizer, ids, first, needed):
    """Before anything is loaded: what it is, what memory it will need, the first prompt exactly as the model will see it.
    Returns the run's log, (TensorBoard's writer, progress bar), or nothing but on the first process."""
    if world.rank:
        return None, None
    there, precision = memory_there(world), str(world.dtype)[6:]
    where = f"on {world.size} x {world.device.type}, computing in {precision}, learning in float32"
    print(f"{args.model}: {needed['parameters'] / 1e6:.1f}M parameters {where}")
    print(f"memory: about {needed['peak'] / 2**30:.1f} GiB of {there / 2**30:.1f} will be needed")
    if needed["peak"] > there:
        print("warning: this may not fit; lower --tokens_per_micro_batch, add --gradient_checkpointing, or use more processes")
    # flags whose default depends on others
    open_flags = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.default is None}
    shown = [f"{k} {v if isinstance(v, str) else f'{v:g}'}" for k, v in open_flags.items() if v not in (None, "")]
    print("flags left open: " + ", ".join(shown))
    pairs = hasattr(args, "pairs_per_step") and (args.data or args.eval_data)
    what = "first text, a chosen side" if pairs else "first prompt"
    print(f"{what}: {tokenizer.decode(ids)!r}\n  as ids: {ids if len(ids) < 40 else [*ids[:30], '...', *ids[-8:]]}")
    print(f"writing to {out}" + (f", going on after step {first} of {args.steps}" if args.resume else "") + "\n")
    threading.excepthook = quiet_threads
    try:
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_log(out / name, first or -1)  # what a resumed run will write again
        writer = SummaryWriter(out / "tensorboard", purge_step=first + (first > 0) if args.resume else None)
        writer.add_text("args", f"```\n{json.dumps(dataclasses.asdict(args), indent=1)}\n```")
        writer.flush()
    except OSError as error:
        fail(f"--out {out}: cannot write there ({error.strerror})")
    # disable=None: no bar in a log file, where every step would be a line
    return writer, tqdm(total=args.steps, initial=first, desc=out.name, dynamic_ncols=True, disable=None)


def quiet_threads(hook):
    """TensorBoard writes in a thread. When that fails, `log` raises the same OSError, and
    `guarded` says it in a sentence; Python would print the thread's traceback as well."""
    if not issubclass(hook.exc_type, OSError):
        threading.__excepthook__(hook)


def log(out, writer, step, metrics, texts=()):
    """One line of metrics.jsonl, the same numbers for TensorBoard, and some of the step's completions as text. Without a
    writer, on other processes than the first, nothing."""
    if writer is None:
        return
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")
    if texts:
        with open(out / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **t}, ensure_ascii=False) + "\n" for t in texts)
    for name, value in metrics.items():
        writer.add_scalar(name, value, step)
    if texts:
        lines = [f"`{t['reward']:.3f}` {t['prompt']!r} -> {t['completion']!r}" for t in texts]
        writer.add_text("samples", "\n\n".join(lines), step)
    writer.flush()
    scores = ", ".join(f"{k[5:]} {v:.3f}" for k, v in metrics.items() if k.startswith("eval/"))
    if scores:
        with contextlib.suppress(BrokenPipeError):  # of `| tee`, which the same Ctrl-C has ended
            tqdm.write(f"step {step}: held-out {scores}")
    elif not sys.stderr.isatty() and time.monotonic() > getattr(writer, "quiet_until", 0):  # no bar: a line a minute
        names = [k for k in ("reward", "accuracy", "loss", "kl/ref", "tokens_per_second") if k in metrics]
        if names:
            writer.quiet_until = time.monotonic() + 60
            with contextlib.suppress(BrokenPipeError):
                tqdm.write(f"step {step}: " + ", ".join(f"{k} {metrics[k]:.3g}" for k in names))


def conclude(out, args, writer, bar, use):
    """The held-out scores before and after, and what a person wants to type next; `use` are the lines of Python for it."""
    if writer is None:
        return
    bar.close()
    writer.close()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = {k: v for line in lines for k, v in line.items()}
    for name in [k for k in lines[0] if k.startswith("eval/")]:
        print(f"held-out {name[5:]}: {lines[0][name]:.3f}" + (f" -> {last[name]:.3f}" if args.steps else ""))
    if args.steps and not any(k.startswith("eval/") for k in last):
        for name in [k for k in ("reward", "accuracy") if k in last]:
            print(f"{name} of the first step: {next(m[name] for m in lines if name in m):.3f}, of the last: {last[name]:.3f}")
        print("nothing was held out; --eval_data gives a score that training has not seen")
    print(f"\n  tensorboard --logdir {out}")
    if args.steps:
        print("\nand, in Python, to use the model:\n\n  from transformers import pipeline\n  " + use)


def usage(out, tokenizer, prompt, args):
    """The line of Python that samples from the model that a run has made, with a prompt of its own."""
    prompt = prompt if prompt and len(str(prompt)) < 200 else "your prompt"
    if tokenizer.chat_template and args.chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return f'print(pipeline("text-generation", "{out / "model"}")({prompt!r}, max_new_tokens={args.max_new_tokens}))'


class Stop(Exception):
    """Something in a run that it must not go on from."""


class Ended(Stop):
    """A signal asked for the end, and what was done is saved."""


@contextlib.contextmanager
def guarded(out, args, bar):
    """A run that cannot go on ends with one sentence and the command that resumes it, exit status 1. The checkpoint is
    whole: it is replaced only by a finished one."""
    try:
        yield
        if dist.is_initialized():
            if dist.get_world_size() > 1:
                dist.barrier()
            dist.destroy_process_group()
    except (Stop, OSError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        if bar is not None:
            bar.close()
        if int(os.environ.get("RANK", 0)) and not getattr(error, "own", isinstance(error, (OSError, torch.OutOfMemoryError))):
            raise SystemExit(1) from error  # the first process says it
        what = "" if isinstance(error, (Ended, KeyboardInterrupt)) else "error: "
        what += (
            "stopped at once" if isinstance(error, KeyboardInterrupt) else (str(error) or type(error).__name__).splitlines()[0]
        )
        if isinstance(error, torch.OutOfMemoryError):
            what += "; lower --tokens_per_micro_batch or add --gradient_checkpointing (training)"
            what += ", or lower --sample_rows (sampling)" if hasattr(args, "sample_rows") else ""
            held = [f"--{n}" for n in ("prompts_per_step", "max_new_tokens") if hasattr(args, n)]
            what += f", or, in a new run, {' or '.join(held)} (sampling)" if held else ""
        words = shlex.join([a for a in sys.argv if a != "--resume"] + ([] if args.out else ["--out", str(out)]) + ["--resume"])
        on = "go on from the last checkpoint" if checkpoints(out) else "no checkpoint was written yet; begin from the start"
        command = "torchrun ..." if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "python"
        raise SystemExit(f"{what}\n{on} with: {command} {words}" if args.steps else what) from error
    finally:
        if out.resolve() in HELD:
            HELD.pop(out.resolve()).close()


def catch_signals(steps):
    """SIGTERM (a cluster takes its machine back), SIGINT (Ctrl-C) and SIGHUP (the terminal is
    gone) only set a flag; the loop finishes its step, saves, and stops. A second SIGTERM or SIGINT
    stops at once, and so does the first signal where there are no steps to finish. Under nohup SIGHUP is ignored,
    and stays so. Returns the function that tells whether a signal has come."""
    caught = []

    def handler(number, frame):
        if caught and number == signal.SIGHUP:
            return  # the shell and the kernel may both send one, and nobody has asked twice
        if caught or not steps:
            raise KeyboardInterrupt
        caught.append(number)
        words = b"\nstopping at the next safe place, and saving; a second signal stops at once\n"
        for stream, text in ((1, b""), (2, words if int(os.environ.get("RANK", 0)) == 0 else b"")):
            try:
                os.write(stream, text)  # not by print, which the signal may have interrupted
            except OSError:  # the terminal is gone; writing to it would end the run before it saves
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)
    return lambda: bool(caught)


# -- Sampling --------------------------------------------------------------------------------------------------------

PREFILL_TOKENS = 8192  # of prompts in one forward, padding included: more would hold more memory and be no faster


def rows_at_once(held_out, max_new_tokens, rows=1):
    """How many completions of held-out prompts [(ids, row), ...] are drawn at once, so that an evaluation holds no
    more than a rollout of `rows` completions, or than 8192 tokens, which is little beside training; at most 256."""
    longest = max((len(ids) for ids, _ in held_out), default=0) + max_new_tokens
    return max(1, min(256, max(rows, 8192 // longest)))


@dataclass
class Samples:
    """n completions of each prompt; row i * n + j is sample j of prompt i."""

    prompt_ids: torch.Tensor  # [B, P] padded on the left
    prompt_mask: torch.Tensor  # [B, P] true on the prompt
    ids: torch.Tensor  # [B, C] padded on the right
    mask: torch.Tensor  # [B, C] true on every token the policy chose, the stop token included
    logprobs: torch.Tensor  # [B, C] of softmax(logits / temperature), as the sampler saw them; 0 off the mask
    finished: torch.Tensor  # [B] false where the completion was cut at max_new_tokens and has no stop token
    texts: list  # [B] the completions as text, stop and special tokens left out


def given(prompts, completions, tokenizer, world):
    """Completions that nobody drew (demonstrations, preference pairs), as ids, in the shape of samples."""
    P, C, pad = max(map(len, prompts)), max(map(len, completions)), tokenizer.pad_token_id
    rows = [
        [[pad] * (P - len(p)) + p for p in prompts],
        [[False] * (P - len(p)) + [True] * len(p) for p in prompts],
        [c + [pad] * (C - len(c)) for c in completions],
        [[True] * len(c) + [False] * (C - len(c)) for c in completions],
    ]
    tensors = [torch.tensor(r, device=world.device) for r in rows]
    texts = [tokenizer.decode(c, skip_special_tokens=True, clean_up_tokenization_spaces=False) for c in completions]
    return Samples(*tensors, torch.zeros(len(rows[2]), C, device=world.device), tensors[3].any(1), texts)


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, written into room made once. The stock layer makes a longer copy of its whole
    cache at every token. Reading goes through views of the filled part, so the model sees no difference."""

    def __init__(self, stock, rows, room):
        """Takes over the chosen rows of a stock layer; room: columns for the longest prompt and all new tokens."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = stock.keys.dtype, stock.keys.device, True
        self.room, self.filled = room, stock.keys.shape[2]
        self.buffers = [stock.keys, stock.values]  # [B, heads, room, d] each, once they are copied
        stock.keys = stock.values = None
        self.reorder_cache(rows)

    def update(self, keys, values, *args, **kwargs):
        begin, self.filled = self.filled, self.filled + keys.shape[2]
        for buffer, new in zip(self.buffers, (keys, values)):
            buffer[:, :, begin : self.filled] = new
        self.keys, self.values = (buffer[:, :, : self.filled] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self):
        return self.filled

    def reorder_cache(self, rows):
        # The views keep their whole buffers alive. Without them an old buffer is freed once it is copied, so a
        # copy of the cache needs room for one buffer more, and not for a second cache.
        self.keys = self.values = None
        for i in range(len(self.buffers)):
            old = self.buffers[i]
            self.buffers[i] = old.new_empty(len(rows), old.shape[1], self.room, old.shape[3])
            torch.index_select(old[:, :, : self.filled], 0, rows, out=self.buffers[i][:, :, : self.filled])


def join_caches(caches):
    """One cache out of those of the slices of a batch. transformers' layers keep what belongs to the rows (keys and
    values, states of a convolution or a recurrence) in tensors, or in dicts of tensors, whose first dimension is the
    row; the rest (numbers of tokens, windows) is equal in all slices, because all are padded to one length."""

    def join(parts):
        if isinstance(parts[0], dict):
            return {key: join([part[key] for part in parts]) for key in parts[0]}
        if isinstance(parts[0], torch.Tensor) and parts[0].ndim > 1:
            return torch.cat(parts)
        return parts[0]

    for layers in zip(*(cache.layers for cache in caches)):
        for name in list(vars(layers[0])):
            # taken out of the slices' layers, so that no more than one tensor is held twice
            setattr(layers[0], name, join([vars(layer).pop(name) for layer in layers]))
    return caches[0]


def draw(logits, u, block=256):
    """One token a row from softmax(logits) by inverse CDF, and its log-probability. logits [B, V]; u [B, 1] uniform
    in [0, 1), float64.

    The token is the first whose cumulative probability exceeds u. The sum is taken in two levels: over blocks of the
    vocabulary, then inside the block that u falls into; both in float64, because a float32 cumulative sum over
    150,000 tokens is wrong in its fourth digit. torch.multinomial draws one random number for every entry of the
    vocabulary where this draws one a row.
    """
    logits = logits.float()
    top = logits.amax(-1, keepdim=True)
    p = F.pad((logits - top).exp(), (0, -logits.shape[1] % block)).view(len(logits), -1, block)  # [B, blocks, block]
    mass = p.sum(-1).double()  # [B, blocks]
    total = mass.cumsum(-1)
    # strictly below the total, here and inside the block, so that no token of probability 0 is ever reached
    target = u * (1 - 1e-12) * total[:, -1:]
    which = torch.searchsorted(total, target, right=True).clamp_(max=total.shape[1] - 1)  # [B, 1] the block
    share = (1 + (target - total.gather(1, which)) / mass.gather(1, which)).clamp_(0, 1 - 1e-12)
    inside = p.gather(1, which[:, :, None].expand(-1, -1, block))[:, 0].double().cumsum(-1)  # [B, block]
    token = which * block + torch.searchsorted(inside, share * inside[:, -1:], right=True)
    token = token.clamp_(max=logits.shape[1] - 1)  # only logits that are NaN get here; the update will say so
    return token[:, 0], (logits.gather(1, token) - top)[:, 0] - total[:, -1].log().float()


def choose(logits, temperature, u):
    """The next token of every row and its log-probability: drawn from softmax(logits / temperature) and nothing else,
    or, at temperature 0, the likeliest with its log-probability at temperature 1."""
    if temperature > 0:
        return draw(logits.float() / temperature, u)
    token = logits.argmax(-1, keepdim=True)
    return token[:, 0], logits.float().log_softmax(-1).gather(1, token)[:, 0]


@contextlib.contextmanager
def whole_weights(model):
    """While this lasts, a sharded model holds its whole weights, so that a forward gathers nothing. Without it, every
    token drawn would send the whole model over the network.

    FSDP2's hooks around the forward of each block, which gather and free weights, have nothing to do then. They are
    put aside, because they would take time of the CPU for every token, and come back for training. The root's
    stay: FSDP2 makes its streams in the root's first forward."""
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    blocks = [m for m in units if m is not model]
    hooks = [(m._forward_pre_hooks, m._forward_hooks) for m in blocks]
    try:
        for unit in units:
            unit.unshard()
        for block in blocks:
            block._forward_pre_hooks, block._forward_hooks = {}, {}
        yield
    finally:
        for block, (before, after) in zip(blocks, hooks):
            block._forward_pre_hooks, block._forward_hooks = before, after
        if units:
            forget_forwards(model)


@torch.no_grad()
def sample(model, tokenizer, prompts, *, n=1, max_new_tokens, temperature=1.0, seed=None):
    """n completions of every prompt (text that is rendered already, or a list of token ids) from any causal model.

    Each token is drawn from softmax(logits / temperature): no top-k, top-p or repetition penalty, whatever the
    model's generation config says. They would change the distribution the sample comes from, and the policy gradient,
    the ratio and the KL would be those of another one. Equal seeds give equal samples.

    Compared with `generate`: a prompt is computed once for its n samples, finished rows leave the batch, the cache is
    not copied at every token, and a row needs one random number a token.
    """
    was_training = [m.training for m in model.modules()]
    try:
        # eval mode: no dropout, and no gradient checkpointing (which would silently drop the cache)
        model.eval()
        with whole_weights(model):
            return rollout(model, tokenizer, prompts, n, max_new_tokens, temperature, seed)
    finally:
        for module, mode in zip(model.modules(), was_training):
            module.training = mode


def rollout(model, tokenizer, prompts, n, max_new_tokens, temperature, seed):
    device = next(model.parameters()).device
    prompts = [encode(tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
    if [] in prompts:
        raise ValueError(f"prompt {prompts.index([])} is empty: there is nothing to continue")
    B, P = len(prompts) * n, max(map(len, prompts))
    pad, stops = tokenizer.pad_token_id, torch.tensor(stop_ids(model, tokenizer), device=device)
    prompt_ids = torch.tensor([[pad] * (P - len(p)) + p for p in prompts], device=device)
    prompt_mask = torch.tensor([[False] * (P - len(p)) + [True] * len(p) for p in prompts], device=device)
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    takes, name = inspect.signature(model.forward).parameters, cache_argument(model)
    if name is None:
        raise ValueError(f"{type(model).__name__} takes none of transformers' caches, so `sample` cannot continue with it")

    def forward(cache, ids, mask, positions):
        inputs = {name: cache}
        if "position_ids" in takes:
            inputs["position_ids"] = positions
        if "logits_to_keep" in takes:
            inputs["logits_to_keep"] = 1
        return model(input_ids=ids, attention_mask=mask, use_cache=True, **inputs).logits[:, -1]

    # 1. Every prompt once, a slice of the rows at a time. Positions count real tokens, so a prompt's are the same
    #    however far it is padded.
    caches, logits, size = [], [], max(1, PREFILL_TOKENS // P)
    for slice_ids, slice_mask in zip(prompt_ids.split(size), prompt_mask.split(size)):
        caches.append(DynamicCache(config=model.config))
        positions = (slice_mask.cumsum(1) - 1).clamp_(min=0)
        try:
            # cloned, because the last position is a view that can keep the logits of all positions
            logits.append(forward(caches[-1], slice_ids, slice_mask.long(), positions).clone())
        except ValueError as error:  # MiniMax wants a cache of its own
            raise Stop(f"{type(model).__name__} cannot be sampled from ({error})") from error
    cache = join_caches(caches) if len(caches) > 1 else caches[0]
    recurrent = is_recurrent(cache)

    # 2. n copies of its cache, with room for the new tokens. From here on a row is a completion.
    owner = torch.arange(len(prompts), device=device).repeat_interleave(n)  # [B] the prompt of each row
    prompt_ids, prompt_mask, logits = prompt_ids[owner], prompt_mask[owner], torch.cat(logits)[owner]
    for i, layer in enumerate(cache.layers):
        # a layer that reads another's cache has no keys of its own
        if type(layer) is DynamicLayer and layer.keys is not None:
            cache.layers[i] = RoomyLayer(layer, owner, P + max_new_tokens)
        elif n > 1:
            layer.reorder_cache(owner)
    seen = F.pad(prompt_mask.long(), (0, max_new_tokens), value=1)  # [B, P + C] a token sees its prompt and its past
    position = prompt_mask.sum(1, keepdim=True)  # of a row's next token

    # 3. Token by token. `rows` are those still running, by their number in the whole batch.
    ids = torch.full((B, max_new_tokens), pad, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    length = torch.full((B,), max_new_tokens, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    rows, running = torch.arange(B, device=device), torch.ones(B, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        # one number for every row of the whole batch: what a row draws does not depend on which others have finished
        u = torch.rand(B, 1, dtype=torch.float64, device=device, generator=generator)
        token, logprob = choose(logits, temperature, u[rows])
        ids[rows, t] = torch.where(running, token, pad)
        logprobs[rows, t] = torch.where(running, logprob, 0.0)
        ended = running & torch.isin(token, stops)
        length[rows] = torch.where(ended, t + 1, length[rows])
        finished[rows] |= ended
        running &= ~ended
        left = int(running.sum())
        if left == 0 or t + 1 == max_new_tokens:
            break
        if left <= 0.9 * len(rows):  # a tenth has finished: worth a copy of the others' cache
            kept = running.nonzero()[:, 0]
            cache.reorder_cache(kept)
            rows, token, position, seen, running = rows[kept], token[kept], position[kept], seen[kept], running[kept]
        logits = forward(cache, token[:, None], None if recurrent else seen[:, : P + t + 1], position + t)

    # 4. Masks from lengths. Comparing ids with the pad id instead would lose the EOS where pad == EOS.
    C = int(length.max())
    mask = torch.arange(C, device=device) < length[:, None]
    texts = [
        tokenizer.decode(row[: end - done], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for row, end, done in zip(ids.tolist(), length.tolist(), finished.tolist())
    ]
    return Samples(prompt_ids, prompt_mask, ids[:, :C], mask, logprobs[:, :C], finished, texts)


# ---- shims for the new interface ----
Samples.rows_per_prompt = 1
_sample = sample
def sample(*a, n=1, **k):
    s = _sample(*a, n=n, **k)
    s.rows_per_prompt = n
    return s
as_samples = given
rows_of_step = picked
nth_row = pick
run_date = began
stop_together = together

def is_prompt(value):
    messages = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), (str, list)) and "role" in m for m in value
    )
    return bool(value) and (isinstance(value, str) or messages)

def take(self, rows):
    tensors = {name: value[rows] for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(self, texts=[self.texts[i] for i in rows.tolist()], **tensors)
Samples.take = take

def completion_states(model, samples, rows):
    n = samples.rows_per_prompt
    device = samples.ids.device
    prompts, owner = torch.tensor(rows, device=device).div(n, rounding_mode="floor").unique(return_inverse=True)
    P = int(samples.prompt_mask[rows].sum(1).max())
    C = int(samples.mask[rows].sum(1).max())
    first = rows if n == 1 else prompts * n
    prompt_ids, prompt_mask = samples.prompt_ids[first, -P:], samples.prompt_mask[first, -P:]
    ids, mask = samples.ids[rows, :C], samples.mask[rows, :C]
    if n == 1:
        inputs = torch.cat([prompt_ids, ids[:, :-1]], 1), torch.cat([prompt_mask, mask[:, :-1]], 1)
        return hidden_states(model, *inputs)[:, prompt_ids.shape[1] - 1 :], ids, mask
    start, cache = prompt_states(model, prompt_ids, prompt_mask)  # [p, 1, width]
    cache.reorder_cache(owner)
    given = ids[:, : max(C - 1, 1)]
    seen = torch.cat([prompt_mask[owner], mask[:, : given.shape[1]]], 1)
    states = hidden_states(model, given, seen, cache)
    return torch.cat([start[owner], states], 1)[:, :C], ids, mask

class Meter:
    """What a step collects for the log, over its micro-batches and all processes."""

    def __init__(self):
        self.sums = {}
        self.counts = {}
        self.maxima = {}
    def add(self, name, values, mask=None):
        values = values.double()
        if mask is not None:
            values = values * mask
        count = values.numel() if mask is None else mask.sum()
        self.sums[name] = self.sums.get(name, 0) + values.sum()
        self.counts[name] = self.counts.get(name, 0) + count
    def total(self, name, value):
        self.sums[name] = self.sums.get(name, 0) + value.double()
    def maximum(self, name, values):
        self.maxima[name] = torch.maximum(self.maxima.get(name, values.max()), values.max())
    def result(self, world):
        sums = all_sum(world, *self.sums.values(), *self.counts.values())
        counts = dict(zip(self.counts, sums[len(self.sums):]))
        result = {}
        for name, value in zip(self.sums, sums):
            if counts.get(name, 1):
                result[name] = value / counts.get(name, 1)
        for name, value in self.maxima.items():
            result[name] = all_gather(world, value.view(1)).max().item()
        return result

def examples(samples, rewards, tokenizer, n):
    prompt = tokenizer.decode(samples.prompt_ids[0][samples.prompt_mask[0]])
    rows = zip(samples.texts[:n], rewards[:n].tolist())
    return [{"prompt": prompt, "completion": text, "reward": reward} for text, reward in rows]

def advise(metrics, args, said):
    pass
def show_progress(bar, metrics, args, said):
    if bar:
        kl = f", kl {metrics['kl/ref']:.2f}" if "kl/ref" in metrics else ""
        bar.set_postfix_str(f"reward {metrics['reward']:.3f}{kl}, {metrics['tokens_per_second']:,.0f} tokens/s")
        bar.update()

_introduce = introduce
def introduce(out, args, world, tokenizer, ids, done_steps, learning=1, frozen=0):
    return _introduce(out, args, world, tokenizer, ids, done_steps, {"parameters": 0, "peak": 0})

def save_if_due(out, args, world, step, models, optimizers, stop_asked):
    ending = all_sum(world, stop_asked())[0] > 0
    if step % args.save_every == 0 or step == args.steps or ending:
        save_checkpoint(out, world, step, models, optimizers, args.keep)
    if ending and step < args.steps:
        raise Ended(f"stopped by a signal after step {step} of {args.steps}, which is saved")


def has_answer(record):
    return isinstance(record.get("answer"), (str, int, float))


def load_prompts(path, flag, tokenizer, args, answer_flag):
    """[(token ids of the prompt, its line of the file as a dict), ...]. Prompts that are too long
    are left out, and counted."""
    kept = []
    left_out = 0
    for number, record in read_json(path, flag) if path else ():
        where = f"{flag} {path}, line {number}"
        record = record if isinstance(record, dict) else {}
        record = {**record, "prompt": record.get("prompt", record.get("question"))}
        if not is_prompt(record["prompt"]):
            fail(f'{where}: needs a "prompt" (or "question"), a text or a list of messages')
        ids = encode_prompt(tokenizer, record["prompt"], args.system, args.chat)
        if not 0 < len(ids) <= args.max_prompt_tokens:
            left_out += 1
        elif answer_flag and not has_answer(record):
            fail(f'{where}: {answer_flag} needs an "answer", a text or a number')
        else:
            kept.append((ids, record))
    if left_out:
        limit = f"--max_prompt_tokens {args.max_prompt_tokens}"
        say(f"{flag}: {left_out} of {left_out + len(kept)} prompts left out ({limit})")
        if not kept:
            fail(f"{flag}: no prompt is left")
    return kept


def critic_folder(args, config, tokenizer, longest, reward_is_model):
    """The folder that a separate critic starts from: that of the reward model, if it has every
    token of the policy under the same id and a context for the longest prompt and completion,
    else that of the policy."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        why = f"transformers has no sequence classifier for the family {config.model_type!r}"
        fail(f"--critic separate: {why}; use --critic shared")
    if reward_is_model:
        vocabulary = load_tokenizer(args.reward).get_vocab()
        has_tokens = tokenizer.get_vocab().items() <= vocabulary.items()
        context = context_of(read_config(args.reward))
        if has_tokens and context >= longest + args.max_new_tokens:
            return args.reward
    return args.model


def mean_and_variance(x, mask, world):
    """Of x [B, C] over the tokens of all processes."""
    x = x[mask].double()
    total, squares, count = all_sum(world, x.sum(), x.square().sum(), len(x))
    mean = total / count
    return mean, max(squares / count - mean**2, 0.0)


def can_share_prompts(models, args, world):
    """Whether training computes a prompt once for its completions, in each of these models."""
    if args.samples_per_prompt == 1 or not args.steps:
        return False
    checkpointing = args.gradient_checkpointing
    # dict.fromkeys: a model that comes twice is asked once, and all processes ask in one order
    different = list(dict.fromkeys(models))
    return all(prompts_can_be_shared(model, world, checkpointing) for model in different)
