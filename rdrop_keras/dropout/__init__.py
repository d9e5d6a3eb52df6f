"""`with_dropout`: the same model with dropout, for the many pretrained models that come without."""
