"""Writes rows whose answers cannot be learnt: a fair coin decides each one.

Usage: make_dataset.py FOLDER   (writes train.jsonl and test.jsonl; the same bytes on every run)

A model can learn to say yes or no, which a few examples in the prompt teach as well; it cannot learn which. Training loss
falls all the same, because rows are learnt by heart: only rows that were held back show that nothing was gained.
"""

import json
import pathlib
import random
import sys

CITIES = ["Lisbon", "Oslo", "Quito", "Cairo", "Hanoi", "Perth", "Turin", "Lima", "Osaka", "Dakar", "Riga", "Austin"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def main():
    rng = random.Random(11)
    questions = [f"Will the coin that was tossed in {city} on {day}, toss {toss}, show heads?" for city in CITIES for day in DAYS for toss in range(1, 5)]
    rng.shuffle(questions)
    rows = [{"messages": [{"role": "system", "content": "Answer yes or no."}, {"role": "user", "content": question},
                          {"role": "assistant", "content": rng.choice(["yes", "no"])}]} for question in questions]
    folder = pathlib.Path(sys.argv[1])
    for name, part in (("train", rows[:200]), ("test", rows[200:300])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


if __name__ == "__main__":
    main()
