"""Measures of a trained model: perplexity, lm-eval's tasks, and needles in haystacks."""
