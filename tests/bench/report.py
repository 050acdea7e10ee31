# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

"""From samples to the table."""

import dataclasses
import statistics

HEADINGS = ("case", "contender", "median", "min - max", "x raw",
            "x qemu-nbd", "CPU s", "peak MiB", "target")


@dataclasses.dataclass
class Result:
    """All samples of one contender (in one variant) in one case."""
    variant: str = ""
    figures: list = dataclasses.field(default_factory=list)
    cpu: list = dataclasses.field(default_factory=list)
    peak: list = dataclasses.field(default_factory=list)

    @property
    def median(self):
        return statistics.median(self.figures)


def ratio(results, contender, against):
    """Of medians, or None where one of the two did not run."""
    if contender not in results or against not in results:
        return None
    return results[contender].median / results[against].median


def judge(case, results, target):
    """Return (text, met) for one target of one case."""
    if target.against is None:
        value = results["ours"].median
    else:
        value = ratio(results, "ours", target.against)
    unit = case.workload.unit
    sign = "<=" if unit.lower_is_better else ">="
    name = (f"x {target.against}" if target.against else unit.name)
    wanted = f"{sign} {target.factor:.2f} {name}"
    if value is None:
        return f"{wanted}: not measured", False
    met = (value <= target.factor if unit.lower_is_better
           else value >= target.factor)
    shown = f"{value:.2f}" if target.against else unit.show(value)
    return f"{wanted}: {shown} {'ok' if met else 'MISSED'}", met


def row(case, contender, results):
    result = results[contender]
    show = case.workload.unit.show
    cells = [case.name, f"{contender} {result.variant}".strip(),
             show(result.median),
             f"{show(min(result.figures))} - {show(max(result.figures))}"]
    for against in ("raw", "qemu-nbd"):
        value = ratio(results, contender, against)
        cells.append("-" if value is None else f"{value:.2f}")
    cells.append(f"{statistics.median(result.cpu):.2f}")
    cells.append(f"{max(result.peak) / (1 << 20):.0f}")
    targets = case.targets if contender == "ours" else ()
    cells.append("; ".join(judge(case, results, t)[0] for t in targets))
    return cells


def table(measured):
    """Lines of text for MEASURED, a list of (case, results)."""
    rows = [HEADINGS]
    for case, results in measured:
        rows += [row(case, contender, results) for contender in results]
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEADINGS))]
    lines = []
    for number, cells in enumerate(rows):
        if number > 0 and cells[0] != rows[number - 1][0]:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
        words = [c.ljust(w) if i < 2 or i == len(HEADINGS) - 1 else c.rjust(w)
                 for i, (c, w) in enumerate(zip(cells, widths))]
        lines.append("  ".join(words).rstrip())
    return lines


def missed(measured):
    """The names of the cases in which a target was not reached."""
    return [case.name for case, results in measured if "ours" in results
            and not all(judge(case, results, t)[1] for t in case.targets)]


def as_data(measured):
    """For --json: every sample, so that other programs can judge."""
    return [{"case": case.name, "title": case.title,
             "unit": case.workload.unit.name,
             "results": {name: dataclasses.asdict(result)
                         for name, result in results.items()}}
            for case, results in measured]
