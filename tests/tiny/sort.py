"""The bundled task: sort the digits of a list. Its data, and two rewards that give partial credit.

    python reinforce.py --reward tests/tiny/sort.py:position

A list has 4 to 8 digits, doubles allowed: the prompt is `52817=` and the answer `12578`. `exact` pays only for a right
answer, which is rare at first; these two pay for being nearly right, each in its own way, and each can be gamed.
"""

import random


def position(completion, row):
    """The share of places that hold the right digit; extra digits count as wrong places."""
    said, answer = completion.strip(), row["answer"]
    return sum(a == b for a, b in zip(said, answer)) / max(len(said), len(answer))


def adjacent(completion, row):
    """Half for digits that belong (each once for each time the list has it), half for neighbours in order. The second
    half does not ask which digits they are: `99999` is in perfect order."""
    said, answer = completion.strip(), row["answer"]
    left = list(answer)
    present = sum(1 for c in said if c in left and not left.remove(c))
    ordered = sum(a <= b for a, b in zip(said, said[1:]))
    return 0.5 * present / max(len(said), len(answer)) + 0.5 * ordered / max(
        len(said) - 1, len(answer) - 1
    )


def lists(count, seed, without=()):
    """`count` different lists of 4 to 8 digits, as rows, none of them among the prompts in `without`."""
    rng, seen, rows = random.Random(seed), set(without), []
    while len(rows) < count:
        digits = "".join(rng.choice("0123456789") for _ in range(rng.randint(4, 8)))
        if digits + "=" not in seen:
            seen.add(digits + "=")
            rows.append({"prompt": digits + "=", "answer": "".join(sorted(digits))})
    return rows
