"""Replaces generated text in a Markdown page, between two comments with its name."""


def rewrite(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers with this name.

    Raises:
        ValueError: the page does not have the markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no {begin} ... {end}; put both where the table belongs")
    return f"{before}{begin}\n{text}\n{end}{after}"
