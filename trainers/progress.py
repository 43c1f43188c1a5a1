"""A run's progress on the terminal: a bar, the step, the loss and the time left."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from trainers.evaluate import Score


class TerminalProgress:
    """A context manager that puts the terminal back in order, and a `trainers.tuning.Progress`."""

    def __init__(self, title: str, console: Console) -> None:
        self._bar = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("validation {task.fields[validation]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID = self._bar.add_task(title, total=None, loss="-", validation="-")

    def __enter__(self) -> "TerminalProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def started(self, num_steps: int) -> None:
        self._bar.update(self._task, total=num_steps)

    def stepped(self, loss: float) -> None:
        self._bar.update(self._task, advance=1, loss=f"{loss:.3f}")

    def validated(self, validation: Score) -> None:
        self._bar.update(self._task, validation=f"{validation.loss:.3f}")
