"""The discrete variational auto-encoder: networks, likelihoods, evaluation."""
