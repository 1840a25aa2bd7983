"""What handlers are given and what they answer."""

from collections.abc import Mapping
from typing import Any

from gradio.components import Component

Values = Mapping[Component, Any]  # what the browser sent, by widget
Updates = dict[Any, Any]  # what changes, by widget: components, and the layout around them
