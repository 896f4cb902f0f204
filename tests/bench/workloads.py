"""What is trained or answered in a benchmark: rows, examples a step, method, precision, and who is measured beside the trainer.

Rows are made of words that are one token each in SmolLM2's vocabulary, with and without a space before them, so that lengths
are known without a tokenizer; that every program counts the same tokens is checked when it runs (bench.py). Nothing but
seeds decides what the rows are.
"""

import dataclasses
import json
import math
import pathlib
import random
from collections.abc import Callable

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "models/SmolLM2-135M-Instruct"
DEMO_ROWS = REPOSITORY / "crds/examples/demo/train.jsonl"
DEMO_QUESTIONS = REPOSITORY / "crds/examples/demo/test.jsonl"

WORDS = ("river stone light paper winter engine market bridge water letter summer window doctor music forest number").split()
SYSTEM = "Answer briefly."
# Tokens of SmolLM2's template around what is said: the whole system turn, a question, an answer.
SYSTEM_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = 8, 5, 6
CHAT_ROWS, CHAT_SHORTEST, CHAT_LONGEST, CHAT_MOST_EXCHANGES = 2000, 30, 1500, 8


def dense_rows(count, length):
    """Text rows of exactly `length` tokens, the end token included."""
    rng = random.Random(5)
    return [{"text": "".join(" " + rng.choice(WORDS) for _ in range(length - 1))} for _ in range(count)]


def demo_rows(count):
    """The first conversations of the demo's training rows."""
    return [json.loads(line) for line in DEMO_ROWS.read_text().splitlines()[:count]]


def demo_questions(count):
    """The first conversations of the demo's validation rows; the last turn of each is what is to be answered."""
    return [json.loads(line) for line in DEMO_QUESTIONS.read_text().splitlines()[:count]]


def chat_rows(count):
    """Conversations of one to eight exchanges whose lengths in tokens, template included, are log-uniform from 30 to 1,500.
    An answer has about twice as many words as a question."""
    rng = random.Random(7)
    rows = []
    for _ in range(count):
        length = round(math.exp(rng.uniform(math.log(CHAT_SHORTEST), math.log(CHAT_LONGEST))))
        # An exchange has at least a word in the question and two in the answer.
        room = (length - SYSTEM_TOKENS) // (QUESTION_TOKENS + ANSWER_TOKENS + 3)
        exchanges = rng.randint(1, min(room, CHAT_MOST_EXCHANGES))
        words = length - SYSTEM_TOKENS - exchanges * (QUESTION_TOKENS + ANSWER_TOKENS)
        shares = [turn % 2 + 1 for turn in range(2 * exchanges)]
        counts = shares[:]
        for turn in rng.choices(range(len(shares)), shares, k=words - sum(shares)):
            counts[turn] += 1
        turns = [{"role": ("user", "assistant")[turn % 2], "content": " ".join(rng.choice(WORDS) for _ in range(number))}
                 for turn, number in enumerate(counts)]
        rows.append({"messages": [{"role": "system", "content": SYSTEM}, *turns]})
    return rows


@dataclasses.dataclass(frozen=True)
class Workload:
    """One thing that is measured."""
    make_rows: Callable  # from a number of rows to them
    batch: int  # examples a step; of a method that answers, those that a peer answers at once
    longest: int  # tokens of the longest row: where rows are cut, and how long a packed row of TRL is
    peers: tuple  # who is measured beside the trainer
    steps: int = 6  # optimizer steps of a run
    rows: int | None = None  # rows in the data set; None: as many as are trained
    packs: int = 1  # packed rows a step for trl-packed: about the tokens of `batch` rows
    method: str = "LoRA"  # or Full, or Generate: nothing is trained, the rows are answered
    precision: str = "BF16"  # or FP32
    description: str = ""

    def data(self, steps):
        """The rows for a run of so many steps."""
        return self.make_rows(self.rows or self.batch * steps)


WORKLOADS = {
    "dense-4x256": Workload(lambda count: dense_rows(count, 256), 4, 256, ("peft", "peft-compile", "trl"),
                            description="four text rows of 256 tokens a step"),
    "dense-1x512": Workload(lambda count: dense_rows(count, 512), 1, 512, ("peft", "trl"),
                            description="one text row of 512 tokens a step"),
    "dense-4x256-fp32": Workload(lambda count: dense_rows(count, 256), 4, 256, ("peft", "trl"), precision="FP32",
                                 description="four text rows of 256 tokens a step"),
    "demo-rows": Workload(demo_rows, 16, 256, ("peft", "trl", "trl-packed"), packs=3,
                          description="sixteen conversations of the demo a step"),
    "chat-mixed": Workload(chat_rows, 4, CHAT_LONGEST, ("peft", "trl", "trl-packed"), rows=CHAT_ROWS,
                           description="four of 2,000 conversations of 30 to 1,500 tokens a step"),
    "full-4x256": Workload(lambda count: dense_rows(count, 256), 4, 256, ("transformers", "trl", "trl-mixed"), method="Full",
                           description="four text rows of 256 tokens a step"),
    "generation": Workload(demo_questions, 150, 256, ("transformers-generate",), rows=150, method="Generate",
                           description="150 questions of the demo answered by the base model"),
}
