"""Per-unit gradients of a Hugging Face model, exact or refused."""
