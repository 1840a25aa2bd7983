"""The formulas, each in one place, as pure functions of tensors and numbers. Start with `dora`."""
