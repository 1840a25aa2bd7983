"""One step: the objective, the class pictures beside it."""
