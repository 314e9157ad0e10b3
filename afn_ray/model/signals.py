"""What is read off one block of the model: a small class for each signal, found by name or by entry
point.
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

NEEDS = frozenset({"attention", "neurons", "norm", "outliers"})
DIMENSIONS = 3
"""Outlier dimensions of a layer."""
TAKEN = frozenset({"high", "quartile", "sink", "neurons"})
"""Columns that have a layer behind their name too."""


@dataclass(slots=True)
class Attention:
    """Who gets the attention of one block in a batch of packed sequences.

    ``received`` and ``own`` [heads, 1, rows], float32: what a token gets in the mean over the other
    tokens of its sequence that may attend to it (0 where there is none), and from itself. ``norms``
    [heads, 1, rows]: length of what a head would add for this token alone, its value through the
    head's part of the output projection.
    """

    received: torch.Tensor
    own: torch.Tensor
    norms: torch.Tensor


@dataclass(slots=True)
class Site:
    """What one block gave for a batch, all on the model's device; the rows are tokens, and
    filler.
    """

    layer: int  # 0: the embeddings
    hidden: torch.Tensor  # [..., rows, hidden_size], output of the block
    before: torch.Tensor | None = None  # the same of its input; None at layer 0
    attention: Attention | None = None  # only for signals that need it, as is the next
    neurons: torch.Tensor | None = (
        None  # [..., rows, intermediate_size], what goes into the MLP's last product
    )
    unscaled: torch.Tensor | None = (
        None  # the output before the gain and bias of the LayerNorm that ends the block
    )
    outliers: torch.Tensor | None = (
        None  # int64 [DIMENSIONS], of the hidden state, found on a pilot
    )


class Signal(ABC):
    """Numbers read off a block for each token. Subclasses take no arguments and keep no state."""

    name: ClassVar[str]
    """As in ``--signals``."""
    columns: ClassVar[tuple[str, ...]]
    """What it measures; in the tables each is followed by the layer, as in ``strength_8``."""
    unit: ClassVar[str]
    first_layer: ClassVar[int] = 0
    """1 for what the embeddings have not."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Of ``NEEDS``, which cost time and are made only for those who ask."""
    is_series: ClassVar[bool] = True
    """Whether each of ``columns`` is a column of the tokens table; false for what has a table of
    its own.
    """

    @abstractmethod
    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        """For each of ``columns`` finite, non-negative numbers [..., rows], float32, on the same
        device.
        """


def series(layers: Sequence[int], signals: Sequence[Signal]) -> list[Series]:
    """What ``signals`` measure at ``layers``, in the order of the tables: signal by signal, layers
    in their order.
    """
    return [
        Series(c, k)
        for s in signals
        if s.is_series
        for c in s.columns
        for k in layers
        if k >= s.first_layer
    ]


def measured(layers: Sequence[int], signals: Sequence[Signal]) -> list[Series]:
    """All that a model gives: the ``series``, then layer by layer what goes into tables of its
    own.
    """
    others = [
        Series(c, k)
        for s in signals
        if not s.is_series
        for k in layers
        if k >= s.first_layer
        for c in s.columns
    ]
    return [*series(layers, signals), *others]


class Strength(Signal):
    """Token Activation Strength: L2 norm of the hidden state (arXiv:2605.22377)."""

    name, columns, unit = STRENGTH, (STRENGTH,), "of the hidden state"

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        return [norm(site.hidden)]


class Shift(Signal):
    """L2 norm of what the block changed: of its output less its input."""

    name, columns, unit = "shift", ("shift",), "of the hidden state"
    first_layer = 1

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        assert site.before is not None
        return [norm(site.hidden - site.before)]


class Centred(Signal):
    """The strength without the gain and the bias of the LayerNorm that ends the block.

    All but the same for every token, sqrt(hidden_size): what differs in strength is how far a token
    points into the dimensions of large gain. Blocks that end in a sum have no such norm.
    """

    name, columns, unit = "centred", ("strength_centred",), "standard deviations"
    first_layer, needs = 1, frozenset({"norm"})

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        assert site.unscaled is not None
        return [norm(site.unscaled)]


class Trimmed(Signal):
    """The strength without the layer's outlier dimensions, which are found on a pilot and kept in
    the run.
    """

    name, columns, unit = "trimmed", ("strength_trimmed",), "of the hidden state"
    needs = frozenset({"outliers"})

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        assert site.outliers is not None
        return [norm(site.hidden.index_fill(-1, site.outliers, 0))]


class States(Signal):
    """Whole hidden states [..., rows, hidden_size]: for whoever looks at more of them than a
    number; not recorded.
    """

    name, columns, unit = "states", ("states",), "of the hidden state"

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        return [site.hidden.float()]


class Received(Signal):
    """Attention that the token gets in the layer.

    ``attention``: from the other tokens of its window, in the mean over them and over heads.
    ``attention_self``: from itself, mean over heads. ``attention_norm``: what it adds to the
    others, each head's share of attention times the length of its transformed value, summed over
    heads (Kobayashi et al. 2020, arXiv:2004.10102, before the sum over heads), in the mean over the
    others; in a model whose attention looks back, over those behind it.
    """

    name, columns = "attention", ("attention", "attention_self", "attention_norm")
    unit = "share of a token's attention; of the hidden state for attention_norm"
    first_layer, needs = 1, frozenset({"attention"})

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        seen = site.attention
        assert seen is not None
        return [seen.received.mean(0), seen.own.mean(0), (seen.received * seen.norms).sum(0)]


class Neurons(Signal):
    """The MLP's neurons that are furthest from 0: behind the non-linearity, in a gated MLP the
    product with the gate.

    ``top`` numbers of neurons, then their values in the same order, the furthest first; a value of
    0 is no neuron. They go into the table ``token_neurons``.
    """

    name, unit = "neurons", "of the input of the MLP's last product"
    first_layer, needs, is_series = 1, frozenset({"neurons"}), False

    def __init__(self, top: int = TOP_NEURONS) -> None:
        self.columns = tuple(f"{what}_{i}" for what in ("neuron", "value") for i in range(top))  # type: ignore[misc]
        self._top = top

    def measure(self, site: Site) -> Sequence[torch.Tensor]:
        assert site.neurons is not None
        neurons = site.neurons.float()
        which = neurons.abs().topk(min(self._top, neurons.shape[-1])).indices
        missing = (0, self._top - which.shape[-1])  # of an MLP with fewer neurons
        found = (which.float(), neurons.gather(-1, which))
        return [column for x in found for column in functional.pad(x, missing).unbind(-1)]


def norm(hidden: torch.Tensor) -> torch.Tensor:
    """[..., hidden_size], any float dtype -> L2 norms [...], float32.

    The sum is accumulated in float32: in bfloat16 it would flip 1.6 % of the HIGH labels.
    """
    norms: torch.Tensor = torch.linalg.vector_norm(hidden, dim=-1, dtype=torch.float32)
    return norms


BUILT_IN: dict[str, type[Signal]] = {
    s.name: s for s in (Strength, Shift, Centred, Trimmed, Received, Neurons)
}


def known() -> list[str]:
    """Names that ``find_signals`` finds: ours, and those of installed packages."""
    return [*BUILT_IN, *sorted(_elsewhere().keys() - BUILT_IN)]


def _elsewhere() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=SIGNAL_GROUP)}


def find_signals(text: str, top_neurons: int = TOP_NEURONS) -> tuple[tuple[Signal, ...], list[str]]:
    """The signals that ``text`` names, and what tells each from others of its name: for one of
    another package its version too, since what was measured by another one is another measure.

    Raises ``ConfigError`` for a name that nobody has, and for a class that is no ``Signal``.
    """
    found: list[Signal] = []
    identities = []
    others = _elsewhere()
    for name in signal_names(text):
        if name in BUILT_IN:
            found.append(Neurons(top_neurons) if name == Neurons.name else BUILT_IN[name]())
            identities.append(name)
        elif name in others:
            found.append(_load(others[name]))
            package = others[name].dist
            identities.append(f"{name} of {package.name} {package.version}" if package else name)
        else:
            raise ConfigError(
                f"there is no signal {name!r}{nearest([name], known())}; there are {', '.join(known())}"
            )
    columns = [c for s in found for c in s.columns]
    if twice := sorted({c for c in columns if columns.count(c) > 1}):
        raise ConfigError(f"two signals measure {', '.join(twice)}; leave one of them out")
    return tuple(found), identities


def _load(point: EntryPoint) -> Signal:
    where = f"signal {point.name!r} ({point.value})"
    try:
        signal = point.load()()
        if not isinstance(signal, Signal):
            raise ConfigError(f"{where} is no subclass of afn_ray.signals.Signal")
        names_are_right = bool(signal.columns) and all(SIGNAL.fullmatch(c) for c in signal.columns)
        names_are_right = names_are_right and not TAKEN & {*signal.columns}
        wrong = [
            f"{name} is {getattr(signal, name)!r}, expected {expected}"
            for name, expected, right in (
                ("name", repr(point.name), signal.name == point.name),
                (
                    "columns",
                    f"names of small letters and _, none of {', '.join(sorted(TAKEN))}",
                    names_are_right,
                ),
                ("is_series", "True", signal.is_series is True),
                ("first_layer", "0 or 1", signal.first_layer in (0, 1)),
                ("needs", f"some of {', '.join(sorted(NEEDS))}", frozenset(signal.needs) <= NEEDS),
            )
            if not right
        ]
    except ConfigError:
        raise
    except Exception as error:  # it is somebody else's code
        raise ConfigError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if wrong:
        raise ConfigError(f"{where} is no signal: {'; '.join(wrong)}")
    return signal
