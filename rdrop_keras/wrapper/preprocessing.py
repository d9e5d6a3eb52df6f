"""Raw inputs of KerasHub tasks. A task preprocesses them in `fit`, `evaluate` and `predict`, and not in `call`.

It does so as a `PipelineModel`, a `keras.Model` whose methods map `preprocess_samples` over the data and then call the
same method of `keras.Model`. Here that last call goes to another model. KerasHub is never imported, since a task brings
its `PipelineModel` along.

Comes in: a method's name, a task, and raw data. Goes out: what the same method of another model returns on the
preprocessed data. Called by: `WrapperModel`, and `monitor`.
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
        args: The positional arguments of `method`.
        kwargs: Its keyword arguments.
    """
    pipeline = pipeline_class(task)
    # It is not initialized and Keras never sees it: it only serves as `self` in the methods of `PipelineModel`.
    adapter = object.__new__(_adapter_class(pipeline))
    vars(adapter).update(preprocess_samples=task.preprocess_samples, trained=trained)
    return getattr(pipeline, method)(adapter, *args, **kwargs)


@functools.cache
def _adapter_class(pipeline):
    def method_of_trained(method):
        return lambda self, *args, **kwargs: getattr(keras.Model, method)(self.trained, *args, **kwargs)

    # What `super()` in `PipelineModel` finds: the method resolution order has it before `keras.Model`.
    receiver = type("Receiver", (keras.Model,), {method: method_of_trained(method) for method in METHODS})
    return type("Adapter", (pipeline, receiver), {})
