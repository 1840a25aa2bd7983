"""How the app looks, and the shortcuts that it has. Every part of the page brings its own styles."""

import gradio as gr

from ui.generate import form, history, rack, restore, stage
from ui.library import cards
from ui.tabs import inspect_html, leave_one_out, weight_grid
from ui.train import widgets as train_widgets

HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  document.querySelector("#generate")?.click();
}, true);
if (window.innerWidth < 768) {  // there the open sidebar would cover the page
  let tries = 0;
  const waiting = setInterval(() => {
    const toggle = document.querySelector(".sidebar.open .toggle-button, .sidebar.open > button");
    if (toggle) toggle.click();
    if (toggle || ++tries > 100) clearInterval(waiting);
  }, 200);
}
</script>
"""

_PAGE = """
.gradio-container { width: 100%; max-width: 1280px !important; margin: 0 auto; }
#title h1 { margin: 0; font-size: 1.35rem; }
#title p { margin: 0; color: var(--body-text-color-subdued); }
#pictures img { width: 100%; height: 100%; object-fit: contain; }
#pictures .image-container, #pictures .image-frame { height: 100%; }
#base, #blend { aspect-ratio: 1; }
.status { display: flex; flex-direction: column; gap: .35rem; min-height: 2.2rem; overflow-wrap: anywhere; }
.status progress { width: 100%; height: .4rem; accent-color: var(--color-accent); }
@media (min-width: 900px) { #stage { position: sticky; top: .5rem; align-self: flex-start; } }
.rack-head { align-items: center; }
.rack-head h2 { display: inline; font-size: 1.05rem; margin: 0 .5rem 0 0; }
.folder { color: var(--body-text-color-subdued); overflow-wrap: anywhere; font-size: .85rem; }
.slot { padding: .6rem .7rem; gap: .5rem; border: 1px solid var(--border-color-primary); border-radius: .5rem;
  background: var(--block-background-fill); }
.slot-head { align-items: center; flex-wrap: nowrap; }
.slot-head > :not(.tick) { flex: 1 1 auto !important; }
.slot-head .tick { flex: 0 0 auto !important; width: auto !important; }
.slot .tick, .slot .strength { border: 0 !important; padding: 0 !important; background: none !important; }
.slot .form { border: 0; background: none; gap: .5rem; }
.slot .badge, .slot .badge > div { padding: 0 !important; min-height: 0 !important; }
input[type=range]::-webkit-slider-thumb { box-shadow: 0 0 0 1px var(--neutral-400), var(--input-shadow) !important; }
input[type=range]::-moz-range-thumb { box-shadow: 0 0 0 1px var(--neutral-400), var(--input-shadow) !important; }
.chip { display: inline-block; padding: .05rem .5rem; margin: .2rem .3rem .2rem 0; border-radius: 1rem;
  font-size: .8rem;
  background: var(--background-fill-primary); border: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.chip.warn { border-color: #b45309; }
.chip.bad { border-color: #dc2626; border-radius: .4rem; }
.broken { font-size: .85rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.broken ul { margin: 0; padding-left: 1.2rem; }
.news { margin: 0; font-size: .85rem; color: var(--body-text-color-subdued); }
.meter table, .meter tr, .meter td, .meter th { border: 0 !important; }
#tabs { margin-top: 1rem; }
#presets { align-items: center; }
#presets button { flex: 0 0 auto; }
@media (max-width: 767px) {
  #tabs .row > * { min-width: min(100%, 16rem) !important; }
}
"""

CSS = _PAGE + "".join(
    part.CSS
    for part in (cards, form, history, inspect_html, leave_one_out, rack, restore, stage, train_widgets, weight_grid)
)


def theme() -> gr.themes.Base:
    """System fonts only: nothing is fetched from elsewhere."""
    plain = gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
        spacing_size="sm",
        radius_size="md",
    )
    # gradio's subdued text, and its empty checkboxes in the dark, have too little contrast to be seen
    return plain.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        checkbox_border_color_dark="*neutral_400",
    )
