"""Are long runs safe? Each script is killed (SIGKILL) at random moments, some of them while it saves, and resumed each time; at the end
its weights, moments and logged numbers must be those of a run that was never touched, bit for bit. And memory must not grow.

    python tests/bench/soak.py                         # most of an hour on one core
    python tests/bench/soak.py --scripts grpo.py --kills 5

Exit status 1 if anything differs. Writes soak.json and soak.md.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import common

ROLLOUT = ["--prompts_per_step", "8", "--max_new_tokens", "12", "--eval_data", ""]
PAIRS = ["--pairs_per_step", "8", "--data", str(HERE.parent / "tiny" / "pairs_train.jsonl")]
RUNS = {  # small steps, so that a run has many of them; everything else is as in a first run
    "reinforce.py": ROLLOUT,
    "ppo.py": ROLLOUT,
    "grpo.py": [*ROLLOUT, "--beta", "0.05", "--ref_update_every", "7"],
    "dpo.py": PAIRS,
    "reward_model.py": PAIRS,
}
CLOCKS = ("time/sample", "time/train", "tokens_per_second", "memory_gib")


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(RUNS)
    kills: int = 20
    steps: int = 300
    """of the run that is killed (ten times as many where steps need no rollout)"""
    long: int = 1000
    """steps of the run whose memory is watched"""
    seed: int = 0


def start(script, out, steps, resume=False):
    command = [
        sys.executable,
        str(HERE.parents[1] / script),
        *RUNS[script],
        "--out",
        str(out),
        "--steps",
        str(steps),
    ]
    command += ["--save_every", "5", "--device", "cpu"] + ["--resume"] * resume
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def log(out):
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def finish(process):
    _, error = process.communicate()
    if process.returncode:
        sys.exit(f"a run ended with {process.returncode}: {error[-2000:]}")


def half_written(out):
    """The checkpoints that are being written, or were when their process was killed; each with the time of its last write."""
    found = set()
    for path in (out / "checkpoint").glob("*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # it is finished by now
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def kill(process, out, moment, old):
    """After `moment` seconds, or, with None, when a checkpoint is being written; `old` are those that were left half written
    before. -> whether one was being written."""
    end = time.monotonic() + (60 if moment is None else moment)
    while process.poll() is None and time.monotonic() < end:
        if moment is None and half_written(out) - old:
            break
        time.sleep(0.0005 if moment is None else 0.01)
    if process.poll() is not None:
        finish(process)
        return None  # too late
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return bool(half_written(out) - old)


def survive(script, folder, args):
    """-> what happened to a run that is killed again and again, and whether it ended as one that was not."""
    steps = args.steps * (10 if script in ("dpo.py", "reward_model.py") else 1)  # theirs are short
    began = time.monotonic()
    process, first = start(script, folder / "whole", steps), None
    while process.poll() is None:
        if first is None and log(folder / "whole"):
            first = time.monotonic() - began  # until the first line: imports, loading
        time.sleep(0.05)
    finish(process)
    whole, rng = time.monotonic() - began, random.Random(args.seed)
    out, kills, saving = folder / "killed", 0, 0
    while kills < args.kills:
        old = half_written(out)
        process = start(script, out, steps, resume=(out / "args.json").exists())
        # a life is long enough to come forward, and too short to come to the end before the last kill
        moment = (
            None
            if kills % 4 == 3
            else first + rng.uniform(-0.5, 1.0) * (whole - first) / args.kills
        )
        torn = kill(process, out, moment, old)
        if torn is None:
            sys.exit(f"{script}: the run was over after {kills} kills; give it more --steps")
        kills, saving = kills + 1, saving + torn
    finish(start(script, out, steps, resume=True))
    a, b = (common.read_checkpoint(folder / name) for name in ("whole", "killed"))
    same = a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    logs = [
        [{k: v for k, v in m.items() if k not in CLOCKS} for m in log(folder / name)]
        for name in ("whole", "killed")
    ]
    return {
        "script": script,
        "steps": steps,
        "kills": kills,
        "while_saving": saving,
        "weights": same,
        "log": logs[0] == logs[1],
    }


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def grown(script, folder, args):
    """The peak memory of the process at the last step, as a multiple of that at step 100."""
    finish(start(script, folder / "long", args.long))
    memory = {m["step"]: m["memory_gib"] for m in log(folder / "long") if "memory_gib" in m}
    return memory[args.long] / memory[100]


def main(args):
    path = HERE / "soak.json"
    results = (
        json.loads(path.read_text())["results"] if path.exists() else []
    )  # of other scripts, which stay
    for script in args.scripts:
        with tempfile.TemporaryDirectory() as folder:
            row = next((r for r in results if r["script"] == script), {}) | survive(
                script, Path(folder), args
            )
            if args.long:
                row["memory"] = round(grown(script, Path(folder), args), 3)
        results = [r for r in results if r["script"] != script] + [row]
        results.sort(key=lambda r: list(RUNS).index(r["script"]))
        print(row, flush=True)
        write(path, results)
    sys.exit(not all(r["weights"] and r["log"] and r["memory"] < 1.05 for r in results))


def write(path, results):
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }
    path.write_text(json.dumps({**versions, "results": results}, indent=1) + "\n")
    lines = [
        "| script | kills, of those while saving | weights and moments | log | memory, step 1000 / step 100 |",
        "|---|---|---|---|---|",
    ]
    for r in results:
        words = ["equal" if r[k] else "DIFFERENT" for k in ("weights", "log")]
        lines.append(
            f"| {r['script']} | {r['kills']}, {r['while_saving']} | {words[0]} | {words[1]} | {r['memory']:.3f} |"
        )
    (HERE / "soak.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
