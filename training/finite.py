"""Steps whose loss or gradient is not a finite number."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import RunFailed, shorten
from training.state import TrainState

CHECK_EVERY_STEPS = 20  # to look makes a GPU wait, so it is not done at every step there


class FiniteSteps:
    """Names the files of steps that are not finite. The optimizer keeps them from the weights (see fit.py);
    BatchNorm gets its statistics of before them back.

    `note` does not wait for the GPU. `check` looks at what was noted since it last did; on a GPU, where it
    does not look at every step, up to 19 good steps' statistics go with a bad one's.
    """

    def __init__(self, state: TrainState, files: Sequence[Path], most_in_a_row: int):
        self.state, self.files, self.most_in_a_row = state, files, most_in_a_row
        self._unchecked: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._statistics = state.statistics()
        self._kept = [statistic.clone() for statistic in self._statistics]

    def note(self, finite: torch.Tensor, indices: torch.Tensor) -> None:
        """Of each step: () bool on the model's device, and the batch's indices."""
        self._unchecked.append((finite, indices))

    def check(self, now: bool = False) -> None:
        """Raises RunFailed after `most_in_a_row` steps in a row that were not finite."""
        every = CHECK_EVERY_STEPS if self._unchecked and self._unchecked[0][0].is_cuda else 1
        if not self._unchecked or (len(self._unchecked) < every and not now):
            return
        finite = torch.stack([one for one, _ in self._unchecked]).tolist()
        for is_finite, (_, indices) in zip(finite, self._unchecked, strict=True):
            self.state.nonfinite_steps = 0 if is_finite else self.state.nonfinite_steps + 1
            if not is_finite:
                self._say(indices)
        sources, targets = (self._statistics, self._kept) if all(finite) else (self._kept, self._statistics)
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        self._unchecked.clear()
        scaler = self.state.scaler
        if scaler.is_enabled() and scaler.get_scale() < 1:  # from 65536 on it is halved at every such step
            raise RunFailed(
                "in float16 the gradient is not finite however little it is scaled; train with --no-amp or a "
                "lower --learning-rate; earlier checkpoints are intact"
            )

    def _say(self, indices: torch.Tensor) -> None:
        times = self.state.nonfinite_steps
        said = (
            f"the loss or its gradient is not a finite number; the images of that batch:\n"
            f"{shorten([str(self.files[i % len(self.files)]) for i in indices.tolist()], 64)}\n"
        )
        if times >= self.most_in_a_row:
            raise RunFailed(
                f"{said}that is {times} step{'s' * (times > 1)} in a row (--max-nonfinite-steps "
                f"{self.most_in_a_row}); look at these images, lower --learning-rate, or train with "
                "--no-amp; earlier checkpoints are intact"
            )
        tqdm.write(f"warning: {said}the step is skipped ({times} in a row)")
