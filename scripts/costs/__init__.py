"""What a model will cost (`python -m costs estimate`), and what it has cost (`python -m costs costs`)."""
