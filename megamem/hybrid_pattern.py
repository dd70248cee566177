"""Reads `--hybrid-layer-pattern`: the kind of each layer, and the stage that builds it.

*-|*-/*     two pipeline stages with an attention and a feed-forward each; the layers behind "/"
            are for multi-token prediction
"""

FEED_FORWARDS = {"-": "dense", "E": "experts"}
"""Symbols of the layers that a memory layer can replace -> their kind."""

STAGE, PREDICTION = "|", "/"


def symbols(pattern: str) -> str:
    """The pattern without separators: one symbol for each layer of the model.

    >>> symbols("*-|*-/*")
    '*-*-'
    """
    return pattern.split(PREDICTION)[0].replace(STAGE, "")


def stage_layers(
    pattern: str,
    stages: int,
    pp_rank: int,
    vp_stage: int | None = None,
    first: int | None = None,
    last: int | None = None,
) -> list[int]:
    """Numbers, from 0, of the layers that a stage builds.

    Args:
        pattern: the pattern; without "|" its layers are divided evenly.
        stages: the pipeline-parallel size.
        pp_rank: the stage.
        vp_stage: the virtual stage, if there are several.
        first: number of layers of the first stage, if it differs.
        last: number of layers of the last stage, if it differs.

    >>> stage_layers("*-*-|*-", stages=2, pp_rank=1)
    [4, 5]
    """
    segments = pattern.split(PREDICTION)[0].split(STAGE)
    if len(segments) > 1:
        counts = [len(segment) for segment in segments]
    else:
        counts = _stage_sizes(len(segments[0]), stages, first, last)
    place = (vp_stage or 0) * stages + pp_rank
    start = sum(counts[:place])
    return list(range(start, start + counts[place]))


def _stage_sizes(layers: int, stages: int, first: int | None, last: int | None) -> list[int]:
    given = [count for count in (first, last) if count is not None]
    middle = stages - len(given)
    sizes = [(layers - sum(given)) // middle if middle else 0] * stages
    if first is not None:
        sizes[0] = first
    if last is not None:
        sizes[-1] = last
    return sizes
