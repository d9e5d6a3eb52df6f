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
        args, kwargs: Those of `method`.
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


def _pass_on(method):
    def call(self, *args, **kwargs):
        return getattr(keras.Model, method)(self.trained, *args, **kwargs)

    return call


for _method in METHODS:
    setattr(_Receiver, _method, _pass_on(_method))
