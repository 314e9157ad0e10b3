"""Signals: numbers per token that are read from one block, one class for each signal.

A signal is built in, or an installed package provides it through an entry point.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar

import torch
import torch.nn.functional as functional

from afn_ray.config import SIGNAL, SIGNAL_GROUP, TOP_NEURONS, signal_names
from afn_ray.errors import ConfigError
from afn_ray.schema import STRENGTH, Series
from afn_ray.text import nearest

NEEDS = frozenset({"attention", "mean", "neurons", "norm", "outliers"})
"""Inputs beside hidden states that a signal can need."""
DIMENSIONS = 3
"""Number of outlier dimensions of a layer."""
TAKEN = frozenset({"high", "quartile", "sink", "neurons"})
"""Names of other columns that end in a layer number; a signal's column cannot have them."""


@dataclass(slots=True)
class Attention:
    """Attention that the tokens of a packed batch receive in one block.

    All are float32 [heads, 1, rows]. ``received`` is the attention from other tokens: the mean over
    the tokens of the same sequence that may attend to this one, 0 if there are none. ``own`` is the
    attention from the token itself. ``norms`` is the L2 norm of the token's value after the head's
    part of the output projection.
    """

    received: torch.Tensor
    own: torch.Tensor
    norms: torch.Tensor


@dataclass(slots=True)
class Site:
    """The values of one block for one batch, on the model's device.

    The rows are tokens, then filler. The last five fields are set only for signals that need them.
    """

    layer: int  # 0: the embeddings
    hidden: torch.Tensor  # output of the block, [..., rows, hidden_size]
    before: torch.Tensor | None = None  # input of the block, same shape; None at layer 0
    attention: Attention | None = None
    # Input of the MLP's last product, [..., rows, intermediate_size].
    neurons: torch.Tensor | None = None
    # Output of the LayerNorm that ends the block, without its gain and bias.
    unscaled: torch.Tensor | None = None
    # Outlier dimensions of the hidden state, int64 [DIMENSIONS], found by the calibration.
    outliers: torch.Tensor | None = None
    # Mean hidden state, float32 [hidden_size], found by the calibration.
    mean: torch.Tensor | None = None


class Signal(ABC):
    """Numbers read from a block for each token. Subclasses take no arguments and keep no state."""

    name: ClassVar[str]
    """Name of the signal in ``--signals``."""
    columns: ClassVar[tuple[str, ...]]
    """Names of the measured numbers; the tables append the layer, as in ``strength_8``."""
    unit: ClassVar[str]
    """Unit of the numbers, in words."""
    first_layer: ClassVar[int] = 0
    """First layer that has the signal: 0, or 1 if the embeddings do not have it."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Members of ``NEEDS`` that the signal reads; they are computed only on demand."""
    number_columns: ClassVar[tuple[str, ...]] = ()
    """Names of whole numbers below 2^31 measured beside ``columns``; only ``neurons`` has any."""
    is_series: ClassVar[bool] = True
    """True if each of ``columns`` is a column of the tokens table; false if they have their own."""

    @abstractmethod
    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        """One float32 tensor [..., rows] for each of ``columns``, on the same device.

        All numbers are finite and not negative. An int32 tensor [..., rows] for each of
        ``number_columns`` follows.
        """


def series(layers: Sequence[int], signals: Sequence[Signal]) -> list[Series]:
    """All series of ``signals`` at ``layers``, in the order of the tables.

    The order is by signal, then by column, then by layer.
    """
    found = []
    for signal in signals:
        if signal.is_series:
            for column in signal.columns:
                found += [Series(column, k) for k in layers if k >= signal.first_layer]
    return found


def measured(layers: Sequence[int], signals: Sequence[Signal]) -> list[Series]:
    """Every float32 value of a token: ``series``, then values for separate tables by layer."""
    found = series(layers, signals)
    for signal in signals:
        if not signal.is_series:
            found += _by_layer(layers, signal, signal.columns)
    return found


def numbered(layers: Sequence[int], signals: Sequence[Signal]) -> list[Series]:
    """Every int32 number of a token, by signal, then by layer, then by column."""
    found = []
    for signal in signals:
        found += _by_layer(layers, signal, signal.number_columns)
    return found


def _by_layer(layers: Sequence[int], signal: Signal, columns: Sequence[str]) -> list[Series]:
    """The ``columns`` of ``signal`` at those of ``layers`` that have it, by layer."""
    found = []
    for k in layers:
        if k >= signal.first_layer:
            found += [Series(column, k) for column in columns]
    return found


class Strength(Signal):
    """Token Activation Strength: L2 norm of the hidden state (arXiv:2605.22377)."""

    name = STRENGTH
    columns = (STRENGTH,)
    unit = "of the hidden state"

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        return [norm(site.hidden)]


class Shift(Signal):
    """L2 norm of the block's change: its output minus its input."""

    name = "shift"
    columns = ("shift",)
    unit = "of the hidden state"
    first_layer = 1

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        assert site.before is not None
        return [norm(site.hidden - site.before)]


class Centred(Signal):
    """The strength without the gain and the bias of the LayerNorm that ends the block.

    It is nearly sqrt(hidden_size) for every token. So strengths differ only by how far a token
    points into the dimensions of large gain. Blocks that end in a sum have no such norm.
    """

    name = "centred"
    columns = ("strength_centred",)
    unit = "standard deviations"
    first_layer, needs = 1, frozenset({"norm"})

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        assert site.unscaled is not None
        return [norm(site.unscaled)]


class Trimmed(Signal):
    """The strength without the layer's outlier dimensions.

    The calibration finds these dimensions, and the run stores them.
    """

    name = "trimmed"
    columns = ("strength_trimmed",)
    unit = "of the hidden state"
    needs = frozenset({"outliers"})

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        assert site.outliers is not None
        return [norm(site.hidden.index_fill(-1, site.outliers, 0))]


class CentredMean(Signal):
    """L2 norm of the hidden state minus the layer's mean state.

    The calibration finds the mean state on a sample of the corpus, and the measure has it.
    """

    name = "centred_mean"
    columns = ("strength_centred_mean",)
    unit = "of the hidden state"
    needs = frozenset({"mean"})

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        assert site.mean is not None
        return [norm(site.hidden - site.mean)]


class States(Signal):
    """Whole hidden states [..., rows, hidden_size], for use inside the package; never recorded."""

    name = "states"
    columns = ("states",)
    unit = "of the hidden state"

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        return [site.hidden.float()]


class Received(Signal):
    """Attention that the token receives in the layer.

    ``attention``: from the other tokens of its window, mean over these tokens and over heads.
    ``attention_self``: from itself, mean over heads. ``attention_norm``: how much the token adds to
    the other tokens, mean over them. It is each head's attention weight times the L2 norm of the
    transformed value, summed over heads (Kobayashi et al. 2020, arXiv:2004.10102, before the sum
    over heads). In a causal model the other tokens are those after this one.
    """

    name, columns = "attention", ("attention", "attention_self", "attention_norm")
    unit = "share of a token's attention; of the hidden state for attention_norm"
    first_layer, needs = 1, frozenset({"attention"})

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        seen = site.attention
        assert seen is not None
        return [seen.received.mean(0), seen.own.mean(0), (seen.received * seen.norms).sum(0)]


class Neurons(Signal):
    """The MLP's neurons with the largest absolute values.

    Values are read after the non-linearity; in a gated MLP, after the product with the gate. The
    columns are the ``top`` values, the largest absolute value first; the number columns are the
    neurons' numbers in the same order. A value of 0 means no neuron. They go into the table
    ``token_neurons``.
    """

    name, unit = "neurons", "of the input of the MLP's last product"
    first_layer = 1
    needs = frozenset({"neurons"})
    is_series = False

    def __init__(self, top: int = TOP_NEURONS) -> None:
        self.columns = tuple(f"value_{i}" for i in range(top))  # type: ignore[misc]
        self.number_columns = tuple(f"neuron_{i}" for i in range(top))  # type: ignore[misc]
        self._top = top

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        assert site.neurons is not None
        neurons = site.neurons.float()
        which = neurons.abs().topk(min(self._top, neurons.shape[-1])).indices
        missing = (0, self._top - which.shape[-1])  # an MLP may have fewer neurons than ``top``
        columns: list[torch.Tensor] = []
        for found in (neurons.gather(-1, which), which.int()):
            columns += functional.pad(found, missing).unbind(-1)
        return columns


def norm(hidden: torch.Tensor) -> torch.Tensor:
    """L2 norms, float32 [...], of ``hidden`` [..., hidden_size] in any float dtype.

    The sum is accumulated in float32: in bfloat16 it would flip 1.6 % of the HIGH labels.
    """
    norms: torch.Tensor = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
    return norms


BUILT_IN: dict[str, type[Signal]] = {
    s.name: s for s in (Strength, Shift, Centred, Trimmed, CentredMean, Received, Neurons)
}


def known() -> list[str]:
    """Names of all signals: the built-in ones, and those of installed packages."""
    return [*BUILT_IN, *sorted(_elsewhere().keys() - BUILT_IN)]


def _elsewhere() -> dict[str, EntryPoint]:
    """Signals of installed packages, by name."""
    return {point.name: point for point in entry_points(group=SIGNAL_GROUP)}


def find_signals(text: str, top_neurons: int = TOP_NEURONS) -> tuple[tuple[Signal, ...], list[str]]:
    """The signals that ``text`` names, and the identity of each.

    The identity is the signal's name. For a signal of an installed package it includes the name and
    version of the package: another version is another measure. Raises ``ConfigError`` for an
    unknown name, for a class that is no valid ``Signal``, and for two signals with the same column.
    """
    found: list[Signal] = []
    identities = []
    names = signal_names(text)
    # Reading what is installed takes milliseconds.
    others = {} if all(name in BUILT_IN for name in names) else _elsewhere()
    for name in names:
        if name in BUILT_IN:
            found.append(Neurons(top_neurons) if name == Neurons.name else BUILT_IN[name]())
            identities.append(name)
        elif name in others:
            found.append(_load(others[name]))
            package = others[name].dist
            identities.append(f"{name} of {package.name} {package.version}" if package else name)
        else:
            raise ConfigError(
                f"there is no signal {name!r}{nearest([name], known())}; there are "
                f"{', '.join(known())}"
            )
    columns: list[str] = []
    for signal in found:
        columns += [*signal.columns, *signal.number_columns]
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise ConfigError(f"two signals measure {', '.join(twice)}; leave one of them out")
    return tuple(found), identities


def _load(point: EntryPoint) -> Signal:
    """The signal at ``point``. Raises ``ConfigError`` if it cannot be loaded or is not valid."""
    where = f"signal {point.name!r} ({point.value})"
    try:
        signal = point.load()()
        if not isinstance(signal, Signal):
            raise ConfigError(f"{where} is no subclass of afn_ray.signals.Signal")
        names_are_right = bool(signal.columns) and all(map(SIGNAL.fullmatch, signal.columns))
        names_are_right = names_are_right and not TAKEN & {*signal.columns}
        names = f"names of small letters and _, none of {', '.join(sorted(TAKEN))}"
        needs = f"some of {', '.join(sorted(NEEDS))}"
        wrong = []
        for name, expected, is_right in (
            ("name", repr(point.name), signal.name == point.name),
            ("columns", names, names_are_right),
            ("number_columns", "()", signal.number_columns == ()),
            ("is_series", "True", signal.is_series is True),
            ("first_layer", "0 or 1", signal.first_layer in (0, 1)),
            ("needs", needs, frozenset(signal.needs) <= NEEDS),
        ):
            if not is_right:
                wrong.append(f"{name} is {getattr(signal, name)!r}, expected {expected}")
    except ConfigError:
        raise
    except Exception as error:  # third-party code may raise any error
        raise ConfigError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if wrong:
        raise ConfigError(f"{where} is no signal: {'; '.join(wrong)}")
    return signal
