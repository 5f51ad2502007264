"""One forward path for evaluation, chat, serving and checks: token log-likelihoods and generation."""
