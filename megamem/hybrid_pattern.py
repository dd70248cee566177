"""What `--hybrid-layer-pattern` says: which layer is what, and which stage builds it.

*-|*-/*     two stages of an attention and a feed-forward each; behind "/" layers that predict
            further tokens
"""

FEED_FORWARDS = {"-": "dense", "E": "experts"}
"""The symbols whose place a memory may take."""

STAGE, PREDICTION = "|", "/"


def symbols(pattern: str) -> str:
    """One symbol for each layer of the model.

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
        pattern: cut at "|", or else as evenly as it goes.
        stages: pipeline-parallel size.
        pp_rank: the stage.
        vp_stage: its virtual stage, where there are several.
        first: layers of the first stage, where it is uneven.
        last: layers of the last stage, where it is uneven.

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
