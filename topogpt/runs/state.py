"""Where a run stands."""

import math
from dataclasses import dataclass


@dataclass
class TrainState:
    """Where a run stands: everything the loop carries from step to step besides weights and optimiser."""

    step: int = 0  # optimiser steps done
    best_cross_entropy: float | None = None  # lowest validation cross-entropy of a saved step
    best_step: int | None = None
    last_cross_entropy: float | None = None  # of the last evaluation
    increases: int = 0  # evaluations in a row at which it rose
    evaluated_at: int | None = None  # step of the last evaluation
    skipped_in_a_row: int = 0  # steps skipped for a non-finite gradient
    wandb_id: str | None = None

    def update(self, cross_entropy: float) -> bool:
        """Take in an evaluation; return whether it is the best so far. NaN is an increase, never best."""
        last = self.last_cross_entropy
        rose = last is not None and not cross_entropy <= (math.inf if math.isnan(last) else last)
        self.increases = self.increases + 1 if rose else 0
        self.last_cross_entropy, self.evaluated_at = cross_entropy, self.step
        best = not math.isnan(cross_entropy) and (
            self.best_cross_entropy is None or cross_entropy < self.best_cross_entropy
        )
        if best:
            self.best_cross_entropy, self.best_step = cross_entropy, self.step
        return best
