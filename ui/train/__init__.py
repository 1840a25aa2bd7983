"""The Train tab: data, form and plan of a run, the process that trains, and what it looks like meanwhile."""
