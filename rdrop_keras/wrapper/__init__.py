"""A Keras model that trains another model in its own way, and is that other model in everything else.

No module here imports anything of R-Drop. `wrapper_model.WrapperModel` is the base class, and the other modules serve
it.
"""
