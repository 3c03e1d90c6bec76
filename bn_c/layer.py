"""The layer: parameters, running statistics and the mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bn_c import _checks, _core, _threads
from bn_c.functional import Activation
from bn_c.stats import BatchStats

Floats = NDArray[np.float32]
TORCH_KEYS = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
COUNTER = "num_batches_tracked"


class _PerChannel:
    """A float32 array of one value per channel: read-only to read, checked when assigned, None if absent."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: BatchNorm | None, owner: type) -> Any:
        if layer is None:
            return self
        array = layer._arrays.get(self.name)
        return None if array is None else array.view()

    def __set__(self, layer: BatchNorm, value: ArrayLike) -> None:
        if self.name not in layer._arrays:
            raise ValueError(f"{self.name}: expected no assignment, this layer was made without it")
        layer._assign({self.name: value})


class BatchNorm(_core.Layer):
    """The batch normalization layer, forward only; a new one is in inference mode.

    In inference mode `bn(x)` normalises with the running statistics. In training mode it normalises with those
    of the mini-batch and moves the running ones:

        running = (1 - momentum) * running + momentum * batch

    Parameters
    ----------
    num_features : int
        The number of channels, C.
    eps : float
        Added to the variance; finite, >= 0.
    momentum : float from 0 to 1, or None
        The weight of the new mini-batch, as in PyTorch; None: the average of all mini-batches.
    axis : int
        Where inputs have their channels: 1, or -1 for channels last.
    affine : bool
        Whether there are gamma and beta; else they are None.
    track_running_stats : bool
        Whether there are running statistics; else they are None and every call uses those of its mini-batch.
    unbiased_running_var : bool
        Whether running_var takes the variance divided by m - 1, as in PyTorch, or by m, as in Keras and ONNX.
    activation : None, "relu", "relu6", "hard_swish", ("leaky_relu", slope) or ("clip", low, high)
        Applied to y in the same pass.
    allow_single_value : bool
        Whether training takes mini-batches of one value per channel: y is beta, running_var keeps its value.
    training : bool
        The mode to begin with.
    num_threads : int or None
        Threads of each call; the result does not depend on it. None: `bn_c.get_num_threads()`.

    Attributes
    ----------
    gamma, beta, running_mean, running_var : read-only float32 arrays of shape (C,), or None
        Changed by assignment of any float dtype or list, from the next call on.
    num_batches_tracked : int
        Mini-batches seen in training mode.
    eps, momentum, activation, num_threads, training
        Can be assigned.
    num_features, axis
        Cannot.

    Methods
    -------
    bn(x, *, residual=None, mask=None, dtype=None, out=None)
        y. All are as in `batch_norm`; mask selects what enters the statistics of the mini-batch, and counts only where
        they are used. May be called from several threads at once.
    train(), eval()
        Change the mode and return the layer.
    adapt(x)
        Moves the running statistics to those of a drifted sensor.
    state_dict(), load_state_dict(state), from_torch(state), from_keras(...), from_onnx(model)
        To and from other frameworks; files: `load_layers`, `save_layers`. Layers can be pickled and copied.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came. A call that raises changes nothing. ValueError also for
        one value per channel in training mode, which has no variance, unless `allow_single_value`.

    Examples
    --------
    >>> bn = bn_c.BatchNorm(2, activation="relu")
    >>> bn.running_mean, bn.running_var = [10, 20], [4, 25]
    >>> bn(np.array([[12, 30]], np.float32)).round(3)
    array([[1., 2.]], dtype=float32)
    >>> _ = bn.train()(np.array([[10, 10], [20, 30]], np.float32))  # learns 0.1 of it
    >>> bn.eval().running_mean
    array([10.5, 20. ], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        axis: int = 1,
        affine: bool = True,
        track_running_stats: bool = True,
        unbiased_running_var: bool = True,
        activation: Activation = None,
        allow_single_value: bool = False,
        training: bool = False,
        num_threads: int | None = 1,
    ) -> None:
        channels = _checks.num_features(num_features)
        self._num_features = channels
        self._axis = _checks.axis(axis)
        self._unbiased_running_var = _checks.flag("unbiased_running_var", unbiased_running_var)
        self._allow_single_value = _checks.flag("allow_single_value", allow_single_value)
        self._arrays: dict[str, Floats] = {}
        self.eps = eps
        self.momentum = momentum
        self.activation = activation
        self.num_threads = num_threads
        self.training = training
        self._num_batches_tracked = 0
        if _checks.flag("affine", affine):
            self._assign({"gamma": np.ones(channels), "beta": np.zeros(channels)})
        if _checks.flag("track_running_stats", track_running_stats):
            self._assign({"running_mean": np.zeros(channels), "running_var": np.ones(channels)})

    gamma = _PerChannel("The scale of each channel, float32 (C,).")
    beta = _PerChannel("The shift of each channel, float32 (C,).")
    running_mean = _PerChannel("The mean of each channel in inference, float32 (C,).")
    running_var = _PerChannel("The variance of each channel in inference, float32 (C,).")

    # Whatever calls depend on changes together with the version, so that what a running call has folded is not kept.
    # What takes memory is made before that: if there is none left, nothing has changed.

    def _assign(self, values: Mapping[str, Any]) -> None:
        """Checks all values, then takes them."""
        self._take(self._checked(values))

    def _checked(self, values: Mapping[str, Any]) -> dict[str, Floats]:
        arrays = {}
        for name, value in values.items():
            arrays[name] = np.array(_checks.vector(name, value, self._num_features), np.float32)
            arrays[name].flags.writeable = False
        return arrays

    def _take(self, arrays: dict[str, Floats]) -> None:
        version = object()
        self._arrays.update(arrays)
        self._version = version
        self._ready = None

    @property
    def num_features(self) -> int:
        """The number of channels."""
        return self._num_features

    @property
    def axis(self) -> int:
        """Where inputs have their channels."""
        return self._axis

    @property
    def eps(self) -> float:
        """Added to the variance."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps, self._version = _checks.eps(value), object()
        self._ready = None

    @property
    def momentum(self) -> float | None:
        """The weight of the new mini-batch in the running statistics; None: the average of all."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        self._momentum = None if value is None else _checks.momentum(value)

    @property
    def activation(self) -> Activation:
        """Applied to y."""
        return self._activation

    @activation.setter
    def activation(self, value: Activation) -> None:
        self._checked_activation, self._activation, self._version = _checks.activation(value), value, object()
        self._ready = None

    @property
    def num_threads(self) -> int | None:
        """Threads of each call; None: `bn_c.get_num_threads()`."""
        return self._num_threads

    @num_threads.setter
    def num_threads(self, value: int | None) -> None:
        self._num_threads, self._version = None if value is None else _checks.num_threads(value), object()
        self._ready = None

    @property
    def num_batches_tracked(self) -> int:
        """Mini-batches seen in training mode."""
        return self._num_batches_tracked

    @num_batches_tracked.setter
    def num_batches_tracked(self, value: int) -> None:
        self._num_batches_tracked = _checks.count("num_batches_tracked", value)

    @property
    def training(self) -> bool:
        """Whether calls use, and learn from, the statistics of their mini-batch."""
        return self._training

    @training.setter
    def training(self, value: bool) -> None:
        self._training, self._version = _checks.flag("training", value), object()
        self._ready = None

    def train(self, mode: bool = True) -> BatchNorm:
        """Training mode, or inference mode if `mode` is False. Returns the layer."""
        self.training = mode
        return self

    def eval(self) -> BatchNorm:
        """Inference mode. Returns the layer."""
        return self.train(False)

    def _forward(self, x: Any, residual: Any, mask: Any, dtype: Any, out: Any) -> NDArray[Any]:
        """Any call that is not just x, residual and out with statistics already folded."""
        x = _checks.array("x", x)
        mask, counted = _checks.mask(mask, x, self._axis)
        version = self._version
        options = (
            self._checked_activation,
            self._axis,
            _checks.optional_array("residual", residual),
            _checks.out_dtype(dtype),
            _checks.out(out),
            _threads.resolve(self._num_threads),
        )
        if self._training or "running_mean" not in self._arrays:
            y = self._normalize_batch(x, mask, counted, options)
        else:
            folded = self._ready
            if folded is None:
                arrays = self._arrays.copy()
                folded = self._parameters(arrays).fold(arrays["running_mean"], arrays["running_var"], self._eps)
                self._keep(folded, version, self._checked_activation, self._axis, self._num_threads or 0)
            y = _core.normalize(x, folded, *options)
        return y if out is None else out

    def _parameters(self, arrays: Mapping[str, Floats]) -> _core.Folded:
        return _core.Folded(self._num_features, arrays.get("gamma"), arrays.get("beta"))

    def _normalize_batch(
        self, x: NDArray[Any], mask: NDArray[Any] | None, counted: int, options: tuple[Any, ...]
    ) -> NDArray[Any]:
        if self._training and not self._allow_single_value:
            channels = _checks.channels(x, self._axis)
            if channels and x.size and (x.size == channels if mask is None else counted == 1):
                raise ValueError(
                    f"x: expected more than one value per channel in training mode, got shape "
                    f"{_checks.shape(x.shape)}{'' if mask is None else ' with one that the mask selects'}; "
                    f"allow_single_value=True takes it"
                )
        folded = self._parameters(self._arrays.copy())
        y = _core.normalize_batch(x, folded, self._eps, mask, counted, *options)
        if self._training and "running_mean" in self._arrays:
            self._track(folded)
        return y

    def _track(self, batch: _core.Folded) -> None:
        seen = self._num_batches_tracked + 1
        weight = 1 / seen if self._momentum is None else self._momentum
        running = self._arrays["running_mean"], self._arrays["running_var"]
        self._take(batch.running(*running, weight, self._unbiased_running_var))
        self._num_batches_tracked = seen

    def adapt(self, x: Any, prior: float = 16) -> BatchNorm:
        """Re-centres a trained layer on data from a sensor that has drifted (Schneider et al. 2020, arXiv:2006.16971).

            running = (prior * running + n * batch) / (prior + n)

        for running_mean and running_var, with x's own mean and biased variance and n, the number of samples in x.

        Parameters
        ----------
        x : array
            As in a call; its first dimension counts samples. If that one has the channels, x is one sample.
        prior : float
            How many samples the present statistics are worth; finite, >= 0. 0 takes those of x alone.

        Returns
        -------
        BatchNorm
            The layer. Neither the mode nor num_batches_tracked changes.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what was expected and what came; also if x has no element per channel, or the layer
            no running statistics. Nothing changes then.
        """
        prior = _checks.finite("prior", prior)
        x = _checks.array("x", x)
        threads = _threads.resolve(self._num_threads)
        stats = BatchStats.of(*_core.moments(x, None, 0, self._axis, self._num_features, threads))
        if stats.count == 0:
            raise ValueError(f"x: expected at least one element per channel, got shape {_checks.shape(x.shape)}")
        if "running_mean" not in self._arrays:
            raise ValueError("running_mean: expected a layer with running statistics, this one was made without")
        samples = 1 if self._axis % x.ndim == 0 else x.shape[0]
        arrays, update = self._arrays.copy(), {}
        with np.errstate(all="ignore"):
            for name, batch in (("running_mean", stats.mean), ("running_var", stats.var)):
                old = prior / (prior + samples) * arrays[name].astype(np.float64) if prior else 0.0
                update[name] = old + samples / (prior + samples) * batch
            self._assign(update)
        return self

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of the parameters and running statistics, under PyTorch's keys."""
        state: dict[str, NDArray[Any]] = {
            key: self._arrays[name].copy() for key, name in TORCH_KEYS.items() if name in self._arrays
        }
        if "running_mean" in self._arrays:
            state[COUNTER] = np.array(self._num_batches_tracked, np.int64)
        return state

    def load_state_dict(self, state: Mapping[str, Any], prefix: str = "") -> None:
        """Takes parameters and running statistics from a dict with PyTorch's keys, each after `prefix`.

        Other keys, and a missing num_batches_tracked, are ignored. Values may be arrays, lists or CPU tensors.
        Raises TypeError or ValueError, and changes nothing, if a key is missing or a value does not fit.
        """
        state = _state(state, prefix)
        values = {}
        for key, name in TORCH_KEYS.items():
            if name in self._arrays:
                if prefix + key not in state:
                    raise ValueError(f"state: expected a key {prefix + key!r}, got {_checks.names(state)}")
                values[name] = _checks.vector(_of_state(prefix + key), state[prefix + key], self._num_features)
        count = self._num_batches_tracked
        if prefix + COUNTER in state:
            count = _checks.count(_of_state(prefix + COUNTER), state[prefix + COUNTER])
        self._assign(values)
        self._num_batches_tracked = count

    @classmethod
    def from_torch(cls, state: Mapping[str, Any], prefix: str = "", **options: Any) -> BatchNorm:
        """The layer of a PyTorch state dict.

        Parameters
        ----------
        state : mapping
            A state dict, also of a whole model; arrays, lists or CPU tensors.
        prefix : str
            What the layer's keys begin with, such as "layer1.0.bn1.".
        options
            As in the constructor: `eps`, which is not in a state dict, `momentum`, `axis`, `activation` ...
        """
        state = _state(state, prefix)
        found = {name: prefix + key for key, name in TORCH_KEYS.items() if prefix + key in state}
        if not found:
            raise ValueError(f"state: expected keys such as {prefix + 'running_mean'!r}, got {_checks.names(state)}")
        defaults = {
            "affine": "gamma" in found or "beta" in found,
            "track_running_stats": "running_mean" in found or "running_var" in found,
        }
        first = next(iter(found.values()))
        layer = cls(_checks.length(_of_state(first), state[first]), **{**defaults, **options})
        layer.load_state_dict(state, prefix)
        return layer

    @classmethod
    def from_keras(
        cls,
        gamma: ArrayLike | None,
        beta: ArrayLike | None,
        moving_mean: ArrayLike,
        moving_variance: ArrayLike,
        *,
        epsilon: float = 1e-3,
        axis: int = -1,
    ) -> BatchNorm:
        """The layer of the weights of a Keras `BatchNormalization`.

        Parameters
        ----------
        gamma, beta, moving_mean, moving_variance : (C,) arrays, lists or Keras variables
            `layer.get_weights()` has those that there are, in this order; gamma or beta is None where it is missing
            (`scale=False`, `center=False`).
        epsilon, axis
            As in Keras, with its defaults.

        Returns
        -------
        BatchNorm
            In training mode it moves the running statistics as Keras does by default: 0.01 of each new mini-batch
            (Keras' momentum 0.99 is the weight of the old), with the variance divided by m.
        """
        epsilon = _checks.finite("epsilon", epsilon)
        channels = _checks.length("moving_mean", moving_mean)
        affine = gamma is not None or beta is not None
        values = {
            "gamma": np.ones(channels) if gamma is None else _checks.vector("gamma", gamma, channels),
            "beta": np.zeros(channels) if beta is None else _checks.vector("beta", beta, channels),
            "running_mean": _checks.vector("moving_mean", moving_mean, channels),
            "running_var": _checks.vector("moving_variance", moving_variance, channels),
        }
        layer = cls(channels, eps=epsilon, momentum=0.01, axis=axis, affine=affine, unbiased_running_var=False)
        layer._assign({name: value for name, value in values.items() if name in layer._arrays})
        return layer

    @classmethod
    def from_onnx(cls, model_or_path: Any, node: str | None = None) -> BatchNorm:
        """The layer of a BatchNormalization node of an ONNX model, of any opset.

        Parameters
        ----------
        model_or_path : onnx.ModelProto, or path of an .onnx file
            External data is found next to the file.
        node : str, optional
            The node's name or that of its output; None: the only one that there is.

        Returns
        -------
        BatchNorm
            With momentum as the weight of the new mini-batch, 1 - that of ONNX, and in training mode if the node is.

        Raises
        ------
        OSError
            If the file cannot be read.
        TypeError, ValueError
            Naming the argument; also if a parameter is no constant but computed at run time.
        ImportError
            If onnx is not installed: `pip install 'bn-c[models]'`.
        """
        from bn_c import models

        return models.from_onnx(cls, model_or_path, node)

    def _options(self) -> dict[str, Any]:
        """What the constructor was given, with what has been assigned since."""
        return {
            "eps": self.eps,
            "momentum": self.momentum,
            "axis": self.axis,
            "affine": "gamma" in self._arrays,
            "track_running_stats": "running_mean" in self._arrays,
            "unbiased_running_var": self._unbiased_running_var,
            "activation": self.activation,
            "allow_single_value": self._allow_single_value,
            "training": self.training,
            "num_threads": self.num_threads,
        }

    def __repr__(self) -> str:
        return f"BatchNorm({self.num_features}, {', '.join(f'{k}={v!r}' for k, v in self._options().items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        more = {name: value for name, value in vars(self).items() if name not in OWN}
        options = self._options()
        return _rebuilt, (type(self), self.num_features, options, self._arrays, self._num_batches_tracked, more)


def _of_state(key: str) -> str:
    """A value of a state dict, as messages name it."""
    return f"state[{key!r}]"


def _state(state: Any, prefix: Any) -> Mapping[str, Any]:
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a string, got {_checks.kind(prefix)}")
    return _checks.mapping("state", state)


def _rebuilt(
    cls: type[BatchNorm],
    num_features: int,
    options: dict[str, Any],
    arrays: dict[str, Floats],
    batches: int,
    more: dict[str, Any],
) -> BatchNorm:
    """A layer as it was when it was pickled or copied; `more` are attributes that users and subclasses gave it."""
    layer = cls.__new__(cls)
    BatchNorm.__init__(layer, num_features, **options)
    layer._assign(arrays)
    layer.num_batches_tracked = batches
    vars(layer).update(more)
    return layer


OWN = frozenset(vars(BatchNorm(0)))  # the attributes of every layer
