"""Draws tokens/s of each workload as horizontal bars, relative to the fastest peer, as an SVG that reads on light and dark."""

from xml.sax.saxutils import escape

WIDTH, TITLE_START, LABEL_END, BAR_START, BAR_END = 760, 12, 150, 160, 660
BAR, STEP, GROUP_TITLE, GROUP_GAP, TOP = 16, 21, 22, 14, 40
# Greys that read on white and on black for text and peers, one strong colour for the trainer.
TEXT, PEER, OURS = "#768390", "#9ca3af", "#2f81f7"


def text(x, y, words, **attributes):
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{extra}>{escape(words)}</text>'


def bar(y, name, rate, relative, scale):
    """One program: its name, its bar, tokens/s and the rate relative to the fastest peer."""
    length = relative * scale
    colour = OURS if name == "ours" else PEER
    weight = {"font_weight": "bold"} if name == "ours" else {}
    return [
        text(LABEL_END, y + BAR - 4, name, text_anchor="end", **weight),
        f'<rect x="{BAR_START}" y="{y:.1f}" width="{length:.1f}" height="{BAR}" rx="2" fill="{colour}"/>',
        text(BAR_START + length + 6, y + BAR - 4, f"{rate:.0f} ({relative:.2f}×)", **weight),
    ]


def draw(results):
    """`results`: by workload, with `median` tokensPerSecond by program, None where a program does not work."""
    groups = {}
    for name, result in results.items():
        rates = {program: values["tokensPerSecond"] for program, values in result["median"].items() if values}
        best = max(rate for program, rate in rates.items() if program != "ours")
        groups[name] = (result["workload"], {program: (rate, rate / best) for program, rate in rates.items()})
    widest = max(relative for _, bars in groups.values() for _, relative in bars.values())
    scale = (BAR_END - BAR_START) / widest
    elements, y = [], TOP
    for description, bars in groups.values():
        elements.append(text(TITLE_START, y + 12, description))
        y += GROUP_TITLE
        for program, (rate, relative) in bars.items():
            elements += bar(y, program, rate, relative, scale)
            y += STEP
        y += GROUP_GAP
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" font-family="sans-serif" '
        f'font-size="12" fill="{TEXT}">',
        text(TITLE_START, 22, "Useful tokens/s (relative to the fastest peer)", font_size=15, font_weight="bold"),
    ]
    return "\n".join([*head, *elements, "</svg>"]) + "\n"
