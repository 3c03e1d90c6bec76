"""Statistics of channels that can be taken in parts, on several machines, and merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bn_c import _checks, _core

Doubles = NDArray[np.float64]


class BatchStats:
    """Count, mean and biased variance of each channel.

    Parts merge exactly (parallel variance: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm
    for computing sample variances", 1979), in any order to 1e-12 relative, so this is what a streaming loop,
    multiprocessing, Dask, Ray or MPI reduce over:

        stats = bn_c.BatchStats(3)
        for batch in batches:
            stats.update(batch)
        total = stats + other

    Statistics compare, can be pickled, and are plain numbers in `to_dict`.

    Parameters
    ----------
    num_features : int
        The number of channels.

    Raises
    ------
    TypeError, ValueError
        If `num_features` is no integer >= 0.
    """

    _count: int
    _mean: Doubles
    _rest: Doubles  # of the means, beyond what float64 holds: or merging would lose it
    _m2: Doubles

    def __init__(self, num_features: int) -> None:
        channels = _checks.num_features(num_features)
        self._set(0, np.zeros(channels), np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, count: int, mean: Doubles, m2: Doubles) -> BatchStats:
        """The statistics of `count` elements per channel; `m2` is the sum of squared deviations."""
        return cls.__new__(cls)._set(count, mean, np.zeros(len(mean)), m2)

    def _set(self, count: int, mean: Doubles, rest: Doubles, m2: Doubles) -> BatchStats:
        self._count, self._mean, self._rest, self._m2 = count, mean, rest, m2
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What comes in a buffer (pickle's protocol 5, Dask) may begin where no double should.
        self._set(state["_count"], *(np.require(state[name], None, "A") for name in ("_mean", "_rest", "_m2")))

    @property
    def num_features(self) -> int:
        """The number of channels."""
        return len(self._mean)

    @property
    def count(self) -> int:
        """Elements per channel so far."""
        return self._count

    @property
    def mean(self) -> Doubles:
        """float64 (C,); NaN before the first element."""
        return self._mean.copy() if self._count else np.full_like(self._mean, np.nan)

    @property
    def var(self) -> Doubles:
        """Biased variance, sum((x - mean)^2) / count, float64 (C,); NaN before the first element."""
        return self._divided(self._count)

    @property
    def unbiased_var(self) -> Doubles:
        """sum((x - mean)^2) / (count - 1), float64 (C,); NaN below two elements."""
        return self._divided(self._count - 1)

    @property
    def std(self) -> Doubles:
        """The square root of the biased variance, float64 (C,)."""
        std: Doubles = np.sqrt(self.var)
        return std

    def _divided(self, by: int) -> Doubles:
        return self._m2 / by if by > 0 else np.full_like(self._m2, np.nan)

    def update(self, x: Any, axis: int = 1, mask: Any = None) -> BatchStats:
        """Adds the elements of x, with its channels on `axis`; those that `mask` selects, as in `batch_norm`.

        Returns itself. Raises TypeError or ValueError, and changes nothing, if x is no array of a supported dtype
        with `num_features` channels, or if the mask does not fit it.
        """
        x, axis = _checks.array("x", x), _checks.axis(axis)
        return self._add(BatchStats.of(*_core.moments(x, *_checks.mask(mask, x, axis), axis, self.num_features, 1)))

    def merge(self, other: BatchStats) -> BatchStats:
        """Adds the elements that another has seen. Returns itself; TypeError, ValueError if they do not fit."""
        if not isinstance(other, BatchStats):
            raise TypeError(f"other: expected BatchStats, got {_checks.kind(other)}")
        if other.num_features != self.num_features:
            raise ValueError(f"other: expected {self.num_features} features, got {other.num_features}")
        return self._add(other)

    def _add(self, other: BatchStats) -> BatchStats:
        if other._count == 0:
            return self
        # None of these arrays is ever written again, so they can be shared.
        if self._count == 0:
            return self._set(other._count, other._mean, other._rest, other._m2)
        mean, rest, m2 = self._mean.copy(), self._rest.copy(), self._m2.copy()
        _core.merge(mean, rest, m2, self._count, other._mean, other._rest, other._m2, other._count)
        return self._set(self._count + other._count, mean, rest, m2)

    def __add__(self, other: BatchStats) -> BatchStats:
        if not isinstance(other, BatchStats):
            return NotImplemented
        return BatchStats(self.num_features).merge(self).merge(other)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BatchStats):
            return NotImplemented
        return (
            self._count == other._count
            and np.array_equal(self._mean, other._mean, equal_nan=True)
            and np.array_equal(self._rest, other._rest)
            and np.array_equal(self._m2, other._m2, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]  # it changes

    def __repr__(self) -> str:
        text = f"BatchStats(num_features={self.num_features}, count={self._count}"
        if self._count and self.num_features:
            mean, var = self.mean, self.var
            text += f", mean={mean.min():.6g}..{mean.max():.6g}, var={var.min():.6g}..{var.max():.6g}"
        return text + ")"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, as JSON takes them; `from_dict` gives the same bits back."""
        rows = {"mean": self._mean, "mean_rest": self._rest, "m2": self._m2}
        return {"count": self._count, **{name: row.tolist() for name, row in rows.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BatchStats:
        """What `to_dict` returned. Raises TypeError or ValueError if it is anything else."""
        values = _checks.mapping("values", values)
        try:
            count, mean, rest, m2 = (values[key] for key in ("count", "mean", "mean_rest", "m2"))
            channels = len(mean)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"values: expected count, mean, mean_rest and m2 as to_dict() gives them, got {_checks.said(values)}"
            ) from error
        count = _checks.count("count", count)
        mean, rest, m2 = (
            np.array(_checks.vector(name, value, channels), np.float64)
            for name, value in (("mean", mean), ("mean_rest", rest), ("m2", m2))
        )
        if np.any(m2 < 0):
            raise ValueError(f"m2: expected sums of squares, got {m2.min()}")
        if count == 0 and np.any([mean, rest, m2]):
            raise ValueError("count: expected one above 0, as there are a mean and m2, got 0")
        return cls.__new__(cls)._set(count, mean, rest, m2)
