"""The benchmark's strategies, one readable file each.

To compare a memory of your own: write a file with a function from
:class:`~strategies.common.Setup` to :class:`~strategies.common.Contender`, and name it here.
"""

from collections.abc import Callable

from strategies.common import Contender, Setup
from strategies.condensed_replay import condensed_replay
from strategies.cumulative import cumulative
from strategies.gdumb import gdumb
from strategies.memory_only import memory_only
from strategies.naive import naive
from strategies.stock_replay import stock_herding, stock_replay, stock_reservoir

PROTOCOLS: dict[str, Callable[[Setup], Contender]] = {
    "memory-only": memory_only,
    "gdumb": gdumb,
    "replay": condensed_replay,
}
"""What is done with a condensed memory; the methods are the recipes that fill it."""

WITHOUT_RECIPE: dict[str, Callable[[Setup], Contender]] = {
    "naive": naive,
    "cumulative": cumulative,
    "stock_replay": stock_replay,
    "stock_herding": stock_herding,
    "stock_reservoir": stock_reservoir,
}
"""Methods that fill no condensed memory, for comparison under the protocol ``replay``."""
