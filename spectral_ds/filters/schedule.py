"""How strongly the filter acts at each step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StrengthSchedule:
    """s over the optimizer steps.

    Attributes:
        strength: s at its full height, in [0, 1].
        warmup_steps: s rises linearly over so many steps, from s/warmup_steps.
        decay_steps: then it falls linearly over so many, to 0; 0: it stays.
        interval: only steps that are multiples of this are filtered.
    """

    strength: float
    warmup_steps: int = 0
    decay_steps: int = 0
    interval: int = 1

    def at(self, step: int) -> float:
        """s at optimizer step `step` (from 0); 0 on steps that are not filtered."""
        if step % self.interval != 0:
            return 0.0
        if step < self.warmup_steps:
            return self.strength * (step + 1) / self.warmup_steps
        if self.decay_steps == 0:
            return self.strength
        return self.strength * max(0.0, 1 - (step - self.warmup_steps) / self.decay_steps)
