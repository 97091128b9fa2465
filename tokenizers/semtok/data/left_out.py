"""What lies in a user's data and is not used: counted by kind, so that one line can tell of all of it."""

from collections.abc import Iterable, Iterator, Sequence

from semtok.errors import printable

MAX_EXAMPLES = 2


class LeftOut:
    """Things of a data set that its source does not use, by kind.

    A kind is a plural that reads on after a number, such as ``hidden files`` or ``files with the suffix .heic``.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, name: str, count: int = 1) -> None:
        """Counts ``count`` things of one kind; the first names of a kind are kept as examples."""
        self._counts[kind] = self._counts.get(kind, 0) + count
        examples = self._examples.setdefault(kind, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(name)

    def entries(self) -> list[tuple[str, int, list[str]]]:
        """Each kind with its count and its examples, to be kept and given to ``include``."""
        return [(kind, n, list(self._examples[kind])) for kind, n in self._counts.items()]

    def include(self, entries: Iterable[tuple[str, int, Sequence[str]]]) -> None:
        """Adds what another counted."""
        for kind, count, examples in entries:
            for name in examples[:-1]:
                self.add(kind, name)
            self.add(kind, examples[-1], count - len(examples) + 1)

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def counts(self) -> dict[str, int]:
        """How many of each kind, for ``summary.json``."""
        return dict(self._counts)

    def line(self) -> str:
        """All kinds in one line, each with its number and examples; empty where nothing was left out."""
        told = []
        for kind, count in self._counts.items():
            examples = ", ".join(printable(name) for name in self._examples[kind])
            more = ", …" if count > len(self._examples[kind]) else ""
            told.append(f"{kind}: {count} ({examples}{more})")
        return "; ".join(told)
