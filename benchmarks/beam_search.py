"""Beam search for the programs that write texts: KerasHub's, ended by the stop tokens and fair to long texts."""

import keras_hub
from keras import ops


class BeamSampler(keras_hub.samplers.BeamSampler):
    """KerasHub's beam search, with an end and without a taste for short texts.

    KerasHub's goes on after the end of a text and adds what it finds there to the beam's log-probability, and takes
    the beam with the highest sum. Here the rest of an ended text is padding, which costs nothing, and the beam with the
    highest mean log-probability a token is taken.

    Args:
        num_beams: How many.
        pad_token_id: What fills up an ended sequence.
    """

    def __init__(self, num_beams, pad_token_id):
        super().__init__(num_beams=num_beams, return_all_beams=True)
        self.pad_token_id = pad_token_id

    def __call__(self, next, prompt, index=0, stop_token_ids=(), **kwargs):
        generated = ops.arange(prompt.shape[1]) >= index

        def next_until_end(prompt, cache, index):
            logits, hidden_states, cache = next(prompt, cache, index)
            stops = ops.any(prompt[..., None] == ops.convert_to_tensor(stop_token_ids, prompt.dtype), axis=-1)
            ended = ops.any(ops.logical_and(stops, generated), axis=1, keepdims=True)
            only_padding = ops.where(ops.arange(logits.shape[-1]) == self.pad_token_id, 0.0, -1e9)
            return ops.where(ended, only_padding, ops.cast(logits, "float32")), hidden_states, cache

        beams, log_probs = super().__call__(
            next_until_end, prompt, index=index, stop_token_ids=stop_token_ids, **kwargs
        )
        tokens = ops.logical_and(beams != self.pad_token_id, generated)
        lengths = ops.maximum(ops.sum(ops.cast(tokens, log_probs.dtype), axis=-1), 1.0)
        best = ops.argmax(log_probs / lengths, axis=-1)
        return ops.squeeze(ops.take_along_axis(beams, best[:, None, None], axis=1), axis=1)
