"""What the nets learn: digits under noise, or the next byte of a text. Draws depend on seed and update alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lowprec.studies import data
from lowprec.studies.residual.config import SIDE, Config

HELD = 600
"""Images that a seed holds out of scikit-learn's 1797."""

Batch = tuple[Tensor, Tensor]
"""Rows, and the class of each."""


class Task(Protocol):
    """What a net is trained on and scored by.

    classes: what is told apart; symbols: size of the alphabet, 0 where rows are features; features: of a row.
    """

    classes: int
    symbols: int
    features: int

    def batch(self, update: int, rows: int) -> Batch:
        """The batch of an update."""

    def held(self) -> Iterator[Batch]:
        """What is scored."""

    def clean(self) -> Iterator[Batch]:
        """The same without noise, where there is any."""


def task_of(config: Config, seed: int, device: torch.device) -> Task:
    """The task of a seed."""
    return Digits(config, seed, device) if config.on_digits else Text(config, seed, device)


def generator(seed: int, what: int, update: int = 0) -> torch.Generator:
    """A generator of its own for each use and update."""
    state = np.random.SeedSequence((seed, what, update)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


@lru_cache(maxsize=1)
def digits() -> Batch:
    """scikit-learn's images [1797, 64], of mean 0 and deviation 1, and their classes.

    Raises:
        ValueError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("data: digits need scikit-learn; pip install 'lowprec[studies]', or name a text") from None
    images, classes = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float()
    return (x - x.mean()) / x.std(), torch.from_numpy(classes).long()


class Digits:
    """Images moved by a pixel or so under normal noise, drawn anew for each batch."""

    classes, symbols, features = 10, 0, SIDE**2

    def __init__(self, config: Config, seed: int, device: torch.device) -> None:
        self.config, self.seed, self.device = config, seed, device
        images, classes = digits()
        order = torch.randperm(len(images), generator=generator(seed, 0))
        self.images, self.truth = images[order[HELD:]], classes[order[HELD:]]
        self.held_images, self.held_truth = images[order[:HELD]], classes[order[:HELD]]

    def batch(self, update: int, rows: int) -> Batch:
        draws = generator(self.seed, 1, update)
        chosen = torch.randint(len(self.images), (rows,), generator=draws)
        return self._disturbed(self.images[chosen], draws), self.truth[chosen].to(self.device)

    def held(self) -> Iterator[Batch]:
        for copy in range(self.config.copies):
            yield self._disturbed(self.held_images, generator(self.seed, 2, copy)), self.held_truth.to(self.device)

    def clean(self) -> Iterator[Batch]:
        yield self.held_images.to(self.device), self.held_truth.to(self.device)

    def _disturbed(self, images: Tensor, draws: torch.Generator) -> Tensor:
        most = self.config.shift
        ground = float(images.min())
        padded = torch.nn.functional.pad(images.view(-1, SIDE, SIDE), (most,) * 4, value=ground)
        down, right = torch.randint(2 * most + 1, (2, len(images), 1), generator=draws)
        pixel = torch.arange(SIDE)
        row = torch.arange(len(images))[:, None, None]
        moved = padded[row, (down + pixel)[:, :, None], (right + pixel)[:, None, :]].flatten(1)
        return (moved + self.config.noise * torch.randn(moved.shape, generator=draws)).to(self.device)


class Text:
    """Windows of a text, and the symbol that follows each."""

    def __init__(self, config: Config, seed: int, device: torch.device) -> None:
        corpus = data.load(config.data, config.split)
        self.config, self.seed = config, seed
        self.train, self.test = corpus.train.to(device), corpus.test.to(device)
        self.classes = self.symbols = len(corpus.symbols)
        self.features = config.features
        self.places = torch.arange(config.window + 1, device=device)

    def batch(self, update: int, rows: int) -> Batch:
        last = len(self.train) - self.config.window
        return self._windows(self.train, torch.randint(last, (rows,), generator=generator(self.seed, 1, update)))

    def held(self) -> Iterator[Batch]:
        last = len(self.test) - self.config.window
        count = min(self.config.scored, last)
        rows = self.config.batch * self.config.wider
        for begin in range(0, count, rows):
            spread = torch.arange(begin, min(begin + rows, count)) * last // count
            yield self._windows(self.test, spread)

    def clean(self) -> Iterator[Batch]:
        return iter(())

    def _windows(self, text: Tensor, starts: Tensor) -> Batch:
        windows = text[starts.to(text.device)[:, None] + self.places].long()
        return windows[:, :-1], windows[:, -1]
