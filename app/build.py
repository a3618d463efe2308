"""The whole page."""

import gradio as gr

from app.api import add_api
from app.compare_tab import CompareTab
from app.generate_tab import GenerateTab
from app.runs_tab import RunsTab
from app.services import Services

__all__ = ["build"]

KEPT_SECONDS = 6 * 3600
MOST_AT_ONCE = 20


def build(services: Services) -> gr.Blocks:
    """The app around its services, ready to be launched."""
    with gr.Blocks(
        title="Bi-LoRA Diffusion", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS), fill_width=True
    ) as blocks:
        add_api(services)  # first: the names are taken in the order of the functions
        gr.Markdown("# Bi-LoRA Diffusion")
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(services)
            with gr.Tab("Compare", id="compare"):
                compare = CompareTab(services)
            with gr.Tab("Runs", id="runs"):
                RunsTab(services, tabs, generate, compare)
        for tab in (generate, compare):  # a page that is opened later knows the files that are there by then
            blocks.load(
                tab.opened, outputs=[slot.file for slot in tab.slots], api_visibility="private", show_progress="hidden"
            )
    return blocks.queue(default_concurrency_limit=MOST_AT_ONCE)
