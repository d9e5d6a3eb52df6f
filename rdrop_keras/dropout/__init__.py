"""`with_dropout` makes the same model with dropout, for the many pretrained models that come without it."""
