"""A text through a model: block by block, what enters and leaves it, nats, gradients, and greedy text."""
