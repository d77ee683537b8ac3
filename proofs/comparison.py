"""One line of a comparison's table, and how it is printed."""

from dataclasses import dataclass


@dataclass
class Line:
    """What was compared, how often, and how far the two sides lie apart.

    `difference` is the largest one found. The line holds if it is at most `tolerance`. For a comparison of
    decisions the difference is the number of decisions that differ and no known departure explains. A line of
    a departure `departs`: its two sides differ for a known reason, and the tolerance bounds by how much.
    """

    topic: str
    case: str
    count: int
    difference: float
    tolerance: float
    note: str = ""
    departs: bool = False

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance      # false for NaN


def print_table(lines: list[Line]) -> None:
    topic = None
    for line in lines:
        if line.topic != topic:
            topic = line.topic
            print(f"\n## {topic}\n\n| compared | count | largest difference | tolerance | result | note |")
            print("|---|---|---|---|---|---|")
        result = ("departs" if line.departs else "equal") if line.holds else "**DIFFERS**"
        print(f"| {line.case} | {line.count:,} | {line.difference:.2g} | {line.tolerance:g} | {result} "
              f"| {line.note} |", flush=True)
