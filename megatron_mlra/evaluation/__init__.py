"""Log-likelihoods and perplexity of checkpoints, on local text and tasks."""
