"""When a checkpoint is due, and how long a due one stays due."""

from __future__ import annotations


class SaveSchedule:
    """Checkpoints every ``every_steps`` steps (0: never), and after further steps, such as the end
    of each phase.

    A due checkpoint stays due until `saved`: one that falls on a skipped step is saved after the
    next step that is not skipped, and not an interval later.
    """

    def __init__(self, every_steps: int) -> None:
        self._every_steps = every_steps
        self._is_due = False

    def is_due(self, step: int, further: bool) -> bool:
        """Whether to save after ``step``, which may be a ``further`` one. Ask after every step."""
        self._is_due |= further or (self._every_steps > 0 and step % self._every_steps == 0)
        return self._is_due

    def saved(self) -> None:
        """Notes that the due checkpoint was saved."""
        self._is_due = False
