"""What the tabs and the API ask for, over the package: one request at a time, each in its turn."""

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from app import markup
from app.options import Options
from app.running import Cancellations, Status, follow
from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import show
from bilora_diffusion.generation.comparison import ComparisonSettings
from bilora_diffusion.generation.files import LoraFiles
from bilora_diffusion.generation.png import save_picture
from bilora_diffusion.generation.settings import PictureSettings
from bilora_diffusion.generation.turns import Cancelled, Turns
from bilora_diffusion.strict_json import strict_json

__all__ = ["UPLOADS", "Compared", "Picture", "Services", "Tell"]

logger = logging.getLogger("app")
Result = TypeVar("Result")

UPLOADS = "uploaded"
"""The folder name that uploaded files are listed under."""
KEPT_SECONDS = 6 * 3600
Tell = Callable[[Status], None]


@dataclass(frozen=True)
class Picture:
    """Attributes:
    path: a PNG that holds its settings.
    settings: that draw this one picture again.
    left_out: the end of its prompt that the base did not read.
    """

    path: Path
    settings: dict[str, Any]
    left_out: str = ""


@dataclass(frozen=True)
class Compared:
    """A finished comparison as files.

    Attributes:
        titles, rows: labels.
        cells: row by row, a PNG for each column.
        columns: what each column's files say of themselves, and its numbers, JSON values.
        settings: as JSON values.
        grid, settings_file: the PNG of all and the JSON.
        left_out: the ends of its prompts that the base did not read.
    """

    titles: Sequence[str]
    rows: Sequence[str]
    cells: Sequence[Sequence[Path]]
    columns: Sequence[dict[str, Any]]
    settings: dict[str, Any]
    grid: Path
    settings_file: Path
    left_out: Sequence[str] = ()


class Services:
    """One for the whole app. Models are imported and loaded at the first request, or by `warm_up`.

    Arguments:
        folder: for pictures and uploads; files older than six hours go.
    """

    def __init__(self, options: Options, folder: Path | None = None) -> None:
        self.options = options
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="bilora_app_")  # goes with the app
        self.folder = folder or Path(self._temporary.name)
        self.files = LoraFiles.below((*options.lora_dirs, options.runs_dir), {UPLOADS: self.folder / "uploads"})
        self.cancellations = Cancellations()
        self._bases = {_shown_name(base): base for base in options.bases}
        self._turns = Turns()
        self._engine: tuple[str, Any] | None = None
        self._judge: tuple[str, Any] | None = None

    @property
    def bases(self) -> list[str]:
        """The bases that can be chosen, as they are called in settings; of a path only the last part."""
        return list(self._bases)

    def warm_up(self) -> None:
        """Imports what takes seconds, in the background."""

        def work() -> None:
            import bilora_diffusion.compare  # noqa: F401

        threading.Thread(target=work, name="app warm-up", daemon=True).start()

    def generate(self, settings: PictureSettings, tell: Tell, cancelled: threading.Event) -> list[Picture]:
        """Draws and saves pictures.

        Returns:
            All, or those that were done when `cancelled` was set.

        Raises:
            UserError: anything in the settings or files that does not fit.
            Cancelled: when `cancelled` is set before one is done.
        """
        base = self._known_base(settings.base)
        loras = [(self.files.path(lora.file), lora.file, lora.weight) for lora in settings.loras]
        for lora in settings.loras:
            self.files.describe(lora.file)
        folder = self._job_folder()
        with self._turns.turn(cancelled, _waiting(tell)):
            engine = self._engine_of(base, tell)

            def report(number: int, step) -> None:
                text = f"Picture {number + 1} of {settings.pictures}, step {step.step} of {step.steps}"
                tell(Status(text, (number + step.step / step.steps) / settings.pictures, step.preview))

            left_out = engine.left_out(settings.prompt)
            pictures: list[Picture] = []
            for number in range(settings.pictures):
                one = replace(settings, seed=(settings.seed + number) % 2**32, pictures=1)
                try:
                    (drawn,) = engine.draw(
                        one, loras, report=partial(report, number), previews=True, cancelled=cancelled
                    )
                except Cancelled:
                    if pictures:
                        break
                    raise
                own = replace(drawn.settings, base=base, loras=settings.loras)
                path = folder / f"{own.seed}.png"
                save_picture(path, drawn.picture, own.to_json())
                pictures.append(Picture(path, own.to_json(), left_out))
        return pictures

    def compare(self, settings: ComparisonSettings, tell: Tell, cancelled: threading.Event) -> Compared:
        """Draws and saves a comparison; raises as `generate`."""
        base = self._known_base(settings.shared.base)
        settings = replace(settings, shared=replace(settings.shared, base=base))
        described = [
            [self.files.describe(lora.file).to_json() | {"weight": lora.weight} for lora in column.loras]
            for column in settings.columns
        ]
        folder = self._job_folder()
        width = len(settings.columns)
        cells = width * len(settings.rows())
        with self._turns.turn(cancelled, _waiting(tell)):
            engine = self._engine_of(base, tell)
            from bilora_diffusion.compare import compare

            def report(row: int, column: int, step) -> None:
                number = row * width + column
                text = f"Picture {number + 1} of {cells}, step {step.step} of {step.steps}"
                tell(Status(text, (number + step.step / step.steps) / cells, step.preview))

            prompts = dict.fromkeys(row.changes["prompt"] for row in settings.rows())
            left_out = [end for end in map(engine.left_out, prompts) if end]
            judge = self._judge_of(base)
            result = compare(
                engine, settings, self.files, judge=judge, report=report, previews=True, cancelled=cancelled
            )
        paths = []
        for number, row in enumerate(result.cells):
            paths.append([folder / f"{number}-{column}.png" for column in range(width)])
            for path, one in zip(paths[-1], row, strict=True):
                save_picture(path, one.picture, one.settings.to_json())
        grid, settings_file = folder / "comparison.png", folder / "comparison.json"
        result.save_grid(grid)
        settings_file.write_text(strict_json(result.settings.to_json(), indent=2) + "\n", encoding="utf-8")
        columns = [
            {"title": title, "loras": loras, "measures": [one.to_json() for one in measures]}
            for title, loras, measures in zip(result.titles, described, result.measures, strict=True)
        ]
        told = result.settings.to_json()
        return Compared(result.titles, result.rows, paths, columns, told, grid, settings_file, left_out)

    def shown(
        self, session: str | None, work: Callable[[Tell, threading.Event], Result]
    ) -> Iterator[tuple[str, Result | None]]:
        """Yields the status line of a piece of work as HTML, and last the result beside it; errors are a line too."""
        with self.cancellations.of(session) as cancelled:
            running = follow(lambda tell: work(tell, cancelled), cancelled)
            yield markup.progress(Status("Starting")), None
            preview = None
            try:
                while True:
                    status = next(running)
                    preview = status.preview or preview  # the last one stays until there is a newer
                    yield markup.progress(replace(status, preview=preview)), None
            except StopIteration as end:
                yield "", end.value
            except UserError as error:
                yield markup.error(str(error)), None
            except Cancelled:
                yield markup.note("Cancelled."), None
            except Exception as error:  # a bug: the person should know, and the terminal should have the traceback
                logger.exception("unexpected error")
                yield markup.error(f"unexpected error ({type(error).__name__}: {error}): please report it"), None
            finally:
                running.close()

    def loras(self) -> list[dict[str, Any]]:
        """What the LoRA files that can be used say of themselves, the newest first."""
        return [self.files.describe(name).to_json() for name in self.files.names()]

    def add_upload(self, path: Path, shown_name: str, base: str | None = None) -> str:
        """Takes an uploaded file over; returns its name.

        Raises:
            UserError: it is no LoRA, or none for the base.
        """
        self.files.check(path, shown_name)
        base = self._known_base(base)
        with self._turns.turn(threading.Event(), lambda ahead: None):
            self._engine_of(base, lambda status: None).check(path, shown_name)
        return self.files.add(UPLOADS, path, shown_name)

    def _known_base(self, name: str | None) -> str:
        if name is None:
            return self.bases[0]
        if name not in self._bases:
            raise UserError(f"base is {show(name)}: there are {', '.join(self.bases)}; others are given with --base")
        return name

    def _engine_of(self, base: str, tell: Tell) -> Any:
        """The engine of a base, loaded; the one of another base is let go first."""
        if self._engine is None or self._engine[0] != base:
            tell(Status(f"Loading the base {base}"))
            from bilora_diffusion.bases import Base
            from bilora_diffusion.generation.engine import Engine

            self._engine = None
            engine = Engine(Base(self._bases[base]))
            engine.load()
            self._engine = (base, engine)
        return self._engine[1]

    def _judge_of(self, base: str) -> Any:
        if self._judge is None or self._judge[0] != base:
            from bilora_diffusion.measures import judge_for

            self._judge = (base, judge_for(self._bases[base], self.options.clip))
        return self._judge[1]

    def _job_folder(self) -> Path:
        """A new folder for one request's files; those of old requests go."""
        jobs = self.folder / "pictures"
        jobs.mkdir(parents=True, exist_ok=True)
        for old in jobs.iterdir():
            if time.time() - old.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=jobs))


def _waiting(tell: Tell) -> Callable[[int], None]:
    return lambda ahead: tell(Status(f"Waiting: {ahead} before you"))


def _shown_name(base: str) -> str:
    path = Path(base).expanduser()
    return path.resolve().name if path.exists() else base
