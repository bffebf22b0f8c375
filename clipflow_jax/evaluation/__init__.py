"""How good is it: scores of a trained model."""
