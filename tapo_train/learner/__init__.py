"""The learner: from trajectories with advantages to new weights.

    batch         rows -> packed micro-batches; the one place that shifts by one
    balance       rows move between ranks: even work for all
    dealing       which rank trains which rows in which micro-batch
    shape         a model's size as integers, and the FLOP it takes
    memory        what an update takes of a device, computed
    layout        what batching must know of a model: special ids, patch size, positions
    attention     attention inside each trajectory of a packed sequence
    head          LM head on the trained positions, in chunks: log-probabilities [K]
    objective     log-probabilities -> per-token loss: policy gradient or supervised
    settings      what a run can set, and the schedule of the learning rate
    distributed   process group: start, sums, maxima, end
    engine        the door to DeepSpeed
    policy        Policy: logprobs, update, score, named_weights, save, load, export
    checkpoint    atomic folders with a manifest of hashes
    export        checkpoint -> Hugging Face folder

Nothing is imported here, so that the light modules load without torch.
"""
