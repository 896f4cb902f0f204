"""Puts benchmark results into docs/benchmarks.md, between its two marks, and draws docs/benchmarks.svg."""

from chart import draw
from workloads import REPOSITORY

PAGE, CHART = REPOSITORY / "docs/benchmarks.md", REPOSITORY / "docs/benchmarks.svg"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


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
    before, rest = PAGE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n" + "\n".join([*table(results), "", *measured]) + f"\n{END}" + after)
    CHART.write_text(draw(results))
