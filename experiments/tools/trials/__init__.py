"""Try the library from outside, at random from a seed; each part counts what it tried and what was lost."""

from dataclasses import dataclass, field


@dataclass
class Part:
    """Hold what one part of a campaign has come to.

    Attributes:
        claim: what must hold in each trial.
        outcomes: how often each possible end has come about.
        faults: what must not be, one a trial.
    """

    name: str
    claim: str
    trials: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def count(self, outcome: str, times: int = 1) -> None:
        self.trials += times
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + times

    def fail(self, fault: str) -> None:
        """Count a trial that has failed."""
        self.count("fault")
        self.faults.append(" ".join(fault.split())[:300])
