"""The other tabs that draw or write: weight grids, leave-one-out, inspection, export."""
