"""The Compare tab: base | LoRA | Bi-LoRA, or any files, with the same prompts and seeds."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from app import markup
from app.choices import chosen_loras, lora_choices, lora_slot, newest_of_method
from app.services import Compared, Services, Tell
from bilora_diffusion.errors import UserError
from bilora_diffusion.flags import show
from bilora_diffusion.generation.comparison import (
    MOST_COLUMNS,
    SWEPT,
    ComparedColumn,
    ComparisonSettings,
    Sweep,
    read_comparison,
)
from bilora_diffusion.generation.settings import FIELDS, SCHEDULERS, PictureSettings, usual_guidance

__all__ = ["CompareTab"]

NO_COLUMN = "-"
FIRST_CHOICES = (("base (no LoRA)", ""), ("no column", NO_COLUMN))
NO_SWEEP = "nothing"
SHARED = ("negative_prompt", "base", "steps", "guidance_scale", "width", "height", "scheduler")
START = "Each row has one prompt and one seed: its pictures differ in the weights alone."
SLIDER_PX = 512
"""Pictures are shown at least this large between the slider's halves."""


class CompareTab:
    """Laid out inside a `gr.Tab` when it is made, then connected."""

    def __init__(self, services: Services) -> None:
        self.services = services
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self._lay_out_inputs()
            with gr.Column(scale=5, min_width=300):
                self._lay_out_results()
        self._connect()

    def _lay_out_inputs(self) -> None:
        self.prompts = gr.Textbox("", label="Prompts, one a line", lines=3, elem_id="compare-prompts")
        self.seeds = gr.Textbox("0", label="Seeds, with commas", elem_id="compare-seeds")
        with gr.Row():
            self.start = gr.Button("Compare", variant="primary", elem_id="compare-button", min_width=120)
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="compare-cancel", min_width=120)
        starts = enumerate(self.starts(), start=1)
        self.slots = [lora_slot(self.services, f"Column {number}", start, FIRST_CHOICES) for number, start in starts]
        with gr.Accordion("Sweep", open=False):
            self.variable = gr.Dropdown([NO_SWEEP, *SWEPT], value=NO_SWEEP, label="From row to row changes")
            self.values = gr.Textbox(
                "", label="Its values", info="with commas; prompts one a line", lines=2, elem_id="sweep-values"
            )
        self._lay_out_settings()
        with gr.Row():
            self.refresh = gr.Button("Refresh the lists", size="sm", min_width=120)
        self.file = gr.File(
            label="Drop a comparison's JSON or PNG, anywhere, to take its settings over",
            file_types=[".json", ".png"],
            height=120,
            elem_id="compare-file",
        )

    def _lay_out_settings(self) -> None:
        fields: dict[str, Any] = {}
        with gr.Accordion("Settings", open=False):
            fields["negative_prompt"] = gr.Textbox("", label="Negative prompt")
            fields["base"] = gr.Dropdown(self.services.bases, value=self.services.bases[0], label="Base")
            fields["steps"] = gr.Slider(1, 150, FIELDS["steps"].default, step=1, label="Steps", elem_id="compare-steps")
            fields["guidance_scale"] = gr.Slider(
                0, 30, usual_guidance(self.services.bases[0]), step=0.5, label="Guidance"
            )
            with gr.Row():
                fields["width"] = gr.Number(0, label="Width (px)", info="0: the base's", min_width=90)
                fields["height"] = gr.Number(0, label="Height (px)", info="0: the base's", min_width=90)
            fields["scheduler"] = gr.Dropdown(list(SCHEDULERS), value=FIELDS["scheduler"].default, label="Scheduler")
        self.fields = fields

    def _lay_out_results(self) -> None:
        self.status = gr.HTML(markup.note(START), elem_id="compare-status")
        self.table = gr.HTML(elem_id="comparison")
        self.result = gr.State(None)
        with gr.Column(visible=False) as self.after:
            with gr.Row():
                self.row = gr.Dropdown([], label="Row", type="index", min_width=220, scale=2)
                self.left = gr.Dropdown([], label="Left", type="index", min_width=120)
                self.right = gr.Dropdown([], label="Right", type="index", min_width=120)
            gr.HTML('<p class="quiet">Drag the line: left and right have the same prompt and seed.</p>')
            self.slider = gr.ImageSlider(
                label="Left and right",
                show_label=False,
                format="png",
                type="pil",
                elem_id="slider",
                interactive=False,
                max_height=SLIDER_PX + 40,
            )
            with gr.Row():
                self.grid_file = gr.DownloadButton("Download the table as PNG", size="sm", elem_id="download-png")
                self.json_file = gr.DownloadButton("Download the settings as JSON", size="sm", elem_id="download-json")
        self.facts = gr.HTML(elem_id="comparison-facts")

    def _connect(self) -> None:
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        pairs = [part for slot in self.slots for part in (slot.file, slot.weight)]
        files = [slot.file for slot in self.slots]
        self.everything = [
            self.prompts, self.seeds, self.variable, self.values, *(self.fields[name] for name in SHARED), *pairs
        ]  # fmt: skip
        picks = [self.row, self.left, self.right]
        self.start.click(
            self.compare,
            self.everything,
            [self.status, self.table, self.facts, self.result, self.after, *picks, self.grid_file, self.json_file],
            concurrency_limit=None,
            **hidden,
        ).then(self.slide, [self.result, *picks], self.slider, **hidden)
        gr.on([pick.input for pick in picks], self.slide, [self.result, *picks], self.slider, **hidden)
        self.fields["base"].input(usual_guidance, self.fields["base"], self.fields["guidance_scale"], **hidden)
        self.cancel.click(self.stop, queue=False, **hidden)
        self.refresh.click(self.renew_choices, outputs=files, **hidden)
        self.file.upload(self.take_settings, self.file, [self.status, self.file, *self.everything], **hidden)

    def compare(self, request: gr.Request, *values: Any) -> Iterator[tuple]:
        """Yields everything that shows the result."""

        def work(tell: Tell, cancelled: threading.Event) -> Compared:
            return self.services.compare(settings_from(values), tell, cancelled)

        for shown, result in self.services.shown(f"{request.session_hash} compare", work):
            if result is None:
                yield shown, *(gr.skip() for _ in range(9))
                continue
            rows = [label or "the one row" for label in result.rows]
            rows = [f"{number + 1}. {label}" for number, label in enumerate(rows)]
            titles = [f"{number + 1}. {title}" for number, title in enumerate(result.titles)]
            yield (
                markup.note(f"Done: {len(rows) * len(titles)} pictures. {markup.left_out(result.left_out)}"),
                markup.comparison_table(result.titles, result.rows, result.cells, result.columns),
                markup.facts_table(result.titles, result.columns),
                result.cells,
                gr.update(visible=True),
                gr.update(choices=rows, value=rows[0]),
                gr.update(choices=titles, value=titles[-2]),
                gr.update(choices=titles, value=titles[-1]),
                str(result.grid),
                str(result.settings_file),
            )

    def slide(self, cells: Sequence[Sequence[Path]] | None, row: int, left: int, right: int) -> Any:
        """The two pictures for the slider."""
        if not cells or None in (row, left, right):
            return gr.skip()
        return _enlarged(cells[row][left]), _enlarged(cells[row][right])

    def stop(self, request: gr.Request) -> None:
        """Ends the comparison of this browser."""
        self.services.cancellations.cancel(f"{request.session_hash} compare")

    def starts(self) -> list[str]:
        """What the columns begin with: base, the newest plain LoRA, the newest Bi-LoRA; at least two columns."""
        found = [newest_of_method(self.services, method) for method in ("lora", "bilora")]
        columns = ["", *(file for file in found if file)]
        columns += [""] * (2 - len(columns))
        return columns + [NO_COLUMN] * (MOST_COLUMNS - len(columns))

    def opened(self) -> list[dict]:
        """For a page that is opened: the files that are there now, and what the columns begin with."""
        updates = zip(self.renew_choices(), self.starts(), strict=True)
        return [update | {"value": start} for update, start in updates]

    def renew_choices(self) -> list[dict]:
        """The files that are there now, for every column."""
        choices = [*FIRST_CHOICES, *lora_choices(self.services, with_none=False)]
        return [gr.update(choices=choices) for _ in self.slots]

    def take_settings(self, path: str | None) -> list:
        """Fills the form from a comparison's JSON or PNG, and empties the box for the next one."""
        try:
            settings = read_comparison(Path(path or ""))
            return [markup.note(f"These are the settings of {Path(path or '').name}."), None, *self.shown(settings)]
        except UserError as error:
            return [markup.error(str(error)), None, *(gr.skip() for _ in self.everything)]

    def shown(self, settings: ComparisonSettings) -> list:
        """The values of the tab's components for settings.

        Raises:
            UserError: they name a base or a LoRA that is not here, or the form has no place for them.
        """
        base = settings.shared.base or self.services.bases[0]
        if base not in self.services.bases:
            raise UserError(f"the comparison is of the base {base}: start the app with --base for it")
        if any(len(column.loras) > 1 for column in settings.columns):
            raise UserError("a column has several LoRAs, the form has one for each: use the command line or the API")
        if any(column.label for column in settings.columns) or any("\n" in prompt for prompt in settings.prompts):
            raise UserError(
                "the comparison has labels or prompts of several lines, for which the form has no place: use the "
                "command line or the API"
            )
        choices = [*FIRST_CHOICES, *lora_choices(self.services, with_none=False)]
        pairs: list[Any] = []
        for number in range(len(self.slots)):
            column = settings.columns[number] if number < len(settings.columns) else None
            lora = column.loras[0] if column and column.loras else None
            if lora:
                self.services.files.path(lora.file)
            file = lora.file if lora else "" if column else NO_COLUMN
            pairs += [gr.update(choices=choices, value=file), lora.weight if lora else 1]
        sweep = settings.sweep
        shared = settings.to_json() | {"base": base}
        return [
            "\n".join(settings.prompts),
            ", ".join(map(str, settings.seeds)),
            sweep.variable if sweep else NO_SWEEP,
            _as_text(sweep) if sweep else "",
            *(shared[name] if shared[name] is not None else 0 for name in SHARED),
            *pairs,
        ]


def settings_from(values: Sequence[Any]) -> ComparisonSettings:
    """From the values of the tab's components.

    Raises:
        UserError: a value that cannot be.
    """
    prompts, seeds, variable, swept, *rest = values
    own = dict(zip(SHARED, rest[: len(SHARED)], strict=True))
    own |= {name: own[name] or None for name in ("width", "height")}
    shared = PictureSettings(**own)
    pairs = rest[len(SHARED) :]
    columns = [
        ComparedColumn(loras=chosen_loras((file, weight)))
        for file, weight in zip(pairs[::2], pairs[1::2], strict=True)
        if file != NO_COLUMN
    ]
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if not lines and variable != "prompt":
        raise UserError("there is no prompt: write one in each line")
    return ComparisonSettings(
        columns=tuple(columns),
        prompts=tuple(lines or [""]),
        seeds=tuple(_number(text, "seed") for text in seeds.split(",")),
        sweep=_sweep(variable, swept) if variable != NO_SWEEP else None,
        shared=shared,
    )


def _sweep(variable: str, text: str) -> Sweep:
    words = text.splitlines() if variable == "prompt" else text.replace("\n", ",").split(",")
    words = [word.strip() for word in words if word.strip()]
    if not words:
        raise UserError(f"the sweep of {variable} has no values: write some")
    return Sweep(variable=variable, values=tuple(_number(word, variable) for word in words))


def _as_text(sweep: Sweep) -> str:
    """A sweep's values as they are written into the form."""
    if sweep.variable == "prompt":
        return "\n".join(sweep.values)
    return ", ".join(f"{value:g}" for value in sweep.values)


def _number(text: str, name: str) -> Any:
    """A word as its field wants it; what is none stays text and is refused in the field's own words."""
    kind = FIELDS[name].kind
    try:
        return kind(text.strip()) if kind in (int, float) else text
    except ValueError:
        if name == "seed":
            raise UserError(f"a seed is {show(text.strip())}: it must be {FIELDS['seed'].allowed}") from None
        return text


def _enlarged(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        scale = max(1, SLIDER_PX / max(picture.size))
        return picture.convert("RGB").resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
        )
