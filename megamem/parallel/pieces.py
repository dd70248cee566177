"""Runs the pieces of a pass so that one works while what another has sent is on its way.

A piece is a generator that yields whenever it has sent something and would have to wait for it.
"""

from collections.abc import Generator


class Pieces[T]:
    """Pieces that have started. Every rank runs the pieces in the same order."""

    def __init__(self, pieces: list[Generator[None, None, T]]) -> None:
        """Run each piece until it first has to wait."""
        self._results: list[T | None] = [None] * len(pieces)
        self._pieces = pieces
        self._running = [number for number in range(len(pieces)) if self._goes_on(number)]

    @property
    def running(self) -> bool:
        """Whether a piece has not ended."""
        return bool(self._running)

    def go_on(self, joined: int) -> None:
        """Run each of the first `joined` pieces until it has to wait again, the last one first."""
        for number in reversed([number for number in self._running if number < joined]):
            if not self._goes_on(number):
                self._running.remove(number)

    def finish(self) -> list[T]:
        """Run all pieces to their end, and return their results.

        In each round one more piece joins those that run, and runs first. What an older piece waits
        for is thus on its way while a younger one reads its rows, and the last hops of one piece
        are on their way at the same time as the first hops of another. On an emulated network this
        took 14 to 22 % less than with the oldest piece first (tests/network.sh).
        """
        joined = 0
        while self.running:
            joined += 1
            self.go_on(joined)
        results = [result for result in self._results if result is not None]
        assert len(results) == len(self._pieces)
        return results

    def _goes_on(self, number: int) -> bool:
        """Run a piece until it has to wait again; return False if it has ended."""
        try:
            next(self._pieces[number])
        except StopIteration as end:
            self._results[number] = end.value
            return False
        return True


def together[A, B](
    first: Generator[None, None, A], second: Generator[None, None, B]
) -> Generator[None, None, tuple[A, B]]:
    """Run two generators as one, so that what both have sent is on its way at the same time."""
    both: Pieces[A | B] = Pieces([first, second])
    while both.running:
        yield
        both.go_on(2)
    one, other = both.finish()
    return one, other  # type: ignore[return-value]
