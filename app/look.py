"""How the app looks, in light and dark: no font and no script from elsewhere, as it must work offline."""

import gradio as gr

__all__ = ["CSS", "HEAD", "theme"]

CSS = """
.gradio-container { max-width: 1400px !important; width: 100% !important; margin: 0 auto !important;
  --block-info-text-color: #5b6472; }
.dark .gradio-container, .gradio-container.dark { --block-info-text-color: #aab2bf; }
.gradio-container main { width: 100%; }
.status { padding: 0.5rem 0.75rem; border-radius: 8px; background: var(--background-fill-secondary);
  color: var(--body-text-color); overflow-wrap: anywhere; }
.status.error { background: #b42318; color: #fff; }
.bar { height: 6px; border-radius: 3px; margin: 0.5rem 0; background: var(--border-color-primary); overflow: hidden; }
.bar > div { height: 100%; background: var(--color-accent); transition: width 0.15s; }
.forming { width: 256px; max-width: 100%; border-radius: 8px; display: block; margin: 0.5rem auto; }
.quiet { color: var(--body-text-color); opacity: 0.75; }
.comparison { overflow-x: auto; max-width: calc(100vw - 6rem); }
.comparison table { border-collapse: collapse; width: 100%; table-layout: fixed; min-width: 520px; }
.comparison table, .comparison tr, .comparison th, .comparison td { border: none !important; }
.comparison th { text-align: left; padding: 0.4rem; color: var(--body-text-color); }
.comparison th.row-label { font-weight: 400; opacity: 0.75; padding-top: 0.8rem; overflow-wrap: anywhere; }
.comparison td { padding: 0.25rem 0.4rem; vertical-align: top; }
.comparison img { width: 100%; border-radius: 8px; display: block; cursor: zoom-in; }
.comparison img.large { position: fixed; inset: 0; width: 100vw; height: 100vh; height: 100dvh; z-index: 1000;
  object-fit: contain; border-radius: 0; background: #111e; cursor: zoom-out; }
.facts, .numbers { display: grid; grid-template-columns: minmax(4.5rem, auto) 1fr; gap: 0.15rem 0.6rem;
  font-size: 0.8rem; margin: 0.4rem 0; }
.facts dt, .numbers dt { color: var(--body-text-color); opacity: 0.7; }
.numbers { grid-template-columns: 1fr auto; }
.facts dd, .numbers dd { margin: 0; overflow-wrap: anywhere; color: var(--body-text-color); }
.meanings { font-size: 0.8rem; color: var(--body-text-color); opacity: 0.8; margin: 0.5rem 0 0 1rem; list-style: disc; }
#slider { max-width: 560px; }
@media (max-width: 640px) {
  .comparison table { min-width: 0; }
  .facts, .numbers { grid-template-columns: 1fr; font-size: 0.72rem; }
  .facts dd { margin-bottom: 0.3rem; }
}
.plain { overflow-x: auto; max-width: calc(100vw - 6rem); max-height: 320px; overflow-y: auto; }
.plain table { border-collapse: collapse; width: 100%; font-size: 0.85rem; }
.plain table, .plain tr, .plain th, .plain td { border: none !important; }
.plain tbody tr { border-top: 1px solid var(--border-color-primary) !important; }
.plain th, .plain td { text-align: left; padding: 0.3rem 0.6rem; white-space: nowrap; color: var(--body-text-color); }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plot { flex: 1 1 280px; min-width: 0; margin: 0; }
.plot figcaption { font-size: 0.85rem; color: var(--body-text-color); }
.plot svg { width: 100%; height: auto; display: block; }
.plot svg text { font-size: 11px; fill: var(--body-text-color); opacity: 0.8; }
.plot .rule { stroke: var(--border-color-primary); }
.plot polyline { fill: none; stroke-width: 1.8; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; font-size: 0.8rem; color: var(--body-text-color); }
.legend i { display: inline-block; width: 0.8rem; height: 0.25rem; margin-right: 0.35rem; vertical-align: middle; }
.log textarea { font-family: ui-monospace, Consolas, monospace !important; font-size: 0.8rem !important; }
footer { display: none !important; }
"""

HEAD = """
<meta name="viewport" content="width=device-width, initial-scale=1">
<script>
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  const button = [...document.querySelectorAll("#generate-button, #compare-button")]
    .find((one) => one.offsetParent !== null);
  if (button) { event.preventDefault(); document.activeElement.blur(); setTimeout(() => button.click(), 50); }
}, true);
document.addEventListener("dragover", (event) => {
  if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  // Anywhere on the page; a browser would leave it and show the file.
  const file = event.dataTransfer?.files[0];
  if (!file || event.defaultPrevented) return;
  event.preventDefault();
  const box = [...document.querySelectorAll("#png, #compare-file")].find((one) => one.offsetParent !== null);
  const input = box?.querySelector("input[type=file]");
  if (!input) return;
  const given = new DataTransfer();
  given.items.add(file);
  input.files = given.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});
const large = () => document.querySelector(".comparison img.large");
document.addEventListener("click", (event) => {
  const open = large(), picture = event.target.closest?.(".comparison img");
  if (open) open.classList.remove("large");
  else if (picture) picture.classList.add("large");
}, true);
document.addEventListener("keydown", (event) => {
  // The same place on the screen for each column of a row: differences jump to the eye.
  const open = large();
  if (!open) {
    if (event.key !== "Enter" || event.ctrlKey || !event.target.matches?.(".comparison img")) return;
    event.preventDefault();
    return event.target.classList.add("large");
  }
  if (event.key === "Escape") open.classList.remove("large");
  const columns = open.closest("tr").children.length;
  const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (!by) return;
  event.preventDefault();
  const pictures = [...document.querySelectorAll(".comparison img")];
  const next = pictures[pictures.indexOf(open) + by];
  if (!next) return;
  open.classList.remove("large");
  next.classList.add("large");
}, true);
document.addEventListener("click", (event) => {
  // On a phone the answer stands far below the button.
  const button = event.target.closest?.("#generate-button, #compare-button");
  if (!button || window.innerWidth > 700) return;
  const answer = document.querySelector(button.id === "generate-button" ? "#status" : "#compare-status");
  setTimeout(() => answer?.scrollIntoView({ behavior: "smooth" }), 300);
}, true);
</script>
"""


def theme() -> gr.themes.Base:
    """Gradio's default with the system's own fonts."""
    return gr.themes.Default(
        primary_hue="indigo",
        font=("ui-sans-serif", "system-ui", "sans-serif"),
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )
