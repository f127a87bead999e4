"""A second task, for a chat model: simple sums, answered by the number and nothing else (half of the reward is for the form,
and both halves are logged).

    python tests/tiny/sums.py FOLDER       # writes sums_train.jsonl and sums_test.jsonl there; no prompt is in both, but b + a may be in one and a + b in the other
    python grpo.py --model CHAT_MODEL --data FOLDER/sums_train.jsonl --eval_data FOLDER/sums_test.jsonl \\
        --reward tests/tiny/sums.py:brief --max_new_tokens 16
"""

import json
import random
import re
import sys
from pathlib import Path


def brief(completion, row):
    """Half for a number and nothing else, half for the right one as the last number said."""
    form = completion.strip().isdecimal()
    right = re.findall(r"\d+", completion)[-1:] == [row["answer"]]
    return {"reward": 0.5 * form + 0.5 * right, "form": form, "right": right}


def main(folder):
    sums = [(a, b) for a in range(1, 21) for b in range(1, 21)]
    random.Random(0).shuffle(sums)
    for name, part in (("test", sums[:100]), ("train", sums[100:])):
        rows = [
            {"prompt": f"What is {a} + {b}? Reply with the number only.", "answer": str(a + b)}
            for a, b in part
        ]
        (Path(folder) / f"sums_{name}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in rows)
        )


if __name__ == "__main__":
    main(sys.argv[1])
