"""What a wrapper of any Keras model needs and Keras does not do. Nothing here knows of R-Drop.

`wrapper.WrapperModel` trains another model; the other modules are what it is made of, and `copies`, which makes a model
anew. `_keras` holds every private Keras name. Imports from here go nowhere else in the package.
"""
