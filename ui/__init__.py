"""The Gradio app: prompt, rack of adapters, base beside blend. One file per concern; no tensor maths in here.

Importing `ui` and `ui.options` is cheap; `ui.app` pulls in gradio, torch and diffusers.
"""

from ui.options import UiOptions

__all__ = ["UiOptions"]
