"""Puts benchmark results into docs/benchmarks.md, between their marks, and draws docs/benchmarks.svg."""

import json
import re

from chart import draw
from workloads import REPOSITORY, WORKLOADS

PAGE, CHART = REPOSITORY / "docs/benchmarks.md", REPOSITORY / "docs/benchmarks.svg"
MARKS = ("<!-- results -->", "<!-- end of results -->")
STANDING_MARKS = ("<!-- standing -->", "<!-- end of standing -->")
PROFILE_MARKS = ("<!-- profile -->", "<!-- end of profile -->")
CHECKPOINT_MARKS = ("<!-- checkpoint results -->", "<!-- end of checkpoint results -->")
ROOFLINE_MARKS = ("<!-- roofline -->", "<!-- end of roofline -->")
LADDER_MARKS = ("<!-- ladder results -->", "<!-- end of ladder results -->")


RESULTS = REPOSITORY / "tests/bench/results"
# What is aimed at: measure, workload, key, and by peer the bound and the aim, as times the peer's value.
AIMS = (
    ("tokens/s, dense rows, bf16", "dense-4x256", "tokensPerSecond", {"trl": (1.7, 2.0), "peft": (1.3, 1.5)}),
    ("tokens/s, mixed conversations", "chat-mixed", "tokensPerSecond", {"trl": (3.0, 4.0), "trl-packed": (1.7, 2.0)}),
    ("tokens/s, the demo's conversations", "demo-rows", "tokensPerSecond", {"trl": (3.0, 4.0), "trl-packed": (1.7, 2.0)}),
    ("tokens/s, dense rows, fp32", "dense-4x256-fp32", "tokensPerSecond", {"peft": (1.15, 1.3)}),
    ("new tokens/s, answers", "generation", "tokensPerSecond", {"transformers-generate": (2.0, 3.0)}),
    ("peak memory, dense rows, bf16", "dense-4x256", "peakBytes", {"peft": (0.45, 0.35)}),
)
# Of every rung of the ladder, against TRL in bf16.
LADDER_AIMS = (("tokens/s", "tokensPerSecond", 1.3, 1.6), ("peak memory", "peakBytes", 0.6, 0.5))
MOST_START_SECONDS, MOST_WAITED = (0.5, 0.3), (0.01, 0.0)
LEAST_PRODUCTS = (0.6, 0.7)


def read_results():
    """What bench.py measured last, by workload."""
    return {name: json.loads(path.read_text()) for name in WORKLOADS if (path := RESULTS / f"{name}.json").exists()}


def verdict(value, bound, aim, at_most):
    """Whether a value is within its bound and within its aim."""
    within = [value <= limit if at_most else value >= limit for limit in (bound, aim)]
    return "missed" if not within[0] else "reached" if within[1] else "within the bound"


def digits(value, bound):
    """With two decimals, or as many as show on which side of the bound it is."""
    side = lambda number: (number > bound) - (number < bound)
    decimals = next(number for number in range(2, 17) if side(round(value, number)) == side(value))
    return f"{value:.{decimals}f}"


def aim_row(measure, peer, key, bound, aim, ratio):
    """A line of what is aimed at beside a peer; `ratio`: ours against it, None where it was not measured yet."""
    at_most = key == "peakBytes"
    cells = f"{digits(ratio[key], bound)}× | {verdict(ratio[key], bound, aim, at_most)}" if ratio else "not measured yet | "
    return f"| {measure} | {peer} | {'≤' if at_most else '≥'} {bound}× | {aim}× | {cells} |"


def standing(results):
    """Lines of the table of what is aimed at; what was not measured yet says so."""
    lines = ["| measure | against | bound | aim | measured | |", "|---|---|---|---|---|---|"]
    for measure, workload, key, peers in AIMS:
        against = results.get(workload, {}).get("oursAgainst", {})
        lines += [aim_row(measure, peer, key, bound, aim, against.get(peer)) for peer, (bound, aim) in peers.items()]
    path = RESULTS / "ladder.json"
    rungs = json.loads(path.read_text())["against"]["trl"] if path.exists() else {"every rung": None}
    for rung, ratio in rungs.items():
        lines += [aim_row(f"{measure}, full fine-tuning, {rung}", "trl", key, bound, aim, ratio)
                  for measure, key, bound, aim in LADDER_AIMS]
    if dense := results.get("dense-4x256"):
        start = dense["median"]["ours"]["startSeconds"]
        bound, aim = MOST_START_SECONDS
        lines.append(f"| start, dense rows | | ≤ {bound} s | {aim} s | {start:.3f} s | {verdict(start, bound, aim, True)} |")
    if (path := RESULTS / "profile.txt").exists():
        share = float(re.search(r"over the whole step: ([\d.]+) % of that rate", path.read_text())[1]) / 100
        bound, aim = LEAST_PRODUCTS
        lines.append(f"| matrix products over a whole step, of the machine's bf16 rate | | ≥ {bound:.0%} | {aim:.0%} | {share:.0%} "
                     f"| {verdict(share, bound, aim, False)} |")
    if (path := RESULTS / "checkpoints.json").exists():
        bound, aim = MOST_WAITED
        for name, values in json.loads(path.read_text())["workloads"].items():
            lines.append(f"| waiting for checkpoints, {name} | | ≤ {bound:.0%} | {aim:.0%} | {values['waited']:.2%} "
                         f"| {verdict(values['waited'], bound, aim, True)} |")
    return lines


def table(results):
    """Lines of the table; each workload's first row is the trainer's."""
    lines = ["| workload | | tokens/s (range) | peak memory | start | ours against it: speed, memory |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        for program, values in result["median"].items():
            first = name if program == "ours" else ""
            if values is None:
                lines.append(f"| {first} | {program} | does not work here | | | |")
                continue
            rates = [run["tokensPerSecond"] for run in result["runs"][program]]
            ratio = result["oursAgainst"].get(program)
            start = f"{values['startSeconds']:.2f} s" if "startSeconds" in values else ""
            against = f"{ratio['tokensPerSecond']:.2f}×, {ratio['peakBytes']:.2f}×" if ratio else ""
            lines.append(f"| {first} | {program} | {values['tokensPerSecond']:.0f} ({min(rates):.0f}–{max(rates):.0f}) | "
                         f"{values['peakBytes'] / 2**20:.0f} MiB | {start} | {against} |")
    return lines


def equal_answers(name, result):
    """How alike the answers are, where rows were answered."""
    return [f"{name}: {share:.0%} of the answers are those of {peer}, letter by letter."
            for peer, share in result.get("equalAnswers", {}).items()]


def machine(result):
    """Where and how often a workload was measured, with which versions."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return f"measured on {result['cores']} cores of an {result['processor']}, medians of {result['rounds']} rounds; {versions}"


def write(results):
    """`results`: by workload, what bench.py wrote for it."""
    if not results:
        return
    named = {}
    for name, result in results.items():
        named.setdefault(machine(result), []).append(name)
    measured = [f"{', '.join(names)}: {sentence}." for sentence, names in named.items()]
    measured += [line for name, result in results.items() for line in equal_answers(name, result)]
    put(MARKS, [*table(results), "", *measured])
    put(STANDING_MARKS, standing(results))
    CHART.write_text(draw(results))


def parts(marks):
    """The page up to the first of two marks, what is between them, and what comes after the second."""
    text = PAGE.read_text()
    assert text.count(marks[0]) == text.count(marks[1]) == 1, f"{PAGE} must have {marks[0]} and {marks[1]} once each"
    before, rest = text.split(marks[0])
    return before, *rest.split(marks[1])


def between(marks):
    """The lines between two marks of the page."""
    return parts(marks)[1].strip("\n").split("\n")


def put(marks, lines):
    """Writes lines between two marks of the page."""
    before, _, after = parts(marks)
    PAGE.write_text("\n".join([before + marks[0], *lines, marks[1] + after]))


def write_ladder(result):
    """`result`: what ladder.py wrote. The table of what is aimed at has its rows, too."""
    peers = list(result["against"])
    lines = ["| | tokens/s (range) | peak memory | less than AdamW | " + " | ".join(f"against {peer}: speed, memory" for peer in peers) + " |",
             "|---|---|---|---|" + "---|" * len(peers)]
    whole = result["median"][result["whole"]]["peakBytes"]
    for program, values in result["median"].items():
        rates = [run["tokensPerSecond"] for run in result["runs"][program]]
        ours = program not in peers
        less = f"{(whole - values['peakBytes']) / 2**20:.0f} MiB" if ours and program != result["whole"] else ""
        ratios = [result["against"][peer][program] if ours else None for peer in peers]
        cells = [f"{ratio['tokensPerSecond']:.2f}×, {ratio['peakBytes']:.2f}×" if ratio else "" for ratio in ratios]
        lines.append(f"| {program} | {values['tokensPerSecond']:.0f} ({min(rates):.0f}–{max(rates):.0f}) | "
                     f"{values['peakBytes'] / 2**20:.0f} MiB | {less} | {' | '.join(cells)} |")
    sentence = machine(result)
    put(LADDER_MARKS, [*lines, "", f"{sentence[0].upper()}{sentence[1:]}."])
    put(STANDING_MARKS, standing(read_results()))
