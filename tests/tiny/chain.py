"""A third task, for a chat model: a chain of additions and subtractions, one step a line.

    python tests/tiny/chain.py FOLDER      # writes train.jsonl and test.jsonl there
    python grpo.py --model CHAT_MODEL --data FOLDER/train.jsonl --eval_data FOLDER/test.jsonl \\
        --reward tests/tiny/chain.py:parts --max_new_tokens 96

A problem is `7 + 5 - 3 + 8`. It has 3 to 5 steps; every number in it is from 1 to 9, and every
intermediate result from 0 to 19. The answer has one line for each step and one for the result:

    7 + 5 = 12
    12 - 3 = 9
    9 + 8 = 17
    Result: 17

The prompt is a talk in which three other problems have been solved in this way. No problem is in
both files.
"""

import json
import random
import re
import sys
from pathlib import Path

SYSTEM = "Work out each problem, one step a line, and end with the result."
EXAMPLES = ("7 - 1 - 4 + 5", "3 + 5 + 5 + 2 - 8 + 6", "7 - 4 - 1 + 2 - 1")
STEP = re.compile(r"-?\d{1,3} [+-] \d{1,3} = -?\d{1,3}")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
RESULT = re.compile(r"Result: -?\d{1,3}")


def steps(completion, row):
    """The share of lines that are right, each worked out from the line before it: a wrong sum costs
    one line and not those after it. Lines that are missing or too many make the share smaller.

    (If lines counted only up to the first wrong one, most samples would say nothing about the
    result, which is the last line.)"""
    said, wanted = lines_of(completion), lines_of(row["answer"])
    value = int(wanted[0].split()[0])
    right = 0
    for line, wanted_line in zip(said, wanted):
        expected = f"Result: {value}"
        if STEP.fullmatch(wanted_line):
            sign, number = wanted_line.split()[1:3]
            expected = step(value, sign, number)
        right += line == expected
        if not STEP.fullmatch(line):
            break  # there is no number to go on from
        value = int(line.split()[-1])
    return right / max(len(said), len(wanted))


def form(completion, row):
    """1 for as many steps as the problem has and then a result, whatever the numbers, else 0."""
    said, wanted = lines_of(completion), lines_of(row["answer"])
    if len(said) != len(wanted):
        return 0.0
    all_steps = all(STEP.fullmatch(line) for line in said[:-1])
    return float(all_steps and RESULT.fullmatch(said[-1]) is not None)


def end(completion, row):
    """1 if the last number said is the result, whatever stands before it, else 0."""
    result = row["answer"].split()[-1]
    return float(NUMBER.findall(completion)[-1:] == [result])


def parts(completion, row):
    """`steps` is the reward; the form and the result are logged beside it."""
    return {
        "reward": steps(completion, row),
        "form": form(completion, row),
        "right": end(completion, row),
    }


def lines_of(text):
    """The lines of a text that are not empty, without spaces at their ends."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def step(value, sign, number):
    return f"{value} {sign} {number} = {value + int(sign + number)}"


def solved(problem):
    """The answer to a problem, and its first number and all results."""
    first, *rest = problem.split()
    values = [int(first)]
    lines = []
    for sign, number in zip(rest[::2], rest[1::2]):
        lines.append(step(values[-1], sign, number))
        values.append(values[-1] + int(sign + number))
    lines.append(f"Result: {values[-1]}")
    return "\n".join(lines), values


def random_problem(rng):
    while True:
        problem = str(rng.randint(1, 9))
        for _ in range(rng.randint(3, 5)):
            problem += f" {rng.choice('+-')} {rng.randint(1, 9)}"
        _, values = solved(problem)
        if min(values) >= 0 and max(values) <= 19:
            return problem


def rows(count, seed=0):
    """`count` different problems with their answers; the examples are not among them."""
    rng = random.Random(seed)
    talk = [{"role": "system", "content": SYSTEM}]
    for problem in EXAMPLES:
        talk.append({"role": "user", "content": problem})
        talk.append({"role": "assistant", "content": solved(problem)[0]})
    seen = set(EXAMPLES)
    made = []
    while len(made) < count:
        problem = random_problem(rng)
        if problem not in seen:
            seen.add(problem)
            prompt = [*talk, {"role": "user", "content": problem}]
            made.append({"prompt": prompt, "answer": solved(problem)[0]})
    return made


def main(folder):
    made = rows(256 + 4096)
    for name, part in (("test", made[:256]), ("train", made[256:])):
        lines = [json.dumps(row) + "\n" for row in part]
        (Path(folder) / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(sys.argv[1])
