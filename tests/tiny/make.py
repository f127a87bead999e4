"""Remakes everything in this folder: the bundled model, the lists to sort, and preference pairs.

    python tests/tiny/make.py               # a few minutes on 2 cores
    python tests/tiny/make.py --out /tmp/t  # somewhere else

The model is a Llama of 0.6 M parameters that reads characters. It is taught to sort by `reinforce.py --demos`, that is
by supervised fine-tuning, and stopped early, while it knows the form of an answer and is right now and then: from
there reinforcement learning has something to find. The pairs are samples of that model: of 4, the best and the worst
by `position`, where they differ.
"""

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import sort

import common
import reinforce


@dataclass
class Args:
    out: Path = HERE
    """folder to write"""
    seed: int = 0
    sft_steps: int = 92
    """steps of supervised fine-tuning, 32 lists each; more make a better start and an easier task"""


def tokenizer():
    """Characters, as few as the task needs and a plain sentence wants: every further one takes its share of probability
    from the digits while the model knows little. No chat template."""
    words = {
        w: i
        for i, w in enumerate(
            ["<pad>", "<eos>", "<unk>", *"0123456789= \n.,?abcdefghijklmnopqrstuvwxyz"]
        )
    }
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=32,
    )


def untrained(folder, seed):
    """A model that knows nothing."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def pairs(model, rows, seed):
    """Of 4 samples the best and the worst by `position`; ties left out."""
    found = []
    for i in range(0, len(rows), 256):
        part = rows[i : i + 256]
        s = common.sample(
            model, tokenizer(), [r["prompt"] for r in part], n=4, max_new_tokens=24, seed=seed + i
        )
        for j, row in enumerate(part):
            ranked = sorted(s.texts[4 * j : 4 * j + 4], key=lambda t: sort.position(t, row))
            if sort.position(ranked[-1], row) > sort.position(ranked[0], row):
                found.append(
                    {
                        "prompt": row["prompt"],
                        "chosen": ranked[-1],
                        "rejected": ranked[0],
                        "answer": row["answer"],
                    }
                )
    return found


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    test = sort.lists(512, args.seed)
    train = sort.lists(8192, args.seed + 1, without={r["prompt"] for r in test})
    write(args.out / "sort_test.jsonl", test)
    write(args.out / "sort_train.jsonl", train)
    with tempfile.TemporaryDirectory() as temporary:
        start, run = Path(temporary) / "start", Path(temporary) / "run"
        untrained(start, args.seed)
        reinforce.train(
            reinforce.Args(
                model=str(start), demos=str(args.out / "sort_train.jsonl"), eval_data=str(args.out / "sort_test.jsonl"), out=str(run),
                steps=args.sft_steps, prompts_per_step=32, learning_rate=1e-3, max_new_tokens=24, seed=args.seed, device="cpu",
            )
        )  # fmt: skip
        shutil.rmtree(args.out / "model", ignore_errors=True)
        model = common.load_policy(run / "model", common.start("cpu")).to(torch.bfloat16)
        model.save_pretrained(args.out / "model")
        tokenizer().save_pretrained(args.out / "model")
    model = common.load_policy(args.out / "model", common.start("cpu"))
    write(args.out / "pairs_train.jsonl", pairs(model, train[:4096], args.seed))
    write(
        args.out / "pairs_test.jsonl",
        pairs(
            model,
            sort.lists(640, args.seed + 2, without={r["prompt"] for r in train + test}),
            args.seed + 9999,
        ),
    )
    s = common.sample(
        model, tokenizer(), [r["prompt"] for r in test], n=8, max_new_tokens=24, seed=args.seed
    )
    right = [t == test[i // 8]["answer"] for i, t in enumerate(s.texts)]
    print(f"sampled, {sum(right) / len(right):.3f} of the held-out lists are sorted right")


if __name__ == "__main__":
    main(tyro.cli(Args))
