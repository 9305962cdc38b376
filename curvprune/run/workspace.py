"""Where a run keeps what it has done, and what it has to say."""

from __future__ import annotations

from dataclasses import dataclass, field

from curvprune.certificate import Uses
from curvprune.files import StageLog, State


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """The folder of a run's intermediate results, the log of its stages, and notes that come up on
    the way.

    Attributes:
        state: files that each stage leaves, and skips when it finds them there.
        log: names and seconds of the stages; shows their progress.
        notes: what the report must say, in the order in which it was noticed.
        uses: where uses of the certify split are kept; ``None``: nowhere.
    """

    state: State
    log: StageLog
    notes: list[str] = field(default_factory=list)
    uses: Uses | None = None

    def note(self, *texts: str) -> None:
        """Add what is not noted yet."""
        self.notes.extend(text for text in texts if text not in self.notes)
