"""A picture of completions, each token shaded by its score: a light card in SVG, for any page, bright or dark."""

import html
import textwrap

CHARACTER, LINE = 8, 32  # pixels: the width of a character, with some to spare, and the height of a line
MARGIN, LEFT, RIGHT = 20, 140, 780  # where labels begin, and where tokens begin and end
LEGEND = "shade: p(1-p)[A]+; outlined: selected, these pay the KL penalty"


def svg(prompt: str, completions: list[tuple[str, list]]) -> str:
    """The prompt, and below it completions (label, list of tokens.View), which go on in a new line if one is full."""
    largest = max((token.score for _, tokens in completions for token in tokens), default=0.0) or 1.0
    prompt, y = textwrap.shorten(visible(prompt), 90, placeholder=" …"), 34
    parts, ends = [svg_text(MARGIN, y, prompt, bold=True)], [MARGIN + CHARACTER * max(len(prompt), len(LEGEND))]
    for label, tokens in completions:
        x, y = LEFT, y + LINE
        parts.append(svg_text(MARGIN, y, label, fill="#6e7781"))
        for token in tokens:
            word = visible(token.text)
            width = CHARACTER * len(word) + 10
            if x + width > RIGHT and x > LEFT:
                x, y = LEFT, y + LINE
            outline = ' stroke="#b00020" stroke-width="2"' if token.selected else ""
            parts.append(f'<rect x="{x}" y="{y - 17}" width="{width}" height="24" rx="4" fill="#ff5a3c" '
                         f'fill-opacity="{token.score / largest:.2f}"{outline}/>')
            parts.append(svg_text(x + width // 2, y, word, bold=token.selected, anchor="middle"))
            ends.append(x + width)
            x += width + 4
    y += LINE + 8
    parts.append(svg_text(MARGIN, y, LEGEND, fill="#6e7781"))
    width, height = max(ends) + MARGIN, y + MARGIN
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="13">\n'
            '<rect width="100%" height="100%" rx="8" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n")


def svg_text(x: int, y: int, text: str, *, bold: bool = False, fill: str = "#222222", anchor: str = "start") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{fill}"{weight}>{html.escape(text)}</text>'


def visible(text: str) -> str:
    """The text on one line: XML forbids most control characters, and a rectangle needs something to stand in it."""
    text = text.replace("\n", "⏎")
    return "".join(character if character.isprintable() else "·" for character in text).strip() or "␣"
