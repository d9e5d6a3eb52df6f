"""What a wrapper of any Keras model needs and Keras does not offer. Nothing here knows of R-Drop.

`wrapper.WrapperModel` trains another model, and most other modules serve it. `copies` makes a model anew. `_keras`
holds every private Keras name. Nothing here imports from elsewhere in the package.
"""

from rdrop_keras.keras_gaps.versions import check_version

check_version()
