"""Generated text in a page that people write: it stands between two comments that name it."""


def rewrite(page: str, name: str, text: str) -> str:
    """The page with `text` between the markers of that name.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"no {begin} ... {end} in the page; put both where the tables belong")
    return f"{before}{begin}\n{text}\n{end}{after}"
