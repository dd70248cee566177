"""Shows which product keys were read, as a picture and as numbers for a histogram.

The usage map has side x side cells; each is one row of the table if there are at most 256 sub-keys.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REACH = 6
"""log2 of the relative load at both ends of the colour scale."""
TICKS = {-6: "1/64", -3: "1/8", 0: "uniform", 3: "8x", 6: "64x"}
"""log2 of the relative load -> its label on the colour bar."""


def relative_load(usage: NDArray[Any], num_keys: int) -> NDArray[np.float64]:
    """Reads of each cell divided by those under uniform reads.

    Args:
        usage: reads of each cell, [side, side].
        num_keys: N, the number of sub-keys per query half.

    Returns:
        [side, side]; 1 where a cell is read as often as under uniform reads.
    """
    side = len(usage)
    keys = np.bincount(np.arange(num_keys) * side // num_keys, minlength=side)
    expected = np.outer(keys, keys) * (usage.sum() / num_keys**2)
    return np.asarray(usage / expected, dtype=np.float64)


class UsageMap:
    """Draws the relative load of each cell as a colour on a log scale; unread cells are black.

    The same figure is used for every layer and iteration. A figure is part of a reference cycle, so
    new ones, of 3 MB each, would fill memory while --manual-gc turns Python's collector off.
    """

    def __init__(self, num_keys: int) -> None:
        # the import takes a third of a second, and only runs that draw pictures need it
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(7.5, 6), dpi=100)
        self.axes = self.figure.add_axes((0.1, 0.08, 0.72, 0.86))
        self.axes.set(xlabel="sub-key of the second half", ylabel="sub-key of the first half")
        self.image = self.axes.imshow(
            [[0]],
            # unlike magma and inferno, viridis has no colour that looks like black
            cmap=colormaps["viridis"].with_extremes(bad="black"),
            vmin=-REACH,
            vmax=REACH,
            interpolation="nearest",
            # the axes count sub-keys, also if a cell stands for several
            extent=(-0.5, num_keys - 0.5, num_keys - 0.5, -0.5),
        )
        place = self.figure.add_axes((0.85, 0.08, 0.03, 0.86))
        bar = self.figure.colorbar(self.image, cax=place, extend="both")
        bar.set_ticks(list(TICKS), labels=list(TICKS.values()))
        bar.set_label("reads relative to uniform reads (black: not read)")

    def draw(self, load: NDArray[np.float64], title: str) -> "Figure":
        """Draw these loads [side, side]; returns the figure, which the next call changes.

        The figure is not registered with pyplot.
        """
        # np.ma.log2 masks the cells that were not read
        self.image.set_data(np.ma.log2(load))
        self.axes.set_title(title)
        return self.figure


def load_levels(load: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log2 of the relative load of the cells that were read, and bin edges for their histogram.

    Cells that were not read have no logarithm; the scalar rows_used reports how many there are.

    Returns:
        Levels [cells that were read], and ascending edges of bins that hold all of them. Bins are
        0.5 wide, and 0, the level of uniform reads, is in the middle of one.
    """
    levels = np.log2(load[load > 0])
    return levels, np.arange(np.floor(levels.min()) - 0.25, np.ceil(levels.max()) + 0.5, 0.5)
