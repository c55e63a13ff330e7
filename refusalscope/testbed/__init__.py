"""The embedded default: synthetic prompts with known truth, and a small chat model with SAEs trained on them."""
