"""Which product keys were read, as a picture and as numbers for a histogram.

Shape key: P x P cells of the usage map, each a row of the table where N <= 256; C cells that were
read.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REACH = 6
"""log2 of the relative load at both ends of the colours."""
TICKS = {-6: "1/64", -3: "1/8", 0: "uniform", 3: "8x", 6: "64x"}
"""log2 of the relative load -> its label at the colour bar."""


def relative_load(usage_PP: NDArray[Any], num_keys: int) -> NDArray[np.float64]:
    """Reads of each cell over those of a uniform pick of rows -> [P, P]; 1 is uniform."""
    side = len(usage_PP)
    keys_P = np.bincount(np.arange(num_keys) * side // num_keys, minlength=side)
    expected_PP = np.outer(keys_P, keys_P) * (usage_PP.sum() / num_keys**2)
    return np.asarray(usage_PP / expected_PP, dtype=np.float64)


class UsageMap:
    """The relative load of every cell as a colour, on a logarithmic scale; unread cells are black.

    One figure is drawn anew for every layer and iteration. A figure refers to itself, so that new
    ones would fill memory, 3 MB each, where --manual-gc keeps Python from looking for cycles.
    """

    def __init__(self, num_keys: int) -> None:
        # takes a third of a second, and is needed only where a picture is drawn
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(7.5, 6), dpi=100)
        self.axes = self.figure.add_axes((0.1, 0.08, 0.72, 0.86))
        self.axes.set(xlabel="sub-key of the second half", ylabel="sub-key of the first half")
        self.image = self.axes.imshow(
            [[0]],
            # unlike magma and inferno, viridis has no colour that could be taken for black
            cmap=colormaps["viridis"].with_extremes(bad="black"),
            vmin=-REACH,
            vmax=REACH,
            interpolation="nearest",
            # the axes count sub-keys, also where a cell holds several
            extent=(-0.5, num_keys - 0.5, num_keys - 0.5, -0.5),
        )
        place = self.figure.add_axes((0.85, 0.08, 0.03, 0.86))
        bar = self.figure.colorbar(self.image, cax=place, extend="both")
        bar.set_ticks(list(TICKS), labels=list(TICKS.values()))
        bar.set_label("reads, relative to a uniform pick of rows (black: not read)")

    def draw(self, load_PP: NDArray[np.float64], title: str) -> "Figure":
        """The figure with these loads; pyplot does not know it, and the next call changes it."""
        # masks the cells that were not read
        self.image.set_data(np.ma.log2(load_PP))
        self.axes.set_title(title)
        return self.figure


def load_levels(load_PP: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log2 of the relative load of the cells that were read, and edges of bins that hold them all.

    Cells that were not read have no logarithm; the scalar rows_used says how many there are.

    Returns:
        [C], and ascending edges of bins that are half a power of two wide; 0, which is uniform, is
        in the middle of a bin.
    """
    levels_C = np.log2(load_PP[load_PP > 0])
    return levels_C, np.arange(np.floor(levels_C.min()) - 0.25, np.ceil(levels_C.max()) + 0.5, 0.5)
