"""Times: of several actions in turns, so that what slows the machine slows all; and of calls."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import spectral_ds

# A sample repeats an action until it lasts so long.
SECONDS_OF_SAMPLE = 0.02
# An action that has taken so long sits out the rounds that are left, after one at least.
SECONDS_OF_ACTION = 20.0


@dataclass(frozen=True)
class Times:
    """Of one action.

    Attributes:
        milliseconds: one a round, of the first ones; empty if it failed.
        error: why, in one line.
    """

    milliseconds: tuple[float, ...]
    error: str = ""

    @property
    def median(self) -> float:
        return float(np.median(self.milliseconds))

    def over(self, other: "Times") -> tuple[float, float, float]:
        """This over another, round by round: the median, and the middle 80 % of them."""
        rounds = min(len(self.milliseconds), len(other.milliseconds))
        ratios = np.array(self.milliseconds[:rounds]) / np.array(other.milliseconds[:rounds])
        low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
        return float(middle), float(low), float(high)


def ready(device: torch.device) -> float:
    """Now, once the device has nothing left to do; seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_turns(
    actions: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Times of each action: twice to warm up, and then one after another in each round.

    An action that raises is left out from then on.

    Args:
        before: is called before each sample, and not timed.
    """
    samples: dict[str, list[float]] = {label: [] for label in actions}
    errors: dict[str, str] = {}
    repeats = dict.fromkeys(actions, 1)
    spent = dict.fromkeys(actions, 0.0)
    for turn in tqdm(range(-2, rounds), desc="rounds", leave=False):
        for label, action in actions.items():
            if label in errors or (samples[label] and spent[label] > SECONDS_OF_ACTION):
                continue
            try:
                before()
                started = ready(device)
                for _ in range(repeats[label]):
                    action()
                seconds = ready(device) - started
            except Exception as error:  # the others are measured all the same
                errors[label] = said(error)
                continue
            spent[label] += seconds
            if turn >= 0:
                samples[label].append(1e3 * seconds / repeats[label])
            elif turn == -1:  # the first compiles and allocates; the second tells how long it takes
                repeats[label] = max(1, round(SECONDS_OF_SAMPLE / seconds))
    return {
        label: Times((), errors[label]) if label in errors else Times(tuple(found))
        for label, found in samples.items()
    }


def said(error: Exception) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


class Clock:
    """Counts the seconds of calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    def of(self, call: Callable[..., None]) -> Callable[..., None]:
        """The same call, counted."""

        @functools.wraps(call)
        def run(*arguments: Any) -> None:
            started = ready(self._device)
            call(*arguments)
            self.seconds += ready(self._device) - started

        return run

    def watch_plugin(self) -> None:
        """Count what every plugin does at a step, from now on."""
        for name in ("begin_step", "before_step", "after_update"):
            call = getattr(spectral_ds.SpectralPlugin, name)
            setattr(spectral_ds.SpectralPlugin, name, self.of(call))

    @contextmanager
    def around(self) -> Iterator[Callable[[], float]]:
        """Gives the seconds of the body that nothing else has counted."""
        self.seconds, started = 0.0, ready(self._device)
        yield lambda: ready(self._device) - started - self.seconds
