"""What analysis.tightness found, in words: its tables, the verdict on A.23, and a picture."""

import numpy as np

from support import plots
from support.tables import aligned

EDGES = (0.0, 0.1, 0.3, 0.7, 0.9, 1.0)  # of p_v
KINDS = ("selected", "positive, unselected", "forking")
IN_PLAY = "forking in play"  # of them, where the forced tokens fared differently: elsewhere no branch is defined


def with_error(values: np.ndarray) -> tuple[float, float]:
    """The estimate, and its standard error: the spread of the bootstrap."""
    return float(values[0]), float(np.nanstd(values[1:]))


def tightness_tables(by_kind: dict, by_p: dict, rows: list, members: dict, p: np.ndarray, left_out: list) -> str:
    def cell(estimates: dict, name: str) -> str:
        value, error = with_error(estimates[name])
        floor = estimates.get(f"{name}_floor")
        return f"{value:.3f} ±{error:.3f}" + (f" ({floor[0]:.3f})" if floor is not None else "")

    lines = [["", "contexts", "no L", "R = 0", "mean p", "mean |1-2p|",
              "mean |R|/L", "rms |R|/L, corrected", "sum |R| / sum L"]]
    for kind, estimates in by_kind.items():
        own = p[members[kind]]
        inside = [row for row, member in zip(rows, members[kind]) if member]
        counts = (len(own), sum(row.L == 0 for row in inside), sum(abs(row.R) <= 1e-9 * row.L != 0 for row in inside))
        lines.append([kind, *map(str, counts), f"{own.mean():.3f}", f"{abs(1 - 2 * own).mean():.3f}",
                      *(cell(estimates, name) for name in ("mean", "rms_corrected", "sums"))])
    bins = [["mean |R|/L at p_v", *by_kind]]
    for low, high in zip(EDGES, EDGES[1:]):
        found = [by_p.get((kind, low, high)) for kind in by_kind]
        bins.append([f"{low:g} - {high:g}", *(f"{cell(f[0], 'mean')} n={f[1]}" if f else "-" for f in found)])
    return (f"{aligned(lines)}\n\n{aligned(bins)}\n"
            "± standard error, problems bootstrapped; in brackets: what noise alone would give, alpha equal for all v."
            "\nNoise in alpha makes |R| too large; `corrected` is free of it, made of R from two independent halves."
            "\nno L: no success seen, so no ratio. R = 0: all forced tokens fared the same, as where the chain is lost."
            f"\nProbability of tokens not forced: mean {np.mean(left_out):.4f}, largest {np.max(left_out):.4f}; p is "
            "renormalised over the others.")


def verdict(by_kind: dict) -> str:
    """What the estimates say of A.23: is the mean |R|/L smaller at the selected tokens than at forking ones?"""
    selected, parts, sides = by_kind["selected"], [], []
    for kind in [kind for kind in ("forking", IN_PLAY) if kind in by_kind]:
        difference = selected["mean"][1:] - by_kind[kind]["mean"][1:]
        low, high = np.quantile(difference[np.isfinite(difference)], [0.025, 0.975])
        sides.append("smaller than" if high < 0 else "larger than" if low > 0 else "not measurably different from")
        value, floor = by_kind[kind]["mean"][0], by_kind[kind]["mean_floor"][0]
        parts.append(f"{sides[-1]} {value:.3f} ({floor:.3f}) at '{kind}' tokens "
                     f"[difference {low:+.3f} to {high:+.3f} at 95 %]")
    verdicts = {"smaller than": "bears A.23 out", "larger than": "contradicts A.23"}
    judged = verdicts.get(sides[0] if len(set(sides)) == 1 else "", "does not bear A.23 out")
    return ("A.23 says that |R|/L is smaller at selected tokens than at branch-defining ones at large; measured, it is "
            f"{selected['mean'][0]:.3f} (noise alone {selected['mean_floor'][0]:.3f}) at selected tokens, "
            f"{', '.join(parts)}, which {judged}; at unselected tokens of positive advantage it is "
            f"{by_kind['positive, unselected']['mean'][0]:.3f}.")


def draw_tightness(plot, p: np.ndarray, ratios: np.ndarray, members: dict, by_kind: dict):
    figure, (left, right) = plot.subplots(1, 2, figsize=(9.5, 4.6), width_ratios=(3, 2), layout="constrained")
    top = 1.1 * max(0.5, np.nanquantile(ratios, 0.98))  # a few, of p near 1 and L near 0, may be far above all others
    highest = 1.15 * max(sum(with_error(own[name])) for own in by_kind.values() for name in ("mean", "rms_corrected"))
    for i, (kind, colour) in enumerate(zip(members, plots.colours(list(members)))):
        if kind in KINDS:
            left.plot(p[members[kind]], ratios[members[kind]], "osD"[i], color=colour, markersize=4, alpha=0.6,
                      linewidth=0)
        for x, name in enumerate(("mean", "rms_corrected", "sums")):
            value, error = with_error(by_kind[kind][name])
            at = x + (i - 1.5) * 0.2
            right.bar(at, value, 0.18, yerr=error, color=colour, alpha=0.8, capsize=2, label=kind if x == 0 else None)
            if f"{name}_floor" in by_kind[kind]:
                floor = by_kind[kind][f"{name}_floor"][0]
                right.plot([at - 0.09, at + 0.09], [floor] * 2, "k--", linewidth=1)
                if floor > highest:
                    right.text(at, highest, f"{floor:.1f}↑", ha="center", va="top", fontsize=8)
    grid = np.linspace(0, 1, 201)
    left.plot(grid, abs(1 - 2 * grid) / 2, color=plots.GREY, linewidth=1, label="|1-2p|/2, where |α-β| = A$_{scale}$")
    above = int((ratios > top).sum())
    left.set(xlabel="p of the sampled token", ylabel="|R| / L", ylim=(-0.02 * top, top),
             title="each context" + f" ({above} above the axis)" * bool(above))
    right.set(title="by kind", xticks=range(3), ylim=(0, highest))
    right.set_xticklabels(["mean", "rms,\ncorrected", "sum |R| /\nsum L"])
    handles, labels = (a + b for a, b in zip(right.get_legend_handles_labels(), left.get_legend_handles_labels()))
    plots.legend(figure, handles, labels)
    plots.caption(figure, "Whiskers: standard errors over problems; dashed: what noise alone would give")
    return figure
