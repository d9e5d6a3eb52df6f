"""A Keras model that trains another one in a way of its own, and is that other one in everything else.

Nothing here knows of R-Drop. `wrapper_model.WrapperModel` is the base class, and the other modules serve it.
"""
