"""The Runs tab: what the trainings under a folder do, live; start and stop them; open what they made."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from app import markup
from app.choices import lora_choices
from app.compare_tab import CompareTab
from app.curves import CURVE_TITLES, curves, plot
from app.form import TrainingForm, presets, words_from
from app.generate_tab import GenerateTab
from app.running import Status
from app.services import Services
from bilora_diffusion.errors import UserError
from bilora_diffusion.runs import Run, find_run, list_runs, resume_run, start_run, stop_run

__all__ = ["RunsTab"]

EVERY_SECONDS = 2.0
MOST_PREVIEWS = 12


class RunsTab:
    """Laid out inside a `gr.Tab` when it is made, then connected.

    Arguments:
        tabs: to switch to Generate or Compare.
    """

    def __init__(self, services: Services, tabs: gr.Tabs, generate: GenerateTab, compare: CompareTab) -> None:
        self.services = services
        self.folder = services.options.runs_dir
        self.table = gr.HTML(self.list_html(), elem_id="runs-table")
        names = self.names()
        with gr.Row():
            self.chosen = gr.Dropdown(
                names,
                value=names[:1],
                multiselect=True,
                max_choices=4,
                label="Runs shown (the first is the one below)",
                elem_id="runs-chosen",
            )
        self.plots = gr.HTML(elem_id="plots")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                self.status = gr.HTML(elem_id="run-status")
                self.log = gr.Textbox(
                    label="Log",
                    lines=8,
                    max_lines=14,
                    interactive=False,
                    placeholder="Of a run that was started here or by a report.",
                    elem_id="run-log",
                    elem_classes=["log"],
                )
                with gr.Row():
                    self.stop = gr.Button("Stop this run", variant="stop", elem_id="stop-run")
                    self.resume = gr.Button("Resume it", elem_id="resume-run")
                self.answer = gr.HTML(elem_id="run-answer")
                self.command = gr.Textbox(
                    label="The same in a terminal",
                    max_lines=4,
                    interactive=False,
                    buttons=["copy"],
                    elem_id="run-command",
                    elem_classes=["log"],
                )
            with gr.Column(scale=2, min_width=300):
                self.file = gr.Dropdown([], label="LoRA or checkpoint", elem_id="run-file")
                self.column = gr.Dropdown([1, 2, 3, 4], value=3, label="Column of Compare")
                with gr.Row():
                    self.to_generate = gr.Button("Open in Generate", size="sm", elem_id="to-generate")
                    self.to_compare = gr.Button("Open in Compare", size="sm", elem_id="to-compare")
                gr.HTML('<p class="quiet">Previews, the newest first</p>')
                self.previews = gr.Gallery(
                    label="Previews",
                    show_label=False,
                    format="png",
                    columns=2,
                    height=320,
                    object_fit="contain",
                    elem_id="previews",
                )
        self._lay_out_start()
        self._connect(tabs, generate, compare)

    def _lay_out_start(self) -> None:
        with gr.Accordion("Start a run", open=False):
            if not self.services.options.training:
                gr.HTML(markup.note("Starting runs is off, as others can reach this app: --allow_training allows it."))
            with gr.Row():
                self.name = gr.Textbox("", label="Name", placeholder="of its new folder", elem_id="run-name")
                self.preset = gr.Dropdown(presets(), value=presets()[_first_preset()], label="Preset", elem_id="preset")
            gr.HTML('<p class="quiet">What is left empty keeps the preset\'s value, or its default.</p>')
            self.form = TrainingForm(self.preset.value)
            self.start = gr.Button("Start", variant="primary", elem_id="start-run")
            self.start_answer = gr.HTML(elem_id="start-answer")

    def _connect(self, tabs: gr.Tabs, generate: GenerateTab, compare: CompareTab) -> None:
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        seen = gr.State(None)
        shown = [
            self.table,
            self.chosen,
            self.plots,
            self.status,
            self.log,
            self.command,
            self.file,
            self.previews,
            seen,
        ]
        timer = gr.Timer(EVERY_SECONDS)
        gr.on(
            [timer.tick, self.chosen.change],
            self.look,
            [self.chosen, self.file, seen],
            shown,
            trigger_mode="always_last",
            **hidden,
        )
        self.chosen.input(lambda: "", outputs=self.answer, queue=False, **hidden)
        self.preset.input(self.form.shown, self.preset, self.form.components, **hidden)
        self.stop.click(self.stop_run, self.chosen, self.answer, **hidden)
        self.resume.click(self.resume_run, self.chosen, self.answer, **hidden)
        self.start.click(
            self.start_run, [self.name, self.preset, *self.form.components], [self.start_answer, self.chosen], **hidden
        )
        first = generate.slots[0].file
        self.to_generate.click(self.open_in_generate, self.file, [self.answer, first, tabs], **hidden)
        columns = [slot.file for slot in compare.slots]
        self.to_compare.click(
            lambda file, column: self.open_in_compare(file, column, compare),
            [self.file, self.column],
            [self.answer, *columns, tabs],
            **hidden,
        )

    def names(self) -> list[str]:
        return [run.name for run in list_runs(self.folder)]

    def list_html(self) -> str:
        """The table of all runs."""
        rows = []
        for run in list_runs(self.folder):
            state, config, points = run.state(), run.config(), run.curves()
            last = points[-1] if points else {}
            gaps = [one["loss_gap"] for one in points if one["loss_gap"] is not None]
            rows.append(
                {
                    "run": run.name,
                    "state": state["state"],
                    "step": f"{state['step'] or 0} of {state['steps'] or '?'}",
                    "method": config.get("method", ""),
                    "loss": _number(last.get("loss")),
                    "c/rho": _number(last.get("c_over_rho")),
                    "loss gap": _number(gaps[-1] if gaps else None),
                    "changed": _ago(state["updated"]),
                }
            )
        return markup.table(rows, f"There are no runs in {self.folder} yet.")

    def look(self, chosen: Sequence[str], file: str | None, seen: Any) -> tuple:
        """What has changed since this browser looked last; the rest is left alone, so that no open list closes."""
        runs = {run.name: run for run in list_runs(self.folder)}
        names = list(runs)
        # A page that was just opened shows the latest run, whatever was there when the app was started.
        kept = names[:1] if seen is None else [name for name in chosen or [] if name in runs]
        shown = [runs[name] for name in kept]
        now: dict[str, Any] = {
            "names": names,
            "curves": [(run.name, run.updated()) for run in shown],
            "files": [str(path) for path in shown[0].lora_files()] if shown else [],
            "previews": [str(path) for path in shown[0].previews()] if shown else [],
        }
        new = {name: not seen or seen.get(name) != value for name, value in now.items()}
        files = self._files_of(shown[0]) if shown and new["files"] else []
        values = [name for _, name in files]
        # The newest, unless a person has chosen another one.
        stays = file in values and file != (seen or {}).get("newest")
        now["newest"] = next(iter(values), None) if new["files"] else (seen or {}).get("newest")
        return (
            self.list_html(),
            self._choices(names, chosen, kept, seen is None) if new["names"] else gr.skip(),
            _plots(shown) if new["curves"] else gr.skip(),
            _status_of(shown[0]) if shown else "",
            shown[0].log() if shown else "",
            shown[0].command() if shown else "",
            gr.update(choices=files, value=file if stays else now["newest"]) if new["files"] else gr.skip(),
            _pictures(shown[0]) if shown and new["previews"] else [] if new["previews"] else gr.skip(),
            now,
        )

    @staticmethod
    def _choices(names: Sequence[str], chosen: Sequence[str], kept: Sequence[str], opened: bool) -> dict[str, Any]:
        """The runs to choose from. The choice itself is left alone: a run may have been started meanwhile."""
        if opened or list(kept) != list(chosen or []):
            return gr.update(choices=names, value=kept)
        return gr.update(choices=names)

    def _files_of(self, run: Run) -> list[tuple[str, str]]:
        """(what is shown, name among the LoRA files)."""
        found = []
        for path in run.lora_files():
            name = self.services.files.name_of(path)
            if name is not None:
                found.append(("finished" if path.parent == run.path else path.parent.name, name))
        return found

    def stop_run(self, chosen: Sequence[str]) -> str:
        """Asks the first of the chosen runs to end."""
        try:
            self._require_training()
            stop_run(self._first(chosen))
        except UserError as error:
            return markup.error(str(error))
        return markup.note("Stopping: the step at hand is finished and everything saved.")

    def resume_run(self, chosen: Sequence[str]) -> str:
        """Goes on with the first of the chosen runs."""
        try:
            self._require_training()
            run = self._first(chosen)
            begun = any(run.path.glob("checkpoint-*"))
            resume_run(run)
        except UserError as error:
            return markup.error(str(error))
        how = "goes on from its last checkpoint" if begun else "has no checkpoint yet, so it begins anew"
        return markup.note(f"{run.name} {how}.")

    def start_run(self, name: str, preset: str, *values: str) -> tuple:
        """Starts a run and shows it."""
        try:
            self._require_training()
            if preset not in presets():
                raise UserError("there is no such preset")
            others = [run.name for run in list_runs(self.folder) if run.process()]
            run = start_run(self.folder, name.strip(), words_from(preset, values))
        except UserError as error:
            return markup.error(str(error)), gr.skip()
        note = f"{run.name} is started; it goes on when this page is closed."
        if others:
            note += f" It shares the machine with {', '.join(others)}, which is at work too."
        return markup.note(note), gr.update(choices=self.names(), value=[run.name])

    def _require_training(self) -> None:
        if not self.services.options.training:
            raise UserError("others can reach this app: start it with --allow_training to start and stop runs from it")

    def _first(self, chosen: Sequence[str]) -> Run:
        if not chosen:
            raise UserError("no run is chosen")
        return find_run(self.folder, chosen[0])

    def open_in_generate(self, file: str | None) -> tuple:
        """Puts the file into the first slot."""
        if not file:
            return markup.error("this run has no LoRA yet"), gr.skip(), gr.skip()
        return "", gr.update(choices=lora_choices(self.services), value=file), gr.update(selected="generate")

    def open_in_compare(self, file: str | None, column: int, compare: CompareTab) -> tuple:
        """Puts the file into a column."""
        columns = compare.renew_choices()
        if not file:
            return markup.error("this run has no LoRA yet"), *(gr.skip() for _ in columns), gr.skip()
        updates = [one | {"value": file} if number == column else one for number, one in enumerate(columns, 1)]
        return "", *updates, gr.update(selected="compare")


def _first_preset() -> int:
    """The quickstart, which needs nothing but the package, if it is there."""
    names = [Path(name).stem for name in presets()]
    return names.index("quickstart") if "quickstart" in names else 0


def _plots(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    plots = (plot(CURVE_TITLES[name], by_run, names) for name, by_run in curves(runs).items())
    return f'<div class="plots">{"".join(plots)}</div>'


def _status_of(run: Run) -> str:
    state = run.state()
    step, steps = state["step"] or 0, state["steps"] or 0
    text = f"{run.name}: {state['state']}" + (f", step {step} of {steps}" if steps else "")
    if state["state"] == "failed":
        last = next((line for line in reversed(run.log().splitlines()) if line.strip()), "see its log")
        return markup.error(f"{text}: {last}")
    return markup.progress(Status(text, step / steps if steps else 0.0))


def _pictures(run: Run) -> list[tuple[Image.Image, str]]:
    pictures = []
    for path in reversed(run.previews()[-MOST_PREVIEWS:]):
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                pictures.append((picture.convert("RGB"), path.stem.replace("_", " ")))
        except (OSError, ValueError):  # it is just being written
            continue
    return pictures


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _ago(then: float) -> str:
    seconds = max(0, int(time.time() - then))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
