"""Policy-gradient maths: pure functions of arrays and plain numbers.

    advantages   rewards [N] -> advantages [N]                     (numpy only, no torch)
    turn_advantages  rewards of trajectories and turns -> advantages per turn (numpy only)
    losses       flat trained tokens [K] -> per-token loss [K]     grpo, gspo, sapo
    weighted     two further losses of that kind                           cispo, gmpo
    aggregation  per-token loss [K] -> this micro-batch's share of the step's mean
    importance   sampler's and learner's log-probabilities -> weights [K]
    kl           policy against reference, per token [K]
    entropy      entropy of the policy, per token [K], and its bonus
    metrics      (sum, count) pairs that add up over micro-batches and ranks

No configuration object, no model, no rank, no input or output. Nothing is imported
here, so that the advantages can be used without loading torch.
"""
