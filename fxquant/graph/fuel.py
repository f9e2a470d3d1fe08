"""Optimization fuel: let only the first N rewrites happen, so that a wrong answer is bisected to one rewrite."""

from dataclasses import dataclass, field


@dataclass
class Fuel:
    """Counts rewrites; after ``limit`` of them ``take`` answers False.

    >>> fuel = Fuel(limit=1)
    >>> fuel.take("rms_norm"), fuel.take("gelu"), fuel.log
    (True, False, ['rms_norm'])
    """

    limit: int | None = None
    log: list[str] = field(default_factory=list)

    def take(self, what: str) -> bool:
        """True if the rewrite ``what`` may happen; it is then counted and logged."""
        if self.limit is not None and len(self.log) >= self.limit:
            return False
        self.log.append(what)
        return True
