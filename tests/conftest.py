"""Markers, and what several tests need: tiny random models of many families, and a tokenizer of whole words."""

import importlib.util
import os
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
transformers.logging.disable_progress_bar()

WORDS = 48  # of the tiny vocabulary


def pytest_addoption(parser):
    parser.addoption(
        "--script", help="test this copy of the script: test_grpo.py --script my_grpo.py"
    )


def pytest_configure(config):
    if config.getoption("--script"):
        put_copy_in_place(config.getoption("--script"), config.args)
    # under nohup SIGHUP is ignored, by whatever the tests start, too; those of a closed terminal need it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.addinivalue_line(
        "markers", "learning: trains until a score is reached; minutes (pytest -m learning)"
    )
    config.addinivalue_line("markers", "cuda: needs a GPU (pytest -m cuda)")


def put_copy_in_place(script, tests):
    """Puts somebody's copy in the place of the script whose test file was asked for."""
    names = {Path(test.split("::")[0]).stem.removeprefix("test_") for test in tests}
    if len(names) != 1 or not (ROOT / f"{min(names)}.py").is_file():
        raise pytest.UsageError(
            "--script goes with one test file: tests/test_grpo.py --script my_grpo.py"
        )
    if not Path(script).is_file():
        raise pytest.UsageError(f"--script {script}: no such file")
    name = names.pop()
    spec = importlib.util.spec_from_file_location(name, script)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def pytest_collection_modifyitems(config, items):
    """Without -m, only the fast tests run; tests marked `cuda` are skipped where there is no GPU."""
    asked = config.getoption("-m")
    for item in items:
        if "learning" in item.keywords and "learning" not in asked:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m learning"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def make_tokenizer(pad="<pad>", eos="<eos>", bos=None, template=None):
    """Words w3, w4, ...; ids 0, 1, 2 are <pad>, <eos>, <bos>. `pad=None` leaves the tokenizer without a pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, **{f"w{i}": i for i in range(3, WORDS)}}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, words[bos])]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=eos, bos_token=bos
    )
    tokenizer.chat_template = template
    return tokenizer


def family(name, scale=1.0, **changes):
    """A tiny random model of a family of transformers. Its weights are scaled up, so that attention is sharp and a
    wrong mask or position shows; with the usual small ones every token would attend to all others about equally."""
    common = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
    linear = {"layer_types": ["linear_attention", "full_attention"]}
    delta = linear | {f"linear_{kind}_head_dim": 8 for kind in ("key", "value")}
    own = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
        "mistral": {"sliding_window": 8},
        "gemma2": {"sliding_window": 8, "head_dim": 8, "query_pre_attn_scalar": 8},
        "gemma3_text": {
            "sliding_window": 8,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "qwen3": {"head_dim": 8},
        "granite": {"logits_scaling": 2.0},
        "falcon": {"ffn_hidden_size": 64, "new_decoder_architecture": True, "num_kv_heads": 2},
        "bloom": {"n_layer": 2, "n_head": 4},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
        "mamba": {"state_size": 8, "num_attention_heads": None},
        "qwen3_5_text": {**delta, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
        "qwen3_next": {**delta, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        "olmo_hybrid": {**delta, "linear_num_key_heads": 4, "linear_num_value_heads": 4},
        "minimax": {**linear, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
        "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4},
        "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
        "glm4_moe": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8},
        "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }.get(name, {})  # fmt: skip
    settings = {
        **common,
        **own,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **changes,
    }
    config = transformers.AutoConfig.for_model(
        name, **{k: v for k, v in settings.items() if k == "bos_token_id" or v is not None}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if name != "mamba":
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight.normal_(0.0, scale * 1.5 / weight.shape[-1] ** 0.5)
    return model.float().eval()


FAMILIES = ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "granite", "falcon", "gpt_neox", "bloom", "opt", "mixtral", "qwen3_moe", "mamba"]  # fmt: skip


def load_scorer(path, world):
    """A saved reward model, as --reward loads it: a function from completions and their rows to scores."""
    import common

    reward = common.load_reward(str(path), {"exact": None}, world)
    return lambda texts, rows: reward.score(types.SimpleNamespace(texts=texts), rows)["reward"]


@pytest.fixture
def bfloat16():
    """The GPU's arithmetic on a CPU: FSDP2 over one process, with a process group of its own."""
    import common

    yield common.start("cpu", "bfloat16")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def no_process_group_is_left_open():
    """On one CPU process --dtype bfloat16 makes a group; a test on a GPU needs another kind."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
