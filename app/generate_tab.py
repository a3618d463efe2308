"""The Generate tab: one base, LoRAs with weights, a prompt; pictures that hold their settings."""

import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from app import markup
from app.choices import chosen_loras, lora_choices, lora_slot
from app.services import Picture, Services, Tell
from bilora_diffusion.errors import UserError
from bilora_diffusion.generation.png import read_settings
from bilora_diffusion.generation.settings import FIELDS, MOST_PICTURES, SCHEDULERS, PictureSettings, usual_guidance

__all__ = ["GenerateTab"]

SLOTS = 3
RANDOM_SEED = -1
NAMES = (
    "prompt",
    "negative_prompt",
    "base",
    "steps",
    "guidance_scale",
    "width",
    "height",
    "scheduler",
    "seed",
    "pictures",
)
"""Of `PictureSettings`, in the order of the tab's own components."""


class GenerateTab:
    """Laid out inside a `gr.Tab` when it is made, then connected.

    Attributes:
        slots: file and weight of each LoRA.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        self.fields: dict[str, Any] = {}
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                self._lay_out_inputs()
            with gr.Column(scale=5, min_width=300):
                self._lay_out_results()
        self._connect()

    def _lay_out_inputs(self) -> None:
        services, fields = self.services, self.fields
        fields["prompt"] = gr.Textbox("", label="Prompt", lines=3, elem_id="prompt", placeholder="Ctrl-Enter generates")
        fields["negative_prompt"] = gr.Textbox("", label="Negative prompt", elem_id="negative-prompt")
        with gr.Row():
            self.start = gr.Button("Generate", variant="primary", elem_id="generate-button", min_width=120)
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel-button", min_width=120)
        fields["base"] = gr.Dropdown(services.bases, value=services.bases[0], label="Base")
        self.slots = [lora_slot(services, "LoRA")]
        with gr.Accordion("More LoRAs", open=False):
            self.slots += [lora_slot(services, f"LoRA {number}") for number in range(2, SLOTS + 1)]
        with gr.Row():
            self.upload = gr.UploadButton(
                "Upload a LoRA", file_types=[".safetensors"], size="sm", elem_id="upload", min_width=120
            )
            self.refresh = gr.Button("Refresh the lists", size="sm", min_width=120)
        self._lay_out_settings()

    def _lay_out_settings(self) -> None:
        fields = self.fields
        with gr.Accordion("Settings", open=True):
            fields["steps"] = gr.Slider(1, 150, FIELDS["steps"].default, step=1, label="Steps", elem_id="steps")
            fields["guidance_scale"] = gr.Slider(
                0, 30, usual_guidance(self.services.bases[0]), step=0.5, label="Guidance"
            )
            with gr.Row():
                fields["seed"] = gr.Number(0, label="Seed", info="-1: a random one", min_width=120, elem_id="seed")
                self.dice = gr.Button("Random seed", size="sm", min_width=120, elem_id="dice")
            fields["pictures"] = gr.Slider(1, MOST_PICTURES, 1, step=1, label="Pictures", elem_id="pictures")
            with gr.Row():
                fields["width"] = gr.Number(0, label="Width (px)", info="0: the base's", min_width=120)
                fields["height"] = gr.Number(0, label="Height (px)", info="0: the base's", min_width=120)
            fields["scheduler"] = gr.Dropdown(list(SCHEDULERS), value=FIELDS["scheduler"].default, label="Scheduler")

    def _lay_out_results(self) -> None:
        self.status = gr.HTML(markup.note("Write a prompt and press Generate, or Ctrl-Enter."), elem_id="status")
        self.gallery = gr.Gallery(
            label="Pictures: PNG files with their settings inside",
            show_label=False,  # it would cover the pictures' tops
            format="png",
            columns=2,
            height=480,
            object_fit="contain",
            elem_id="gallery",
            buttons=["download", "fullscreen"],
        )
        with gr.Accordion("What the LoRAs say of themselves", open=False):
            self.facts = gr.HTML(markup.facts_card([]), elem_id="facts")
        self.png = gr.File(
            label="Drop a PNG made here, anywhere, to take its settings over",
            file_types=[".png"],
            height=140,
            elem_id="png",
        )

    def _connect(self) -> None:
        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        pairs = [part for slot in self.slots for part in (slot.file, slot.weight)]
        files = [slot.file for slot in self.slots]
        self.everything = [*(self.fields[name] for name in NAMES), *pairs]
        self.start.click(self.generate, self.everything, [self.status, self.gallery], concurrency_limit=None, **hidden)
        self.fields["base"].input(usual_guidance, self.fields["base"], self.fields["guidance_scale"], **hidden)
        self.cancel.click(self.stop, queue=False, **hidden)
        self.dice.click(lambda: random.randrange(2**32), outputs=self.fields["seed"], queue=False, **hidden)
        self.refresh.click(self.renew_choices, outputs=files, **hidden)
        self.upload.upload(
            self.take_upload, [self.upload, self.fields["base"], *files], [self.status, *files], **hidden
        )
        self.png.upload(self.take_settings, self.png, [self.status, self.png, *self.everything], **hidden)
        gr.on([file.change for file in files], self.describe, files, self.facts, **hidden)

    def generate(self, request: gr.Request, *values: Any) -> Iterator[tuple]:
        """Yields the status line and the pictures."""

        def work(tell: Tell, cancelled: threading.Event) -> list[Picture]:
            return self.services.generate(settings_from(values), tell, cancelled)

        wanted = values[NAMES.index("pictures")]
        for shown, drawn in self.services.shown(f"{request.session_hash} generate", work):
            if drawn is None:
                yield shown, gr.skip()
            else:
                seeds = [one.settings["seed"] for one in drawn]
                pictures = [(str(one.path), f"seed {seed}") for one, seed in zip(drawn, seeds, strict=True)]
                state = "Done" if len(drawn) == wanted else f"Cancelled after {len(drawn)} of {wanted}"
                text = f"{state}: seed {', '.join(map(str, seeds))}. {markup.left_out([drawn[0].left_out])}"
                # One picture alone is shown whole, several as a grid.
                yield markup.note(text), gr.update(value=pictures, selected_index=0 if len(pictures) == 1 else None)

    def stop(self, request: gr.Request) -> None:
        """Ends the pictures of this browser."""
        self.services.cancellations.cancel(f"{request.session_hash} generate")

    def opened(self) -> list[dict]:
        """For a page that is opened: as `renew_choices`."""
        return self.renew_choices()

    def renew_choices(self) -> list[dict]:
        """The files that are there now, for every slot."""
        return [gr.update(choices=lora_choices(self.services)) for _ in self.slots]

    def describe(self, *files: str) -> str:
        """What the chosen files say of themselves."""
        try:
            return markup.facts_card([self.services.files.describe(file).to_json() for file in files if file])
        except UserError as error:
            return markup.error(str(error))

    def take_upload(self, path: str | None, base: str, *files: str) -> list:
        """Puts an uploaded file into the first slot that is free, if it fits the base."""
        try:
            name = self.services.add_upload(Path(path or ""), Path(path or "").name, base)
        except UserError as error:
            return [markup.error(str(error)), *(gr.skip() for _ in files)]
        free = next((number for number, file in enumerate(files) if not file), len(files) - 1)
        choices = lora_choices(self.services)
        values = [name if number == free else file for number, file in enumerate(files)]
        return [markup.note(f"Uploaded {name}."), *(gr.update(choices=choices, value=value) for value in values)]

    def take_settings(self, path: str | None) -> list:
        """Fills the form from a PNG, and empties the box for the next one."""
        try:
            values = read_settings(Path(path or ""))
            if "comparison" in values:
                raise UserError(f"{Path(path or '').name} is the table of a comparison: drop it on the Compare tab")
            settings = PictureSettings.from_json(values)
            return [markup.note(f"These are the settings of {Path(path or '').name}."), None, *self.shown(settings)]
        except UserError as error:
            return [markup.error(str(error)), None, *(gr.skip() for _ in self.everything)]

    def shown(self, settings: PictureSettings) -> list:
        """The values of the tab's components for settings.

        Raises:
            UserError: they name a base or a LoRA that is not here.
        """
        if settings.base not in (None, *self.services.bases):
            raise UserError(f"the picture was made with the base {settings.base}: start the app with --base for it")
        if len(settings.loras) > len(self.slots):
            raise UserError(f"the picture was made with {len(settings.loras)} LoRAs: the form has {len(self.slots)}")
        values = settings.to_json() | {"base": settings.base or self.services.bases[0]}
        choices = lora_choices(self.services)
        for lora in settings.loras:
            self.services.files.path(lora.file)
        pairs: list[Any] = []
        for number in range(len(self.slots)):
            lora = settings.loras[number] if number < len(settings.loras) else None
            pairs += [gr.update(choices=choices, value=lora.file if lora else ""), lora.weight if lora else 1]
        return [*(values[name] if values[name] is not None else 0 for name in NAMES), *pairs]


def settings_from(values: Sequence[Any]) -> PictureSettings:
    """From the values of the tab's components.

    Raises:
        UserError: a value that cannot be.
    """
    own = dict(zip(NAMES, values[: len(NAMES)], strict=True))
    own |= {name: own[name] or None for name in ("width", "height")}
    if own["seed"] is None:
        raise UserError("the seed is empty: write a number, or -1 for a random one")
    if own["seed"] == RANDOM_SEED:
        own["seed"] = random.randrange(2**32)
    return PictureSettings(**own, loras=chosen_loras(values[len(NAMES) :]))
