"""Puts benchmark results into docs/benchmarks.md, between their marks, and draws docs/benchmarks.svg."""

from chart import draw
from workloads import REPOSITORY

PAGE, CHART = REPOSITORY / "docs/benchmarks.md", REPOSITORY / "docs/benchmarks.svg"
MARKS = ("<!-- results -->", "<!-- end of results -->")
CHECKPOINT_MARKS = ("<!-- checkpoint results -->", "<!-- end of checkpoint results -->")
LADDER_MARKS = ("<!-- ladder results -->", "<!-- end of ladder results -->")


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
    """Where and how often a workload was measured; results of older runs do not tell versions."""
    versions = ", ".join(f"{package} {version}" for package, version in result.get("versions", {}).items())
    return (f"measured on {result['cores']} cores of an {result['processor']}, medians of {result['rounds']} rounds"
            + (f"; {versions}" if versions else ""))


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
    CHART.write_text(draw(results))


def put(marks, lines):
    """Writes lines between two marks of the page."""
    before, rest = PAGE.read_text().split(marks[0])
    after = rest.split(marks[1])[1]
    PAGE.write_text("\n".join([before + marks[0], *lines, marks[1] + after]))


def write_ladder(result):
    """`result`: what ladder.py wrote."""
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
