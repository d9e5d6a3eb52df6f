"""Raw inputs of KerasHub tasks, which preprocess them in `fit`, `evaluate` and `predict` and not in `call`.

All of that is KerasHub's `PipelineModel`, a `keras.Model` whose methods map `preprocess_samples` over the data and
then call the same method of `keras.Model`. Here that last call is led to another model. KerasHub is never imported: a
task brings its `PipelineModel` along.
"""

import functools

import keras

METHODS = ("fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch")


def pipeline_class(model):
    """KerasHub's `PipelineModel` if `model` is one, else None."""
    classes = (cls for cls in type(model).__mro__ if cls.__name__ == "PipelineModel")
    return next((cls for cls in classes if hasattr(cls, "preprocess_samples")), None)


def run(method, task, trained, args, kwargs):
    """Calls `method` of `trained`, a `keras.Model`, with inputs preprocessed as `task` preprocesses them.

    Args:
        method: One of `METHODS`.
        task: A KerasHub task.
        trained: The model whose `method` receives the preprocessed inputs.
        args: Those of `method`.
        kwargs: Those of `method`.
    """
    pipeline = pipeline_class(task)
    # Not initialised, and no model to Keras: only a `self` for the methods of `PipelineModel`.
    adapter = object.__new__(_adapter_class(pipeline))
    vars(adapter).update(preprocess_samples=task.preprocess_samples, trained=trained)
    return getattr(pipeline, method)(adapter, *args, **kwargs)


@functools.cache
def _adapter_class(pipeline):
    # In the order of method resolution `_Receiver` stands behind `PipelineModel` and before `keras.Model`.
    return type("Adapter", (pipeline, _Receiver), {})


class _Receiver(keras.Model):
    """Where `super()` of `PipelineModel` leads: to the same method of the trained model."""

    def fit(self, *args, **kwargs):
        return keras.Model.fit(self.trained, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        return keras.Model.evaluate(self.trained, *args, **kwargs)

    def predict(self, *args, **kwargs):
        return keras.Model.predict(self.trained, *args, **kwargs)

    def train_on_batch(self, *args, **kwargs):
        return keras.Model.train_on_batch(self.trained, *args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        return keras.Model.test_on_batch(self.trained, *args, **kwargs)

    def predict_on_batch(self, *args, **kwargs):
        return keras.Model.predict_on_batch(self.trained, *args, **kwargs)
