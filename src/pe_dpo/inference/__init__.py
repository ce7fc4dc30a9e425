"""How pairs and prompts go through a model: policy, reference, log-probs, samples, KL."""
